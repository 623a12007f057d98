"""Mixture-of-Gaussians worlds: toys with something to unlearn, whose truths are known exactly.

The single-cell paper's toy had a membership AUC of .50 before anything was unlearned. Here points are few and nets
large enough to remember them, and each world is first asked whether its originals leak: where they do not, no method
is judged. Models, training, methods and verdicts are the project's own; only the data and their law are made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field, create_model

from scforget import seeding
from scforget.arrays import BoolArray, FloatArray, IntArray
from scforget.audit import equivalence, intervals, verdict
from scforget.audit.equivalence import Equivalence
from scforget.audit.verdict import Verdict
from scforget.data.controls import matched_knn
from scforget.errors import DataError, NonFiniteError
from scforget.methods import METHODS
from scforget.settings import Settings
from scforget.theory import world_attacks
from scforget.theory.gaussian_vae import GaussianVAE, QuadratureSettings, log_likelihood
from scforget.theory.mixtures import (
    Count,
    Fraction,
    FreshSettings,
    Population,
    World,
    WorldSettings,
    draw_world,
    score,
    train_models,
)

Arrays = dict[str, FloatArray | BoolArray | IntArray]
Record = dict[str, Any]
#: Nodes along each axis of a plane world's picture.
_PICTURE = 41
_fields: dict[str, Any] = {name: (method.settings | None, None) for name, method in METHODS.items()}
#: Settings of those methods that are run in the worlds, by name.
WorldMethods = create_model("WorldMethods", __base__=Settings, **_fields)


class Margins(Settings):
    """Largest differences from the retrained models that do not matter: AUC, spreads, nats per point."""

    membership: Annotated[float, Field(gt=0)]
    trace: Annotated[float, Field(gt=0)]
    elbo: Annotated[float, Field(gt=0)]


class WorldsSettings(Settings):
    """All worlds, and how they are judged.

    Attributes
    ----------
    worlds
        By name.
    draws
        How often each world is drawn anew, points and models.
    originals, retrains, apart
        Models of each kind in one draw; ``apart`` are further retrains, which are judged as a method is: by
        construction they have forgotten.
    fresh
        Points that nobody is trained on.
    likelihood_points
        Forgotten points and controls, at most so many of each, on which the exact likelihood is computed.
    neighbours
        Of each forgotten point, for controls matched as the single-cell paper does.
    methods
        Settings of the methods that are run, by their names.
    margins, level, interval_level, trace_shrinkage, bootstrap_draws
        As in the audit.
    quadrature
        Of the exact likelihood; the latent space is a plane.
    """

    worlds: dict[str, WorldSettings]
    draws: Count
    originals: Annotated[int, Field(ge=3)]
    retrains: Annotated[int, Field(ge=4)]
    apart: Annotated[int, Field(ge=3)]
    fresh: FreshSettings
    likelihood_points: Annotated[int, Field(ge=2)]
    neighbours: Count
    methods: WorldMethods
    margins: Margins
    level: Fraction
    interval_level: Fraction
    trace_shrinkage: Annotated[float, Field(ge=0, le=1)]
    bootstrap_draws: Annotated[int, Field(ge=2)]
    quadrature: QuadratureSettings

    @property
    def chosen(self) -> dict[str, Settings]:
        """Settings of the methods that are run, by name."""
        return {name: own for name in METHODS if (own := getattr(self.methods, name)) is not None}


def _statistics(settings: WorldsSettings, models: Population, retrains: Population) -> dict[str, FloatArray]:
    """Both primary statistics of each model; a retrain's trace is taken against the others."""
    shrinkage = settings.trace_shrinkage
    if models is retrains:
        return {"membership": models.aucs, "trace": equivalence.trace_leave_one_out(retrains.forgotten, shrinkage)}
    found = equivalence.trace(models.forgotten, retrains.forgotten, shrinkage=shrinkage)
    return {"membership": models.aucs, "trace": found}


def judge(
    settings: WorldsSettings, models: Population, originals: Population, retrains: Population
) -> dict[str, Equivalence]:
    """Compare a population with the retrained one, by membership and by trace; the audit's own tests."""
    own, start, base = (_statistics(settings, one, retrains) for one in (models, originals, retrains))
    return {
        name: equivalence.welch_equivalence(
            own[name], base[name], margin=getattr(settings.margins, name), level=settings.level,
            original_side=1 if start[name].mean() >= base[name].mean() else -1,
        )
        for name in own
    }  # fmt: skip


def _described(
    settings: WorldsSettings, world: World, models: Population, originals: Population, retrains: Population,
    *, seed: int,
) -> Record:  # fmt: skip
    """Membership, trace, utility and verdict of a population, with intervals."""
    auc, interval = intervals.population_auc(
        models.forgotten, models.controls, settings.interval_level, seed, settings.bootstrap_draws
    )
    tested = judge(settings, models, originals, retrains)
    kept, base = (one.unseen[:, world.kept].mean(1) for one in (models, retrains))
    utility = verdict.utility_verdict(kept, base, settings.margins.elbo, settings.level)
    own = _statistics(settings, models, retrains)
    row: Record = {
        "auc": auc, "auc_interval": list(interval), "auc_per_model": models.aucs.tolist(),
        "trace": float(own["trace"].mean()), "trace_per_model": own["trace"].tolist(),
        "trace_interval": list(intervals.mean_interval(own["trace"], settings.interval_level)),
        "elbo": float(kept.mean()), "elbo_interval": list(intervals.mean_interval(kept, settings.interval_level)),
        "utility": utility,
        "verdict": str(verdict.decide(tested["membership"], tested["trace"])),
    }  # fmt: skip
    for name, test in tested.items():
        row |= {f"{name}_difference": test.difference, f"{name}_difference_interval": list(test.interval)}
        row |= {f"{name}_side": test.side, f"{name}_power": test.power}
    return row


def _unlearned(
    settings: WorldsSettings, world: World, originals: list[GaussianVAE], name: str, seed: int
) -> Population | str:
    """Every original unlearned by a method; in words, if one diverges."""
    found = []
    for index, original in enumerate(originals):
        model = world.task.new_model(seed)
        model.load_state_dict(original.state_dict())
        method = METHODS[name]
        try:
            trained = method.run(
                model, world.task, world.sets, settings.chosen[name], seed=seeding.derive(seed, name, index)
            )
        except NonFiniteError as error:
            return str(error)
        found.append(trained.model)
    try:
        return score(world, found)
    except DataError as error:
        return f"{error.what}: found {error.found}"


def _point_scores(
    settings: WorldsSettings, world: World, models: list[GaussianVAE], own: Population, retrains: Population,
    *, seed: int,
) -> tuple[dict[str, Record], Record, Arrays]:  # fmt: skip
    """Attacks on one population's points, how its bound agrees with its exact likelihood, and both for a picture."""
    some, few = (cells[: settings.likelihood_points] for cells in (world.sets.forget, world.controls))
    exact = world_attacks.exact_scores(models, world.points[np.append(some, few)], settings.quadrature)
    log_p = world.mixture.log_density(world.points)
    found = []
    for cells, exactly, elbo, reconstruction, base in (
        (world.sets.forget, slice(None, len(some)), own.forgotten, own.reconstruction, retrains.forgotten),
        (world.controls, slice(len(some), None), own.controls, own.control_reconstruction, retrains.controls),
    ):
        likelihood = exact["log_likelihood"][:, exactly]
        found.append({
            "elbo": elbo, "reconstruction": reconstruction, "calibrated": elbo - log_p[cells],
            "difference": elbo - world_attacks.reference_mean(elbo, base),
            "log_likelihood": likelihood,
            "log_likelihood_calibrated": likelihood - log_p[cells[: likelihood.shape[1]]],
        })  # fmt: skip
    attacks = world_attacks.on_points(
        found[0], found[1], level=settings.interval_level, seed=seed, draws=settings.bootstrap_draws
    )
    bound = np.hstack([own.forgotten[:, : len(some)], own.controls[:, : len(few)]])
    arrays: Arrays = {"score": bound[0], "log_likelihood": exact["log_likelihood"][0]}
    return attacks, world_attacks.agreement(bound, exact, settings.interval_level), arrays


def _control_aucs(
    settings: WorldsSettings, world: World, original: GaussianVAE, populations: dict[str, Population]
) -> Record:
    """Membership AUC against ``same``, ``weighted`` and ``nearest`` controls."""
    posterior = world.mixture.posterior(world.points[world.unseen])[:, 0]
    weights = np.ones(len(world.unseen)) if world.scattered else posterior
    forgotten, unseen = (world.task.signals(original, cells).mu for cells in (world.sets.forget, world.unseen))
    nearest = matched_knn(forgotten, unseen, settings.neighbours)
    others = 0.0 if world.scattered else float((world.labels[world.unseen][nearest] != 0).mean())
    row: Record = {"nearest_controls": int(nearest.sum()), "nearest_of_other_components": others}
    kinds = {"weighted": weights, "nearest": nearest.astype(np.float64)}
    for kind, one in populations.items():
        found = world_attacks.by_weights(one.forgotten, one.unseen, kinds, settings.interval_level)
        same = {"auc": float(one.aucs.mean())}
        row[kind] = {"same": same | {"interval": list(intervals.mean_interval(one.aucs, settings.interval_level))}}
        row[kind] |= found
    return row


def _picture(settings: WorldsSettings, world: World, models: dict[str, list[GaussianVAE]]) -> Arrays:
    """Of a plane world: its training points, and log densities ``[41, 41]`` of the law, an original, a retrain."""
    arrays: Arrays = {"points": world.points[world.train], "labels": world.labels[world.train]}
    arrays["forgotten"] = np.isin(world.train, world.sets.forget)
    if world.points.shape[1] != 2:
        return arrays
    reach = np.abs(arrays["points"]).max() + 2
    line = np.linspace(-reach, reach, _PICTURE)
    nodes = np.stack(np.meshgrid(line, line, indexing="xy"), -1).reshape(-1, 2)
    arrays |= {"axis": line, "truth": world.mixture.log_density(nodes).reshape(_PICTURE, _PICTURE)}
    for kind in ("original", "retrain"):
        found, _ = log_likelihood(models[kind][0], nodes, settings.quadrature)
        arrays[kind] = found.reshape(_PICTURE, _PICTURE)
    return arrays


def _score_all(
    settings: WorldsSettings, world: World, models: dict[str, list[GaussianVAE]], seed: int
) -> tuple[dict[str, Population], bool, dict[str, str]]:
    """Populations by name, whether the originals leak, and, where they do, which methods failed."""
    scored = {kind: score(world, made) for kind, made in models.items()}
    first = judge(settings, scored["original"], scored["original"], scored["retrain"])
    leaks = not verdict.nothing_to_forget(first["membership"])
    failed: dict[str, str] = {}
    for method in settings.chosen if leaks else ():
        found = _unlearned(settings, world, models["original"], method, seed)
        if isinstance(found, str):
            failed[method] = found
        else:
            scored[method] = found
    return scored, leaks, failed


def run_world(name: str, settings: WorldsSettings, seed: int, draw: int = 0) -> tuple[Record, Arrays]:
    """Draw a world, train its models, ask whether they leak, and if they do judge every method.

    Parameters
    ----------
    name, draw
        Of the world, and which draw of it, from 0.
    seed
        The global one.

    Returns
    -------
    record : dict
        ``world``, ``draw``, ``train``, ``forgotten``; ``leaks`` and ``leak`` in words; ``populations``: original,
        retrain (compared with itself), apart and, if the originals leak, each method; ``failed``: method -> why;
        for original and retrain ``attacks`` and ``likelihood``; ``models``: for every population
        but the retrains how well its models are told from those; ``controls``.
    arrays : dict
        What pictures need: ``points``, ``labels``, ``forgotten`` of the training points; of the first original and
        the first retrain ``score_*`` and ``log_likelihood_*``, forgotten points first; in a plane ``axis``,
        ``truth``, ``original`` and ``retrain`` (log densities).
    """
    own = seeding.derive(seed, "worlds", name, draw)
    world = draw_world(settings.worlds[name], settings.fresh, own)
    counts = {"original": settings.originals, "retrain": settings.retrains, "apart": settings.apart}
    recipe = settings.worlds[name].training
    models = {kind: train_models(world, recipe, kind, number, own) for kind, number in counts.items()}
    scored, leaks, failed = _score_all(settings, world, models, own)
    originals, retrains = scored["original"], scored["retrain"]
    log_p = world.mixture.log_density(world.points[world.sets.forget])
    record: Record = {
        "world": name, "draw": draw, "train": len(world.train), "forgotten": len(world.sets.forget),
        "leaks": leaks, "leak": "the original leaks" if leaks else "nothing to forget here",
        "populations": {
            kind: _described(settings, world, one, originals, retrains, seed=own) for kind, one in scored.items()
        },
        "failed": failed, "attacks": {},
        "likelihood": {"forgotten": min(len(world.sets.forget), settings.likelihood_points)},
        "models": {
            kind: world_attacks.on_models(
                one.forgotten, retrains.forgotten, log_p,
                level=settings.interval_level, seed=own, draws=settings.bootstrap_draws,
            )
            for kind, one in scored.items() if one is not retrains
        },
        "controls": _control_aucs(
            settings, world, models["original"][0], {"original": originals, "retrain": retrains}
        ),
    }  # fmt: skip
    arrays = _picture(settings, world, models)
    for kind in ("original", "retrain"):
        attacks, agreement, pair = _point_scores(settings, world, models[kind], scored[kind], retrains, seed=own)
        record["attacks"][kind], record["likelihood"][kind] = attacks, agreement
        arrays |= {f"{name}_{kind}": values for name, values in pair.items()}
    return record, arrays


def _rate(found: Counter[str], names: Sequence[Verdict], level: float) -> Record:
    """How often one of some verdicts was given, of how many, with a Clopper–Pearson interval."""
    k, n = sum(found[name] for name in names), found.total()
    interval = list(intervals.clopper_pearson(k, n, level)) if n else None
    return {"count": k, "of": n, "interval": interval}


def verdict_errors(records: Sequence[Record], level: float) -> Record:
    """Count verdicts against the truth, over worlds and draws.

    Parameters
    ----------
    records
        From :func:`run_world`.
    level
        Of the Clopper–Pearson intervals.

    Returns
    -------
    dict
        ``apart`` (truth: forgotten): ``convicted`` and ``undetermined``. ``original`` (truth: not forgotten), in
        ``leaking`` worlds and in the ``others``: ``acquitted`` (called forgotten), ``over`` and ``undetermined``.
        ``methods``: by name the counts of each verdict, of which nobody knows the truth.
    """

    def counted(kind: str, rows: Sequence[Record]) -> Counter[str]:
        return Counter(row["populations"][kind]["verdict"] for row in rows if kind in row["populations"])

    apart = counted("apart", records)
    convictions = [Verdict.NOT_FORGOTTEN, Verdict.OVER_FORGOTTEN]
    found: Record = {
        "apart": {
            "convicted": _rate(apart, convictions, level),
            "undetermined": _rate(apart, [Verdict.UNDETERMINED], level),
        },
        "original": {},
    }
    for place, leaks in (("leaking", True), ("others", False)):
        own = counted("original", [row for row in records if row["leaks"] == leaks])
        found["original"][place] = {
            "acquitted": _rate(own, [Verdict.FORGOTTEN], level),
            "over": _rate(own, [Verdict.OVER_FORGOTTEN], level),
            "undetermined": _rate(own, [Verdict.UNDETERMINED], level),
        }
    names = sorted({kind for row in records for kind in row["populations"]} - {"original", "retrain", "apart"})
    found["methods"] = {name: dict(sorted(counted(name, records).items())) for name in names}
    return found


@dataclass(frozen=True)
class Worlds:
    """All worlds and draws, to be made one by one in any order; picklable, for worker processes."""

    settings: WorldsSettings
    seed: int

    @property
    def items(self) -> list[tuple[str, int]]:
        """Every world and draw."""
        return [(name, draw) for name in self.settings.worlds for draw in range(self.settings.draws)]

    def make(self, item: tuple[str, int]) -> tuple[Record, Arrays]:
        """One of them, see :func:`run_world`."""
        return run_world(item[0], self.settings, self.seed, item[1])

    def combine(self, found: Sequence[tuple[Record, Arrays]]) -> tuple[Record, Arrays]:
        """Results of all items together: ``worlds``, a list, and ``verdicts``; arrays as ``world/draw/name``."""
        records = [record for record, _ in found]
        arrays = {
            f"{record['world']}/{record['draw']}/{name}": values
            for record, own in found
            for name, values in own.items()
        }
        return {"worlds": records, "verdicts": verdict_errors(records, self.settings.interval_level)}, arrays


def run(settings: WorldsSettings, seed: int) -> tuple[Record, Arrays]:
    """Make all worlds, one after the other; see :class:`Worlds` for doing so side by side."""
    worlds = Worlds(settings, seed)
    return worlds.combine([worlds.make(item) for item in worlds.items])

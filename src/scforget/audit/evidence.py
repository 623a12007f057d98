"""What stands under a verdict: the worst attack, populations of models, bounds, the cells that remain exposed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from scforget.arrays import BoolArray, FloatArray
from scforget.attacks import LEARNED, kaggle, population
from scforget.audit import BaseAuditSettings, epsilon, exposure, intervals, permutation, variance
from scforget.audit.scene import RETRAINS_FOR_SPREAD, Groups, Population, Scene
from scforget.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

Record = dict[str, Any]


def _varying(scores: FloatArray, cells: BoolArray) -> bool:
    """Whether a score says anything of the compared cells: finite, and different under some model."""
    found = scores[:, cells]
    return bool(np.isfinite(found).all() and (np.ptp(found, axis=1) > 0).any())


def worst_attack(own: Population, groups: Groups, settings: BaseAuditSettings, seed: int) -> Record:
    """The strongest of all attacks that never saw the labels, with the p-value of having looked at all of them."""
    controls = groups.controls["same_group"]
    tried = [name for name in own.scores if name not in LEARNED]
    names = [name for name in tried if _varying(own.scores[name], groups.forget | controls)]
    if not names:
        raise DataError("scores of all attacks", "the same for all cells", "an attack that tells cells apart")
    found = permutation.max_statistic(
        np.stack([own.scores[name] for name in names]), groups.forget, controls,
        names=names, seed=seed, draws=settings.permutation_draws,
    )  # fmt: skip
    return {**found.to_dict(), "constant": [name for name in tried if name not in names]}


def against_retrains(own: Population, scene: Scene, settings: BaseAuditSettings, seed: int) -> Record:
    """Populations of models: Kaggle epsilon and forgetting quality, KLOM, U-LiRA, each with retrain against retrain."""
    chosen, forget = settings.of("population"), scene.groups.forget
    one, two = (models.score[:, forget] for models in (own, scene.target))
    same = min(len(one), len(two) // 2)
    if same < 3:
        return {"models": same, "refused": f"{len(one)} unlearned and {len(two)} retrained models; wanted 3 and 6"}
    epsilons = kaggle.kaggle_epsilon(one[:same], two[:same], scorer=chosen.scorer, delta=settings.delta)
    found: Record = {
        "models": same,
        "epsilon": {"median": float(np.median(epsilons)), "max": float(np.max(epsilons))},
        "forgetting_quality": kaggle.forgetting_quality(epsilons, same, chosen.scorer),
        "forgetting_ceiling": kaggle.forgetting_ceiling(
            two, same, scorer=chosen.scorer, delta=settings.delta, seed=seed, draws=chosen.ceiling_draws
        ),
        "klom": population.klom_summary(
            one, two, bins=chosen.klom_bins, floor=chosen.klom_floor, seed=seed, draws=chosen.ceiling_draws
        ),
    }
    try:
        found["u_lira"] = population.u_lira(one, two, chosen.min_models, settings.interval_level).to_dict()
    except DataError as error:  # models that agree on a cell, as collapsed ones do: no verdict hangs on this attack
        found["u_lira"] = {"status": "undetermined", "reason": str(error), "auc": None, "interval": None}
    return found


def _per_model(models: Population, groups: Groups) -> dict[str, FloatArray]:
    """Two numbers a model, of which a method as good as retraining has the retrains' distribution."""
    means = models.score[:, groups.forget].mean(axis=1)
    return {"membership": groups.aucs(models.score, "same_group"), f"mean_{models.primary}": means}


def indistinguishability(own: Population, scene: Scene, settings: BaseAuditSettings, seed: int) -> Record:
    """How far the models can be told from retrains: a valid lower bound on epsilon, and a plug-in delta(epsilon)."""
    base = _per_model(scene.target, scene.groups)
    statistics = {name: (one, base[name]) for name, one in _per_model(own, scene.groups).items()}
    level = 1 - (1 - settings.interval_level) / len(statistics)  # all bounds hold together
    bounds = {
        name: epsilon.epsilon_lower_bound(
            one, two, level=level, delta=settings.delta, rule="bonferroni", seed=seed
        ).to_dict()
        for name, (one, two) in statistics.items()
    }
    deltas: Record = {}
    for name, (one, two) in statistics.items():
        if np.ptp(one) > 0 and np.ptp(two) > 0:  # a few models on a few cells can share an AUC: no spread to fit
            forward, backward = population.hockey_stick(one[:, None], two[:, None], 1.0)
            deltas[name] = {"forward": float(forward[0]), "backward": float(backward[0])}
    return {"epsilon_bounds": bounds, "delta_at_epsilon_1": deltas}


def _attacker_variance(own: Population, groups: Groups, level: float) -> Record:
    """Where the learned attack's AUC varies: between originals, and between seeds of the attacker."""
    aucs = np.stack([groups.aucs(model, "same_group") for model in own.attackers])
    return variance.variance_components(aucs[:, None, :], level=level).to_dict()


def _exposure(own: Population, scene: Scene, settings: BaseAuditSettings) -> exposure.Exposure:
    forget = scene.groups.forget
    return exposure.exposure(
        own.score[:, forget], scene.target.score[:, forget],
        shrinkage=settings.trace_shrinkage, level=settings.interval_level,
    )  # fmt: skip


def _cells(found: exposure.Exposure, scene: Scene) -> pd.DataFrame:
    import pandas as pd

    names = {"cell": scene.names, "label": scene.labels, "donor": scene.donors}
    table = pd.DataFrame({name: values[scene.groups.forget] for name, values in names.items()})
    table = table.assign(z=found.mean, low=found.interval[:, 0], high=found.interval[:, 1], rank=found.rank)
    return table.sort_values("z", ascending=False, kind="stable")


def cell_table(own: Population, scene: Scene, settings: BaseAuditSettings) -> pd.DataFrame:
    """Every forget cell, the most exposed first: barcode, kind, donor, z against the retrains and its interval.

    No row with too few retrains to have a spread.
    """
    import pandas as pd

    if len(scene.target.seeds) < RETRAINS_FOR_SPREAD:
        return pd.DataFrame(columns=["cell", "label", "donor", "z", "low", "high", "rank"])
    return _cells(_exposure(own, scene, settings), scene)


def exposed_cells(own: Population, scene: Scene, settings: BaseAuditSettings, seed: int) -> Record:
    """Which forget cells remain most exposed, by kind and by donor."""
    if len(scene.target.seeds) < RETRAINS_FOR_SPREAD:
        return {"refused": f"{len(scene.target.seeds)} retrained models; wanted {RETRAINS_FOR_SPREAD}"}
    groups, found = scene.groups, _exposure(own, scene, settings)
    forget, known = groups.forget, bool((scene.donors != "").all())
    record: Record = {
        "null_band": list(found.null_band),
        "above_null": found.above_null,
        "worst": _cells(found, scene).head(len(found.worst)).to_dict("records"),
        "by_label": exposure.by_group(found.mean, scene.labels[forget]),
        "by_donor": None,
        "donor_auc": None,
    }
    if known:
        record["by_donor"] = exposure.by_group(found.mean, scene.donors[forget])
        record["donor_auc"] = exposure.donor_auc(
            own.score, scene.donors, forget, groups.controls["same_group"],
            level=settings.interval_level, seed=seed, draws=settings.bootstrap_draws,
        )  # fmt: skip
    return record


def of_population(own: Population, scene: Scene, settings: BaseAuditSettings, seed: int) -> Record:
    """All of the above for one population of models."""
    return {
        "worst_attack": worst_attack(own, scene.groups, settings, seed),
        "population": against_retrains(own, scene, settings, seed) | indistinguishability(own, scene, settings, seed),
        "attacker_variance": _attacker_variance(own, scene.groups, settings.interval_level),
        "exposure": exposed_cells(own, scene, settings, seed),
    }


def of_target(scene: Scene, settings: BaseAuditSettings, seed: int) -> Record:
    """What there is to say of the retrained models themselves."""
    return {
        "worst_attack": worst_attack(scene.target, scene.groups, settings, seed),
        "attacker_variance": _attacker_variance(scene.target, scene.groups, settings.interval_level),
    }


def gene_list(scores: FloatArray | None, groups: Groups, settings: BaseAuditSettings) -> Record | None:
    """AUC of the gene-list attack, which needs no model, against every kind of control; None if no gene was chosen."""
    if scores is None:
        return None
    found: Record = {}
    for control, mask in groups.controls.items():
        auc, _, interval = intervals.delong(scores[groups.forget], scores[mask], settings.interval_level)
        found[control] = {"auc": auc, "interval": list(interval)}
    return found

"""From scores of cells to an audit record: every attack with its null, both primary statistics, utility, verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from scforget.arrays import FloatArray
from scforget.attacks import LEARNED
from scforget.attacks.references import References
from scforget.audit import BaseAuditSettings, equivalence, evidence, intervals, roc, verdict
from scforget.audit.equivalence import Equivalence
from scforget.audit.scene import RETRAINS_FOR_SPREAD, Groups, Population, Scene

Record = dict[str, Any]


def _excess_abs_z(
    population: Population, target: Population, groups: Groups, settings: BaseAuditSettings
) -> list[float] | None:  # fmt: skip
    own, base = (models.score[:, groups.forget] for models in (population, target))
    if len(base) < RETRAINS_FOR_SPREAD:
        return None
    return list(equivalence.excess_abs_z(own, base, shrinkage=settings.trace_shrinkage).tolist())


def with_references(
    population: Population, references: References, settings: BaseAuditSettings, *, own: bool
) -> Population:  # fmt: skip
    """Add the scores of every reference attack; ``own`` says that these models are the retrained ones themselves."""
    scores = dict(population.scores)
    for name, attack in settings.reference_attacks.items():
        scores |= attack.run(population.score, references, settings.of(name), own=own)
    return replace(population, scores=scores)


def _delong(scores: FloatArray, groups: Groups, control: str, level: float) -> list[list[float]] | None:
    """Interval of each model's AUC; None where a group is too small to have one."""
    if min(groups.forget.sum(), groups.controls[control].sum()) < 2:
        return None
    found = [intervals.delong(row[groups.forget], row[groups.controls[control]], level)[2] for row in scores]
    return [list(interval) for interval in found]


def attacks(
    population: Population, target: Population, groups: Groups, settings: BaseAuditSettings, seed: int
) -> Record:
    """AUC of every score against every kind of control, with interval, null band and distance to the retrains."""
    sizes = groups.sizes()
    nulls = {
        control: roc.advantage_null(sizes["forget"], sizes[control], seed=seed, draws=settings.null_draws)
        for control in groups.controls
    }
    table: Record = {}
    for name, scores in population.scores.items():
        table[name] = {}
        for control, mask in groups.controls.items():
            mean, interval = intervals.population_auc(
                scores[:, groups.forget], scores[:, mask], settings.interval_level, seed, settings.bootstrap_draws
            )
            table[name][control] = {
                "auc": mean,
                "signed": mean - 0.5,
                "advantage": roc.advantage(mean),
                "interval": list(interval),
                # cross-fitted scores depend on each other: the band of a fixed score is too narrow for them
                "null": None if name in LEARNED else nulls[control],
                "per_seed": groups.aucs(scores, control).tolist(),
                "per_seed_intervals": _delong(scores, groups, control, settings.interval_level),
                "distance_to_retrain": mean - float(groups.aucs(target.scores[name], control).mean()),
            }
    return table


def _statistics(
    population: Population, target: Population, groups: Groups, settings: BaseAuditSettings
) -> dict[str, tuple[FloatArray, FloatArray]]:
    """Both primary statistics, of each audited model and of each retrain."""
    own, base = population.score, target.score
    shrinkage = settings.trace_shrinkage
    null = np.zeros(1)  # two retrains: neither has others to be measured against, so their spread is not known
    if len(base) >= RETRAINS_FOR_SPREAD:
        null = equivalence.trace_leave_one_out(base[:, groups.forget], shrinkage)
    traced = null
    if population is not target:
        traced = equivalence.trace(own[:, groups.forget], base[:, groups.forget], shrinkage=shrinkage)
    return {
        "membership": (groups.aucs(own, "same_group"), groups.aucs(base, "same_group")),
        "trace": (traced, null),
    }


def utility_table(population: Population, level: float) -> Record:
    """Mean over models, Student-t interval and single values of every utility metric, by place.

    A value that is missing or not finite is None, and a metric that no model has is left out.
    """
    table: Record = {}
    for place in population.utility[0]:
        table[place] = {}
        for metric in sorted({metric for row in population.utility for metric in row[place]}):
            found = [row[place].get(metric) for row in population.utility]
            per_seed = [value if value is not None and np.isfinite(value) else None for value in found]
            known = np.array([value for value in per_seed if value is not None], dtype=np.float64)
            if known.size:
                table[place][metric] = {
                    "mean": float(known.mean()),
                    "interval": list(intervals.mean_interval(known, level)),
                    "per_seed": per_seed,
                }
    return table


def _complete(table: Record, metric: str) -> bool:
    """Whether every model has a value of a metric; one that some lack cannot be compared."""
    return metric in table and None not in table[metric]["per_seed"]


def _utility(population: Population, target: Population, settings: BaseAuditSettings) -> Record:
    table = utility_table(population, settings.interval_level)
    if population is target:
        return {**table, "verdict": None}
    base = utility_table(target, settings.interval_level)["outside"]
    verdicts = {
        metric: verdict.utility_verdict(
            table["outside"][metric]["per_seed"], base[metric]["per_seed"], margin, settings.level
        )
        for metric, margin in settings.margins.utility.items()
        if _complete(table["outside"], metric) and _complete(base, metric)
    }
    combined = verdict.combined_utility(verdicts.values()) if verdicts else "undetermined"
    return {**table, "verdict": combined, "verdicts": verdicts}


def _fixed_fpr(population: Population, groups: Groups, settings: BaseAuditSettings) -> Record:
    """TPR of the primary score at each target FPR, model by model; refused where the controls are too few."""
    members = population.score[:, groups.forget]
    controls = population.score[:, groups.controls["same_group"]]
    return {
        f"{target:g}": [
            roc.tpr_at_fpr(own, others, target, level=settings.interval_level).to_dict()
            for own, others in zip(members, controls, strict=True)
        ]
        for target in settings.fpr_targets
    }


def _equivalences(
    statistics: Mapping[str, tuple[FloatArray, FloatArray]], sides: Mapping[str, int], settings: BaseAuditSettings
) -> dict[str, Equivalence]:
    return {
        name: equivalence.welch_equivalence(
            own, base, margin=getattr(settings.margins, name), level=settings.level, original_side=sides[name]
        )
        for name, (own, base) in statistics.items()
    }


def _published_criterion(table: Record, target_table: Record, primary: str) -> bool:
    """P0's rule on its own controls: mean advantage inside the retrain's interval of the advantage."""
    low, high = target_table[primary]["matched_knn"]["interval"]
    upper = max(roc.advantage(low), roc.advantage(high))
    lower = 0.0 if low <= 0.5 <= high else min(roc.advantage(low), roc.advantage(high))
    own = float(np.mean([roc.advantage(value) for value in table[primary]["matched_knn"]["per_seed"]]))
    return verdict.published_criterion(own, (lower, upper))


def judge(
    method: str, population: Population, scene: Scene, *, target_attacks: Record, settings: BaseAuditSettings, seed: int
) -> Record:  # fmt: skip
    """Judge a population of unlearned models (or the originals themselves) against the retrained one.

    Parameters
    ----------
    method
        Name of the population, for the record.
    population
        Scored as the scene's own are, the reference attacks included.
    scene
        What it is judged against.
    target_attacks
        :func:`attacks` of the retrained models, as :func:`describe_target` has them.

    Returns
    -------
    dict
        The audit record: ``attacks``, ``primary`` (membership, trace), ``verdict`` and its explanation, ``utility``,
        and the evidence of :mod:`scforget.audit.evidence`.
    """
    originals, target, groups = scene.originals, scene.target, scene.groups
    start = _statistics(originals, target, groups, settings)
    sides = {name: 1 if own.mean() >= base.mean() else -1 for name, (own, base) in start.items()}
    of_original = _equivalences(start, sides, settings)
    statistics = start if population is originals else _statistics(population, target, groups, settings)
    primary = _equivalences(statistics, sides, settings)
    membership, trace = primary["membership"], primary["trace"]
    decision = verdict.decide(membership, trace)
    table = attacks(population, target, groups, settings, seed)
    utility = _utility(population, target, settings)
    modes = []
    if population is not originals:
        modes = _failure_modes(decision, primary, of_original, utility, target)
    sizes = groups.sizes()
    return {
        "method": method,
        "score": population.primary,
        "models": len(population.seeds),
        "seeds": list(population.seeds),
        "groups": sizes,
        "attacks": table,
        "fixed_fpr": _fixed_fpr(population, groups, settings),
        "primary": {name: found.to_dict() for name, found in primary.items()},
        "trace_per_seed": statistics["trace"][0].tolist(),
        "excess_abs_z": _excess_abs_z(population, target, groups, settings),
        "verdict": str(decision),
        "explanation": verdict.explain(
            membership, trace, of_original["membership"],
            n_members=sizes["forget"], n_controls=sizes["same_group"], what=population.what,
        ),
        "nothing_to_forget": verdict.nothing_to_forget(of_original["membership"]),
        "published_criterion": _published_criterion(table, target_attacks, population.primary),
        "utility": utility,
        "utility_rows": list(population.utility),
        "failure_modes": modes,
        **evidence.of_population(population, scene, settings, seed),
    }  # fmt: skip


def _failure_modes(
    decision: verdict.Verdict, primary: Mapping[str, Equivalence], of_original: Mapping[str, Equivalence],
    utility: Record, target: Population,
) -> list[str]:  # fmt: skip
    trace = primary["trace"]
    # A KL that is missing becomes NaN, which is below nothing: no collapse is claimed.
    retrain_kl = np.array([row["outside"].get("kl") for row in target.utility], dtype=np.float64)
    return verdict.failure_modes(
        decision,
        kl=utility["outside"].get("kl", {}).get("mean", float("nan")),
        retrain_kl=float(retrain_kl.mean()),
        distance_to_original=abs(trace.mean - of_original["trace"].mean),
        distance_to_retrain=abs(trace.difference),
    )


def describe_target(scene: Scene, settings: BaseAuditSettings, seed: int) -> Record:
    """Record of the retrained models themselves: the same numbers, retrain against retrain, and no verdict.

    ``design_power`` is the chance that a method as good as retraining is called so, by these numbers of retrains and
    of originals to unlearn from.
    """
    target, groups = scene.target, scene.groups
    statistics = _statistics(target, target, groups, settings)
    null = _equivalences(statistics, {"membership": 1, "trace": 1}, settings)
    spreading = {name: own for name, (own, _) in statistics.items() if own.size > 1}
    return {
        "method": "retrain",
        "score": target.primary,
        "models": len(target.seeds),
        "seeds": list(target.seeds),
        "groups": groups.sizes(),
        "attacks": attacks(target, target, groups, settings, seed),
        "fixed_fpr": _fixed_fpr(target, groups, settings),
        "primary": None,
        "noise_floor": {name: found.noise_floor for name, found in null.items()},
        "design_power": {
            name: equivalence.design_power(
                own, len(scene.originals.seeds), margin=getattr(settings.margins, name), level=settings.level
            )
            for name, own in spreading.items()
        },
        "spread": {name: float(own.std(ddof=1)) for name, own in spreading.items()},
        "trace_per_seed": spreading["trace"].tolist() if "trace" in spreading else [None] * len(target.seeds),
        "verdict": "TARGET",
        "explanation": "What every method is compared with: models trained by the same recipe "
        f"without these {target.what}.",
        "nothing_to_forget": False,
        "published_criterion": None,
        "utility": _utility(target, target, settings),
        "utility_rows": list(target.utility),
        "failure_modes": [],
        **evidence.of_target(scene, settings, seed),
    }  # fmt: skip

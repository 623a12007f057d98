"""What the classifier papers print, each beside the retrained models': accuracies, LiRA, distances, Kaggle's score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy

from scforget.arrays import BoolArray, FloatArray, IntArray
from scforget.attacks import kaggle
from scforget.attacks.confidence import log_probability
from scforget.attacks.lira import lira
from scforget.attacks.population import Scorer
from scforget.attacks.references import References
from scforget.audit import BaseAuditSettings, intervals, roc
from scforget.audit.equivalence import welch
from scforget.audit.samples import DIRECTIONS, energy, sliced_wasserstein
from scforget.audit.scene import Population, Scene
from scforget.errors import DataError, EmptyGroupError
from scforget.seeding import numpy_generator

Record = dict[str, Any]

#: Largest share of retained items that P3's LiRA may call forgotten.
FNR = 0.01
#: Items of a group that distances between outputs are taken over, at most.
ITEMS = 2000


@dataclass(frozen=True)
class ClassOutputs:
    """What M classifiers say of n items of one forget request.

    Attributes
    ----------
    logits : ``[M, n, C]``
        The nets' answers, finite.
    labels : ``[n]``
        Codes of the true classes.
    forget, retain, test, controls : ``[n]`` bool
        Items to be forgotten; the rest of the training items; test items; unseen items that play the non-members. No
        item is in two groups; some are in none.

    Raises
    ------
    EmptyGroupError
        If a group is empty, or there is no model.
    DataError
        If shapes do not fit, a logit is not finite, a label is no class, or an item is in two groups.
    """

    logits: npt.NDArray[np.floating[Any]]
    labels: IntArray
    forget: BoolArray
    retain: BoolArray
    test: BoolArray
    controls: BoolArray

    def __post_init__(self) -> None:
        groups = {name: getattr(self, name) for name in ("forget", "retain", "test", "controls")}
        shapes = [array.shape for array in (self.labels, *groups.values())]
        if self.logits.ndim != 3 or any(shape != self.logits.shape[1:2] for shape in shapes):
            found = f"{self.logits.shape} and {', '.join(map(str, shapes))}"
            raise DataError("logits, labels and groups of classifiers", found, "[M, n, C], then [n] each")
        if not len(self.logits):
            raise EmptyGroupError("classifiers", 0, "at least 1")
        for name, mask in groups.items():
            if not mask.any():
                raise EmptyGroupError(f"{name} items", 0, "at least 1")
        if doubled := int((np.sum(list(groups.values()), axis=0) > 1).sum()):
            raise DataError("groups of items", f"{doubled} items in two of them", "none")
        if not np.isfinite(self.logits).all():
            raise DataError("logits of classifiers", f"{int((~np.isfinite(self.logits)).sum())} not finite", "numbers")
        if self.labels.min() < 0 or self.labels.max() >= self.logits.shape[2]:
            raise DataError("labels of items", self.labels.max(), f"class codes from 0 to {self.logits.shape[2] - 1}")

    def accuracy(self, name: str) -> FloatArray:
        """``[M]``: share of a group's items whose likeliest class is theirs."""
        mask = getattr(self, name)
        found: FloatArray = (self.logits[:, mask].argmax(axis=2) == self.labels[mask]).mean(axis=1)
        return found

    def confidence(self, mask: BoolArray) -> FloatArray:
        """``[M, k]``: logit-scaled confidence φ = log p_y − log(1 − p_y) of the true class, of k marked items."""
        logits, labels = self.logits[:, mask].astype(np.float64), self.labels[mask]
        rows = np.arange(labels.size)
        own = logits[:, rows, labels]
        logits[:, rows, labels] = -np.inf
        return np.asarray(own - scipy.special.logsumexp(logits, axis=2))

    def probabilities(self, mask: BoolArray) -> FloatArray:
        """``[M, k, C]``: what the models answer on k marked items."""
        return np.asarray(scipy.special.softmax(self.logits[:, mask].astype(np.float64), axis=2))


@dataclass(frozen=True)
class ClassPopulation(Population):
    """A population of classifiers, with ``outputs`` on all items that its tables need."""

    outputs: ClassOutputs = field(kw_only=True)
    primary: str = "confidence"


@dataclass(frozen=True)
class ClassScene(Scene):
    """A scene of classifiers.

    Attributes
    ----------
    trained
        Shadow models' confidences on the forget items and then the retained ones, in the order of the outputs.
    """

    trained: References = field(kw_only=True)


def compared(own: FloatArray, base: FloatArray | None, level: float) -> Record:
    """Describe one number a model beside the retrained models'.

    Parameters
    ----------
    own : ``[M]``
        Of each audited model.
    base : ``[K]``
        Of each retrained model; None when these are the audited ones.
    level
        Coverage of the intervals.

    Returns
    -------
    dict
        ``mean``, ``interval`` (Student-t over models), ``per_seed``; and ``retrain`` (their mean), ``difference`` and
        its Welch interval ``difference_interval``, all None without ``base``. An interval is NaN with a single model.
    """
    found: Record = {
        "mean": float(own.mean()), "interval": list(intervals.mean_interval(own, level)), "per_seed": own.tolist(),
        "retrain": None, "difference": None, "difference_interval": None,
    }  # fmt: skip
    if base is None:
        return found
    difference, width = float(own.mean() - base.mean()), float("nan")
    if min(own.size, base.size) > 1:
        error, freedom = welch(own, base)
        width = float(scipy.stats.t.ppf((1 + level) / 2, freedom)) * error
    ends = [difference - width, difference + width]
    return {**found, "retrain": float(base.mean()), "difference": difference, "difference_interval": ends}


def _per_seed(target: Record | None, *keys: str) -> FloatArray | None:
    """One number for each retrained model, out of their own record."""
    found: Any = target
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return None if found is None else np.asarray(found["per_seed"], dtype=np.float64)


def _reading(row: Record) -> str | None:
    if row["difference_interval"] is None or np.isnan(row["difference_interval"]).any():
        return None
    low, high = row["difference_interval"]
    if low > 0:
        return "above the retrained models: over-unlearning, the removal shows"
    if high < 0:
        return "below the retrained models: forget items are still taken for members"
    return "not told from the retrained models"


def lira_rates(
    scores: FloatArray, forget: BoolArray, target: Record | None, level: float
) -> Record:  # fmt: skip
    """P3's LiRA: how many forget items are called non-members when 1 % of the retained ones may be.

    Parameters
    ----------
    scores : ``[M, n]``
        Log-likelihood ratios of forget and retained items, higher = more member-like.
    forget : ``[n]``
        Which are to be forgotten; the others were retained.
    target
        What this function says of the retrained models; None when these are the audited ones.
    level
        Coverage of the intervals.

    Returns
    -------
    dict
        ``tnr`` and ``auc`` as :func:`compared` has them (``tnr`` None with too few retained items, see
        :func:`~scforget.audit.roc.controls_needed`), ``models`` (each model's rates with Clopper–Pearson intervals),
        ``auc_intervals`` (DeLong, by model), ``reading``.

    Notes
    -----
    Member = retained. TNR at FNR <= 1 % is :func:`~scforget.audit.roc.tpr_at_fpr` with the roles and the sign turned
    round: its ``tpr`` is the TNR and its ``fpr`` the FNR. AUC: chance that a retained item scores above a forget item.
    0.01 and 0.5: forget items look like retained ones. More than the retrained models show is no success: P3's table
    ranks two methods above its retrain, whose removal shows.
    """
    rates = [roc.tpr_at_fpr(-row[forget], -row[~forget], FNR, level=level) for row in scores]
    aucs = [intervals.delong(row[~forget], row[forget], level) for row in scores]
    auc = compared(np.array([found[0] for found in aucs]), _per_seed(target, "auc"), level)
    tnr = None
    if rates[0].status == "measured":
        tnr = compared(np.array([rate.tpr for rate in rates]), _per_seed(target, "tnr"), level)
    return {
        "fnr": FNR,
        "items": {"forget": int(forget.sum()), "retain": int((~forget).sum())},
        "retain_needed": roc.controls_needed(FNR),
        "tnr": tnr,
        "auc": auc,
        "models": [rate.to_dict() for rate in rates],
        "auc_intervals": [list(found[2]) for found in aucs],
        "reading": _reading(tnr or auc),
    }


def _thinned(mask: BoolArray, seed: int, name: str) -> BoolArray:
    """At most :data:`ITEMS` of the marked items, the same ones for all models."""
    marked = np.flatnonzero(mask)
    kept = np.zeros_like(mask)
    kept[numpy_generator(seed, "distances", name).permutation(marked)[:ITEMS]] = True
    return kept


def distances(outputs: ClassOutputs, target: Record | None, level: float, seed: int) -> Record:
    """Distances between what a model answers on the forget items and on the controls (P3 §3), model by model.

    Returns
    -------
    dict
        As :func:`compared` has them: ``wasserstein`` and ``cramer`` of the confidences of the true class,
        ``wasserstein_output`` (sliced) and ``cramer_output`` of the class probabilities; ``items``, how many of each.

    Notes
    -----
    At most :data:`ITEMS` of a group, drawn once. A distance between finite samples is above 0 without any leak: what
    counts is the difference from the retrained models', at the same items.
    """
    forget, controls = (_thinned(getattr(outputs, name), seed, name) for name in ("forget", "controls"))
    sure = list(zip(outputs.confidence(forget), outputs.confidence(controls), strict=True))
    said = list(zip(outputs.probabilities(forget), outputs.probabilities(controls), strict=True))
    found = {
        "wasserstein": [scipy.stats.wasserstein_distance(*pair) for pair in sure],
        "cramer": [scipy.stats.energy_distance(*pair) ** 2 for pair in sure],
        "wasserstein_output": [sliced_wasserstein(*pair, seed) for pair in said],
        "cramer_output": [energy(*pair) for pair in said],
    }
    rows = {name: compared(np.array(values), _per_seed(target, name), level) for name, values in found.items()}
    return {**rows, "items": {"forget": int(forget.sum()), "controls": int(controls.sum())}, "directions": DIRECTIONS}


def _kaggle_outputs(models: Population, forget: BoolArray, scorer: Scorer) -> FloatArray:
    """``[M, F]``: logit-scaled confidence; for ``suprun`` the cross-entropy of the logits against their own arg-max."""
    if scorer == "suprun":
        return -log_probability(models.scores["max_prob"][:, forget])
    return models.score[:, forget]


def _ceiling(target: Population, forget: BoolArray, n: int, settings: BaseAuditSettings, seed: int) -> Record:
    """Forgetting quality of n retrains against n others, by scorer; None where a scorer refuses."""
    found: Record = {}
    for scorer in ("official", "suprun"):
        try:
            found[scorer] = kaggle.forgetting_ceiling(
                _kaggle_outputs(target, forget, scorer), n, scorer=scorer, delta=kaggle.DELTAS[scorer], seed=seed,
                draws=settings.of("population").ceiling_draws,
            )  # fmt: skip
        except EmptyGroupError:
            found[scorer] = None
    return {"models": n, **found}


def kaggle_scores(
    own: Population, scene: Scene, target: Record, *, accuracy: Record, settings: BaseAuditSettings, seed: int
) -> Record:  # fmt: skip
    """Score a population by the rules of the NeurIPS 2023 unlearning challenge, by both scorers.

    Parameters
    ----------
    own, scene
        Of which the confidences of the forget items are used.
    target
        Record of the retrained models; its ``kaggle`` holds their ceilings.
    accuracy
        Of the audited models by set, as :func:`compared` has them, beside the retrained ones'.
    settings, seed
        Of the audit.

    Returns
    -------
    dict
        By scorer, ``official`` (confidence of the true class, δ 1e-5) and ``suprun`` (cross-entropy against the own
        answer, δ 0.01): ``models`` on each side, ``epsilon`` (median and largest over items), ``forgetting_quality`` F
        and its ``interval`` (Student-t over items, for these models), ``forgetting_ceiling`` (retrain against retrain
        at as many models; its spread is over the choice of models), ``final_score`` F·(RA_U/RA_R)·(TA_U/TA_R) and
        ``final_interval``; or ``refused`` and why.

    Notes
    -----
    The challenge's rule on time, at most a fifth of a retraining, is no matter of scores: read it off the cost.
    """
    forget = scene.groups.forget
    n = min(len(own.seeds), len(scene.target.seeds) // 2)
    known = target["kaggle"]["ceilings"]
    ceilings = known if known["models"] == n else _ceiling(scene.target, forget, n, settings, seed)
    ratios = [accuracy[name][side] for name in ("retain", "test") for side in ("mean", "retrain")]
    found: Record = {}
    for scorer in ("official", "suprun"):
        one, two = (_kaggle_outputs(models, forget, scorer)[:n] for models in (own, scene.target))
        try:
            epsilons = kaggle.kaggle_epsilon(one, two, scorer=scorer, delta=kaggle.DELTAS[scorer])
            points = kaggle.forgetting_points(epsilons, n, scorer)
            interval = intervals.mean_interval(points, settings.interval_level)
            quality, per_quality = float(points.mean()), kaggle.final_score(1.0, *ratios)
            found[scorer] = {
                "models": n,
                "epsilon": {"median": float(np.median(epsilons)), "max": float(epsilons.max())},
                "forgetting_quality": quality,
                "interval": list(interval),
                "forgetting_ceiling": ceilings[scorer],
                "final_score": quality * per_quality,
                "final_interval": [per_quality * end for end in interval],
            }
        except DataError as error:
            found[scorer] = {"models": n, "refused": str(error)}
    return found


def class_record(
    own: ClassPopulation, scene: ClassScene, target: Record | None, settings: BaseAuditSettings, seed: int
) -> Record:
    """Make the part of an audit record that only classifiers have.

    Parameters
    ----------
    own
        The audited classifiers.
    scene
        What they are judged against.
    target
        What this function says of the retrained models; None when these are the audited ones.
    settings, seed
        Of the audit.

    Returns
    -------
    dict
        ``accuracy`` on ``retain``, ``forget`` and ``test`` items; ``lira`` (:func:`lira_rates`, with the number of
        ``shadows`` and their ``variance``), ``distance`` (:func:`distances`), ``kaggle`` (:func:`kaggle_scores`; of the
        retrained models ``ceilings`` alone).

    Raises
    ------
    EmptyGroupError
        If too few shadow models were trained with, or without, an item.
    DataError
        If the shadow models scored other items.
    """
    outputs, level = own.outputs, settings.interval_level
    accuracy = {
        name: compared(outputs.accuracy(name), _per_seed(target, "accuracy", name), level)
        for name in ("retain", "forget", "test")
    }
    chosen = settings.of("lira")
    trained = np.concatenate([np.flatnonzero(outputs.forget), np.flatnonzero(outputs.retain)])
    sure = np.concatenate([outputs.confidence(outputs.forget), outputs.confidence(outputs.retain)], axis=1)
    ratios = lira(sure, scene.trained, chosen, own=False)["lira_online"]
    rates = lira_rates(ratios, outputs.forget[trained], target and target["lira"], level)
    if target is None:
        n = min(len(scene.originals.seeds), len(own.seeds) // 2)
        scored: Record = {"ceilings": _ceiling(own, scene.groups.forget, n, settings, seed)}
    else:
        scored = kaggle_scores(own, scene, target, accuracy=accuracy, settings=settings, seed=seed)
    return {
        "accuracy": accuracy,
        "lira": {**rates, "shadows": len(scene.trained.shadows), "variance": chosen.variance},
        "distance": distances(outputs, target and target["distance"], level, seed),
        "kaggle": scored,
    }

"""Which cells, kinds of cells and donors remain exposed: per-cell trace, its tables, and the attack on donors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy

from scforget.arrays import BoolArray, FloatArray, IntArray
from scforget.audit import roc
from scforget.audit.equivalence import _leave_one_out, _score_matrices, _standardised
from scforget.audit.intervals import Interval, check_group, mean_interval, population_auc
from scforget.audit.permutation import check_masks
from scforget.errors import DataError

WORST_SHARE = 0.1
DONORS_NEEDED = 2


@dataclass(frozen=True, eq=False)
class Exposure:
    """How exposed each of F forget cells remains, in spreads of the retrained models.

    Attributes
    ----------
    mean : ``[F]``
        Mean over unlearned models of z; positive: known better than by models that never saw the cell.
    interval : ``[F, 2]``
        Student-t over models, NaN with one model; the uncertainty of the retrained models' own mean is not in it.
    rank : ``[F]``
        1 = most exposed; equal means share the best rank.
    worst : ``[ceil(F/10)]``
        Indices of the most exposed tenth, worst first.
    null_band
        Middle ``level`` of z over all cells and retrained models, each standardised by the others: what a single model
        that has never seen the cell shows, hence wide for a mean of several.
    above_null
        Share of cells with a mean above the band.
    level, models, retrains
        As given.
    """

    mean: FloatArray
    interval: FloatArray
    rank: IntArray
    worst: IntArray
    null_band: Interval
    above_null: float
    level: float
    models: int
    retrains: int

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; NaN becomes null."""
        return {
            "mean": self.mean.tolist(),
            "interval": [[None if np.isnan(end) else float(end) for end in row] for row in self.interval],
            "rank": self.rank.tolist(),
            "worst": self.worst.tolist(),
            "null_band": list(self.null_band),
            "above_null": self.above_null,
            "level": self.level,
            "models": self.models,
            "retrains": self.retrains,
        }


def _worst(values: FloatArray) -> IntArray:
    """Indices of the largest tenth (at least one), largest first, the earlier of two equals first."""
    return np.argsort(-values, kind="stable")[: int(np.ceil(WORST_SHARE * values.size))].astype(np.int64)


def exposure(scores: npt.ArrayLike, retrained: npt.ArrayLike, *, shrinkage: float, level: float) -> Exposure:
    """Measure how exposed each forget cell remains: the trace of ``equivalence``, cell by cell.

    Parameters
    ----------
    scores : ``[M, F]``
        Primary score of the F forget cells under M >= 1 unlearned models.
    retrained : ``[K, F]``
        The same under K >= 3 retrained models.
    shrinkage
        w in [0, 1], as for ``equivalence.trace``.
    level
        Coverage of the intervals and of the null band, in (0, 1).

    Returns
    -------
    Exposure
        Its mean over cells is the mean over models of ``equivalence.trace``.

    Raises
    ------
    EmptyGroupError
        Without a cell, or with fewer than 3 retrained models.
    DataError
        If scores are not finite or not of the same cells, retrained models do not differ at some cell, or the
        shrinkage or the level cannot be.

    Notes
    -----
    z_mx = (s_m(x) − mean_R s(x)) / sd_R s(x), sd_R shrunk to the typical cell's. A cell that was over-forgotten is
    strongly negative and ranks last: it is not known, but its removal may show. The worst tenth is chosen on the same
    numbers, so its means overstate by chance; a new model's would be lower.
    """
    if not 0 < level < 1:
        raise DataError("level of an interval", level, "a number between 0 and 1")
    one, two = _score_matrices(scores, retrained, shrinkage, 3)
    z = _standardised(one, two, shrinkage)
    mean = np.asarray(z.mean(axis=0), dtype=np.float64)
    low, high = np.quantile(_leave_one_out(two, shrinkage), [(1 - level) / 2, (1 + level) / 2])
    return Exposure(
        mean=mean,
        interval=np.array([mean_interval(column, level) for column in z.T]),
        rank=scipy.stats.rankdata(-mean, method="min").astype(np.int64),
        worst=_worst(mean),
        null_band=(float(low), float(high)),
        above_null=float((mean > high).mean()),
        level=level,
        models=one.shape[0],
        retrains=two.shape[0],
    )


def by_group(values: npt.ArrayLike, groups: Sequence[object] | npt.NDArray[Any]) -> list[dict[str, Any]]:
    """Summarise per-cell exposure by cell type or donor.

    Parameters
    ----------
    values : ``[F]``
        Exposure of each forget cell, finite.
    groups : ``[F]``
        The label of each, read as text.

    Returns
    -------
    list of dict
        ``name``, ``cells``, ``mean``, ``worst_share`` (share of the group's cells that are in the worst tenth of all
        cells; the expected share is about 0.1), most exposed group first.

    Raises
    ------
    EmptyGroupError
        Without a cell.
    DataError
        If a value is not finite or the numbers of values and labels differ.
    """
    array = check_group("forget cells", values, 1)
    labels = np.array([str(label) for label in groups])
    if array.ndim != 1 or array.shape != labels.shape:
        raise DataError("labels of forget cells", f"{labels.size} for {array.shape}", "one label for each cell")
    if not np.isfinite(array).all():
        raise DataError("exposure of forget cells", "an infinite value", "finite numbers")
    worst = np.zeros(array.size, dtype=bool)
    worst[_worst(array)] = True
    rows = [
        {
            "name": str(name),
            "cells": int((labels == name).sum()),
            "mean": float(array[labels == name].mean()),
            "worst_share": float(worst[labels == name].mean()),
        }
        for name in np.unique(labels)
    ]
    return sorted(rows, key=lambda row: (-row["mean"], row["name"]))


def _donor_means(scores: FloatArray, donors: npt.NDArray[np.str_], mask: BoolArray, names: list[str]) -> FloatArray:
    """``[M, D]``: mean score of each donor's cells inside the mask."""
    return np.stack([scores[:, mask & (donors == name)].mean(axis=1) for name in names], axis=1)


def donor_auc(
    scores: npt.ArrayLike, donors: Sequence[object] | npt.NDArray[Any], forget: npt.ArrayLike, controls: npt.ArrayLike,
    *, level: float, seed: int, draws: int,
) -> dict[str, Any]:  # fmt: skip
    """Attack whole donors: tell those whose cells were in the training data from those who were never seen.

    Parameters
    ----------
    scores : ``[M, n]``
        Of n cells under M >= 1 models, higher = more member-like, finite.
    donors : ``[n]``
        Whose each cell is, read as text.
    forget, controls : ``[n]``, bool
        Which cells were trained on and to be forgotten, and which never were.
    level, seed, draws
        Of the interval, which resamples donors and models.

    Returns
    -------
    dict
        ``auc`` (mean over models), ``interval``, ``per_model [M]``, ``member_donors``, ``control_donors`` (names), and
        ``reason`` None; with fewer than 2 donors on a side ``auc``, ``interval`` and ``per_model`` are None and the
        reason says so.

    Raises
    ------
    EmptyGroupError
        If a group of cells is empty or there is no model.
    DataError
        If shapes do not fit, a score is not finite, or a cell is in both groups.

    Notes
    -----
    Score of a donor: the mean over its forget cells, or over its control cells where it has no forget cell; a donor
    with both is a member, and its control cells are left out. Donors differ in biology too: without a leak the AUC is
    ½ only where the donors to be forgotten were chosen at random.
    """
    array = np.atleast_2d(check_group("scored cells", scores, 1))
    labels = np.array([str(donor) for donor in donors])
    if array.ndim != 2 or labels.shape != array.shape[1:]:
        raise DataError("donors of scored cells", f"{labels.size} for {array.shape}", "one donor for each cell")
    members, others = check_masks(forget, controls, labels.size)
    if not np.isfinite(array[:, members | others]).all():
        raise DataError("scores of donors' cells", "an infinite value", "finite scores")
    inside = sorted({str(name) for name in labels[members]})
    outside = sorted({str(name) for name in labels[others]} - set(inside))
    record: dict[str, Any] = {"member_donors": inside, "control_donors": outside}
    if min(len(inside), len(outside)) < DONORS_NEEDED:
        reason = (
            f"{len(inside)} donors have forget cells and {len(outside)} have control cells only; "
            f"at least {DONORS_NEEDED} of each are needed"
        )
        return {**record, "auc": None, "interval": None, "per_model": None, "reason": reason}
    one, two = _donor_means(array, labels, members, inside), _donor_means(array, labels, others, outside)
    mean, interval = population_auc(one, two, level, seed, draws)
    per_model = [roc.auc(member, control) for member, control in zip(one, two, strict=True)]
    return {**record, "auc": mean, "interval": list(interval), "per_model": per_model, "reason": None}

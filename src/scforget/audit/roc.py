"""How well a score tells forget cells from control cells: AUC, advantage, ROC curve, TPR at a fixed FPR.

Every score is higher = more member-like; a cell is called a member when its score is at or above the threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy

from scforget.arrays import FloatArray
from scforget.audit.intervals import Interval, check_group, clopper_pearson, plain
from scforget.errors import DataError, EmptyGroupError
from scforget.seeding import numpy_generator

# A target FPR is refused when the controls could all stay below the threshold by luck with more than this chance:
# then an empirical FPR of 0 says nothing about the target.
LUCK = 0.05
# In the smaller group; above it the null of the rank sum is normal to three digits and needs no simulation.
NORMAL_NULL_CELLS = 200


def auc(members: npt.ArrayLike, controls: npt.ArrayLike) -> float:
    """Chance that a random forget cell scores above a random control, ties as halves.

    Parameters
    ----------
    members : ``[F]``
        Scores of the forget cells; F >= 1.
    controls : ``[U]``
        Scores of cells that were never trained on; U >= 1.

    Returns
    -------
    float
        In [0, 1]; 0.5 when nothing leaks.

    Raises
    ------
    EmptyGroupError
        If either group is empty.

    Notes
    -----
    Mann & Whitney (1947): (R − F(F+1)/2) / (F·U), R the sum of the members' mid-ranks; O(n log n).
    """
    F, U = check_group("forget cells", members, 1), check_group("control cells", controls, 1)
    ranks = scipy.stats.rankdata(np.concatenate([F, U]))
    return float((ranks[: F.size].sum() - F.size * (F.size + 1) / 2) / (F.size * U.size))


def advantage(auc_value: float) -> float:
    """2·|AUC − ½| (P0): blind to the direction, so print the signed AUC and ``advantage_null`` beside it."""
    return 2 * abs(auc_value - 0.5)


def roc_curve(members: npt.ArrayLike, controls: npt.ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
    """All operating points, from "nobody is a member" to "everybody is".

    Parameters
    ----------
    members, controls : ``[F]``, ``[U]``
        Scores; F, U >= 1.

    Returns
    -------
    fpr, tpr : ``[T + 1]``
        Rising from 0 to 1; T is the number of different scores, as tied cells pass together.
    thresholds : ``[T + 1]``
        Falling; the first is infinite.
    """
    F, U = np.sort(check_group("forget cells", members, 1)), np.sort(check_group("control cells", controls, 1))
    thresholds = np.concatenate([[np.inf], np.unique(np.concatenate([F, U]))[::-1]])
    tpr = 1 - np.searchsorted(F, thresholds, side="left") / F.size
    fpr = 1 - np.searchsorted(U, thresholds, side="left") / U.size
    # A score that is itself infinite is still at or above "nobody's" threshold, which calls nobody a member.
    tpr[0] = fpr[0] = 0.0
    return fpr, tpr, thresholds


@dataclass(frozen=True)
class FixedFpr:
    """TPR at a target FPR; ``undetermined`` (numbers NaN, intervals too) with too few controls.

    Attributes
    ----------
    status
        Whether there were enough controls.
    target, threshold
        Wanted FPR; score from which a cell is called a member (infinite: nobody).
    tpr, tpr_interval, fpr, fpr_interval
        Realised rates and their Clopper–Pearson intervals.
    tpr_k, n_members, fpr_k, n_controls
        Counts behind the rates.
    controls_needed
        The fewest controls for this target.
    """

    status: Literal["measured", "undetermined"]
    target: float
    threshold: float
    tpr: float
    tpr_interval: Interval
    tpr_k: int
    n_members: int
    fpr: float
    fpr_interval: Interval
    fpr_k: int
    n_controls: int
    controls_needed: int

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; NaN and infinity become null."""
        return plain(self)


def controls_needed(target: float) -> int:
    """Fewest controls n with (1 − target)ⁿ <= 0.05: 299 for 1 %, 2,995 for 0.1 %."""
    if not 0 < target < 1:
        raise DataError("target FPR", target, "a number between 0 and 1")
    return int(np.ceil(np.log(LUCK) / np.log1p(-target)))


def tpr_at_fpr(members: npt.ArrayLike, controls: npt.ArrayLike, target: float, *, level: float) -> FixedFpr:
    """Share of forget cells found when at most ``target`` of the controls may be called members.

    Parameters
    ----------
    members, controls : ``[F]``, ``[U]``
        Scores; F, U >= 1.
    target
        Wanted FPR, in (0, 1).
    level
        Coverage of the intervals.

    Returns
    -------
    FixedFpr

    Notes
    -----
    The threshold is the smallest, most permissive score with an **empirical** FPR <= target; tied cells pass together.
    """
    F, U = check_group("forget cells", members, 1), check_group("control cells", controls, 1)
    needed, nan = controls_needed(target), float("nan")
    if U.size < needed:
        nothing = (nan, nan)
        return FixedFpr("undetermined", target, nan, nan, nothing, 0, F.size, nan, nothing, 0, U.size, needed)
    fpr, tpr, thresholds = roc_curve(F, U)
    # Counts are compared, not rates: 1 − 2970/3000 is not 0.01 in floating point.
    allowed = int(np.floor(target * U.size * (1 + 1e-12)))
    point = int(np.flatnonzero(np.rint(fpr * U.size) <= allowed)[-1])
    tpr_k, fpr_k = int(np.rint(tpr[point] * F.size)), int(np.rint(fpr[point] * U.size))
    return FixedFpr(
        status="measured",
        target=target,
        threshold=float(thresholds[point]),
        tpr=tpr_k / F.size,
        tpr_interval=clopper_pearson(tpr_k, F.size, level),
        tpr_k=tpr_k,
        n_members=F.size,
        fpr=fpr_k / U.size,
        fpr_interval=clopper_pearson(fpr_k, U.size, level),
        fpr_k=fpr_k,
        n_controls=U.size,
        controls_needed=needed,
    )


def advantage_null(n_members: int, n_controls: int, *, seed: int, draws: int) -> dict[str, float]:
    """What advantage chance alone gives when nothing leaks: its mean is not 0.

    Parameters
    ----------
    n_members, n_controls
        Group sizes, >= 1.
    seed, draws
        Of the simulation; draws >= 1.

    Returns
    -------
    dict
        ``mean`` and ``q95`` (95 % point) of the advantage: 0.091 and 0.223 for 30 members and 194 controls.

    Notes
    -----
    Without a leak (and without ties) every order of the n₁ + n₂ cells is equally likely, so the larger group falls into
    the gaps between the smaller one's cells as a uniform composition: multinomial counts with Dirichlet(1, …, 1)
    probabilities. That costs O(draws · min(n₁, n₂)); with more than 200 cells in the smaller group the AUC is taken as
    normal with variance (n₁ + n₂ + 1) / (12 n₁ n₂).
    """
    few, many = sorted((n_members, n_controls))
    if few < 1:
        raise EmptyGroupError("forget or control cells", few, "at least 1")
    if few > NORMAL_NULL_CELLS:
        spread = 2 * np.sqrt((few + many + 1) / (12 * few * many))
        return {"mean": float(spread * np.sqrt(2 / np.pi)), "q95": float(spread * scipy.stats.norm.ppf(0.975))}
    generator = numpy_generator(seed, "advantage_null", few, many)
    gaps = generator.multinomial(many, generator.dirichlet(np.ones(few + 1), size=draws))
    # A cell in gap j has j of the smaller group below it.
    aucs = gaps @ np.arange(few + 1) / (few * many)
    values = 2 * np.abs(aucs - 0.5)
    return {"mean": float(values.mean()), "q95": float(np.quantile(values, 0.95))}

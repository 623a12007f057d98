"""The worst of several attacks with an honest p-value: max-statistic permutation test over cells.

The attacks must be blind to the labels. One that is trained on who is a forget cell and who a control (``mlp``) would
have to be trained anew for every permutation and does not belong in here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy

from scforget.arrays import BoolArray, FloatArray
from scforget.audit.intervals import BLOCK, check_group, plain
from scforget.errors import DataError, EmptyGroupError
from scforget.seeding import numpy_generator

# Two orders of adding the same numbers differ by less than this share; then they count as a tie.
ROUNDING = 1e-12


@dataclass(frozen=True)
class AttackTest:
    """One attack among several.

    Attributes
    ----------
    name
        Of the attack.
    auc
        Mean over models, in [0, 1].
    statistic
        |AUC − ½| in standard deviations of its permutation distribution, >= 0.
    p
        Two-sided permutation p-value of this attack alone.
    p_adjusted
        Corrected for having looked at all attacks, >= ``p``.
    """

    name: str
    auc: float
    statistic: float
    p: float
    p_adjusted: float

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return plain(self)


@dataclass(frozen=True)
class MaxStatistic:
    """The worst attack, and every attack's p-values.

    Attributes
    ----------
    worst
        The attack with the largest statistic; its ``p_adjusted`` is the p-value of "no attack finds anything".
    attacks
        All of them, in the order given.
    draws, models, n_members, n_controls
        Permutations; audited models; group sizes.
    """

    worst: AttackTest
    attacks: tuple[AttackTest, ...]
    draws: int
    models: int
    n_members: int
    n_controls: int

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        nested = {"worst": self.worst.to_dict(), "attacks": [attack.to_dict() for attack in self.attacks]}
        return {**plain(self), **nested}


def check_masks(forget: npt.ArrayLike, controls: npt.ArrayLike, n: int) -> tuple[BoolArray, BoolArray]:
    """Return both masks ``[n]``, refusing other types and shapes, empty groups and cells that are in both.

    Raises
    ------
    EmptyGroupError
        If a group is empty.
    DataError
        If a mask is not boolean ``[n]``, or a cell is in both.
    """
    masks = np.asarray(forget), np.asarray(controls)
    for name, mask in zip(("forget cells", "control cells"), masks, strict=True):
        if mask.dtype != bool or mask.shape != (n,):
            raise DataError(name, f"an array of {mask.dtype} with shape {mask.shape}", f"true or false for {n} cells")
        if not mask.any():
            raise EmptyGroupError(name, 0, "at least 1")
    if (masks[0] & masks[1]).any():
        raise DataError("forget and control cells", f"{int((masks[0] & masks[1]).sum())} cells in both", "none")
    return masks


def _check_scores(scores: npt.ArrayLike, names: Sequence[str]) -> FloatArray:
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 3 or array.shape[0] != len(names):
        raise DataError("scores of the attacks", f"shape {array.shape}", f"[{len(names)} attacks, models, cells]")
    if array.shape[0] < 1 or array.shape[1] < 1:
        raise EmptyGroupError("attacks and models of a permutation test", array.shape[:2], "at least 1 of each")
    return array


def _rank_sums(scores: FloatArray, names: Sequence[str]) -> FloatArray:
    """``[A, n]``: each cell's mid-ranks, summed over models; whole or half numbers, so sums of them are exact."""
    for name, one in zip(names, scores, strict=True):
        check_group(f"scores of the attack {name}", one, 1)
    ranks = scipy.stats.rankdata(scores, axis=2).sum(axis=1)
    for name, row in zip(names, ranks, strict=True):
        if np.ptp(row) == 0:
            raise DataError(
                f"scores of the attack {name}", "the same rank for all cells", "scores that tell some cells apart"
            )
    return np.asarray(ranks)


def _permuted_labels(labels: BoolArray, draws: int, generator: np.random.Generator) -> Iterator[FloatArray]:
    """Yield blocks ``[size, n]`` of permuted labels, 1 for a forget cell."""
    block = max(1, BLOCK // labels.size)
    for start in range(0, draws, block):
        size = min(block, draws - start)
        yield generator.permuted(np.tile(labels.astype(np.float64), (size, 1)), axis=1)


def max_statistic(
    scores: npt.ArrayLike, forget: npt.ArrayLike, controls: npt.ArrayLike, *, names: Sequence[str], seed: int,
    draws: int,
) -> MaxStatistic:  # fmt: skip
    """Test the worst of A attacks, in either direction, by permuting who is a forget cell and who a control.

    Parameters
    ----------
    scores : ``[A, M, n]``
        Of n cells by A attacks under each of M models, higher = more member-like; infinite ones have a rank.
    forget, controls : ``[n]``, bool
        Which cells are compared; the others are left out. Controls must be exchangeable with forget cells when nothing
        leaks, as ``same_group`` controls are.
    names
        Of the attacks, A of them.
    seed, draws
        Of the permutations; draws >= 1.

    Returns
    -------
    MaxStatistic

    Raises
    ------
    EmptyGroupError
        If a group of cells, the attacks or the models are missing.
    DataError
        If a score is NaN, shapes do not fit, or an attack gives all cells the same score (or, over models, the same
        mean rank), so that it has no permutation spread.

    Notes
    -----
    Statistic of an attack: |mean AUC over models − ½| / its permutation standard deviation. The mean AUC is a sum of
    mean ranks r over the F forget cells, so the deviation has a closed form: the variance of a sum of F values drawn
    without replacement from n' is F·U/n' times their sample variance. One permutation serves all attacks and models
    and keeps their correlation. p = (1 + #{permuted >= observed}) / (1 + draws), adjusted: the permuted maximum over
    attacks in place of the attack's own (Westfall & Young 1993, single step). Cells are permuted, never models:
    it speaks of these models only.
    """
    if draws < 1:
        raise DataError("draws of a permutation test", draws, "at least 1")
    array = _check_scores(scores, names)
    members, others = check_masks(forget, controls, array.shape[2])
    labels, ranks = members[members | others], _rank_sums(array[:, :, members | others], names)
    F, n = int(labels.sum()), labels.size
    # Deviation of the forget cells' rank sum, times n: whole or half numbers, so that equal means equal.
    centre = F * ranks.sum(axis=1)
    spread = n * np.sqrt(F * (n - F) / n * ranks.var(axis=1, ddof=1))
    observed = np.abs(n * (ranks @ labels) - centre) / spread
    wanted = observed * (1 - ROUNDING)
    own, largest = np.zeros(len(names)), np.zeros(len(names))
    for block in _permuted_labels(labels, draws, numpy_generator(seed, "max_statistic")):
        permuted = np.abs(n * (block @ ranks.T) - centre) / spread
        own += (permuted >= wanted).sum(axis=0)
        largest += (permuted.max(axis=1)[:, None] >= wanted).sum(axis=0)
    p, adjusted = (1 + own) / (1 + draws), (1 + largest) / (1 + draws)
    aucs = (ranks @ labels / array.shape[1] - F * (F + 1) / 2) / (F * (n - F))
    columns = (values.tolist() for values in (aucs, observed, p, adjusted))
    tests = tuple(AttackTest(*row) for row in zip(names, *columns, strict=True))
    return MaxStatistic(tests[int(observed.argmax())], tests, draws, array.shape[1], F, n - F)

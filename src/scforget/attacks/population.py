"""Attacks on populations of models: how well unlearned models are told from retrained ones, cell by cell.

All take one scalar output per model and forget cell, ``unlearned [M, F]`` and ``retrained [K, F]``. With few models
even two populations of the same kind look different to these measures, so each stands beside retrain against retrain at
the **same numbers of models** (``kaggle.forgetting_ceiling``, ``klom_summary``), or is unbiased by design (``u_lira``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import scipy
from pydantic import Field

from scforget.arrays import FloatArray, IntArray
from scforget.errors import DataError, EmptyGroupError
from scforget.seeding import numpy_generator
from scforget.settings import Settings

Scorer = Literal["official", "suprun", "exact"]

# The jackknife leaves out groups of models when there are more of them than this.
JACKKNIFE_GROUPS = 32
# A spread below this share of the scores' size is rounding, not a difference between models.
ROUNDING = 1e-10
# Standard scores at which a Gaussian is integrated.
GRID = np.linspace(-10, 10, 4001)


class PopulationSettings(Settings):
    """Settings of the population attacks.

    Attributes
    ----------
    scorer
        Of the Kaggle epsilon.
    ceiling_draws
        Splits of the retrained models that retrain against retrain is averaged over.
    klom_bins, klom_floor
        Bins of KLOM's histograms; smallest share that a bin of the retrained models is taken to hold.
    min_models
        Fewest models of each kind for U-LiRA.
    """

    scorer: Scorer
    ceiling_draws: Annotated[int, Field(gt=0)]
    klom_bins: Annotated[int, Field(ge=2)]
    klom_floor: Annotated[float, Field(gt=0, lt=1)]
    min_models: Annotated[int, Field(ge=4)]


def matrix(name: str, values: npt.ArrayLike, at_least: int) -> FloatArray:
    """Return outputs of at least so many models at one cell or more, all finite, as float64."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2:
        raise DataError(name, f"an array of shape {array.shape}", "models by cells")
    if array.shape[0] < at_least or array.shape[1] < 1:
        raise EmptyGroupError(name, f"{array.shape[0]} models, {array.shape[1]} cells", f"{at_least} models, 1 cell")
    if not np.isfinite(array).all():
        raise DataError(name, f"{int((~np.isfinite(array)).sum())} outputs that are not finite", "finite outputs")
    return array


def matrices(unlearned: npt.ArrayLike, retrained: npt.ArrayLike, at_least: int) -> tuple[FloatArray, FloatArray]:
    """Return both populations' outputs, at the same cells."""
    one, two = matrix("unlearned models", unlearned, at_least), matrix("retrained models", retrained, at_least)
    if one.shape[1] != two.shape[1]:
        raise DataError("cells of two populations", f"{one.shape[1]} and {two.shape[1]}", "the same cells")
    return one, two


def splits(K: int, n: int, draws: int, seed: int, name: str) -> Iterator[tuple[IntArray, IntArray]]:
    """Random disjoint pairs of n of K models each."""
    generator = numpy_generator(seed, name)
    for _ in range(draws):
        drawn = generator.permutation(K).astype(np.int64)
        yield drawn[:n], drawn[n : 2 * n]


def spread(values: FloatArray) -> tuple[float, float]:
    """Where the middle 95 % of some values lie."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def klom(unlearned: npt.ArrayLike, retrained: npt.ArrayLike, bins: int, floor: float) -> FloatArray:
    """KLOM of each cell: binned KL(unlearned ‖ retrained) of the models' outputs.

    Parameters
    ----------
    unlearned, retrained : ``[M, F]``, ``[K, F]``
        One output per model and cell; M, K >= 1.
    bins
        Of equal width over the pooled range of each cell, >= 2.
    floor
        Smallest share q that a bin of the retrained models is taken to hold, in (0, 1).

    Returns
    -------
    ``[F]``, nats
        Between −``bins``·``floor`` and ln(1/``floor``), as q is not normalised again; 0 for equal histograms, or where
        all outputs are one value.

    Notes
    -----
    Georgiev et al. (2024, arXiv 2410.23232). The KL of two samples grows as they get smaller: 8 and 8 models of one
    Gaussian give 6.5 nats with 20 bins, 512 and 512 give 0.05. Only differences at equal numbers mean something.
    """
    one, two = matrices(unlearned, retrained, 1)
    if bins < 2 or not 0 < floor < 1:
        raise DataError("bins and floor of KLOM", (bins, floor), "at least 2 bins and a floor in (0, 1)")
    pooled = np.concatenate([one, two])
    low, width = pooled.min(axis=0), np.ptp(pooled, axis=0)
    place = np.minimum((pooled - low) / np.where(width > 0, width, 1.0) * bins, bins - 1).astype(np.int64)
    inside = place[None] == np.arange(bins)[:, None, None]
    p, q = inside[:, : one.shape[0]].mean(axis=1), inside[:, one.shape[0] :].mean(axis=1)
    return np.asarray((p * np.log(np.where(p > 0, p, 1.0) / np.maximum(q, floor))).sum(axis=0))


def klom_summary(
    unlearned: npt.ArrayLike, retrained: npt.ArrayLike, *, bins: int, floor: float, seed: int, draws: int
) -> dict[str, float]:
    """95th percentile over cells of KLOM, minus that of retrain against retrain at the same numbers of models.

    Parameters
    ----------
    unlearned, retrained : ``[M, F]``, ``[K, F]``
        As for ``klom``; K >= 2.
    bins, floor
        As for ``klom``.
    seed, draws
        Seed of the stream; random draws of n = min(M, K // 2) unlearned models and two disjoint sets of n retrained
        ones, >= 1. Unlearned and second set are both compared with the first, so that the bias by n cancels.

    Returns
    -------
    dict
        ``models`` (n), ``value``, ``null`` and ``excess`` = value − null, means over draws in nats; ``low`` and
        ``high``, the central 95 % of the excess over draws: scatter over splits of these models, not over new ones.
    """
    one, two = matrices(unlearned, retrained, 1)
    M, K = one.shape[0], two.shape[0]
    n = min(M, K // 2)
    if n < 1 or draws < 1:
        raise EmptyGroupError("models and draws of KLOM", f"{M}, {K} and {draws}", "1 unlearned, 2 retrained, 1 draw")
    generator = numpy_generator(seed, "klom_summary", "unlearned")
    values = np.array(
        [
            [np.quantile(klom(side, two[a], bins, floor), 0.95) for side in (one[generator.permutation(M)[:n]], two[b])]
            for a, b in splits(K, n, draws, seed, "klom_summary")
        ]
    )
    value, null = values.mean(axis=0)
    low, high = spread(values[:, 0] - values[:, 1])
    parts = {"value": float(value), "null": float(null), "excess": float(value - null), "low": low, "high": high}
    return {"models": n, **parts}


@dataclass(frozen=True)
class ULira:
    """What U-LiRA found.

    Attributes
    ----------
    status, reason
        ``measured``, or ``undetermined`` and why; then AUC and interval are NaN and the scores are empty.
    auc, interval, level
        Chance that an unlearned model scores above a retrained one at the same cell, averaged over cells; its interval
        over models at ``level``.
    n_unlearned, n_retrained
        M and K.
    unlearned_scores, retrained_scores : ``[M, n]``, ``[K, n]``
        Log-likelihood ratios, higher = more like an unlearned model, whose trace of the cell is the member's.
    """

    status: Literal["measured", "undetermined"]
    reason: str
    auc: float
    interval: tuple[float, float]
    level: float
    n_unlearned: int
    n_retrained: int
    unlearned_scores: FloatArray = field(repr=False)
    retrained_scores: FloatArray = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold, without the scores; NaN becomes null."""
        measured = self.status == "measured"
        return {
            "status": self.status,
            "reason": self.reason,
            "auc": self.auc if measured else None,
            "interval": list(self.interval) if measured else [None, None],
            "level": self.level,
            "n_unlearned": self.n_unlearned,
            "n_retrained": self.n_retrained,
        }


def _density(values: FloatArray, mean: FloatArray, variance: FloatArray) -> FloatArray:
    """Log-density of Gaussians without the constant, which ratios lose."""
    return np.asarray(-0.5 * (np.log(variance) + (values - mean) ** 2 / variance))


def _without_each(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """``[M, n]`` each: mean and variance of a population without its model m."""
    left, mean = values.shape[0] - 1, values.mean(axis=0)
    away = values - mean
    variance = ((away**2).sum(axis=0) - away**2 * (left + 1) / left) / (left - 1)
    if (variance <= (ROUNDING * np.maximum(1, np.abs(values).max(axis=0))) ** 2).any():
        raise DataError("outputs of U-LiRA", "a cell with equal outputs of all models of a kind", "models that differ")
    return mean - away / left, variance


def _pair_auc(one: FloatArray, two: FloatArray) -> float:
    """Mean over cells and pairs (m, k): is m above k, by the ratio of Gaussians fitted without either of them."""
    (mean_u, variance_u), (mean_r, variance_r) = _without_each(one), _without_each(two)
    retrained_density, wins = _density(two, mean_r, variance_r), 0.0
    for value, mean, variance in zip(one, mean_u, variance_u, strict=True):
        ours = _density(value, mean, variance) - _density(value, mean_r, variance_r)
        theirs = _density(two, mean, variance) - retrained_density
        wins += ((ours > theirs) + 0.5 * (ours == theirs)).sum()
    return float(wins / (one.shape[0] * two.size))


def _jackknife(one: FloatArray, two: FloatArray) -> float:
    """Variance of the AUC over models: both populations lose one group of models at a time."""
    variance = 0.0
    for population, auc_of in ((one, lambda kept: _pair_auc(kept, two)), (two, lambda kept: _pair_auc(one, kept))):
        groups = np.array_split(np.arange(len(population)), min(len(population), JACKKNIFE_GROUPS))
        values = np.array([auc_of(np.delete(population, group, axis=0)) for group in groups])
        variance += (len(groups) - 1) * float(values.var())
    return variance


def u_lira(unlearned: npt.ArrayLike, retrained: npt.ArrayLike, min_models: int, level: float = 0.95) -> ULira:
    """U-LiRA: tell unlearned models from retrained ones by Gaussians fitted to both populations at each cell.

    Parameters
    ----------
    unlearned, retrained : ``[M, n]``, ``[K, n]``
        One output per model and cell; models that were trained independently of each other.
    min_models
        Fewest models of each kind, >= 4; below, the result is ``undetermined``.
    level
        Of the interval, in (0, 1).

    Returns
    -------
    ULira
        AUC 0.5 for a perfect method, at any M and K.

    Raises
    ------
    DataError
        If outputs are not finite, the cells differ, or all models of a kind agree at a cell.

    Notes
    -----
    Hayes et al. (2024, arXiv 2403.01218): score ln N(s; μ_U, σ_U²) − ln N(s; μ_R, σ_R²), the scored model left out of
    its own population. Do not rank these scores against each other: leaving s out pushes the mean of its own population
    away from it, and the AUC of two like populations of 8 models becomes 0.40. For the AUC each pair of an unlearned
    and a retrained model is scored by Gaussians fitted without **both** (leave-pair-out); exchangeability then makes
    its expectation 0.5 for like populations. The interval is a delete-one jackknife over models (delete-a-group above
    32) with Student's t on the logit scale; it errs towards too wide for few models.
    """
    one, two = matrices(unlearned, retrained, 0)
    M, K = one.shape[0], two.shape[0]
    if min_models < 4 or not 0 < level < 1:
        raise DataError("fewest models and level of U-LiRA", (min_models, level), "at least 4 and a level in (0, 1)")
    if min(M, K) < min_models:
        reason = f"{M} unlearned and {K} retrained models; U-LiRA needs {min_models} of each"
        nan, none = float("nan"), np.empty((0, one.shape[1]))
        return ULira("undetermined", reason, nan, (nan, nan), level, M, K, none, none)
    ours = _density(one, *_without_each(one)) - _density(one, two.mean(axis=0), two.var(axis=0, ddof=1))
    theirs = _density(two, one.mean(axis=0), one.var(axis=0, ddof=1)) - _density(two, *_without_each(two))
    auc, error = _pair_auc(one, two), np.sqrt(_jackknife(one, two))
    if error == 0 or auc in (0.0, 1.0):
        # No pair of models disagrees: bounded as min(M, K) disjoint pairs that all agree (Clopper & Pearson 1934).
        gap = 1 - ((1 - level) / 2) ** (1 / min(M, K))
        interval = (auc - gap * auc, auc + gap * (1 - auc))
    else:
        quantile = scipy.stats.t.ppf((1 + level) / 2, min(M, K, JACKKNIFE_GROUPS) - 1)
        width, centre = quantile * error / (auc * (1 - auc)), np.log(auc / (1 - auc))
        low, high = 1 / (1 + np.exp(-np.clip([centre - width, centre + width], -700, 700)))
        interval = (float(low), float(high))
    return ULira("measured", "", auc, interval, level, M, K, ours, theirs)


def _hockey_stick(p: tuple[float, float], q: tuple[float, float], epsilon: float) -> float:
    """E over P of (1 − exp(ε − ln p/q))₊ for two Gaussians (mean, sd), on a grid of P's standard scores."""
    x = p[0] + p[1] * GRID
    ratio = np.log(q[1] / p[1]) - 0.5 * GRID**2 + 0.5 * ((x - q[0]) / q[1]) ** 2
    return float(np.trapezoid(scipy.stats.norm.pdf(GRID) * -np.expm1(np.minimum(epsilon - ratio, 0)), GRID))


def hockey_stick(unlearned: npt.ArrayLike, retrained: npt.ArrayLike, epsilon: float) -> tuple[FloatArray, FloatArray]:
    """Plug-in estimate of delta(epsilon) both ways between unlearned and retrained models, cell by cell.

    Parameters
    ----------
    unlearned, retrained : ``[M, F]``, ``[K, F]``
        One output per model and cell; M, K >= 2.
    epsilon
        >= 0; at 0 it is the total variation.

    Returns
    -------
    delta_forward, delta_backward : ``[F]``
        In [0, 1]: sup over sets A of P(A) − e^ε·Q(A), with P the unlearned and Q the retrained, then the other way.

    Raises
    ------
    DataError
        If all models of a kind agree at a cell, or epsilon is negative or not finite.

    Notes
    -----
    Hockey-stick divergence of the two **fitted Gaussians**, by numerical integration; for equal variances it equals
    Φ(Δ/2σ − εσ/Δ) − e^ε·Φ(−Δ/2σ − εσ/Δ), as of the Gaussian mechanism (Balle & Wang 2018). A plug-in
    estimate, **not a bound**: it is biased upwards by few models, and says nothing of outputs that are not Gaussian.
    """
    one, two = matrices(unlearned, retrained, 2)
    if not (np.isfinite(epsilon) and epsilon >= 0):
        raise DataError("epsilon of a hockey-stick divergence", epsilon, "a finite number from 0")
    fits = [list(zip(side.mean(axis=0), side.std(axis=0, ddof=1), strict=True)) for side in (one, two)]
    if min(sd for fit in fits for _, sd in fit) <= ROUNDING * max(1, np.abs(one).max(), np.abs(two).max()):
        raise DataError("outputs of a hockey-stick divergence", "a cell with equal outputs", "models that differ")
    forward = np.array([_hockey_stick(p, q, epsilon) for p, q in zip(*fits, strict=True)])
    backward = np.array([_hockey_stick(q, p, epsilon) for p, q in zip(*fits, strict=True)])
    return np.clip(forward, 0, 1), np.clip(backward, 0, 1)

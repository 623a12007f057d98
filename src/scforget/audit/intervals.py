"""Intervals: nothing of the audit is printed without one.

For a proportion (Clopper–Pearson), for one AUC (DeLong), for the mean AUC of a population of models (resampling models
and cells), for a mean over models (Student-t), and for any other statistic (BCa).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy

from scforget.arrays import FloatArray, IntArray
from scforget.errors import DataError, EmptyGroupError
from scforget.seeding import numpy_generator

Interval = tuple[float, float]

# Elements of one block of bootstrap weights: 32 MiB of float64 at a time, whatever the groups' sizes.
BLOCK = 2**22


def plain(record: Any) -> dict[str, Any]:
    """Turn a result dataclass into what JSON can hold: tuples become lists, NaN and infinities become None."""

    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            return [one(item) for item in value]
        if isinstance(value, float) and not np.isfinite(value):
            return None
        return value

    return {field.name: one(getattr(record, field.name)) for field in fields(record)}


def check_group(name: str, values: npt.ArrayLike, at_least: int) -> FloatArray:
    """Return scores as float64, refusing NaN and too few cells (last axis).

    Parameters
    ----------
    name
        What the group is called in the error.
    values : ``[..., N]``
        Scores; infinite ones are allowed, they have a rank.
    at_least
        The fewest cells that the statistic can be computed from.

    Returns
    -------
    ``[..., N]``

    Raises
    ------
    EmptyGroupError
        With fewer than ``at_least`` cells.
    DataError
        If a score is NaN.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.shape[-1] < at_least:
        raise EmptyGroupError(name, f"{array.shape[-1]} cells", f"at least {at_least}")
    if np.isnan(array).any():
        raise DataError(name, f"{int(np.isnan(array).sum())} scores that are NaN", "a score for every cell")
    return array


def clopper_pearson(k: int, n: int, level: float) -> Interval:
    """Exact interval of a proportion: k successes in n trials.

    Raises
    ------
    EmptyGroupError
        If n is 0.

    Notes
    -----
    Clopper & Pearson (1934), two-sided with half of 1 − ``level`` on each side, so it never covers less than ``level``.
    """
    from statsmodels.stats.proportion import proportion_confint

    if n < 1:
        raise EmptyGroupError("trials of a proportion", n, "at least 1")
    lower, upper = proportion_confint(k, n, alpha=1 - level, method="beta")
    return float(lower), float(upper)


def _ranks_among(members: FloatArray, controls: FloatArray) -> tuple[IntArray, IntArray, IntArray]:
    """How many controls lie strictly below each member, how many at or below it, and the order that sorts controls."""
    order = np.argsort(controls, kind="stable").astype(np.int64)
    ordered = controls[order]
    below = np.searchsorted(ordered, members, side="left").astype(np.int64)
    return below, np.searchsorted(ordered, members, side="right").astype(np.int64), order


def _logit_interval(auc: float, variance: float, quantile: float, pairs: int, level: float) -> Interval:
    """Interval of an AUC on the logit scale; a width from disjoint pairs where the variance is 0.

    Without variance (perfect separation, or all scores tied) the logit interval would be a point, which claims too
    much. The AUC is also the chance of each of ``pairs`` disjoint member–control pairs, so Clopper–Pearson of
    "all of them agree" bounds it without any normal theory.
    """
    if variance <= 0 or auc in (0.0, 1.0):
        gap = 1 - clopper_pearson(pairs, pairs, level)[0]
        return auc - gap * auc, auc + gap * (1 - auc)
    centre, width = np.log(auc / (1 - auc)), quantile * np.sqrt(variance) / (auc * (1 - auc))
    lower, upper = 1 / (1 + np.exp(-np.clip([centre - width, centre + width], -700, 700)))
    return float(lower), float(upper)


def delong(members: npt.ArrayLike, controls: npt.ArrayLike, level: float) -> tuple[float, float, Interval]:
    """AUC of one model, the variance that the sampling of cells gives it, and its interval.

    Parameters
    ----------
    members : ``[F]``
        Scores of forget cells, higher = more member-like; F >= 2.
    controls : ``[U]``
        Scores of cells that were never trained on; U >= 2.
    level
        Coverage, in (0, 1).

    Returns
    -------
    auc : in [0, 1], ties as halves
    variance : >= 0
    interval : inside [0, 1]

    Raises
    ------
    EmptyGroupError
        If either group has fewer than 2 cells.

    Notes
    -----
    DeLong et al. (1988): var = S₁₀/F + S₀₁/U, the sample variances of each member's share of controls below it, and of
    each control's share of members below it; in O(n log n) by ranks (Sun & Xu 2014). The interval is normal on the
    logit of the AUC, hence inside [0, 1] and better covering than the plain one for AUCs near 0 or 1.
    """
    F, U = check_group("forget cells", members, 2), check_group("control cells", controls, 2)
    below, up_to, _ = _ranks_among(F, U)
    member_share = (below + up_to) / (2 * U.size)
    below, up_to, _ = _ranks_among(U, F)
    control_share = (below + up_to) / (2 * F.size)
    auc = float(member_share.mean())
    variance = float(member_share.var(ddof=1) / F.size + control_share.var(ddof=1) / U.size)
    quantile = float(scipy.stats.norm.ppf((1 + level) / 2))
    return auc, variance, _logit_interval(auc, variance, quantile, min(F.size, U.size), level)


def _weights(generator: np.random.Generator, draws: int, size: int) -> FloatArray:
    """``[draws, size]``: how often each of ``size`` units is drawn in a resample of that size."""
    return generator.multinomial(size, np.full(size, 1 / size), size=draws).astype(np.float64)


def _resampled_aucs(
    members: FloatArray, controls: FloatArray, draws: int, generator: np.random.Generator
) -> Iterator[FloatArray]:
    """Yield blocks ``[draws, M]`` of every model's AUC on resampled members and controls (same cells for all models).

    With K the ``[F, U]`` kernel of one model (1 member above, ½ tie, 0 below), the AUC of a resample with
    multiplicities w is wF' K wU / (F·U). K is never formed: K wU at a member is the weight of the controls below it
    plus half of its ties, two look-ups in the running sum of wU in score order; O(F + U) in time and memory.
    """
    ranks = [_ranks_among(member, control) for member, control in zip(members, controls, strict=True)]
    F, U = members.shape[1], controls.shape[1]
    block = max(1, BLOCK // (F + U))
    for start in range(0, draws, block):
        size = min(block, draws - start)
        member_weight, control_weight = _weights(generator, size, F), _weights(generator, size, U)
        aucs = np.empty((size, len(ranks)))
        running = np.zeros((size, U + 1))
        for model, (below, up_to, order) in enumerate(ranks):
            np.cumsum(control_weight[:, order], axis=1, out=running[:, 1:])
            lower = np.einsum("df,df->d", member_weight, running[:, below])
            aucs[:, model] = (lower + np.einsum("df,df->d", member_weight, running[:, up_to])) / (2 * F * U)
        yield aucs


def _crossed_variance(aucs: FloatArray, resampled: float, cells: int) -> tuple[float, float]:
    """Variance of the mean of M models' AUCs and its degrees of freedom, from the variance of resampled means."""
    M = aucs.size
    between = float(aucs.var(ddof=1)) / M if M > 1 else 0.0
    variance = resampled + between / M
    spread = between**2 / max(M - 1, 1) + max(variance - between, 0.0) ** 2 / (cells - 1)
    return variance, variance**2 / spread if spread > 0 else 1.0


def population_auc(
    members: npt.ArrayLike, controls: npt.ArrayLike, level: float, seed: int, draws: int
) -> tuple[float, Interval]:
    """Mean AUC of a population of models, with an interval that resamples models **and** cells.

    Parameters
    ----------
    members : ``[M, F]``
        Scores of the same F forget cells under each of M models, higher = more member-like; F >= 2.
    controls : ``[M, U]``
        Scores of the same U control cells under the same models; U >= 2.
    level
        Coverage, in (0, 1).
    seed
        Of the bootstrap's stream.
    draws
        Resamples, at least 2.

    Returns
    -------
    auc : in [0, 1]
    interval : inside [0, 1]

    Raises
    ------
    EmptyGroupError
        If either group has fewer than 2 cells, or there is no model.
    DataError
        If the two arrays are not of the same models.

    Notes
    -----
    Models, members and controls are resampled independently (the crossed bootstrap of Owen 2007, which errs towards too
    wide). The variance V of the resampled means gets back the 1/M of the between-model part Vₘ = s²/M that resampling M
    models loses, and the quantile is Student's with Satterthwaite's V² / (Vₘ²/(M−1) + Vᶜ²/(min(F, U)−1)) degrees of
    freedom, Vᶜ = V − Vₘ, on the logit scale: percentiles cover only 85 % when 3 models differ a lot.
    With M = 1 nothing is known between models and the interval is of the cells alone.
    """
    F = check_group("forget cells", np.atleast_2d(members), 2)
    U = check_group("control cells", np.atleast_2d(controls), 2)
    M = F.shape[0]
    if U.shape[0] != M:
        raise DataError("scores of forget and control cells", f"{M} and {U.shape[0]} models", "the same models")
    if M < 1:
        raise EmptyGroupError("models of a population", 0, "at least 1")
    ranks = [_ranks_among(member, control) for member, control in zip(F, U, strict=True)]
    aucs = np.array([(below + up_to).mean() / (2 * U.shape[1]) for below, up_to, _ in ranks])
    blocks = _resampled_aucs(F, U, draws, generator := numpy_generator(seed, "population_auc"))
    means = np.concatenate([(block * _weights(generator, len(block), M)).sum(axis=1) / M for block in blocks])
    pairs = min(F.shape[1], U.shape[1])
    variance, freedom = _crossed_variance(aucs, float(means.var(ddof=1)), pairs)
    quantile = float(scipy.stats.t.ppf((1 + level) / 2, freedom))
    return float(aucs.mean()), _logit_interval(float(aucs.mean()), variance, quantile, pairs, level)


def mean_interval(values: npt.ArrayLike, level: float) -> Interval:
    """Student-t interval of a mean over independently trained models.

    Parameters
    ----------
    values : ``[M]``
        One number a model.
    level
        Coverage, in (0, 1).

    Returns
    -------
    interval
        (NaN, NaN) with one model: its spread is unknown, and ``plain`` writes it as null.

    Raises
    ------
    EmptyGroupError
        Without any model.
    """
    array = check_group("models of a mean", values, 1)
    if array.size == 1:
        return float("nan"), float("nan")
    width = float(scipy.stats.t.ppf((1 + level) / 2, array.size - 1) * array.std(ddof=1) / np.sqrt(array.size))
    return float(array.mean()) - width, float(array.mean()) + width


def bca(
    groups: Sequence[npt.ArrayLike], statistic: Callable[..., float], level: float, seed: int, draws: int
) -> Interval:
    """Bias-corrected and accelerated bootstrap interval of any statistic of one or more independent groups.

    Parameters
    ----------
    groups : each ``[N_i]``
        Resampled separately (stratified); at least 2 values each.
    statistic
        Called with one array for each group.
    level, seed, draws
        Coverage in (0, 1); seed of the stream; resamples.

    Returns
    -------
    interval
        (NaN, NaN) where every resample gives the same value: BCa has no answer there.

    Notes
    -----
    Efron (1987), by ``scipy.stats.bootstrap``; use ``delong`` for an AUC, which needs no resampling.
    """
    arrays = [check_group("values to resample", group, 2) for group in groups]
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", category=scipy.stats.DegenerateDataWarning)
        result = scipy.stats.bootstrap(
            arrays,
            statistic,
            vectorized=False,
            n_resamples=draws,
            confidence_level=level,
            method="BCa",
            rng=numpy_generator(seed, "bca"),
        )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)

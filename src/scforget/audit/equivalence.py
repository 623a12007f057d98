"""Equivalence of unlearned and retrained models, up to a margin that was fixed beforehand.

The unit is an independently trained model. ``trace`` turns per-cell scores into one number a model;
``welch_equivalence`` compares two lists of such numbers (of that one, or of the membership AUC).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt
import scipy

from scforget.arrays import FloatArray
from scforget.audit.intervals import Interval, check_group, plain
from scforget.errors import DataError, EmptyGroupError
from scforget.seeding import numpy_generator

Side = Literal["inside", "beyond", "opposite", "undecided"]

# Half splits that the noise floor averages: all of them up to 10 models, a seeded sample beyond.
HALF_SPLITS = 200
# "Train 20 times as many models" is the largest advice that anybody can follow.
PRACTICAL_FACTOR = 20
# A spread below this share of the scores' size is rounding, not a difference between models.
ROUNDING = 1e-10


@dataclass(frozen=True)
class Equivalence:
    """One statistic of unlearned models compared with that of retrained ones.

    Attributes
    ----------
    mean, target_mean, difference
        Of the unlearned models, of the retrained ones, and the first minus the second.
    interval
        Welch interval of the difference at ``level``; (NaN, NaN) with a single model on either side.
    level, margin
        0.9 makes the interval the same test as TOST at 5 %; the largest difference that does not matter, > 0.
    p_tost
        The larger p-value of the two one-sided Welch tests against ±margin.
    power
        Chance of ending "inside" were the true difference 0, at the observed spreads and numbers of models.
    noise_floor
        Mean difference between two halves of the retrained models.
    side
        Of the interval: wholly ``inside`` the margin; wholly ``beyond`` it where the original lies; wholly beyond it on
        the ``opposite`` side; else ``undecided``.
    models_needed
        Times as many models of both kinds that should decide (1: decided already), taking the observed difference and
        spreads for true; None when more than 20, or with a single model.
    n_unlearned, n_retrained
        Numbers of models.
    """

    mean: float
    target_mean: float
    difference: float
    interval: Interval
    level: float
    margin: float
    p_tost: float
    power: float
    noise_floor: float
    side: Side
    models_needed: int | None
    n_unlearned: int
    n_retrained: int

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; NaN becomes null."""
        return plain(self)


def welch(unlearned: FloatArray, retrains: FloatArray, times: int = 1) -> tuple[float, float]:
    """Return standard error and Welch–Satterthwaite degrees of freedom of a difference of means.

    ``times`` asks for that many times as many models at the same spreads. Degrees of freedom are infinite when neither
    population varies at all.
    """
    sizes = times * unlearned.size, times * retrains.size
    parts = unlearned.var(ddof=1) / sizes[0], retrains.var(ddof=1) / sizes[1]
    spread = parts[0] ** 2 / (sizes[0] - 1) + parts[1] ** 2 / (sizes[1] - 1)
    freedom = (parts[0] + parts[1]) ** 2 / spread if spread > 0 else np.inf
    return float(np.sqrt(parts[0] + parts[1])), float(freedom)


def _side(interval: Interval, margin: float, original_side: int) -> Side:
    lower, upper = interval if original_side > 0 else (-interval[1], -interval[0])
    if lower > -margin and upper < margin:
        return "inside"
    if lower > margin:
        return "beyond"
    return "opposite" if upper < -margin else "undecided"


def _p_tost(difference: float, error: float, freedom: float, margin: float) -> float:
    if error == 0:
        return 0.0 if abs(difference) < margin else 1.0
    return float(scipy.stats.t.sf((margin - abs(difference)) / error, freedom))


def _power(error: float, freedom: float, margin: float, level: float) -> float:
    """Power of TOST when the true difference is 0.

    The test passes when |D| < margin − t·S. D is normal with the standard error; S² is that squared times χ²/df and
    independent of D, so the power is the mean of P(|D| < margin − t·S) over S, taken at 1,000 of its quantiles.
    """
    if error == 0:
        return 1.0
    quantiles = (np.arange(1000) + 0.5) / 1000
    estimated = error * np.sqrt(scipy.stats.chi2.ppf(quantiles, freedom) / freedom)
    room = (margin - scipy.stats.t.ppf((1 + level) / 2, freedom) * estimated) / error
    return float(np.clip(2 * scipy.stats.norm.cdf(room) - 1, 0, 1).mean())


def _models_needed(unlearned: FloatArray, retrains: FloatArray, margin: float, level: float) -> int | None:
    distance = abs(abs(float(unlearned.mean() - retrains.mean())) - margin)
    for times in range(1, PRACTICAL_FACTOR + 1):
        error, freedom = welch(unlearned, retrains, times)
        if scipy.stats.t.ppf((1 + level) / 2, freedom) * error < distance:
            return times
    return None


class _Tests(TypedDict):
    """The part of ``Equivalence`` that needs two models of each kind."""

    interval: Interval
    p_tost: float
    power: float
    side: Side
    models_needed: int | None


_NAN = float("nan")
_NO_TEST = _Tests(interval=(_NAN, _NAN), p_tost=_NAN, power=_NAN, side="undecided", models_needed=None)


def _tests(one: FloatArray, two: FloatArray, margin: float, level: float, original_side: int) -> _Tests:
    difference = float(one.mean() - two.mean())
    error, freedom = welch(one, two)
    width = float(scipy.stats.t.ppf((1 + level) / 2, freedom)) * error
    interval = (difference - width, difference + width)
    return _Tests(
        interval=interval,
        p_tost=_p_tost(difference, error, freedom, margin),
        power=_power(error, freedom, margin, level),
        side=_side(interval, margin, original_side),
        models_needed=_models_needed(one, two, margin, level),
    )


def welch_equivalence(
    unlearned: npt.ArrayLike, retrains: npt.ArrayLike, *, margin: float, level: float = 0.9, original_side: int = 1
) -> Equivalence:
    """Compare the unlearned models' statistic with the retrained ones' by two one-sided Welch tests.

    Parameters
    ----------
    unlearned : ``[M1]``
        One number a model; an original's unlearning seeds are averaged before. M1 >= 1.
    retrains : ``[M2]``
        The same statistic of each retrained model, M2 >= 1.
    margin
        Largest difference that does not matter, > 0, in the statistic's unit; fixed before the models are seen.
    level
        Of the interval; each one-sided test is at (1 − level)/2.
    original_side
        +1 or −1: on which side of the retrained models the original lies.

    Returns
    -------
    Equivalence

    Raises
    ------
    EmptyGroupError
        If either population is empty.
    DataError
        If a value is not finite, or the margin or the side cannot be.

    Notes
    -----
    Schuirmann (1987) with Welch's standard error and degrees of freedom: inside at ``level`` 0.9 if and only if
    ``statsmodels``' ``ttost_ind(…, usevar="unequal")`` gives p < 0.05. Retrain against retrain ends outside ±margin
    with a chance of at most 5 % on each side.
    """
    one, two = check_group("unlearned models", unlearned, 1), check_group("retrained models", retrains, 1)
    if not (np.isfinite(one).all() and np.isfinite(two).all()):
        raise DataError("statistic of a model", "an infinite value", "finite numbers")
    if margin <= 0 or original_side not in (-1, 1):
        raise DataError(
            "margin and side of an equivalence test", (margin, original_side), "margin > 0 and side 1 or -1"
        )
    known = min(one.size, two.size) >= 2
    return Equivalence(
        mean=float(one.mean()),
        target_mean=float(two.mean()),
        difference=float(one.mean() - two.mean()),
        level=level,
        margin=margin,
        noise_floor=half_difference(two),
        n_unlearned=one.size,
        n_retrained=two.size,
        **(_tests(one, two, margin, level, original_side) if known else _NO_TEST),
    )


def design_power(retrains: npt.ArrayLike, n_unlearned: int, *, margin: float, level: float) -> float:
    """Chance that a method as good as retraining is called so, by this number of models.

    Parameters
    ----------
    retrains : ``[M]``
        The statistic of each retrained model, M >= 2; their spread is taken for that of the unlearned ones too.
    n_unlearned
        Number of unlearned models, >= 2.
    margin, level
        As for ``welch_equivalence``.

    Returns
    -------
    float
        In [0, 1].
    """
    values = check_group("retrained models", retrains, 2)
    M = values.size
    parts = values.var(ddof=1) / np.array([n_unlearned, M])
    spread = (parts**2 / np.array([n_unlearned - 1, M - 1])).sum()
    freedom = parts.sum() ** 2 / spread if spread > 0 else np.inf
    return _power(float(np.sqrt(parts.sum())), float(freedom), margin, level)


def half_difference(retrains: npt.ArrayLike, *, seed: int = 0) -> float:
    """Noise floor: how far two halves of the retrained models lie apart, on average over half splits.

    Parameters
    ----------
    retrains : ``[M]``
        The statistic of each retrained model.
    seed
        Of the sample of 200 splits, which is only drawn when there are more (from 11 models on).

    Returns
    -------
    float
        Mean |mean of one half − mean of the other|; with an odd M one half has a model more; NaN with M < 2.
    """
    values = check_group("retrained models", retrains, 0)
    M, half = values.size, values.size // 2
    if half < 1:
        return float("nan")
    if comb(M, half) // (2 - M % 2) <= HALF_SPLITS:
        # With an even M each split would come twice: keep those whose first half holds model 0.
        splits = [np.array(s) for s in combinations(range(M), half) if M % 2 or s[0] == 0]
    else:
        generator = numpy_generator(seed, "half_difference")
        splits = [generator.permutation(M)[:half] for _ in range(HALF_SPLITS)]
    first = np.array([values[s].sum() for s in splits])
    return float(np.abs(first / half - (values.sum() - first) / (M - half)).mean())


def _standardised(scores: FloatArray, reference: FloatArray, shrinkage: float) -> FloatArray:
    """``[M, F]``: each score's distance to the reference models' mean, in their shrunk per-cell spreads."""
    variance = reference.var(axis=0, ddof=1)
    shrunk = (1 - shrinkage) * variance + shrinkage * np.median(np.sqrt(variance)) ** 2
    flat = np.sqrt(shrunk) <= ROUNDING * np.maximum(1, np.abs(reference).max())
    if flat.any():
        raise DataError(
            "spread of the retrained models' scores",
            f"none at {int(flat.sum())} of {flat.size} cells",
            "retrained models that differ (another seed each), or a trace shrinkage above 0",
        )
    return (scores - reference.mean(axis=0)) / np.sqrt(shrunk)


def _score_matrices(
    scores: npt.ArrayLike, retrain_scores: npt.ArrayLike, shrinkage: float, at_least: int
) -> tuple[FloatArray, FloatArray]:
    one, two = (np.atleast_2d(check_group("forget cells", array, 1)) for array in (scores, retrain_scores))
    if two.shape[0] < at_least:
        raise EmptyGroupError("retrained models of a trace", two.shape[0], f"at least {at_least}")
    if one.shape[1] != two.shape[1]:
        raise DataError(
            "cells of a trace", f"{one.shape[1]} and {two.shape[1]}", "the same forget cells for all models"
        )
    if not (np.isfinite(one).all() and np.isfinite(two).all()):
        raise DataError("scores of a trace", "an infinite value", "finite scores")
    if not 0 <= shrinkage <= 1:
        raise DataError("trace shrinkage", shrinkage, "a number in [0, 1]")
    return one, two


def trace(scores: npt.ArrayLike, retrain_scores: npt.ArrayLike, *, shrinkage: float) -> FloatArray:
    """Signed trace that the forget cells left in each model, in units of the retrained models' spread.

    Parameters
    ----------
    scores : ``[M, F]``, nats
        Per-cell ELBO of the F forget cells under M models.
    retrain_scores : ``[K, F]``, nats
        The same under K >= 2 retrained models.
    shrinkage
        w in [0, 1]: how much of each cell's variance is replaced by the typical one.

    Returns
    -------
    ``[M]``
        Positive: the model explains these cells better than models that never saw them; 0 for a retrain.

    Raises
    ------
    DataError
        If retrained models do not differ at some cell, so that there is no unit to measure in.
    EmptyGroupError
        With fewer than 2 retrained models or no cell.

    Notes
    -----
    T_m = mean over x of (s_m(x) − mean_R s(x)) / sd_R s(x), where sd_R² is (1 − w)·sd² + w·(median over cells of sd)²,
    sd with K − 1: a handful of models gives single cells a spread near 0 by luck, which would rule the mean.
    """
    one, two = _score_matrices(scores, retrain_scores, shrinkage, 2)
    return np.asarray(_standardised(one, two, shrinkage).mean(axis=1))


def _leave_one_out(retrain_scores: FloatArray, shrinkage: float) -> FloatArray:
    """``[K, F]``: each retrained model standardised by the others."""
    keep = ~np.eye(retrain_scores.shape[0], dtype=bool)
    return np.array([_standardised(s, retrain_scores[k], shrinkage) for s, k in zip(retrain_scores, keep, strict=True)])


def trace_leave_one_out(retrain_scores: npt.ArrayLike, shrinkage: float) -> FloatArray:
    """Trace of each retrained model against the others: the null that ``trace`` is compared with.

    Parameters
    ----------
    retrain_scores : ``[K, F]``, nats
        K >= 3.
    shrinkage
        As for ``trace``.

    Returns
    -------
    ``[K]``
        Around 0. Its spread is K/(K − 1) of the models' own, so a Welch test on it errs towards caution, and pays for
        the fact that all unlearned models are measured from the same mean_R.
    """
    _, two = _score_matrices(retrain_scores, retrain_scores, shrinkage, 3)
    return np.asarray(_leave_one_out(two, shrinkage).mean(axis=1))


def excess_abs_z(scores: npt.ArrayLike, retrain_scores: npt.ArrayLike, shrinkage: float) -> FloatArray:
    """Secondary, unsigned trace: mean |z| over cells minus what a retrained model shows against the others.

    Sees a change that raises some cells and lowers others, which cancel in ``trace``.

    Parameters
    ----------
    scores, retrain_scores, shrinkage
        As for ``trace``; K >= 3.

    Returns
    -------
    ``[M]``
        Around 0 for a retrain.
    """
    one, two = _score_matrices(scores, retrain_scores, shrinkage, 3)
    null = np.abs(_leave_one_out(two, shrinkage)).mean()
    return np.asarray(np.abs(_standardised(one, two, shrinkage)).mean(axis=1) - null)

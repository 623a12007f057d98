"""Distances between two samples of points: how far one distribution of a model's answers is from another."""

from __future__ import annotations

import numpy as np
import scipy

from scforget.arrays import FloatArray
from scforget.audit.intervals import BLOCK
from scforget.errors import DataError, EmptyGroupError
from scforget.seeding import numpy_generator

#: Directions of the sliced Wasserstein distance.
DIRECTIONS = 128


def _check(one: FloatArray, two: FloatArray) -> None:
    if one.ndim != 2 or two.ndim != 2 or one.shape[1] != two.shape[1] or one.shape[1] == 0:
        raise DataError("points of two samples", f"{one.shape} and {two.shape}", "[n, D] and [m, D]")
    if not (len(one) and len(two)):
        raise EmptyGroupError("points of a sample", 0, "at least 1")
    if not (np.isfinite(one).all() and np.isfinite(two).all()):
        raise DataError("points of two samples", "NaN or infinity", "finite numbers")


def sliced_wasserstein(one: FloatArray, two: FloatArray, seed: int) -> float:
    """Sliced Wasserstein-1 distance of two samples: the mean over random directions of the distance along each.

    Parameters
    ----------
    one, two : ``[n, D]``, ``[m, D]``
        Points, n, m >= 1.
    seed
        Of the :data:`DIRECTIONS` directions; equal seeds compare all models along the same ones.

    Returns
    -------
    float
        >= 0; of one dimension the Wasserstein-1 distance itself, of more at most that.

    Raises
    ------
    EmptyGroupError
        If a sample has no point.
    DataError
        If the points have other dimensions, or are not finite.

    Notes
    -----
    Rabin et al. (2011), Bonneel et al. (2015). The exact distance in several dimensions is a linear programme in n·m
    unknowns (scipy: 2 s for 200 items of each kind, for each of a hundred models); sliced at every size, so that all
    numbers mean the same. A shift by d counts ‖d‖·Γ(D/2)/(√π·Γ((D + 1)/2)): 0.42·‖d‖ in 4 dimensions, 0.26·‖d‖ in 10.
    """
    _check(one, two)
    drawn = numpy_generator(seed, "sliced_wasserstein").standard_normal((DIRECTIONS, one.shape[1]))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    along = zip(drawn @ one.T, drawn @ two.T, strict=True)
    return float(np.mean([scipy.stats.wasserstein_distance(a, b) for a, b in along]))


def _mean_distance(one: FloatArray, two: FloatArray) -> float:
    rows = max(1, BLOCK // len(two))
    blocks = (one[start : start + rows] for start in range(0, len(one), rows))
    return sum(float(scipy.spatial.distance.cdist(block, two).sum()) for block in blocks) / (len(one) * len(two))


def energy(one: FloatArray, two: FloatArray) -> float:
    """Cramér (energy) distance 2·E‖X − Y‖ − E‖X − X'‖ − E‖Y − Y'‖ of two samples ``[n, D]``, ``[m, D]``, >= 0.

    Raises
    ------
    EmptyGroupError, DataError
        As of :func:`sliced_wasserstein`.

    Notes
    -----
    Székely & Rizzo (2013); the distance that P3's adversary estimates. Means are over all pairs, a point and itself
    included, so two samples of one distribution are not at 0: compare with the retrained models'. In one dimension it
    is the square of ``scipy.stats.energy_distance``.
    """
    _check(one, two)
    return max(0.0, 2 * _mean_distance(one, two) - _mean_distance(one, one) - _mean_distance(two, two))

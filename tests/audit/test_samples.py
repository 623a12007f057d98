"""Distances between samples, against scipy, closed forms and slow loops."""

from __future__ import annotations

from math import gamma, pi, sqrt

import numpy as np
import pytest
import scipy
from hypothesis import given
from hypothesis import strategies as st

from scforget.arrays import FloatArray
from scforget.audit import samples
from scforget.audit.samples import energy, sliced_wasserstein
from scforget.errors import DataError, EmptyGroupError

RNG = np.random.default_rng(0)
ONE, TWO = RNG.normal(size=(9, 3)), RNG.normal(0.7, 1.5, size=(14, 3))


def slow_energy(one: FloatArray, two: FloatArray) -> float:
    def mean(a: FloatArray, b: FloatArray) -> float:
        return float(np.mean([np.sqrt(((x - y) ** 2).sum()) for x in a for y in b]))

    return 2 * mean(one, two) - mean(one, one) - mean(two, two)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 6))
def test_energy_in_one_dimension_is_the_square_of_scipys(seed: int, n: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    one, two = rng.normal(size=n), rng.normal(size=m)
    wanted = scipy.stats.energy_distance(one, two) ** 2
    assert energy(one[:, None], two[:, None]) == pytest.approx(wanted, abs=1e-12)


def test_energy_equals_loops_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = slow_energy(ONE, TWO)
    assert energy(ONE, TWO) == pytest.approx(wanted, rel=1e-12)
    monkeypatch.setattr(samples, "BLOCK", 30)
    assert energy(ONE, TWO) == pytest.approx(wanted, rel=1e-12)


def test_energy_of_two_points_is_twice_their_distance_and_of_a_sample_with_itself_0() -> None:
    assert energy(np.zeros((1, 2)), np.array([[3.0, 4.0]])) == 10
    assert energy(ONE, ONE) == 0


def test_sliced_wasserstein_in_one_dimension_is_the_distance_itself() -> None:
    wanted = scipy.stats.wasserstein_distance(ONE[:, 0], TWO[:, 0])
    assert sliced_wasserstein(ONE[:, :1], TWO[:, :1], 3) == pytest.approx(wanted)


@pytest.mark.parametrize("D", [2, 10])
def test_sliced_wasserstein_of_a_shift_is_its_length_times_the_mean_coordinate_of_a_direction(D: int) -> None:
    points = RNG.normal(size=(20, D))
    shift = RNG.normal(size=D)
    wanted = np.linalg.norm(shift) * gamma(D / 2) / (sqrt(pi) * gamma((D + 1) / 2))
    found = np.mean([sliced_wasserstein(points, points + shift, seed) for seed in range(40)])
    assert found == pytest.approx(wanted, rel=0.02)


def test_sliced_wasserstein_is_at_most_the_distance_in_all_dimensions() -> None:
    exact = scipy.stats.wasserstein_distance_nd(ONE, TWO)
    assert 0.3 * exact < sliced_wasserstein(ONE, TWO, 0) < exact


def test_sliced_wasserstein_draws_the_same_directions_for_one_seed_only() -> None:
    assert sliced_wasserstein(ONE, TWO, 1) == sliced_wasserstein(ONE, TWO, 1) != sliced_wasserstein(ONE, TWO, 2)


@pytest.mark.parametrize("distance", [energy, lambda one, two: sliced_wasserstein(one, two, 0)])
def test_distances_refuse_what_is_no_sample(distance: object) -> None:
    assert callable(distance)
    with pytest.raises(DataError, match=r"points of two samples: found \(9, 3\) and \(14, 2\); wanted \[n, D\]"):
        distance(ONE, TWO[:, :2])
    with pytest.raises(EmptyGroupError, match="points of a sample: found 0; wanted at least 1"):
        distance(ONE[:0], TWO)
    with pytest.raises(DataError, match="NaN or infinity"):
        distance(ONE, np.full((1, 3), np.nan))

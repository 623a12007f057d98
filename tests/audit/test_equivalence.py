from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW, ttost_ind

from scforget.audit import equivalence
from scforget.audit.equivalence import welch_equivalence
from scforget.errors import DataError, EmptyGroupError

SEEDS = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(SEEDS, st.integers(2, 9), st.integers(2, 9))
def test_welch_equivalence_equals_statsmodels_tost(seed: int, m1: int, m2: int) -> None:
    rng = np.random.default_rng(seed)
    one, two = rng.normal(0.3, 1, m1), rng.normal(0, 2, m2)
    found = welch_equivalence(one, two, margin=1.0, level=0.9)
    assert found.p_tost == pytest.approx(ttost_ind(one, two, -1.0, 1.0, usevar="unequal")[0], abs=1e-9)
    interval = CompareMeans(DescrStatsW(one), DescrStatsW(two)).tconfint_diff(0.1, usevar="unequal")
    assert found.interval == pytest.approx(interval)
    assert (found.side == "inside") == (found.p_tost < 0.05)


@settings(deadline=None)
@given(SEEDS, st.sampled_from([-1, 1]))
def test_welch_equivalence_side_follows_its_interval(seed: int, original_side: int) -> None:
    rng = np.random.default_rng(seed)
    found = welch_equivalence(
        rng.normal(rng.uniform(-3, 3), 0.5, 5), rng.normal(0, 0.5, 8), margin=1.0, original_side=original_side
    )
    low, high = found.interval
    wanted = "undecided"
    if low > -1 and high < 1:
        wanted = "inside"
    elif low > 1:
        wanted = "beyond" if original_side == 1 else "opposite"
    elif high < -1:
        wanted = "opposite" if original_side == 1 else "beyond"
    assert found.side == wanted


def test_welch_equivalence_difference_is_unlearned_minus_retrain() -> None:
    found = welch_equivalence([3.0, 4.0], [1.0, 2.0], margin=0.5)
    assert (found.mean, found.target_mean, found.difference) == (3.5, 1.5, 2.0)
    assert (found.n_unlearned, found.n_retrained) == (2, 2)


@pytest.mark.parametrize(("sd1", "sd2"), [(1.0, 1.0), (0.3, 1.5)])
def test_welch_equivalence_at_the_margin_passes_at_most_at_its_level(sd1: float, sd2: float) -> None:
    rng, runs = np.random.default_rng(0), 2000
    margin = 2.0
    passes = 0
    for one, two in zip(rng.normal(margin, sd1, (runs, 5)), rng.normal(0, sd2, (runs, 8)), strict=True):
        error, freedom = equivalence.welch(one, two)
        passes += equivalence._p_tost(float(one.mean() - two.mean()), error, freedom, margin) < 0.05
    assert passes / runs < 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)
    assert passes / runs > 0.02  # and the margin was in reach


def test_welch_equivalence_of_retrains_is_rarely_beyond_or_opposite() -> None:
    rng = np.random.default_rng(1)
    sides = [
        welch_equivalence(one, two, margin=1e-9).side
        for one, two in zip(rng.normal(size=(400, 5)), rng.normal(size=(400, 8)), strict=True)
    ]
    for side in ("beyond", "opposite"):
        assert sides.count(side) / 400 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
    assert "inside" not in sides


@pytest.mark.parametrize("margin", [1.0, 1.5, 2.5])
def test_welch_equivalence_power_agrees_with_simulation(margin: float) -> None:
    rng, runs = np.random.default_rng(0), 3000
    draws = zip(rng.normal(0, 0.7, (runs, 5)), rng.normal(0, 1.1, (runs, 8)), strict=True)
    passes = 0
    for one, two in draws:
        error, freedom = equivalence.welch(one, two)
        passes += equivalence._p_tost(float(one.mean() - two.mean()), error, freedom, margin) < 0.05
    # The formula is given the true spreads, scaled samples of which have exactly these standard deviations.
    one = stats.zscore(np.arange(5.0), ddof=1) * 0.7
    two = stats.zscore(np.arange(8.0), ddof=1) * 1.1
    found = welch_equivalence(one, two, margin=margin)
    assert found.power == pytest.approx(passes / runs, abs=0.03)


def test_welch_equivalence_models_needed_is_the_smallest_factor_that_decides() -> None:
    one, two = np.array([-1.0, 0.0, 1.0]), np.array([-1.0, 0.0, 1.0]) + 0.2
    found = welch_equivalence(one, two, margin=1.0)
    assert found.side == "undecided"
    assert found.models_needed is not None
    assert found.models_needed > 1
    for times, inside in ((found.models_needed - 1, False), (found.models_needed, True)):
        error, freedom = equivalence.welch(one, two, times)
        assert bool(0.2 + stats.t.ppf(0.95, freedom) * error < 1) is inside


def test_welch_equivalence_models_needed_is_none_at_the_margin() -> None:
    found = welch_equivalence([0.0, 1.0, 2.0], [-1.0, 0.0, 1.0], margin=1.0)
    assert found.side == "undecided"
    assert found.models_needed is None


@settings(deadline=None)
@given(SEEDS)
def test_welch_equivalence_models_needed_is_one_exactly_if_decided(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = welch_equivalence(rng.normal(rng.uniform(-3, 3), 0.7, 4), rng.normal(0, 0.7, 6), margin=1.0)
    assert (found.models_needed == 1) == (found.side != "undecided")


def test_welch_equivalence_with_one_model_decides_nothing() -> None:
    found = welch_equivalence([0.5], [0.5, 0.6, 0.4], margin=10.0)
    assert found.side == "undecided"
    assert found.models_needed is None
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["interval"] == [None, None]
    assert record["p_tost"] is None


@pytest.mark.parametrize(("shift", "side", "p"), [(0.0, "inside", 0.0), (0.5, "beyond", 1.0)])
def test_welch_equivalence_of_models_without_spread_is_a_plain_comparison(shift: float, side: str, p: float) -> None:
    found = welch_equivalence([1.0 + shift] * 3, [1.0] * 4, margin=0.1)
    assert (found.side, found.p_tost, found.power, found.models_needed) == (side, p, 1.0, 1)
    assert found.interval == (shift, shift)


@pytest.mark.parametrize(
    ("unlearned", "margin", "side"), [([np.inf, 1.0], 1.0, 1), ([0.0, 1.0], 0.0, 1), ([0.0, 1.0], 1.0, 0)]
)
def test_welch_equivalence_refuses_impossible_input(unlearned: list[float], margin: float, side: int) -> None:
    with pytest.raises(DataError):
        welch_equivalence(unlearned, [0.0, 1.0], margin=margin, original_side=side)


def test_welch_equivalence_refuses_no_models() -> None:
    with pytest.raises(EmptyGroupError, match="retrained models"):
        welch_equivalence([0.0, 1.0], [], margin=1.0)


@settings(deadline=None)
@given(SEEDS, st.integers(2, 9))
def test_half_difference_equals_all_half_splits(seed: int, M: int) -> None:
    values = np.random.default_rng(seed).normal(size=M)
    expected = []
    for first in combinations(range(M), M // 2):
        second = [i for i in range(M) if i not in first]
        expected.append(abs(values[list(first)].mean() - values[second].mean()))
    assert equivalence.half_difference(values) == pytest.approx(np.mean(expected))


def test_half_difference_of_many_models_samples_near_the_expected_value() -> None:
    values = stats.norm.ppf((np.arange(40) + 0.5) / 40)
    found = equivalence.half_difference(values)
    # Difference of two means of 20: normal with variance 2/20.
    assert found == pytest.approx(np.sqrt(0.1) * np.sqrt(2 / np.pi), rel=0.15)
    assert found == equivalence.half_difference(values)
    assert found != equivalence.half_difference(values, seed=1)


def test_half_difference_of_one_model_is_unknown() -> None:
    assert np.isnan(equivalence.half_difference([1.0]))


@settings(deadline=None)
@given(SEEDS, st.sampled_from([0.0, 0.3, 1.0]))
def test_trace_equals_loop(seed: int, shrinkage: float) -> None:
    rng = np.random.default_rng(seed)
    scores, retrains = rng.normal(size=(3, 6)), rng.normal(-1, 2, (5, 6))
    typical = np.median([np.std(retrains[:, x], ddof=1) for x in range(6)]) ** 2
    expected = []
    for row in scores:
        terms = []
        for x in range(6):
            variance = (1 - shrinkage) * np.var(retrains[:, x], ddof=1) + shrinkage * typical
            terms.append((row[x] - np.mean(retrains[:, x])) / np.sqrt(variance))
        expected.append(np.mean(terms))
    np.testing.assert_allclose(equivalence.trace(scores, retrains, shrinkage=shrinkage), expected)


@settings(deadline=None)
@given(SEEDS)
def test_trace_is_unchanged_by_a_shared_shift_and_scale(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, retrains, shift = rng.normal(size=(2, 4)), rng.normal(size=(4, 4)), rng.normal(size=4)
    moved = equivalence.trace(3 * scores + shift, 3 * retrains + shift, shrinkage=0.4)
    np.testing.assert_allclose(moved, equivalence.trace(scores, retrains, shrinkage=0.4), rtol=1e-6, atol=1e-6)


def test_trace_leave_one_out_equals_trace_against_the_others() -> None:
    retrains = np.random.default_rng(0).normal(size=(5, 7))
    expected = [equivalence.trace(retrains[k], np.delete(retrains, k, axis=0), shrinkage=0.5)[0] for k in range(5)]
    np.testing.assert_allclose(equivalence.trace_leave_one_out(retrains, 0.5), expected)


def test_trace_of_a_new_retrain_passes_its_test_at_most_at_level_when_shifted_by_the_margin() -> None:
    """Type-I error of the whole chain: traces, leave-one-out null, Welch test, at a true trace of one margin."""
    rng, runs, inside, outside = np.random.default_rng(0), 300, 0, 0
    for _ in range(runs):
        ease = rng.normal(size=40) * 20
        # Models differ as a whole (0.6) and cell by cell (0.8): spread 1 at each cell.
        retrains = ease + 0.6 * rng.normal(size=(8, 1)) + 0.8 * rng.normal(size=(8, 40))
        fresh = ease + 0.6 * rng.normal(size=(5, 1)) + 0.8 * rng.normal(size=(5, 40))
        null = equivalence.trace_leave_one_out(retrains, 0.5)
        for shift in (0.0, 1.0):
            traces = equivalence.trace(fresh + shift, retrains, shrinkage=0.5)
            side = welch_equivalence(traces, null, margin=1.0).side
            inside += shift == 1 and side == "inside"
            outside += shift == 0 and side in ("beyond", "opposite")
    allowed = 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)
    assert inside / runs < allowed
    assert outside / runs < allowed


def test_trace_finds_a_planted_leak() -> None:
    rng = np.random.default_rng(0)
    retrains, unlearned = rng.normal(size=(8, 50)), rng.normal(size=(5, 50)) + 3
    null = equivalence.trace_leave_one_out(retrains, 0.5)
    found = welch_equivalence(equivalence.trace(unlearned, retrains, shrinkage=0.5), null, margin=1.0)
    assert found.side == "beyond"


@pytest.mark.parametrize("shrinkage", [0.0, 0.5, 1.0])
def test_trace_refuses_identical_retrains(shrinkage: float) -> None:
    row = np.random.default_rng(0).normal(-600, 100, 9)
    with pytest.raises(DataError, match="retrained models that differ"):
        equivalence.trace(row + 1, np.tile(row, (4, 1)), shrinkage=shrinkage)


def test_trace_survives_one_flat_cell_only_with_shrinkage() -> None:
    retrains = np.random.default_rng(0).normal(size=(4, 9))
    retrains[:, 2] = 1.0
    with pytest.raises(DataError, match="1 of 9 cells"):
        equivalence.trace(retrains, retrains, shrinkage=0.0)
    assert np.isfinite(equivalence.trace(retrains, retrains, shrinkage=0.5)).all()


def test_trace_refuses_too_few_models_other_cells_and_other_shrinkage() -> None:
    scores = np.random.default_rng(0).normal(size=(3, 4))
    with pytest.raises(EmptyGroupError, match="at least 2"):
        equivalence.trace(scores, scores[:1], shrinkage=0.5)
    with pytest.raises(EmptyGroupError, match="at least 3"):
        equivalence.trace_leave_one_out(scores[:2], 0.5)
    with pytest.raises(EmptyGroupError, match="forget cells"):
        equivalence.trace(scores[:, :0], scores[:, :0], shrinkage=0.5)
    with pytest.raises(DataError, match="same forget cells"):
        equivalence.trace(scores[:, :2], scores, shrinkage=0.5)
    with pytest.raises(DataError, match="shrinkage"):
        equivalence.trace(scores, scores, shrinkage=1.5)
    with pytest.raises(DataError, match="finite"):
        equivalence.trace(np.full((1, 4), np.inf), scores, shrinkage=0.5)


def test_excess_abs_z_is_about_zero_for_retrains_and_sees_what_trace_cannot() -> None:
    rng = np.random.default_rng(0)
    retrains, fresh = rng.normal(size=(12, 400)), rng.normal(size=(6, 400))
    assert abs(equivalence.excess_abs_z(fresh, retrains, 0.5).mean()) < 0.05
    torn = fresh + np.where(np.arange(400) % 2, 4, -4)
    assert (equivalence.excess_abs_z(torn, retrains, 0.5) > 2).all()
    assert (np.abs(equivalence.trace(torn, retrains, shrinkage=0.5)) < 0.5).all()

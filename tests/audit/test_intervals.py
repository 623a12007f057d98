from __future__ import annotations

import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from scforget.arrays import FloatArray
from scforget.audit import intervals, roc
from scforget.errors import DataError, EmptyGroupError

SCORES = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=15)


def at_least(covered: int, runs: int, level: float) -> bool:
    """Whether a coverage of at least ``level`` could have given this count (3 standard errors of the simulation)."""
    return covered >= runs * level - 3 * np.sqrt(runs * level * (1 - level))


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (1, 299)])
def test_clopper_pearson_equals_scipy_exact(k: int, n: int) -> None:
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="exact")
    assert intervals.clopper_pearson(k, n, 0.95) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("p", [0.01, 0.3])
def test_clopper_pearson_covers_exactly_at_least_its_level(p: float) -> None:
    bounds = [intervals.clopper_pearson(k, 40, 0.9) for k in range(41)]
    covered = sum(stats.binom.pmf(k, 40, p) for k, (low, high) in enumerate(bounds) if low <= p <= high)
    assert covered >= 0.9


def test_clopper_pearson_refuses_no_trials() -> None:
    with pytest.raises(EmptyGroupError):
        intervals.clopper_pearson(0, 0, 0.95)


def brute_delong(members: list[float], controls: list[float]) -> tuple[float, float]:
    m, c = np.array(members)[:, None], np.array(controls)[None]
    psi = (m > c) + 0.5 * (m == c)
    return psi.mean(), psi.mean(1).var(ddof=1) / m.size + psi.mean(0).var(ddof=1) / c.size


@settings(deadline=None)
@given(SCORES, SCORES)
def test_delong_equals_the_kernel_formula(members: list[float], controls: list[float]) -> None:
    auc, variance, (low, high) = intervals.delong(members, controls, 0.95)
    assert (auc, variance) == pytest.approx(brute_delong(members, controls), abs=1e-12)
    assert 0 <= low <= auc + 1e-9
    assert auc - 1e-9 <= high <= 1


def test_delong_interval_is_symmetric_on_the_logit() -> None:
    rng = np.random.default_rng(0)
    auc, variance, interval = intervals.delong(rng.normal(0.5, 1, 30), rng.normal(size=60), 0.95)
    logit = np.log(np.array(interval) / (1 - np.array(interval)))
    assert logit.mean() == pytest.approx(np.log(auc / (1 - auc)))
    half = stats.norm.ppf(0.975) * np.sqrt(variance) / (auc * (1 - auc))
    assert np.ptp(logit) / 2 == pytest.approx(half)


@pytest.mark.parametrize("reverse", [False, True])
def test_delong_of_separated_groups_keeps_an_open_end(reverse: bool) -> None:
    low_scores, high_scores = np.arange(10.0), np.arange(10.0, 40.0)
    groups = (low_scores, high_scores) if reverse else (high_scores, low_scores)
    auc, variance, interval = intervals.delong(*groups, 0.95)
    gap = 1 - stats.binomtest(10, 10).proportion_ci(0.95, method="exact").low
    assert variance == 0
    assert (auc, interval) == ((0, pytest.approx((0, gap))) if reverse else (1, pytest.approx((1 - gap, 1))))


def test_delong_of_equal_scores_is_centred_and_open() -> None:
    auc, _, (low, high) = intervals.delong(np.ones(8), np.ones(9), 0.95)
    assert auc == 0.5
    assert 0 < low < 0.5 < high < 1
    assert low + high == pytest.approx(1)


def test_delong_refuses_a_single_cell() -> None:
    with pytest.raises(EmptyGroupError, match="at least 2"):
        intervals.delong([1.0], [0.0, 2.0], 0.95)


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_delong_covers_its_level(shift: float) -> None:
    rng, runs = np.random.default_rng(1), 800
    truth = stats.norm.cdf(shift / np.sqrt(2))
    found = [intervals.delong(rng.normal(shift, 1, 25), rng.normal(size=60), 0.95)[2] for _ in range(runs)]
    assert at_least(sum(low <= truth <= high for low, high in found), runs, 0.94)


def test_resampled_aucs_equal_the_weighted_kernel() -> None:
    rng = np.random.default_rng(0)
    members, controls = rng.integers(0, 5, (3, 7)).astype(float), rng.integers(0, 5, (3, 9)).astype(float)
    found = np.concatenate(list(intervals._resampled_aucs(members, controls, 20, np.random.default_rng(4))))
    generator = np.random.default_rng(4)
    w_f, w_u = intervals._weights(generator, 20, 7), intervals._weights(generator, 20, 9)
    for model in range(3):
        m, c = members[model][:, None], controls[model][None]
        kernel = (m > c) + 0.5 * (m == c)
        np.testing.assert_allclose(found[:, model], np.einsum("df,fu,du->d", w_f, kernel, w_u) / 63)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_population_auc_is_the_mean_over_models(seed: int) -> None:
    rng = np.random.default_rng(seed)
    members, controls = rng.integers(0, 6, (4, 10)).astype(float), rng.integers(0, 6, (4, 12)).astype(float)
    auc, (low, high) = intervals.population_auc(members, controls, 0.95, seed, 50)
    assert auc == pytest.approx(np.mean([roc.auc(m, c) for m, c in zip(members, controls, strict=True)]))
    assert 0 <= low <= auc <= high <= 1


def simulate_population(rng: np.random.Generator, M: int, F: int, U: int, spread: float) -> tuple[FloatArray, ...]:
    """Scores with an easiness of each cell, a leak that differs between models, and noise for each model and cell."""
    leak = 0.5 + spread * rng.normal(size=(M, 1))
    members = rng.normal(size=F) + leak + 0.5 * rng.normal(size=(M, F))
    return members, rng.normal(size=U) + 0.5 * rng.normal(size=(M, U))


@pytest.mark.parametrize(("M", "F", "U", "spread"), [(5, 30, 60, 0.15), (3, 60, 90, 0.3), (1, 25, 50, 0.0)])
def test_population_auc_covers_its_level(M: int, F: int, U: int, spread: float) -> None:
    rng, runs = np.random.default_rng(2), 700
    # AUC of N(δ, 1 + ¼ + spread²) against N(0, 1 + ¼), averaged over models.
    truth = stats.norm.cdf(0.5 / np.sqrt(2.5 + spread**2))
    covered = 0
    for run in range(runs):
        low, high = intervals.population_auc(*simulate_population(rng, M, F, U, spread), 0.95, run, 200)[1]
        covered += bool(low <= truth <= high)
    assert at_least(covered, runs, 0.94)


def test_population_auc_without_spread_of_cells_is_a_student_interval_over_models() -> None:
    # Each model gives all members one score, so that its AUC is 1 or ½ whatever cells are drawn.
    members = np.repeat([[1.0], [0.0], [0.0], [1.0]], 50, axis=1)
    auc, interval = intervals.population_auc(members, np.zeros((4, 60)), 0.95, 0, 20_000)
    assert auc == 0.75
    half = stats.t.ppf(0.975, 3) * np.std([1, 0.5, 0.5, 1], ddof=1) / np.sqrt(4) / (0.75 * 0.25)
    logit = np.log(np.array(interval) / (1 - np.array(interval)))
    np.testing.assert_allclose(logit, [np.log(3) - half, np.log(3) + half], rtol=0.05)


def test_population_auc_of_one_model_is_about_its_delong_interval() -> None:
    rng = np.random.default_rng(0)
    members, controls = rng.normal(0.7, 1, 150), rng.normal(size=200)
    interval = intervals.population_auc(members, controls, 0.95, 0, 4000)[1]
    np.testing.assert_allclose(interval, intervals.delong(members, controls, 0.95)[2], atol=0.006)


def test_population_auc_widens_when_models_disagree() -> None:
    rng = np.random.default_rng(3)
    members, controls = np.tile(rng.normal(size=200), (4, 1)), np.tile(rng.normal(size=200), (4, 1))
    alike = intervals.population_auc(members, controls, 0.95, 0, 300)[1]
    apart = intervals.population_auc(members + np.array([[-1.0], [-0.5], [0.5], [1.0]]), controls, 0.95, 0, 300)[1]
    assert np.diff(apart) > 2 * np.diff(alike)


def test_population_auc_repeats_with_its_seed() -> None:
    members, controls = simulate_population(np.random.default_rng(0), 3, 20, 30, 0.1)
    first, second = (intervals.population_auc(members, controls, 0.95, 5, 100) for _ in range(2))
    assert first == second
    assert first != intervals.population_auc(members, controls, 0.95, 6, 100)


def test_population_auc_of_separated_groups_keeps_an_open_end() -> None:
    auc, (low, high) = intervals.population_auc(np.ones((3, 11)), np.zeros((3, 17)), 0.95, 0, 50)
    assert (auc, high) == (1, 1)
    assert 0.6 < low < 0.8


def test_population_auc_of_large_groups_is_bounded_in_memory() -> None:
    rng = np.random.default_rng(0)
    members, controls = rng.normal(size=(2, 10_000)), rng.normal(size=(2, 10_000))
    tracemalloc.start()
    intervals.population_auc(members, controls, 0.95, 0, 400)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The kernel of one model alone would be 800 MB.
    assert peak < 300e6


@pytest.mark.parametrize(
    ("members", "controls", "error"),
    [
        (np.zeros((2, 1)), np.zeros((2, 5)), EmptyGroupError),
        (np.zeros((2, 5)), np.zeros((3, 5)), DataError),
        (np.zeros((0, 5)), np.zeros((0, 5)), EmptyGroupError),
        (np.full((2, 5), np.nan), np.zeros((2, 5)), DataError),
    ],
)
def test_population_auc_refuses_what_it_cannot_judge(
    members: FloatArray, controls: FloatArray, error: type[Exception]
) -> None:
    with pytest.raises(error):
        intervals.population_auc(members, controls, 0.95, 0, 10)


def test_mean_interval_equals_scipy() -> None:
    values = np.random.default_rng(0).normal(size=7)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert intervals.mean_interval(values, 0.95) == pytest.approx((expected.low, expected.high))


def test_mean_interval_of_one_model_is_unknown() -> None:
    assert np.isnan(intervals.mean_interval([0.7], 0.95)).all()
    with pytest.raises(EmptyGroupError):
        intervals.mean_interval([], 0.95)


def test_mean_interval_covers_its_level() -> None:
    draws = np.random.default_rng(0).normal(1, 2, (1000, 5))
    covered = sum(low <= 1 <= high for low, high in (intervals.mean_interval(row, 0.95) for row in draws))
    assert at_least(covered, 1000, 0.95)
    assert covered < 980  # not merely because it is too wide


def test_bca_equals_scipy_and_contains_the_estimate() -> None:
    values = np.random.default_rng(0).exponential(size=40)
    low, high = intervals.bca([values], lambda x: float(np.mean(x)), 0.95, 0, 500)
    assert low < values.mean() < high
    reference = stats.bootstrap((values,), np.mean, n_resamples=4000, method="BCa", rng=1).confidence_interval
    assert (low, high) == pytest.approx((reference.low, reference.high), rel=0.1)


def test_bca_of_a_constant_is_unknown() -> None:
    assert np.isnan(intervals.bca([np.ones(9)], lambda x: float(np.mean(x)), 0.95, 0, 50)).all()


def test_bca_resamples_two_groups_apart() -> None:
    rng = np.random.default_rng(0)
    members, controls = rng.normal(1, 1, 30), rng.normal(size=40)
    low, high = intervals.bca([members, controls], roc.auc, 0.95, 0, 300)
    expected = intervals.delong(members, controls, 0.95)[2]
    assert (low, high) == pytest.approx(expected, abs=0.05)


def test_plain_writes_null_for_what_json_lacks() -> None:
    @dataclass(frozen=True)
    class Record:
        interval: tuple[float, float]
        value: float
        name: str

    assert intervals.plain(Record((float("nan"), 1.0), float("inf"), "x")) == {
        "interval": [None, 1.0],
        "value": None,
        "name": "x",
    }

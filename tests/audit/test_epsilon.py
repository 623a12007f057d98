from __future__ import annotations

import json
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from scforget.audit import epsilon, intervals
from scforget.audit.epsilon import epsilon_lower_bound, epsilon_one_run
from scforget.errors import DataError, EmptyGroupError

Rule = Literal["bonferroni", "held_out"]
RULES: list[Rule] = ["bonferroni", "held_out"]
LEVEL = 0.95


def at_most(count: int, runs: int, chance: float) -> bool:
    """Whether a chance of at most this could have given the count (3 standard errors of the simulation)."""
    return count <= runs * chance + 3 * np.sqrt(runs * chance * (1 - chance))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Exact ε at δ of telling N(0, 1) from N(mu, 1)."""

    def excess(eps: float) -> float:
        own = stats.norm.cdf(mu / 2 - eps / mu) - np.exp(eps) * stats.norm.cdf(-mu / 2 - eps / mu)
        return float(own - delta)

    return float(optimize.brentq(excess, 0, 50))


def slow_bound(positives: list[float], negatives: list[float], delta: float, errors: tuple[float, float]) -> float:
    """The largest of the four claims over all thresholds, one event and one binomial test at a time."""
    found = 0.0
    sides = (positives, errors[0]), (negatives, errors[1])
    for t in {*positives, *negatives}:
        for one, two in (sides, sides[::-1]):
            for inside in (lambda s, t=t: s >= t, lambda s, t=t: s < t):
                ends = []
                for scores, error in (one, two):
                    k = sum(inside(s) for s in scores)
                    ends.append(intervals.clopper_pearson(k, len(scores), 1 - 2 * error))
                likely, rare = ends[0][0], ends[1][1]
                if likely > delta:
                    found = max(found, float(np.log((likely - delta) / rare)))
    return found


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=12),
    st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=12),
    st.sampled_from([0.0, 0.01, 0.3]),
)
def test_epsilon_lower_bound_equals_slow_code_over_all_rules(
    positives: list[float], negatives: list[float], delta: float
) -> None:
    found = epsilon_lower_bound(positives, negatives, level=0.6, delta=delta, rule="bonferroni", seed=0)
    errors = 0.4 / (4 * len(positives)), 0.4 / (4 * len(negatives))
    assert found.epsilon == pytest.approx(slow_bound(positives, negatives, delta, errors), abs=1e-9)
    assert 0 <= found.epsilon <= found.ceiling + 1e-12


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_epsilon_lower_bound_depends_on_ranks_and_not_on_names_or_directions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, two = rng.normal(2, 1, 20), rng.normal(size=20)
    pairs = [(one, two), (two, one), (-one, -two), (np.exp(one), np.exp(two))]
    found = [epsilon_lower_bound(*pair, level=0.9, delta=0.0, rule="bonferroni", seed=1).epsilon for pair in pairs]
    assert found[1:] == pytest.approx([found[0]] * 3)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_epsilon_lower_bound_held_out_ignores_shift_and_scale(seed: int) -> None:
    # Whole numbers and powers of two: the arithmetic is exact.
    rng = np.random.default_rng(seed)
    one, two = rng.integers(-2, 9, 20).astype(float), rng.integers(-5, 6, 20).astype(float)
    pairs = [(one, two), (4 * one + 8, 4 * two + 8)]
    found = [epsilon_lower_bound(*pair, level=0.9, delta=0.0, rule="held_out", seed=1).epsilon for pair in pairs]
    assert found[0] == found[1]


@pytest.mark.parametrize("discrete", [False, True])
def test_epsilon_lower_bound_bands_hold_at_every_threshold_at_once(discrete: bool) -> None:
    """The lemma behind ``bonferroni``: Clopper–Pearson bounds at all thresholds, of which any may then be chosen."""
    rng, runs, n, wrong = np.random.default_rng(0), 1000, 40, 0
    error, _ = epsilon._simultaneous_errors(n, n, 0.6)  # of the 40 % half is for this sample
    for _ in range(runs):
        scores = rng.integers(0, 6, n).astype(float) if discrete else rng.uniform(size=n)
        thresholds = np.arange(6.0) if discrete else np.repeat(scores, 2)
        truth = 1 - thresholds / 6 if discrete else 1 - thresholds
        counts = epsilon._count(scores, thresholds)
        if not discrete:  # just above and just below each observed score
            counts[1::2] -= 1
        low, high = epsilon._bounds(counts, n, error)
        wrong += bool(((truth < low) | (truth > high)).any())
    assert at_most(wrong, runs, 0.2)
    assert wrong > 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("level", [0.5, LEVEL])
def test_epsilon_lower_bound_of_null_data_is_zero_at_its_level(rule: Rule, discrete: bool, level: float) -> None:
    """At 0.5 a choice of the threshold that is not paid for shows most: it is above 0 nearly always."""
    rng, runs, above = np.random.default_rng(1), 200, 0
    for run in range(runs):
        one, two = rng.normal(size=(2, 100))
        if discrete:
            one, two = np.round(one), np.round(two)
        above += epsilon_lower_bound(one, two, level=level, delta=0.0, rule=rule, seed=run).epsilon > 0
    assert at_most(above, runs, 1 - level)


def test_gaussian_epsilon_is_the_best_threshold_rule() -> None:
    mu, delta = 1.5, 0.02
    eps = gaussian_epsilon(mu, delta)
    rules = [stats.norm.sf(t, mu) - np.exp(eps) * stats.norm.sf(t) for t in np.linspace(-3, 5, 801)]
    assert max(rules) == pytest.approx(delta, abs=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("mu", "delta"), [(0.5, 0.1), (1.0, 0.05)])
def test_epsilon_lower_bound_of_a_gaussian_mechanism_is_below_the_exact_epsilon(
    rule: Rule, mu: float, delta: float
) -> None:
    truth, rng, runs, above = gaussian_epsilon(mu, delta), np.random.default_rng(2), 200, 0
    for run in range(runs):
        found = epsilon_lower_bound(
            rng.normal(mu, 1, 300), rng.normal(size=300), level=LEVEL, delta=delta, rule=rule, seed=run
        )
        above += found.epsilon > truth
    assert at_most(above, runs, 1 - LEVEL)


@pytest.mark.parametrize("rule", RULES)
def test_epsilon_lower_bound_of_randomised_response_is_right_at_its_level_and_near(rule: Rule) -> None:
    """One threshold attains ε here, so the bound is as tight as it can be, and errs as often as it may."""
    truth, rng, runs, found = 1.0, np.random.default_rng(3), 300, []
    q = special.expit(truth)
    for run in range(runs):
        one, two = rng.binomial(1, q, 500), rng.binomial(1, 1 - q, 500)
        found.append(epsilon_lower_bound(one, two, level=LEVEL, delta=0.0, rule=rule, seed=run).epsilon)
    assert at_most(int((np.array(found) > truth).sum()), runs, 1 - LEVEL)
    assert np.median(found) > 0.5


@pytest.mark.parametrize("rule", RULES)
def test_epsilon_lower_bound_sees_a_large_shift(rule: Rule) -> None:
    rng, above = np.random.default_rng(4), 0
    for run in range(100):
        found = epsilon_lower_bound(
            rng.normal(3, 1, 200), rng.normal(size=200), level=LEVEL, delta=1e-5, rule=rule, seed=run
        )
        above += found.epsilon > 1
    assert above >= 95


def test_epsilon_lower_bound_ceiling_is_the_bound_of_separated_samples() -> None:
    for rule in RULES:
        found = epsilon_lower_bound(np.arange(20) + 100.0, np.arange(30.0), level=LEVEL, delta=0.01, rule=rule, seed=0)
        assert found.epsilon == pytest.approx(found.ceiling)
        assert found.ceiling > 0
        assert (found.n_positives, found.n_negatives) == ((20, 30) if rule == "bonferroni" else (10, 15))
    # By hand: all of 10 and none of 15, each bound wrong with a chance of 2.5 %; the claim with 15 likely ones wins.
    likely, rare = 0.025 ** (1 / 15), 1 - 0.025 ** (1 / 10)
    other, its_rare = 0.025 ** (1 / 10), 1 - 0.025 ** (1 / 15)
    expected = max(np.log((likely - 0.01) / rare), np.log((other - 0.01) / its_rare))
    assert found.ceiling == pytest.approx(expected)


def test_epsilon_lower_bound_names_its_event() -> None:
    # All negatives lie in the middle of nothing: only "below 0" is likelier under the positives.
    found = epsilon_lower_bound(
        np.r_[-np.ones(30), np.ones(30)], np.ones(60), level=0.9, delta=0.0, rule="bonferroni", seed=0
    )
    assert (found.event, found.likelier, found.threshold) == ("below", "positives", 0.0)
    assert (found.positive_rate, found.negative_rate) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("lower", "upper", "wanted"),
    [(1.0, 3.0, 2.0), (2.0, 2.0, 2.0), (-np.inf, 3.0, 3.0), (1.0, np.inf, np.inf), (-np.inf, np.inf, np.inf)],
)
def test_midway_keeps_the_lower_score_out_and_the_upper_in(lower: float, upper: float, wanted: float) -> None:
    assert epsilon._midway(lower, upper) == wanted
    assert epsilon._midway(1.0, np.nextafter(1.0, 2)) == np.nextafter(1.0, 2)


def test_epsilon_lower_bound_of_one_value_is_zero_and_goes_into_json() -> None:
    found = epsilon_lower_bound(np.full(9, -np.inf), np.full(9, -np.inf), level=0.9, delta=0.0, rule="held_out", seed=0)
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["epsilon"] == 0
    assert record["threshold"] is None


def test_epsilon_lower_bound_repeats_with_its_seed() -> None:
    rng = np.random.default_rng(5)
    one, two = rng.normal(2, 1, 60), rng.normal(size=60)
    again = [epsilon_lower_bound(one, two, level=0.9, delta=0.0, rule="held_out", seed=s).epsilon for s in (0, 0, 1)]
    assert again[0] == again[1] != again[2]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"level": 1.0}, "level"),
        ({"delta": -0.1}, "δ"),
        ({"delta": 1.0}, "δ"),
        ({"rule": "best"}, "rule"),
        ({"positives": [np.nan, 1.0]}, "NaN"),
        ({"negatives": np.ones((2, 3))}, "two plain lists"),
    ],
)
def test_epsilon_lower_bound_refuses_impossible_input(change: dict[str, object], match: str) -> None:
    asked = {
        "positives": [0.0, 1.0],
        "negatives": [0.0, 1.0],
        "level": 0.9,
        "delta": 0.0,
        "rule": "held_out",
        "seed": 0,
    }
    with pytest.raises(DataError, match=match):
        epsilon_lower_bound(**{**asked, **change})  # type: ignore[arg-type]


def test_epsilon_lower_bound_refuses_one_score() -> None:
    with pytest.raises(EmptyGroupError, match="scores of negatives"):
        epsilon_lower_bound([0.0, 1.0], [0.0], level=0.9, delta=0.0, rule="bonferroni", seed=0)


def slow_p(eps: float, m: int, r: int, v: int, delta: float) -> float:
    """The theorem as it is written, one binomial coefficient at a time."""
    from math import comb

    q = np.exp(eps) / (1 + np.exp(eps))
    pmf = [comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    extra = max((sum(pmf[v - i : v]) / i for i in range(1, v + 1)), default=0.0)
    return float(sum(pmf[v:]) + 2 * m * delta * extra)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_epsilon_one_run_is_the_crossing_of_the_theorems_p_value(data: st.DataObject) -> None:
    m = data.draw(st.integers(1, 40))
    r = data.draw(st.integers(1, m))
    v = data.draw(st.integers(0, r))
    delta = data.draw(st.sampled_from([0.0, 1e-5, 1e-3]))
    found = epsilon_one_run(m, r, v, delta=delta, level=0.9)
    if found == 0:
        assert slow_p(1e-9, m, r, v, delta) > 0.1 - 1e-6
    else:
        assert slow_p(found, m, r, v, delta) == pytest.approx(0.1, abs=1e-6)
        assert slow_p(found + 0.01, m, r, v, delta) > 0.1


@pytest.mark.parametrize(("r", "v"), [(100, 70), (500, 400), (30, 30), (100, 50), (10, 0)])
def test_epsilon_one_run_without_delta_inverts_the_binomial_tail(r: int, v: int) -> None:
    lower = intervals.clopper_pearson(v, r, 0.9)[0]  # one-sided at 5 %
    expected = max(0.0, special.logit(lower)) if lower > 0 else 0.0
    assert epsilon_one_run(1000, r, v, delta=0.0, level=0.95) == pytest.approx(expected, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 80), st.data())
def test_epsilon_one_run_rises_with_right_guesses_and_falls_with_delta(r: int, data: st.DataObject) -> None:
    v = data.draw(st.integers(0, r - 1))
    bounds = [epsilon_one_run(2 * r, r, v + more, delta=1e-4, level=0.95) for more in (0, 1)]
    assert bounds[0] <= bounds[1]
    assert epsilon_one_run(2 * r, r, v, delta=1e-3, level=0.95) <= bounds[0]


@pytest.mark.parametrize("m", [40, 150])
@pytest.mark.parametrize(("truth", "delta"), [(0.0, 0.0), (0.5, 0.0), (2.0, 0.0), (1.0, 1e-3), (1.0, 0.02)])
def test_epsilon_one_run_of_randomised_response_covers_exactly_at_least_its_level(
    m: int, truth: float, delta: float
) -> None:
    """Each coin is told outright with a chance of δ, else by randomised response: (ε, δ), and exactly binomial."""
    right = delta + (1 - delta) * special.expit(truth)
    v = np.arange(m + 1)
    bounds = np.array([epsilon_one_run(m, m, int(k), delta=delta, level=0.95) for k in v])
    chances = stats.binom.pmf(v, m, right)
    assert chances[bounds <= truth].sum() >= 0.95
    if truth == 2 and m == 150:  # and it is not 0 out of caution
        assert (chances * bounds).sum() > 1.4


@pytest.mark.parametrize(("m", "r", "v"), [(0, 0, 0), (10, 0, 0), (10, 11, 5), (10, 5, 6), (10, 5, -1)])
def test_epsilon_one_run_refuses_counts_that_do_not_fit(m: int, r: int, v: int) -> None:
    with pytest.raises(DataError, match="m >= r >= 1"):
        epsilon_one_run(m, r, v, delta=0.0, level=0.95)


@pytest.mark.parametrize(("delta", "level"), [(1.0, 0.95), (0.0, 0.0)])
def test_epsilon_one_run_refuses_an_impossible_level_or_delta(delta: float, level: float) -> None:
    with pytest.raises(DataError):
        epsilon_one_run(10, 5, 5, delta=delta, level=level)

from __future__ import annotations

import math
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import StratifiedShuffleSplit

from scforget.arrays import FloatArray
from scforget.attacks import kaggle
from scforget.attacks.kaggle import DELTAS, forgetting_ceiling, forgetting_quality, kaggle_epsilon
from scforget.attacks.population import PopulationSettings, Scorer
from scforget.errors import DataError, EmptyGroupError

SCORERS: list[Scorer] = ["official", "suprun", "exact"]
# Few different values, so that ties are the rule.
OUTPUTS = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=6)
SEEDS = st.integers(0, 2**32 - 1)


@cache
def rule(fpr: float, fnr: float, delta: float, wrong: float = 0.0) -> float:
    """Epsilon of one rule, case by case; 0 where it is dropped."""
    if fpr == 0 and fnr == 0:
        return math.inf
    if fpr == 0 or fnr == 0:
        return 0.0
    sides = [math.log((1 - delta - a) / b) for a, b in ((fpr, fnr), (fnr, fpr)) if 1 - delta - a > 0]
    return max(0.0, *sides) if sides else wrong


def share(values: list[float], low: float, high: float) -> float:
    return sum(low <= v <= high for v in values) / len(values)


def slow_exact(u: list[float], r: list[float], delta: float) -> float:
    best, points = 0.0, sorted({*u, *r})
    for low in points:
        for high in points:
            in_u, in_r = share(u, low, high), share(r, low, high)
            if low <= high:
                best = max(best, rule(in_r, 1 - in_u, delta), rule(in_u, 1 - in_r, delta))
    return min(best, 50)


def slow_official(u: list[float], r: list[float], delta: float) -> float:
    range_u, range_r = max(u) - min(u), max(r) - min(r)
    if min(range_u, range_r) / max(range_u, range_r) < 0.01:
        return 50
    positive, negative = (r, u) if np.median(r) > np.median(u) else (u, r)
    low, high = min(u + r), max(u + r)
    best = 0.0
    for t in np.linspace(low, high, math.ceil(100 * (high - low))):
        best = max(best, rule(share(negative, t, math.inf), 1 - share(positive, t, math.inf), delta))
    if max(positive) - min(positive) >= max(negative) - min(negative):
        positive, negative = negative, positive
    width = max(positive) - min(positive)
    start, end = min(positive) + width - 2, max(positive) + 2
    for right in np.linspace(start, end, math.ceil(100 * (end - start))).tolist():
        for left in np.linspace(right - width - 2, right - width + 2, 400).tolist():
            best = max(best, rule(share(negative, left, right), 1 - share(positive, left, right), delta))
    return min(best, 50)


def slow_suprun(u: FloatArray, r: FloatArray, delta: float) -> float:
    found = [rule((r > t).mean(), (u <= t).mean(), delta, math.inf) for t in (*u, *r)]
    values, labels, rates = np.append(u, r)[:, None], np.repeat([1, 0], [u.size, r.size]), []
    for train, test in StratifiedShuffleSplit(3, random_state=0).split(values, labels):
        said = LogisticRegression().fit(values[train], labels[train]).predict(values[test])
        (tn, fp), (fn, tp) = confusion_matrix(labels[test], said, labels=[0, 1])
        rates.append((fp / (fp + tn), fn / (fn + tp)))
    fpr, fnr = np.mean(rates, axis=0)
    return float(min(max(*found, rule(fpr, fnr, delta, math.inf)), 50))


@pytest.mark.parametrize(
    ("u", "r"),
    [
        ([0.1, 0.9, 1.7], [0.3, 1.1, 2.2, 2.4]),
        ([0.0, 1.0, 1.0, 2.0], [1.0, 1.0, 3.0, 2.0]),  # ties
        ([-0.2, 0.0, 0.1], [-1.5, -0.1, 0.05, 2.0]),  # the narrower one within the wider one
        ([-1.5, -0.1, 0.05, 2.0], [-0.2, 0.0, 0.1]),
        ([0.0, 2.0, 1.5], [0.5, 2.5, 1.0]),  # equal ranges
        ([0.0, 1.5, 1.5, 3.0], [2.0, 2.0, 3.5, 4.0, 5.0]),  # equal ranges: the lower median is the inner one
        ([-5.5, -2.0, 0.5, 1.0, 3.0], [-0.5, 0.0, 2.0]),  # needs a slack above 1
        ([-9.5, -0.5, 1.5, 5.0], [-4.5, 0.0, 3.5]),  # and below 3
        ([-7.5, 0.5, 5.5], [-10.0, 1.5, 3.0, 6.0]),  # retrained above by the median
        ([-5.5, 0.5, 2.0, 2.5, 2.5], [-7.5, -1.5, -1.0, 0.5, 1.5]),  # unlearned above by the median
    ],
)
def test_kaggle_epsilon_official_equals_a_loop_over_every_rule(u: list[float], r: list[float]) -> None:
    found = kaggle_epsilon(np.array(u)[:, None], np.array(r)[:, None], scorer="official", delta=1e-5)
    assert found[0] == pytest.approx(slow_official(u, r, 1e-5), abs=1e-12)


@settings(deadline=None)
@given(OUTPUTS, OUTPUTS, st.sampled_from([0.0, 1e-5, 0.1]))
def test_kaggle_epsilon_exact_equals_a_loop_over_every_rule(u: list[float], r: list[float], delta: float) -> None:
    found = kaggle_epsilon(np.array(u)[:, None], np.array(r)[:, None], scorer="exact", delta=delta)
    assert found[0] == pytest.approx(slow_exact(u, r, delta), abs=1e-12)


@pytest.mark.parametrize(("M", "K"), [(6, 6), (8, 12), (20, 20)])
def test_kaggle_epsilon_suprun_equals_a_loop_over_every_rule(M: int, K: int) -> None:
    rng = np.random.default_rng(M)
    u, r = rng.normal([0, 1, 0, -9], 1, (M, 4)), rng.normal(0, [1, 1, 3, 1], (K, 4))
    found = kaggle_epsilon(u, r, scorer="suprun", delta=0.01)
    np.testing.assert_allclose(found, [slow_suprun(a, b, 0.01) for a, b in zip(u.T, r.T, strict=True)], atol=1e-12)
    assert found[3] == 50  # wrong on every model: as good as right on every model


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(2, 9), st.integers(2, 9))
def test_kaggle_epsilon_exact_is_never_below_official(seed: int, M: int, K: int) -> None:
    rng = np.random.default_rng(seed)
    u, r = rng.normal(rng.uniform(-1, 1), 1, (M, 2)), rng.normal(0, rng.uniform(0.3, 3), (K, 2))
    ranges = np.sort([np.ptp(u, axis=0), np.ptp(r, axis=0)], axis=0)
    exact, official = (kaggle_epsilon(u, r, scorer=scorer, delta=1e-5) for scorer in ("exact", "official"))
    assert ((exact >= official - 1e-12) | (ranges[0] < 0.01 * ranges[1])).all()


@settings(deadline=None)
@given(OUTPUTS, OUTPUTS)
def test_kaggle_epsilon_exact_depends_on_order_alone_and_on_neither_name(u: list[float], r: list[float]) -> None:
    one, two = np.array(u)[:, None], np.array(r)[:, None]
    found = kaggle_epsilon(one, two, scorer="exact", delta=1e-5)
    assert kaggle_epsilon(two, one, scorer="exact", delta=1e-5) == found
    assert kaggle_epsilon(np.exp(one), np.exp(two), scorer="exact", delta=1e-5) == found
    assert kaggle_epsilon(-one[::-1], -two, scorer="exact", delta=1e-5) == found


@pytest.mark.parametrize("scorer", SCORERS)
def test_kaggle_epsilon_of_separated_populations_is_the_cap(scorer: Scorer) -> None:
    u, r = np.linspace(5, 6, 8)[:, None], np.linspace(0, 1, 8)[:, None]
    for one, two in ((u, r), (r, u)):
        assert kaggle_epsilon(one, two, scorer=scorer, delta=DELTAS[scorer])[0] == 50


def test_kaggle_epsilon_official_caps_a_peaked_population_by_its_range() -> None:
    # On either side of an output of the wider population, so that no rule tells them apart without an error.
    r = np.linspace(0, 1, 9)[:, None]
    for width, capped in ((0.0099, True), (0.0101, False)):
        u = 0.5 + np.linspace(-0.5, 0.5, 8)[:, None] * width
        assert (kaggle_epsilon(u, r, scorer="official", delta=1e-5)[0] == 50) == capped
        assert kaggle_epsilon(u, r, scorer="exact", delta=1e-5)[0] < 50


def test_kaggle_epsilon_of_equal_constants_is_0_as_no_rule_is_left() -> None:
    same = np.ones((8, 1))
    assert [kaggle_epsilon(same, same, scorer=scorer, delta=0.01)[0] for scorer in SCORERS] == [0, 0, 0]


def test_kaggle_epsilon_of_512_models_reaches_the_published_largest() -> None:
    u, r = np.append(np.arange(1000, 1511), 0.0), np.append(np.arange(511), 2000.0)
    found = kaggle_epsilon(u[:, None], r[:, None], scorer="exact", delta=1e-5)[0]
    assert found == pytest.approx(math.log(511), abs=1e-4)


@pytest.mark.parametrize("scorer", SCORERS)
def test_kaggle_epsilon_refuses_bad_input(scorer: Scorer) -> None:
    good = np.random.default_rng(0).normal(size=(8, 3))
    bad = good.copy()
    bad[0, 0] = np.nan
    with pytest.raises(DataError, match="not finite"):
        kaggle_epsilon(bad, good, scorer=scorer, delta=0.0)
    with pytest.raises(DataError, match="same cells"):
        kaggle_epsilon(good, good[:, :2], scorer=scorer, delta=0.0)
    with pytest.raises(DataError, match="models by cells"):
        kaggle_epsilon(good[0], good[0], scorer=scorer, delta=0.0)
    with pytest.raises(DataError, match="delta"):
        kaggle_epsilon(good, good, scorer=scorer, delta=1.0)
    for one in (good[:1], good[:, :0]):
        with pytest.raises(EmptyGroupError):
            kaggle_epsilon(one, one, scorer=scorer, delta=0.0)


def test_kaggle_epsilon_suprun_refuses_folds_without_both_kinds() -> None:
    values = np.random.default_rng(0).normal(size=(36, 1))
    with pytest.raises(EmptyGroupError, match="5 and 5"):
        kaggle_epsilon(values[:5], values[5:10], scorer="suprun", delta=0.01)
    with pytest.raises(EmptyGroupError, match="2 and 30"):
        kaggle_epsilon(values[:2], values[2:32], scorer="suprun", delta=0.01)


@pytest.mark.parametrize(
    ("n_models", "epsilon", "points"),
    [
        (512, 0.0, 1.0),
        (512, 0.5, 0.5),
        (512, 6.24, 2 / 2**13),
        (512, 6.5, 2 / 2**14),
        (512, 7.0, 0.0),
        (10, 0.49, 1.0),
        (10, 2.99, 2 / 2**6),
        (10, 3.0, 0.0),
        (10, 50.0, 0.0),
    ],
)
def test_forgetting_quality_official_has_the_published_bins(n_models: int, epsilon: float, points: float) -> None:
    assert forgetting_quality([epsilon], n_models, "official") == points
    assert forgetting_quality([epsilon, 0.0], n_models, "exact") == (points + 1) / 2


@pytest.mark.parametrize(("epsilon", "number"), [(0, 1), (0.5, 2), (0.99, 2), (6, 13), (50, 13), (np.inf, 13)])
def test_forgetting_quality_suprun_has_13_bins(epsilon: float, number: int) -> None:
    assert forgetting_quality([epsilon], 10, "suprun") == 2 / 2**number


@pytest.mark.parametrize(
    ("epsilons", "n"), [([], 10), ([1.0], 2), ([np.nan], 10), ([-0.1], 10)], ids=["none", "n", "nan", "negative"]
)
def test_forgetting_quality_refuses_bad_input(epsilons: list[float], n: int) -> None:
    with pytest.raises(DataError):
        forgetting_quality(epsilons, n, "official")


def test_final_score_multiplies_the_utility_ratios() -> None:
    assert kaggle.final_score(0.5, 80, 100, 60, 75) == pytest.approx(0.5 * 0.8 * 0.8)
    assert kaggle.final_score(0.07, 0.9, 0.9, 0.6, 0.6) == pytest.approx(0.07)
    with pytest.raises(DataError, match="final score"):
        kaggle.final_score(0.1, 0.9, 0.0, 0.9, 0.9)
    with pytest.raises(DataError, match="final score"):
        kaggle.final_score(0.1, np.nan, 0.9, 0.9, 0.9)


@pytest.mark.parametrize("scorer", SCORERS)
def test_forgetting_ceiling_is_reproducible_and_in_order(scorer: Scorer) -> None:
    retrained = np.random.default_rng(0).normal(size=(14, 4))
    found, again, other = (
        forgetting_ceiling(retrained, 7, scorer=scorer, delta=DELTAS[scorer], seed=seed, draws=4) for seed in (0, 0, 1)
    )
    assert found == again != other
    assert 0 <= found["low"] <= found["mean"] <= found["high"] <= 1


def test_forgetting_ceiling_averages_disjoint_splits() -> None:
    retrained = np.random.default_rng(0).normal(size=(6, 5))
    halves = [list(half) for half in combinations(range(6), 3)]
    epsilons = [
        kaggle_epsilon(retrained[half], np.delete(retrained, half, axis=0), scorer="exact", delta=0) for half in halves
    ]
    qualities = [forgetting_quality(epsilon, 3, "exact") for epsilon in epsilons]
    one = forgetting_ceiling(retrained, 3, scorer="exact", delta=0, seed=0, draws=1)
    assert one["low"] == one["mean"] == one["high"]
    assert one["mean"] in qualities
    many = forgetting_ceiling(retrained, 3, scorer="exact", delta=0, seed=0, draws=2000)
    assert many["mean"] == pytest.approx(np.mean(qualities), abs=4 * np.std(qualities) / np.sqrt(2000))


def test_forgetting_ceiling_is_what_a_perfect_method_scores() -> None:
    rng, perfect, ceilings, leaky = np.random.default_rng(0), [], [], []
    for _ in range(150):
        u, r = rng.normal(size=(8, 20)), rng.normal(size=(16, 20))
        ceilings.append(forgetting_ceiling(r, 8, scorer="exact", delta=1e-5, seed=0, draws=10)["mean"])
        perfect.append(forgetting_quality(kaggle_epsilon(u, r[:8], scorer="exact", delta=1e-5), 8, "exact"))
        leaky.append(forgetting_quality(kaggle_epsilon(u + 2, r[:8], scorer="exact", delta=1e-5), 8, "exact"))
    error = np.hypot(np.std(perfect), np.std(ceilings)) / np.sqrt(150)
    assert np.mean(perfect) == pytest.approx(np.mean(ceilings), abs=3 * error)
    assert np.mean(ceilings) < 0.3  # far from 1: with 8 models nobody scores more
    assert np.mean(leaky) < np.mean(ceilings) - 0.05


def test_forgetting_ceiling_refuses_too_few_models() -> None:
    retrained = np.random.default_rng(0).normal(size=(9, 4))
    for n, draws in ((5, 3), (2, 3), (4, 0)):
        with pytest.raises(EmptyGroupError):
            forgetting_ceiling(retrained, n, scorer="exact", delta=0.0, seed=0, draws=draws)


def test_population_settings_refuse_what_cannot_be() -> None:
    good = {"scorer": "exact", "ceiling_draws": 50, "klom_bins": 20, "klom_floor": 1e-5, "min_models": 8}
    assert PopulationSettings.model_validate(good).min_models == 8
    for key, value in (("scorer", "best"), ("ceiling_draws", 0), ("klom_bins", 1), ("klom_floor", 0.0)):
        with pytest.raises(ValidationError, match=key):
            PopulationSettings.model_validate({**good, key: value})

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats
from sklearn import metrics

from scforget.arrays import BoolArray, FloatArray
from scforget.attacks.lira import SCORES, LiraSettings, lira
from scforget.attacks.references import References
from scforget.errors import DataError, EmptyGroupError

SHARED, PER_CELL = (LiraSettings(variance=kind, min_models=2) for kind in ("global", "per_cell"))


class World(NamedTuple):
    """M audited models, which cells each was trained on, and shadow models; unit: the OUT spread."""

    scores: FloatArray
    trained: BoolArray
    references: References


def world(rng: np.random.Generator, M: int, S: int, gain: FloatArray, spread_in: float) -> World:
    """Members gain ``gain [n]`` and have the spread ``spread_in``; cells differ by far more than any model does.

    Each cell is in exactly half of the shadows, and half of the cells in each audited model.
    """
    n = gain.size
    ease = rng.normal(-600, 100, n)
    members = rng.permuted(np.repeat([True, False], S // 2)[:, None].repeat(n, axis=1), axis=0)
    trained = rng.permuted(np.repeat([True, False], n // 2)[None].repeat(M, axis=0), axis=1)

    def scored(inside: BoolArray) -> FloatArray:
        return ease + np.where(inside, gain, 0) + np.where(inside, spread_in, 1) * rng.normal(size=inside.shape)

    return World(
        scored(trained), trained, References(np.empty((0, n)), scored(members), members, np.zeros(n, dtype=bool))
    )


def tpr_at(scores: FloatArray, trained: BoolArray, rates: FloatArray) -> FloatArray:
    """TPR over all cells and models at given FPRs."""
    return np.array([(scores[trained] >= np.quantile(scores[~trained], 1 - rate)).mean() for rate in rates])


def optimal_unequal(gain: float, spread: float) -> tuple[FloatArray, FloatArray]:
    """ROC of the most powerful test of N(gain, spread²), spread < 1, against N(0, 1): members are in an interval."""
    centre = gain / (1 - spread**2)  # where the likelihood ratio is largest
    half = np.linspace(0, 40, 20_001)
    fpr = stats.norm.cdf(centre + half) - stats.norm.cdf(centre - half)
    inner = stats.norm(gain, spread)
    return fpr, inner.cdf(centre + half) - inner.cdf(centre - half)


def loop(scores: FloatArray, found: References, variance: str) -> tuple[FloatArray, FloatArray]:
    M, n = scores.shape
    groups = [(found.shadows[found.members[:, x], x], found.shadows[~found.members[:, x], x]) for x in range(n)]
    online, offline = np.full((M, n), np.nan), np.empty((M, n))
    compared = [x for x in range(n) if not found.aside[x]]
    common = [np.sqrt(np.mean([np.var(groups[x][side], ddof=1) for x in compared])) for side in (0, 1)]
    for m in range(M):
        for x in range(n):
            inside, outside = groups[x]
            sd_out = common[1] if variance == "global" else np.std(outside, ddof=1)
            offline[m, x] = (scores[m, x] - np.mean(outside)) / sd_out
            if x in compared:
                sd_in = common[0] if variance == "global" else np.std(inside, ddof=1)
                online[m, x] = stats.norm.logpdf(scores[m, x], np.mean(inside), sd_in)
                online[m, x] -= stats.norm.logpdf(scores[m, x], np.mean(outside), sd_out)
    return online, offline


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["global", "per_cell"]))
def test_lira_equals_loop_over_scipy_normals(seed: int, variance: str) -> None:
    rng = np.random.default_rng(seed)
    members = rng.permuted(np.repeat([True, False], [4, 3])[:, None].repeat(6, axis=1), axis=0)
    aside = np.arange(6) >= 4
    members[:, aside] = False
    known = References(rng.normal(size=(2, 6)), rng.normal(-600, 9, (7, 6)), members, aside)
    scores = rng.normal(-600, 9, (3, 6))
    found = lira(scores, known, LiraSettings.model_validate({"variance": variance, "min_models": 3}), own=False)
    assert tuple(found) == SCORES
    online, offline = loop(scores, known, variance)
    np.testing.assert_allclose(found["lira_online"], online, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(found["lira_offline"], offline, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", SCORES)
def test_lira_equals_the_optimal_test_of_two_gaussians_of_equal_variance(name: str) -> None:
    separation, rates = 1.0, np.array([0.01, 0.05, 0.1, 0.3, 0.6])
    made = world(np.random.default_rng(0), 20, 400, np.full(2000, separation), 1.0)
    found = lira(made.scores, made.references, SHARED, own=False)[name]
    auc = metrics.roc_auc_score(made.trained.ravel(), found.ravel())
    assert auc == pytest.approx(stats.norm.cdf(separation / np.sqrt(2)), abs=0.01)
    optimal = stats.norm.cdf(stats.norm.ppf(rates) + separation)
    np.testing.assert_allclose(tpr_at(found, made.trained, rates), optimal, atol=0.015)


def test_lira_online_equals_the_optimal_test_of_two_gaussians_of_unequal_variance() -> None:
    rates = np.array([0.01, 0.05, 0.1, 0.3, 0.6])
    made = world(np.random.default_rng(1), 20, 400, np.full(2000, 0.7), 0.5)
    found = lira(made.scores, made.references, PER_CELL, own=False)["lira_online"]
    fpr, tpr = optimal_unequal(0.7, 0.5)
    auc = metrics.roc_auc_score(made.trained.ravel(), found.ravel())
    assert auc == pytest.approx(metrics.auc(fpr, tpr), abs=0.01)
    np.testing.assert_allclose(tpr_at(found, made.trained, rates), np.interp(rates, fpr, tpr), atol=0.02)
    # What knows only OUT ranks by s alone: P(N(gain, spread²) > N(0, 1)), which is less.
    offline = lira(made.scores, made.references, PER_CELL, own=False)["lira_offline"]
    auc_offline = metrics.roc_auc_score(made.trained.ravel(), offline.ravel())
    assert auc_offline == pytest.approx(stats.norm.cdf(0.7 / np.sqrt(1 + 0.5**2)), abs=0.01)
    assert auc > auc_offline + 0.02


def test_lira_online_has_the_power_of_offline_or_more_where_cells_differ_in_their_gain() -> None:
    gains, rates = np.array([0.5, 3.0]), np.array([0.02, 0.05, 0.1, 0.3, 0.6])
    made = world(np.random.default_rng(2), 20, 400, np.repeat(gains, 1000), 1.0)
    found = lira(made.scores, made.references, SHARED, own=False)
    online, offline = (tpr_at(found[name], made.trained, rates) for name in SCORES)
    # The log ratio of a cell is N(±gain²/2, gain²), plus for members; z is N(gain, 1) or N(0, 1).
    cut = np.linspace(20, -20, 20_001)[:, None]
    fpr, tpr = (stats.norm.sf((cut - sign * gains**2 / 2) / gains).mean(axis=1) for sign in (-1, 1))
    np.testing.assert_allclose(online, np.interp(rates, fpr, tpr), atol=0.015)
    np.testing.assert_allclose(offline, stats.norm.sf(stats.norm.isf(rates)[:, None] - gains).mean(axis=1), atol=0.015)
    assert (online > offline - 0.005).all()
    assert online[3] > offline[3] + 0.02


@pytest.mark.parametrize("chosen", [SHARED, PER_CELL])
def test_lira_without_a_leak_rejects_at_most_at_its_level(chosen: LiraSettings) -> None:
    rng, runs = np.random.default_rng(3), 400
    aucs: dict[str, list[float]] = {name: [] for name in SCORES}
    rejected = dict.fromkeys(SCORES, 0)
    for _ in range(runs):
        made = world(rng, 1, 16, np.zeros(80), 1.0)
        for name, scores in lira(made.scores, made.references, chosen, own=False).items():
            members, controls = scores[made.trained], scores[~made.trained]
            test = stats.mannwhitneyu(members, controls, alternative="greater", method="asymptotic")
            aucs[name].append(test.statistic / (members.size * controls.size))
            rejected[name] += test.pvalue < 0.05
    for name in SCORES:
        assert np.mean(aucs[name]) == pytest.approx(0.5, abs=3 * np.std(aucs[name]) / np.sqrt(runs))
        assert rejected[name] / runs < 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)
        assert rejected[name] > 0


def test_lira_finds_a_planted_leak_at_the_power_computed_beforehand() -> None:
    """One-sided rank-sum test at 5 %: AUC A is normal, its variance by all pairs of pairs."""
    rng, runs, cells, separation = np.random.default_rng(4), 1000, 20, 0.75
    auc = stats.norm.cdf(separation / np.sqrt(2))
    both = stats.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]]).cdf(np.full(2, separation / np.sqrt(2)))
    spread = np.sqrt((auc * (1 - auc) + 2 * (cells - 1) * (both - auc**2)) / cells**2)
    critical = 0.5 + stats.norm.ppf(0.95) * np.sqrt((2 * cells + 1) / (12 * cells**2))
    power = stats.norm.cdf((auc - critical) / spread)
    detected = 0
    for _ in range(runs):
        made = world(rng, 1, 400, np.full(2 * cells, separation), 1.0)
        scores = lira(made.scores, made.references, SHARED, own=False)["lira_online"]
        detected += metrics.roc_auc_score(made.trained[0], scores[0]) > critical
    assert 0.5 < power < 0.9
    assert detected / runs == pytest.approx(power, abs=0.045)


def test_lira_tells_certain_members_apart_where_a_probability_is_1() -> None:
    made = world(np.random.default_rng(5), 1, 40, np.full(4, 20.0), 1.0)
    far = np.stack([made.references.shadows.mean(axis=0) + gain for gain in (20.0, 60.0, 1000.0)])
    found = lira(far, made.references, PER_CELL, own=False)
    assert (np.diff(found["lira_offline"], axis=0) > 1).all()
    assert stats.norm.cdf(found["lira_offline"]).min() == 1
    assert np.isfinite(found["lira_online"]).all()


def test_lira_is_unchanged_by_a_shift_of_each_cell_and_a_common_unit() -> None:
    made = world(np.random.default_rng(6), 3, 12, np.full(8, 1.0), 0.8)
    ease = np.linspace(-9000, -8000, 8)
    moved = replace(made.references, shadows=2 * made.references.shadows + ease)
    for chosen in (SHARED, PER_CELL):
        found = lira(2 * made.scores + ease, moved, chosen, own=False)
        for name, expected in lira(made.scores, made.references, chosen, own=False).items():
            np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-6)


def test_lira_of_retrains_does_not_use_the_retrains() -> None:
    made = world(np.random.default_rng(7), 3, 12, np.full(8, 1.0), 1.0)
    known = replace(made.references, retrains=made.scores)
    own, other = (lira(made.scores, known, SHARED, own=own) for own in (True, False))
    for name in SCORES:
        np.testing.assert_array_equal(own[name], other[name])
    with pytest.raises(DataError, match="same order"):
        lira(made.scores[::-1], known, SHARED, own=True)


def test_lira_refuses_too_few_models_of_a_cell() -> None:
    made = world(np.random.default_rng(8), 1, 8, np.zeros(6), 1.0)
    enough, more = (LiraSettings(variance="per_cell", min_models=least) for least in (4, 5))
    lira(made.scores, made.references, enough, own=False)
    with pytest.raises(EmptyGroupError, match=r"\(IN\).*at least 5"):
        lira(made.scores, made.references, more, own=False)


def test_lira_refuses_shadow_models_that_do_not_differ() -> None:
    made = world(np.random.default_rng(9), 1, 8, np.zeros(6), 1.0)
    shadows = made.references.shadows.copy()
    shadows[:, 2] = -600.1
    lira(made.scores, replace(made.references, shadows=shadows), SHARED, own=False)
    with pytest.raises(DataError, match=r"OUT shadow.*none at 1 of 6 cells"):
        lira(made.scores, replace(made.references, shadows=shadows), PER_CELL, own=False)
    members = made.references.members
    flat_inside = replace(made.references, shadows=np.where(members, -600.1, made.references.shadows))
    with pytest.raises(DataError, match=r"IN shadow.*none at 6 of 6 cells"):
        lira(made.scores, flat_inside, SHARED, own=False)


@pytest.mark.parametrize("wrong", [{"variance": "pooled"}, {"min_models": 1}])
def test_lira_settings_refuse_what_gives_no_variance(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LiraSettings.model_validate({"variance": "global", "min_models": 4} | wrong)

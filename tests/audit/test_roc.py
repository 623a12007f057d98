from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

from scforget.arrays import FloatArray
from scforget.audit import roc
from scforget.errors import DataError, EmptyGroupError

# Few different values, so that ties are the rule.
SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=25)


def labelled(members: list[float], controls: list[float]) -> tuple[FloatArray, FloatArray]:
    return np.repeat([1.0, 0.0], [len(members), len(controls)]), np.array(members + controls)


@settings(deadline=None)
@given(SCORES, SCORES)
def test_auc_equals_sklearn_scipy_and_all_pairs(members: list[float], controls: list[float]) -> None:
    found = roc.auc(members, controls)
    pairs = [(m > c) + 0.5 * (m == c) for m in members for c in controls]
    assert found == pytest.approx(np.mean(pairs), abs=1e-12)
    assert found == pytest.approx(metrics.roc_auc_score(*labelled(members, controls)), abs=1e-12)
    u = stats.mannwhitneyu(members, controls, method="asymptotic").statistic if len({*members, *controls}) > 1 else None
    if u is not None:
        assert found == pytest.approx(u / (len(members) * len(controls)), abs=1e-12)


@settings(deadline=None)
@given(SCORES, SCORES)
def test_auc_of_swapped_groups_is_the_complement(members: list[float], controls: list[float]) -> None:
    assert roc.auc(members, controls) + roc.auc(controls, members) == pytest.approx(1)


def test_auc_ranks_infinite_scores() -> None:
    assert roc.auc([np.inf, 1.0], [-np.inf, 0.0]) == 1


@pytest.mark.parametrize(("members", "controls"), [([], [1.0]), ([1.0], [])])
def test_auc_refuses_an_empty_group(members: list[float], controls: list[float]) -> None:
    with pytest.raises(EmptyGroupError, match="0 cells"):
        roc.auc(members, controls)


def test_auc_refuses_nan() -> None:
    with pytest.raises(DataError, match="NaN"):
        roc.auc([np.nan, 1.0], [0.0])


def test_advantage_is_blind_to_direction() -> None:
    assert roc.advantage(0.38) == pytest.approx(roc.advantage(0.62)) == pytest.approx(0.24)


@settings(deadline=None)
@given(SCORES, SCORES)
def test_roc_curve_equals_sklearn(members: list[float], controls: list[float]) -> None:
    fpr, tpr, thresholds = roc.roc_curve(members, controls)
    expected = metrics.roc_curve(*labelled(members, controls), drop_intermediate=False)
    for found, wanted in zip((fpr, tpr, thresholds), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-12)
    assert metrics.auc(fpr, tpr) == pytest.approx(roc.auc(members, controls))


def test_roc_curve_begins_with_nobody_even_for_infinite_scores() -> None:
    fpr, tpr, _ = roc.roc_curve([np.inf, 0.0], [0.0])
    assert (fpr[0], tpr[0]) == (0, 0)
    np.testing.assert_allclose(tpr[-1], 1)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 12).map(float), min_size=1, max_size=40),
    st.lists(st.integers(0, 9).map(float), min_size=14, max_size=40),
    st.sampled_from([0.2, 0.25, 0.5]),
)
def test_tpr_at_fpr_equals_a_scan_of_all_thresholds(members: list[float], controls: list[float], target: float) -> None:
    found = roc.tpr_at_fpr(members, controls, target, level=0.95)
    m, c = np.array(members), np.array(controls)
    allowed = [t for t in [*members, *controls, np.inf] if (c >= t).sum() <= target * c.size + 1e-9]
    threshold = min(allowed)
    assert found.status == "measured"
    assert found.threshold == threshold
    assert found.tpr == pytest.approx((m >= threshold).mean())
    assert found.fpr == pytest.approx((c >= threshold).mean())
    assert found.tpr_interval[0] <= found.tpr <= found.tpr_interval[1]
    assert found.fpr <= target


def test_tpr_at_fpr_allows_exactly_the_target_despite_rounding() -> None:
    controls = np.arange(3000.0)
    found = roc.tpr_at_fpr(np.full(10, 5000.0), controls, 0.01, level=0.95)
    assert found.fpr_k == 30
    assert found.threshold == 2970
    # 0.29 · 100 is 28.999999999999996.
    assert roc.tpr_at_fpr([0.0], np.arange(100.0), 0.29, level=0.95).fpr_k == 29


def test_tpr_at_fpr_passes_tied_controls_together() -> None:
    controls = np.concatenate([np.zeros(290), np.ones(10)])
    found = roc.tpr_at_fpr(np.array([1.0, 1.0, 2.0]), controls, 0.01, level=0.95)
    assert found.fpr_k == 0
    assert found.tpr_k == 1
    assert found.threshold == 2


@pytest.mark.parametrize(("target", "needed"), [(0.01, 299), (0.001, 2995)])
def test_tpr_at_fpr_is_refused_with_one_control_too_few(target: float, needed: int) -> None:
    assert roc.controls_needed(target) == needed
    rng = np.random.default_rng(0)
    members, controls = rng.normal(size=30), rng.normal(size=needed)
    assert roc.tpr_at_fpr(members, controls, target, level=0.95).status == "measured"
    refused = roc.tpr_at_fpr(members, controls[1:], target, level=0.95)
    assert refused.status == "undetermined"
    assert refused.controls_needed == needed
    record = json.loads(json.dumps(refused.to_dict(), allow_nan=False))
    assert record["tpr"] is None
    assert record["tpr_interval"] == [None, None]


def test_tpr_at_fpr_without_any_allowed_score_calls_nobody() -> None:
    found = roc.tpr_at_fpr([0.0], np.ones(299), 0.01, level=0.95)
    assert (found.tpr, found.fpr, found.threshold) == (0, 0, np.inf)
    assert found.to_dict()["threshold"] is None


@pytest.mark.parametrize("target", [0.0, 1.0, -0.1])
def test_controls_needed_refuses_an_impossible_target(target: float) -> None:
    with pytest.raises(DataError, match="target FPR"):
        roc.controls_needed(target)


def test_advantage_null_of_30_and_194_is_the_published_band() -> None:
    null = roc.advantage_null(30, 194, seed=42, draws=100_000)
    assert null["mean"] == pytest.approx(0.091, abs=0.001)
    assert null["q95"] == pytest.approx(0.223, abs=0.002)


def test_advantage_null_equals_all_orders_of_a_few_cells() -> None:
    from itertools import combinations

    values = [abs(2 * (sum(s) - 3) / 12 - 1) for s in combinations(range(7), 3)]
    null = roc.advantage_null(3, 4, seed=0, draws=100_000)
    assert null["mean"] == pytest.approx(np.mean(values), abs=0.005)
    assert null == roc.advantage_null(4, 3, seed=0, draws=100_000)


def test_advantage_null_joins_its_normal_limit() -> None:
    simulated = roc.advantage_null(roc.NORMAL_NULL_CELLS, 900, seed=0, draws=20_000)
    limit = roc.advantage_null(roc.NORMAL_NULL_CELLS + 1, 900, seed=0, draws=20_000)
    assert simulated["mean"] == pytest.approx(limit["mean"], rel=0.02)
    assert simulated["q95"] == pytest.approx(limit["q95"], rel=0.03)


def test_advantage_null_refuses_an_empty_group() -> None:
    with pytest.raises(EmptyGroupError):
        roc.advantage_null(0, 10, seed=0, draws=10)

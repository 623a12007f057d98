from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from scforget.arrays import FloatArray
from scforget.attacks.likelihood_ratio import SCORES, LikelihoodRatioSettings, likelihood_ratio
from scforget.attacks.references import References
from scforget.errors import DataError, EmptyGroupError

SEEDS = st.integers(0, 2**32 - 1)
SETTINGS = LikelihoodRatioSettings()


def references(retrains: FloatArray) -> References:
    n = retrains.shape[1]
    return References(retrains, np.empty((0, n)), np.empty((0, n), dtype=bool), np.zeros(n, dtype=bool))


@pytest.fixture
def shadowed() -> References:
    """Four retrains and six shadows of five cells, the last of which was set aside."""
    rng = np.random.default_rng(0)
    members = np.array([[True, False, True, False, False], [False, True, False, True, False]] * 3)
    return References(rng.normal(size=(4, 5)), rng.normal(size=(6, 5)), members, np.arange(5) == 4)


@settings(deadline=None)
@given(SEEDS, st.integers(2, 6), st.integers(1, 4))
def test_likelihood_ratio_equals_loop(seed: int, K: int, M: int) -> None:
    rng = np.random.default_rng(seed)
    scores, retrains = rng.normal(-600, 50, (M, 7)), rng.normal(-600, 50, (K, 7))
    expected = [[row[x] - sum(retrains[k][x] for k in range(K)) / K for x in range(7)] for row in scores]
    found = likelihood_ratio(scores, references(retrains), SETTINGS, own=False)
    assert tuple(found) == SCORES
    np.testing.assert_allclose(found["likelihood_ratio"], expected, atol=1e-10)


@settings(deadline=None)
@given(SEEDS, st.integers(3, 7))
def test_likelihood_ratio_of_retrains_equals_comparing_each_with_the_others(seed: int, K: int) -> None:
    retrains = np.random.default_rng(seed).normal(-600, 50, (K, 5))
    found = likelihood_ratio(retrains, references(retrains), SETTINGS, own=True)["likelihood_ratio"]
    for k in range(K):
        others = references(np.delete(retrains, k, axis=0))
        expected = likelihood_ratio(retrains[k : k + 1], others, SETTINGS, own=False)["likelihood_ratio"][0]
        np.testing.assert_allclose(found[k], expected, atol=1e-10)


def test_likelihood_ratio_is_blind_to_how_easy_a_cell_is() -> None:
    rng = np.random.default_rng(0)
    scores, retrains, ease = rng.normal(size=(2, 6)), rng.normal(size=(4, 6)), rng.normal(-600, 100, 6)
    plain = likelihood_ratio(scores, references(retrains), SETTINGS, own=False)["likelihood_ratio"]
    moved = likelihood_ratio(scores + ease, references(retrains + ease), SETTINGS, own=False)["likelihood_ratio"]
    np.testing.assert_allclose(moved, plain, atol=1e-10)
    assert (likelihood_ratio(scores + 1, references(retrains), SETTINGS, own=False)["likelihood_ratio"] > plain).all()


def test_likelihood_ratio_of_unlearned_and_left_out_retrains_has_the_spreads_of_theory() -> None:
    """Both are about 0; variance σ²(1 + 1/K) of a fresh model, σ²·K/(K − 1) of a retrain left out."""
    K, retrains = 5, np.random.default_rng(0).normal(size=(5, 40_000))
    fresh = np.random.default_rng(1).normal(size=(1, 40_000))
    other = likelihood_ratio(fresh, references(retrains), SETTINGS, own=False)["likelihood_ratio"][0]
    left_out = likelihood_ratio(retrains, references(retrains), SETTINGS, own=True)["likelihood_ratio"][0]
    tolerance = 4 * np.sqrt(2 / 40_000)
    assert other.var() == pytest.approx(1 + 1 / K, rel=tolerance)
    assert left_out.var() == pytest.approx(K / (K - 1), rel=tolerance)
    assert max(abs(other.mean()), abs(left_out.mean())) < 4 * np.sqrt(1.25 / 40_000)


def test_likelihood_ratio_refuses_too_few_retrains() -> None:
    retrains = np.random.default_rng(0).normal(size=(2, 3))
    likelihood_ratio(retrains, references(retrains), SETTINGS, own=False)
    left_out = likelihood_ratio(retrains, references(retrains), SETTINGS, own=True)["likelihood_ratio"]
    np.testing.assert_allclose(left_out, [retrains[0] - retrains[1], retrains[1] - retrains[0]])
    with pytest.raises(EmptyGroupError, match="at least 2"):
        likelihood_ratio(retrains, references(retrains[:1]), SETTINGS, own=False)


def test_likelihood_ratio_settings_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValidationError):
        LikelihoodRatioSettings.model_validate({"gamma": 1.0})


def test_check_refuses_scores_that_do_not_fit(shadowed: References) -> None:
    with pytest.raises(DataError, match=r"shape \[M, 5\]"):
        shadowed.check(np.zeros((2, 4)), own=False)
    with pytest.raises(DataError, match=r"shape \[M, 5\]"):
        shadowed.check(np.zeros(5), own=False)
    with pytest.raises(EmptyGroupError, match="audited models"):
        shadowed.check(np.zeros((0, 5)), own=False)
    with pytest.raises(DataError, match="2 scores that are NaN"):
        shadowed.check(np.array([[0.0, np.nan, 1.0, -np.inf, 2.0]]), own=False)


def test_check_takes_only_the_retrains_in_order_for_its_own(shadowed: References) -> None:
    np.testing.assert_array_equal(shadowed.check(shadowed.retrains, own=True), shadowed.retrains)
    for wrong in (shadowed.retrains[::-1], shadowed.retrains[:2]):
        with pytest.raises(DataError, match="same order"):
            shadowed.check(wrong, own=True)


def test_references_refuse_shapes_that_do_not_fit(shadowed: References) -> None:
    wrong = [
        {"retrains": shadowed.retrains[:, :4]},
        {"shadows": shadowed.shadows[:5]},
        {"members": shadowed.members.T},
        {"aside": shadowed.aside[:4]},
        {"retrains": shadowed.retrains[0]},
    ]
    for change in wrong:
        with pytest.raises(DataError, match=r"shapes \[K, n\]"):
            replace(shadowed, **change)
    with pytest.raises(EmptyGroupError, match="scored cells"):
        references(np.empty((3, 0)))


def test_references_refuse_masks_that_are_numbers_and_scores_that_are_not(shadowed: References) -> None:
    with pytest.raises(DataError, match="booleans"):
        replace(shadowed, members=shadowed.members.astype(np.int64))
    for name in ("retrains", "shadows"):
        spoiled = getattr(shadowed, name).copy()
        spoiled[1, 2] = np.nan
        with pytest.raises(DataError, match="1 scores that are NaN"):
            replace(shadowed, **{name: spoiled})


def test_references_refuse_a_cell_set_aside_that_a_shadow_saw(shadowed: References) -> None:
    members = shadowed.members.copy()
    members[2, 4] = True
    with pytest.raises(DataError, match="1 that a shadow model was trained on"):
        replace(shadowed, members=members)


def test_require_shadows_counts_in_and_out_of_each_compared_cell(shadowed: References) -> None:
    shadowed.require_shadows(3)
    with pytest.raises(EmptyGroupError, match=r"\(IN\).*as few as 3.*4 of 4 cells.*at least 4"):
        shadowed.require_shadows(4)
    with pytest.raises(EmptyGroupError, match=r"\(IN\).*as few as 0.*1 of 5 cells"):
        replace(shadowed, aside=np.zeros(5, dtype=bool)).require_shadows(1)
    members = shadowed.members.copy()
    members[:, 1] = True
    with pytest.raises(EmptyGroupError, match=r"\(OUT\).*as few as 0.*1 of 5 cells"):
        replace(shadowed, members=members).require_shadows(1)


def test_require_shadows_refuses_to_compare_nothing(shadowed: References) -> None:
    nobody = replace(shadowed, members=np.zeros((6, 5), dtype=bool), aside=np.ones(5, dtype=bool))
    with pytest.raises(EmptyGroupError, match="only cells set aside"):
        nobody.require_shadows(1)

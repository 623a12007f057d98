from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from scforget.arrays import BoolArray, FloatArray
from scforget.attacks.references import References
from scforget.attacks.rmia import SCORES, RmiaSettings, rmia
from scforget.errors import DataError, EmptyGroupError

PLAIN = RmiaSettings(gamma=1.0)


def references(rng: np.random.Generator, S: int, n: int, aside: int, level: float, spread: float) -> References:
    """Shadows of n cells, each compared one in about half of them and in and out of at least one."""
    members = rng.random((S, n)) < 0.5
    members[0], members[1] = True, False
    mask = np.arange(n) >= n - aside
    members[:, mask] = False
    return References(np.empty((0, n)), rng.normal(level, spread, (S, n)), members, mask)


def loop(scores: FloatArray, known: References, gamma: float, online: bool) -> FloatArray:
    """Densities themselves, in arithmetic whose exponents do not end at -308."""
    S, n = known.shadows.shape

    def ratio(m: int, x: int) -> Decimal:
        inside = [Decimal(known.shadows[s, x]).exp() for s in range(S) if known.members[s, x]]
        outside = [Decimal(known.shadows[s, x]).exp() for s in range(S) if not known.members[s, x]]
        p = sum(outside) / len(outside)
        if online and inside:
            p = (p + sum(inside) / len(inside)) / 2
        return Decimal(scores[m, x]).exp() / p

    population = [z for z in range(n) if known.aside[z]]
    shares = np.empty(scores.shape)
    for m in range(len(scores)):
        for x in range(n):
            above = [ratio(m, x) / ratio(m, z) > Decimal(gamma) for z in population if z != x]
            shares[m, x] = sum(above) / len(population)
    return shares


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1.0, 1.5, 4.0]),
    st.sampled_from([(0.0, 1.0), (-600.0, 10.0), (-1e4, 30.0)]),
)
def test_rmia_equals_loop_over_densities(seed: int, gamma: float, size: tuple[float, float]) -> None:
    rng = np.random.default_rng(seed)
    known, scores = references(rng, 5, 9, 4, *size), rng.normal(*size, (2, 9))
    found = rmia(scores, known, RmiaSettings(gamma=gamma), own=False)
    assert tuple(found) == SCORES
    np.testing.assert_allclose(found["rmia_online"], loop(scores, known, gamma, online=True))
    np.testing.assert_allclose(found["rmia_offline"], loop(scores, known, gamma, online=False))


def test_rmia_is_unchanged_by_how_easy_a_cell_is() -> None:
    rng = np.random.default_rng(0)
    known, scores = references(rng, 6, 40, 15, 0.0, 2.0), rng.normal(0, 2, (3, 40))
    ease = rng.normal(-1e4, 3000, 40)
    found = rmia(scores + ease, replace(known, shadows=known.shadows + ease), PLAIN, own=False)
    for name, expected in rmia(scores, known, PLAIN, own=False).items():
        np.testing.assert_allclose(found[name], expected, atol=1e-12)


def test_rmia_of_one_in_and_one_out_model_is_the_ratio_to_their_average() -> None:
    members = np.array([[True, False, False], [False, False, False]])
    aside = np.array([False, True, True])
    shadows = np.log([[0.4, 0.1, 0.3], [0.2, 0.3, 0.1]])
    known = References(np.empty((0, 3)), shadows, members, aside)
    # p(x) is 0.3 online and 0.2 offline, p(z) 0.2 for both z: ratios of z are 1 and 1.25.
    for p, online, offline in ((0.29, 0.0, 1.0), (0.31, 0.5, 1.0), (0.38, 1.0, 1.0), (0.22, 0.0, 0.5)):
        found = rmia(np.log([[p, 0.2, 0.25]]), known, PLAIN, own=False)
        assert (found["rmia_online"][0, 0], found["rmia_offline"][0, 0]) == (online, offline)


def test_rmia_online_weighs_in_and_out_equally_however_many_there_are() -> None:
    rng = np.random.default_rng(1)
    known, scores = references(rng, 2, 12, 5, -600.0, 3.0), rng.normal(-600, 3, (4, 12))
    known.shadows[0, known.aside] = known.shadows[1, known.aside]
    copies = [0, 1, 1, 1]
    more = replace(known, shadows=known.shadows[copies], members=known.members[copies])
    found, expected = (rmia(scores, one, PLAIN, own=False)["rmia_online"] for one in (more, known))
    np.testing.assert_array_equal(found, expected)
    assert 0 < expected[:, :7].mean() < 1


def test_rmia_falls_with_gamma_and_rises_with_the_score() -> None:
    rng = np.random.default_rng(2)
    known, scores = references(rng, 6, 40, 15, -600.0, 2.0), rng.normal(-600, 2, (3, 40))
    higher = np.where(known.aside, scores, scores + 1)
    for name, low in rmia(scores, known, PLAIN, own=False).items():
        assert (rmia(scores, known, RmiaSettings(gamma=3.0), own=False)[name] <= low).all()
        high = rmia(higher, known, PLAIN, own=False)[name]
        assert (high >= low).all()
        assert (high > low).any()
        assert ((low >= 0) & (low <= 1)).all()


def test_rmia_of_a_tie_is_not_above() -> None:
    known = References(
        np.empty((0, 3)), np.zeros((2, 3)), np.array([[True, False, False], [False] * 3]), np.array([False, True, True])
    )
    found = rmia(np.zeros((1, 3)), known, PLAIN, own=False)
    for name in SCORES:
        np.testing.assert_array_equal(found[name], np.zeros((1, 3)))


def simulate(rng: np.random.Generator, gain: float) -> tuple[dict[str, FloatArray], BoolArray]:
    """Scores of 80 compared cells under one model that was trained on half of them; members gain ``gain`` nats."""
    n, ease = 140, rng.normal(-600, 100, 140)
    known = references(rng, 16, n, 60, 0.0, 1.0)
    trained = (np.arange(n) < 40)[None]
    scores = ease + rng.normal(size=(1, n)) + gain * trained
    found = rmia(scores, replace(known, shadows=ease + known.shadows + gain * known.members), PLAIN, own=False)
    return {name: values[0, :80] for name, values in found.items()}, trained[0, :80]


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_rmia_without_a_leak_rejects_at_most_at_its_level_and_finds_a_planted_one(gain: float) -> None:
    rng, runs = np.random.default_rng(3), 1000
    aucs: dict[str, list[float]] = {name: [] for name in SCORES}
    rejected = dict.fromkeys(SCORES, 0)
    for _ in range(runs):
        found, trained = simulate(rng, gain)
        for name, scores in found.items():
            test = stats.mannwhitneyu(scores[trained], scores[~trained], alternative="greater", method="asymptotic")
            aucs[name].append(test.statistic / (40 * 40))
            rejected[name] += test.pvalue < 0.05
    for name in SCORES:
        if gain:
            assert np.mean(aucs[name]) > 0.7
            assert rejected[name] / runs > 0.9
        else:
            assert np.mean(aucs[name]) == pytest.approx(0.5, abs=3 * np.std(aucs[name]) / np.sqrt(runs))
            assert 0 < rejected[name] / runs < 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)


def test_rmia_of_retrains_does_not_use_the_retrains() -> None:
    rng = np.random.default_rng(4)
    known, scores = references(rng, 6, 12, 5, -600.0, 3.0), rng.normal(-600, 3, (4, 12))
    known = replace(known, retrains=scores)
    own, other = (rmia(scores, known, PLAIN, own=own) for own in (True, False))
    for name in SCORES:
        np.testing.assert_array_equal(own[name], other[name])
    with pytest.raises(DataError, match="same order"):
        rmia(scores[::-1], known, PLAIN, own=True)


def test_rmia_refuses_to_work_without_population_or_models() -> None:
    rng = np.random.default_rng(5)
    known, scores = references(rng, 6, 12, 5, -600.0, 3.0), rng.normal(-600, 3, (1, 12))
    members = known.members.copy()
    members[0, 5:] = True
    with pytest.raises(EmptyGroupError, match="population of the rmia attack"):
        rmia(scores, replace(known, members=members, aside=np.zeros(12, dtype=bool)), PLAIN, own=False)
    members = known.members.copy()
    members[:, 0] = False
    with pytest.raises(EmptyGroupError, match=r"\(IN\).*1 of 7 cells"):
        rmia(scores, replace(known, members=members), PLAIN, own=False)
    with pytest.raises(DataError, match="NaN"):
        rmia(np.full((1, 12), np.nan), known, PLAIN, own=False)


@pytest.mark.parametrize("gamma", [0.5, float("nan"), float("inf")])
def test_rmia_settings_refuse_an_impossible_gamma(gamma: float) -> None:
    with pytest.raises(ValidationError):
        RmiaSettings(gamma=gamma)

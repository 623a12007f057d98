from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scforget.arrays import BoolArray, FloatArray
from scforget.audit import permutation, roc
from scforget.audit.permutation import MaxStatistic, max_statistic
from scforget.errors import DataError, EmptyGroupError

SEEDS = st.integers(0, 2**32 - 1)


def masks(F: int, U: int, others: int = 0) -> tuple[BoolArray, BoolArray]:
    groups = np.repeat([0, 1, 2], [F, U, others])
    return groups == 0, groups == 1


def run(scores: FloatArray, F: int, U: int, *, draws: int = 99, seed: int = 0) -> MaxStatistic:
    names = [f"attack{a}" for a in range(len(scores))]
    return max_statistic(scores, *masks(F, U, scores.shape[2] - F - U), names=names, seed=seed, draws=draws)


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.booleans())
def test_max_statistic_auc_is_the_mean_over_models(seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(3, 4, 25))
    if ties:
        scores = np.round(scores)
    found = run(scores, 7, 12)  # and 6 cells that take no part
    for attack, one in zip(found.attacks, scores, strict=True):
        expected = np.mean([roc.auc(row[:7], row[7:19]) for row in one])
        assert attack.auc == pytest.approx(expected, abs=1e-12)
    assert (found.models, found.n_members, found.n_controls) == (4, 7, 12)
    assert found.worst.statistic == max(attack.statistic for attack in found.attacks)


def test_max_statistic_equals_the_enumeration_of_all_labellings() -> None:
    rng = np.random.default_rng(0)
    scores = np.round(2 * rng.normal(size=(3, 2, 9)) + np.r_[np.ones(4), np.zeros(5)])
    deviations = []
    for chosen in combinations(range(9), 4):
        rest = [x for x in range(9) if x not in chosen]
        aucs = [np.mean([roc.auc(row[list(chosen)], row[rest]) for row in one]) for one in scores]
        deviations.append(np.abs(np.array(aucs) - 0.5))
    table = np.array(deviations)
    standard = table / np.sqrt((table**2).mean(axis=0))  # the first labelling is the observed one
    found = run(scores, 4, 5, draws=40_000)
    for a, attack in enumerate(found.attacks):
        assert attack.statistic == pytest.approx(standard[0, a])
        assert attack.p == pytest.approx((standard[:, a] >= standard[0, a] - 1e-9).mean(), abs=0.01)
        assert attack.p_adjusted == pytest.approx((standard.max(axis=1) >= standard[0, a] - 1e-9).mean(), abs=0.01)


@settings(deadline=None, max_examples=40)
@given(SEEDS)
def test_max_statistic_p_values_are_ordered_and_depend_on_ranks_only(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(4, 2, 20))
    found = run(scores, 8, 12)
    for attack in found.attacks:
        assert 1 / 100 <= attack.p <= attack.p_adjusted <= 1
    assert found.worst.p_adjusted == min(attack.p_adjusted for attack in found.attacks)
    turned = run(-np.exp(scores), 8, 12)
    for one, two in zip(found.attacks, turned.attacks, strict=True):
        assert one.auc == pytest.approx(1 - two.auc)
        assert (one.p, one.p_adjusted) == (two.p, two.p_adjusted)


def test_max_statistic_of_one_attack_needs_no_adjustment_and_copies_of_it_neither() -> None:
    scores = np.random.default_rng(0).normal(size=(1, 3, 30))
    alone = run(scores, 10, 20).worst
    assert alone.p == alone.p_adjusted
    copies = run(np.concatenate([scores, scores, -scores]), 10, 20)
    assert copies.worst.name == "attack0"
    assert {attack.p_adjusted for attack in copies.attacks} == {alone.p}


def test_max_statistic_is_the_same_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(0).normal(size=(2, 3, 30))
    whole = run(scores, 10, 20)
    monkeypatch.setattr(permutation, "BLOCK", 7 * 30)
    assert run(scores, 10, 20) == whole
    assert run(scores, 10, 20, seed=1) != whole


def correlated(rng: np.random.Generator, attacks: int, models: int, n: int) -> FloatArray:
    """Attacks that share most of what they see of a cell, under models that share much of it too."""
    cell, by_attack = rng.normal(size=(1, 1, n)), rng.normal(size=(attacks, 1, n))
    return cell + by_attack + 0.7 * rng.normal(size=(attacks, models, n))


def test_max_statistic_rejects_a_null_with_correlated_attacks_at_most_at_its_level() -> None:
    rng, runs, adjusted, unadjusted = np.random.default_rng(0), 1500, 0, 0
    for seed in range(runs):
        worst = run(correlated(rng, 5, 3, 50), 15, 35, seed=seed).worst
        adjusted += worst.p_adjusted <= 0.05
        unadjusted += worst.p <= 0.05
    assert adjusted / runs < 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)
    assert adjusted / runs > 0.03  # and it is not merely timid
    assert unadjusted / runs > 0.10  # picking after the fact would have been wrong


def test_max_statistic_finds_one_planted_attack_among_five() -> None:
    rng, runs, found = np.random.default_rng(1), 200, 0
    for seed in range(runs):
        scores = correlated(rng, 5, 3, 90)
        scores[3, :, :30] -= 1.5  # in the direction that an advantage is blind to
        worst = run(scores, 30, 60, seed=seed).worst
        found += worst.name == "attack3" and worst.p_adjusted <= 0.05 and worst.auc < 0.5
    assert found / runs > 0.9


def test_max_statistic_goes_into_json() -> None:
    found = run(np.random.default_rng(0).normal(size=(2, 1, 10)), 4, 6)
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["worst"] in record["attacks"]
    assert [attack["name"] for attack in record["attacks"]] == ["attack0", "attack1"]


def test_max_statistic_ranks_infinite_scores() -> None:
    scores = np.arange(10.0).reshape(1, 1, 10)
    scores[0, 0, 0], scores[0, 0, 9] = -np.inf, np.inf
    assert run(scores, 4, 6).worst.auc == 0


def test_max_statistic_names_the_attack_that_is_constant_or_nan() -> None:
    scores = np.random.default_rng(0).normal(size=(2, 2, 10))
    flat = scores.copy()
    flat[1] = [[1.0], [2.0]]
    with pytest.raises(DataError, match=r"attack1.*same rank"):
        run(flat, 4, 6)
    cancelling = scores.copy()
    cancelling[0, 1] = -cancelling[0, 0]
    with pytest.raises(DataError, match=r"attack0.*same rank"):
        run(cancelling, 4, 6)
    missing = scores.copy()
    missing[1, 0, 9] = np.nan
    with pytest.raises(DataError, match=r"attack1.*NaN"):
        run(missing, 4, 6)
    assert run(missing, 4, 5).n_controls == 5  # cell 9 takes no part


def test_max_statistic_refuses_shapes_that_do_not_fit() -> None:
    scores = np.random.default_rng(0).normal(size=(2, 2, 10))
    forget, controls = masks(4, 6)
    for wrong, names in ((scores[0], ["a", "b"]), (scores, ["a"])):
        with pytest.raises(DataError, match="scores of the attacks"):
            max_statistic(wrong, forget, controls, names=names, seed=0, draws=9)
    with pytest.raises(EmptyGroupError, match=r"attacks and models"):
        max_statistic(scores[:, :0], forget, controls, names=["a", "b"], seed=0, draws=9)
    with pytest.raises(DataError, match="draws"):
        max_statistic(scores, forget, controls, names=["a", "b"], seed=0, draws=0)


def test_check_masks_refuses_what_are_no_two_groups() -> None:
    forget, controls = masks(4, 6)
    with pytest.raises(EmptyGroupError, match="control cells"):
        permutation.check_masks(forget, np.zeros(10, bool), 10)
    with pytest.raises(DataError, match="4 cells in both"):
        permutation.check_masks(forget, np.ones(10, bool), 10)
    with pytest.raises(DataError, match="true or false"):
        permutation.check_masks(forget, controls.astype(int), 10)
    with pytest.raises(DataError, match="for 9 cells"):
        permutation.check_masks(forget, controls, 9)

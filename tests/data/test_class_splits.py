"""How labelled items are dealt: shares, people apart, the papers' presets, and what cannot be dealt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from scforget.arrays import BoolArray
from scforget.data.class_splits import ClassFractions, ClassSplitSettings, ItemSets, split_items
from scforget.data.splits import PeopleScenario, draw_scenario
from scforget.errors import DataError, EmptyGroupError

N = 600
SHARES = {"train": 0.4, "aside": 0.1, "unseen": 0.3, "test": 0.2}
OFFICIAL = {"train": 0.6, "aside": 0.1, "unseen": 0.3, "test": "official"}


def how(preset: Any = "none", **changes: Any) -> ClassSplitSettings:
    fractions = changes.pop("fractions", SHARES if preset == "none" else None)
    rest = {"by_identity": False, "limit": None} | changes
    made = None if fractions is None else ClassFractions(**fractions)
    return ClassSplitSettings(preset=preset, fractions=made, **rest)


@pytest.fixture(scope="module")
def obs() -> pd.DataFrame:
    """People of 1 to 20 items, and 60 items of nobody known."""
    rng = np.random.default_rng(0)
    donors = np.repeat([f"p{i}" for i in range(200)], rng.integers(1, 21, 200))[: N - 60]
    columns = {"label": rng.choice(["a", "b", "c"], N), "donor": np.r_[donors, [""] * 60]}
    return pd.DataFrame(columns).sample(frac=1, random_state=0)


@pytest.fixture(scope="module")
def official() -> BoolArray:
    return np.equal(np.arange(N) % 6, 0)


def split(obs: pd.DataFrame, official: BoolArray, kind: ClassSplitSettings, seed: int = 0) -> ItemSets:
    return split_items(obs, official, kind, np.random.default_rng(seed))


def parts(found: ItemSets) -> list[Any]:
    return [found.sets.train, found.sets.aside, found.sets.unseen, found.test]


@settings(deadline=None, max_examples=30)
@given(n=st.integers(60, 900), seed=st.integers(0, 2**32 - 1))
def test_sets_partition_the_items_in_the_shares_asked_for(n: int, seed: int) -> None:
    obs = pd.DataFrame({"label": ["a", "b"] * n}).iloc[:n]
    found = split(obs, np.zeros(n, dtype=bool), how(), seed)
    assert sorted(np.concatenate(parts(found))) == list(range(n))
    for part, share in zip(parts(found), SHARES.values(), strict=True):
        assert abs(len(part) - share * n) <= 1.5
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()
    assert found.sets.stop.shape == (0,)


def test_every_item_may_land_in_every_set(obs: pd.DataFrame, official: BoolArray) -> None:
    seen = np.zeros((4, N), dtype=bool)
    for seed in range(60):
        for row, part in enumerate(parts(split(obs, official, how(), seed))):
            seen[row, part] = True
    assert seen.mean(axis=1).min() > 0.99


def test_the_official_test_set_is_taken_as_it_is(obs: pd.DataFrame, official: BoolArray) -> None:
    found = split(obs, official, how(fractions=OFFICIAL))
    np.testing.assert_array_equal(found.test, np.flatnonzero(official))
    assert [len(part) for part in parts(found)] == [300, 50, 150, 100]
    with pytest.raises(EmptyGroupError, match="no official test items"):
        split(obs, np.zeros(N, dtype=bool), how(fractions=OFFICIAL))


def test_people_are_in_one_set_each_and_shares_hold_to_a_person(obs: pd.DataFrame, official: BoolArray) -> None:
    donors = obs["donor"].to_numpy()
    for seed in range(10):
        found = split(obs, official, how(by_identity=True), seed)
        homes = [set(donors[part]) - {""} for part in parts(found)]
        assert len(set.union(*homes)) == sum(map(len, homes)) == len(set(donors)) - 1
        assert sum(map(len, parts(found))) == N
        for part, share in zip(parts(found), SHARES.values(), strict=True):
            assert abs(len(part) - share * N) <= 20  # the largest person, half of it at either end
        assert sum("" in donors[part] for part in parts(found)) >= 3  # nobody known is no person


def test_people_on_both_sides_of_the_official_test_set_are_refused(obs: pd.DataFrame, official: BoolArray) -> None:
    with pytest.raises(DataError, match=r"\d+ people on both sides; wanted a share for test"):
        split(obs, official, how(fractions=OFFICIAL, by_identity=True))
    theirs = obs["donor"].isin(["p0", "p1"]).to_numpy()
    found = split(obs, theirs, how(fractions=OFFICIAL, by_identity=True))
    np.testing.assert_array_equal(found.test, np.flatnonzero(theirs))


def test_a_limit_takes_fewer_items_and_leaves_the_test_set(obs: pd.DataFrame, official: BoolArray) -> None:
    found = split(obs, official, how(fractions=OFFICIAL, limit=200))
    assert [len(part) for part in parts(found)] == [120, 20, 60, 100]
    with pytest.raises(DataError, match="found 500 items outside the test set; wanted 501"):
        split(obs, official, how(fractions=OFFICIAL, limit=501))


def test_p3_sets_a_tenth_aside_and_halves_the_rest(official: BoolArray) -> None:
    obs = pd.DataFrame({"label": ["a", "b"] * 300})
    found = split(obs, official, how("p3"))
    assert [len(part) for part in parts(found)] == [225, 50, 225, 100]


def test_p2_keeps_people_apart_and_forgets_some_of_them(obs: pd.DataFrame, official: BoolArray) -> None:
    found = split(obs, official, how("p2", by_identity=True))
    assert abs(len(found.sets.train) - 0.8 * N) <= 20
    request = PeopleScenario(kind="people", fraction=0.02)  # the report's share
    drawn = draw_scenario(obs, found.sets, request, np.random.default_rng(0), 1)
    donors = obs["donor"].to_numpy()
    theirs = np.isin(donors, donors[drawn.sets.forget])
    np.testing.assert_array_equal(np.flatnonzero(theirs), drawn.sets.forget)
    assert "" not in donors[drawn.sets.forget]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"preset": "p3", "fractions": SHARES}, "fractions: null"),
        ({"preset": "none", "fractions": None}, "give fractions"),
        ({"preset": "p2"}, "by_identity: true"),
        ({"fractions": SHARES | {"test": 0.3}}, "must be 1, not 1.1"),
        ({"fractions": SHARES | {"test": "official"}}, "must be 1, not 0.8"),
        ({"fractions": SHARES | {"test": "mine"}}, "official"),
        ({"fractions": SHARES | {"aside": 0.0}}, "greater than 0"),
        ({"limit": 0}, "greater than 0"),
        ({"preset": "p4"}, "p3"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        how(**changes)


def test_what_cannot_be_dealt_is_refused(obs: pd.DataFrame) -> None:
    none = np.zeros(N, dtype=bool)
    with pytest.raises(DataError, match="items of nobody known; wanted identities"):
        split(obs.drop(columns="donor"), none, how(by_identity=True))
    with pytest.raises(DataError, match="items of nobody known"):
        split(obs.assign(donor=None), none, how(by_identity=True))
    with pytest.raises(EmptyGroupError, match="no item for 'aside'"):
        split(obs.iloc[:3], none[:3], how())
    with pytest.raises(EmptyGroupError, match=r"no item for '\w+'; wanted more items, a larger share, or smaller"):
        split(obs.assign(donor="one"), none, how(by_identity=True))
    left_out = split(obs, none, how()).test[0]
    rare = obs.assign(label=np.where(np.arange(N) == left_out, "rare", obs["label"]))
    with pytest.raises(EmptyGroupError, match="class 'rare': found no training item"):
        split(rare, none, how())

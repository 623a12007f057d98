"""Requests of several people: whole identities, the nearest share, controls among people or among their own cells."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from scforget.data.splits import (
    CellSets,
    PeopleScenario,
    Scenario,
    ScenarioSettings,
    SiblingScenario,
    draw_scenario,
    draw_scenarios,
)
from scforget.errors import DataError, EmptyGroupError

PEOPLE = PeopleScenario(kind="people", fraction=0.2)


def dealt(train: list[int], stop: list[int], unseen: list[int]) -> CellSets:
    return CellSets(*(np.array(part, dtype=np.int64) for part in (train, stop, [], unseen)))


@pytest.fixture
def obs() -> pd.DataFrame:
    """Twenty people of 5 items each, in order, and 20 items of nobody known."""
    donors = [f"p{i:02d}" for i in range(20) for _ in range(5)] + [""] * 20
    return pd.DataFrame({"label": ["a", "b"] * 60, "donor": pd.Categorical(donors)})


@pytest.fixture
def apart() -> CellSets:
    """People 0 to 15 and the first unknown items are trained on, the others are unseen; no stop."""
    return dealt([*range(80), *range(100, 110)], [], [*range(80, 100), *range(110, 120)])


def draw(obs: pd.DataFrame, sets: CellSets, seed: int = 0, fraction: float = 0.2) -> Scenario:
    request = PeopleScenario(kind="people", fraction=fraction)
    return draw_scenario(obs, sets, request, np.random.default_rng(seed), min_controls=1)


def test_people_are_forgotten_whole_and_as_many_as_come_nearest(obs: pd.DataFrame, apart: CellSets) -> None:
    chosen = set()
    for seed in range(20):
        found = draw(obs, apart, seed)
        donors = obs["donor"].to_numpy()[found.sets.forget]
        assert len(found.sets.forget) == 20  # a fifth of 90 are 18: 15 or 20
        assert all((donors == name).sum() == 5 for name in set(donors))
        assert "" not in donors
        np.testing.assert_array_equal(np.union1d(found.sets.forget, found.sets.retain), apart.train)
        chosen |= set(donors)
    assert len(chosen) > 12  # at random


def test_people_of_unequal_size_stop_where_they_are_nearest() -> None:
    obs = pd.DataFrame({"label": ["a"] * 40, "donor": ["big"] * 15 + [f"s{i}" for i in range(15)] + ["u"] * 10})
    sets = dealt(list(range(30)), [], list(range(30, 40)))
    for seed in range(30):
        forget = draw(obs, sets, seed, fraction=0.1).sets.forget
        # three small ones; or one to three before a big one that would overshoot by more; or the big one, drawn first
        assert len(forget) in (1, 2, 3, 15)
        assert (len(forget) == 15) == (forget[0] == 0)


def test_a_tiny_share_is_one_person(obs: pd.DataFrame, apart: CellSets) -> None:
    assert len(draw(obs, apart, fraction=0.001).sets.forget) == 5


def test_controls_are_other_people_where_people_are_apart(obs: pd.DataFrame, apart: CellSets) -> None:
    found = draw(obs, apart)
    np.testing.assert_array_equal(found.controls, np.arange(80, 100))  # not those of nobody known
    donors = obs["donor"].to_numpy()
    np.testing.assert_array_equal(found.group, np.isin(donors, donors[found.sets.forget]))


def test_controls_are_their_own_cells_where_people_are_in_every_set(obs: pd.DataFrame) -> None:
    """As with one donor: of unseen and stop cells, theirs are the kind that is forgotten."""
    numbers = np.arange(100)
    sets = dealt(*([int(i) for i in numbers if i % 5 in part] for part in ({0, 1, 2}, {3}, {4})))
    found = draw(obs, sets)
    theirs = {int(i) // 5 for i in found.sets.forget}
    assert 0 < len(theirs) < 20
    assert {int(i) // 5 for i in found.controls} == theirs
    assert {int(i) // 5 for i in found.sets.stop} == set(range(20)) - theirs
    assert {int(i) // 5 for i in np.flatnonzero(found.group)} == theirs


def test_the_group_is_of_the_forgotten_people_alone(obs: pd.DataFrame, apart: CellSets) -> None:
    """By it utility inside and outside is told apart: other people, who may be controls, are outside."""
    drawn = draw_scenario(obs, apart, PEOPLE, np.random.default_rng(3), 1)
    donors = obs["donor"].to_numpy()
    assert set(donors[drawn.group]) == set(donors[drawn.sets.forget])
    assert not drawn.group[drawn.controls].any()


def test_a_sibling_of_people_is_other_people(obs: pd.DataFrame, apart: CellSets) -> None:
    scenarios: dict[str, ScenarioSettings] = {"first": PEOPLE, "other": SiblingScenario(kind="sibling", of="first")}
    drawn = draw_scenarios(obs, apart, scenarios, lambda name: np.random.default_rng(len(name)), 1)
    first, other = (set(obs["donor"].to_numpy()[drawn[name].sets.forget]) for name in ("first", "other"))
    assert len(first) == len(other) == 4
    assert not first & other


def test_people_are_refused_where_nobody_is_known(obs: pd.DataFrame, apart: CellSets) -> None:
    with pytest.raises(DataError, match="items of nobody known; wanted an identity"):
        draw(obs.drop(columns="donor"), apart)
    with pytest.raises(EmptyGroupError, match="selects no cell"):
        draw(obs.assign(donor=""), apart)
    with pytest.raises(EmptyGroupError, match="selects no cell"):
        draw(obs.assign(donor=None), apart)


def test_people_are_refused_where_everybody_would_go(obs: pd.DataFrame) -> None:
    with pytest.raises(EmptyGroupError, match="every training cell"):
        draw(obs, dealt([0, 1, 2, 3, 4], [], list(range(5, 20))))


def test_no_stop_set_is_no_error_but_one_that_is_used_up_is(obs: pd.DataFrame, apart: CellSets) -> None:
    """Classifiers have none; a VAE's must not be lost to a request."""
    request = PeopleScenario(kind="people", fraction=0.2)
    assert not len(draw_scenario(obs, apart, request, np.random.default_rng(0), 1).sets.stop)
    unknown = np.array([104], dtype=np.int64)  # nobody's, so that nobody's request takes it
    assert len(draw(obs, replace(apart, train=np.setdiff1d(apart.train, unknown), stop=unknown)).sets.stop) == 1
    theirs = draw(obs, apart).sets.forget[-1:]
    used_up = replace(apart, stop=theirs)
    with pytest.raises(EmptyGroupError, match="no stop cell"):
        draw(obs, used_up)

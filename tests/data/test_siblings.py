"""A second draw of a forget request: as many cells of the same kind, none of them the other's; nothing else moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from scforget import seeding
from scforget.data.splits import (
    CellSets,
    Fractions,
    Scenario,
    ScenarioSettings,
    check_siblings,
    draw_scenario,
    draw_scenarios,
    split_cells,
)
from scforget.errors import EmptyGroupError

N = 400
ADAPTER: TypeAdapter[dict[str, ScenarioSettings]] = TypeAdapter(dict[str, ScenarioSettings])
SUBSET = {"kind": "subset", "cluster": "T", "fraction": 0.3}
SCATTERED = {"kind": "scattered", "cells": 40}


def sibling(of: str) -> dict[str, str]:
    return {"kind": "sibling", "of": of}


def requests(**values: dict[str, Any]) -> dict[str, ScenarioSettings]:
    return check_siblings(ADAPTER.validate_python(values))


@pytest.fixture(scope="module")
def obs() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    labels = pd.Categorical(rng.choice(["B", "T", "rare"], N, p=[0.5, 0.45, 0.05]))
    return pd.DataFrame({"label": labels, "donor": rng.choice(["d1", "d2"], N)}, index=[f"cell_{i}" for i in range(N)])


@pytest.fixture(scope="module")
def sets() -> CellSets:
    fractions = Fractions(train=0.5, stop=0.1, aside=0.15, unseen=0.25)
    return split_cells(N, fractions, np.random.default_rng(1))


def named(seed: int = 0) -> Callable[[str], np.random.Generator]:
    return lambda name: seeding.numpy_generator(seeding.derive(seed, "scenario", name))


def draw(obs: pd.DataFrame, sets: CellSets, seed: int = 0, **values: dict[str, Any]) -> dict[str, Scenario]:
    return draw_scenarios(obs, sets, requests(**values), named(seed), min_controls=1)


def test_draw_scenarios_draws_each_name_as_if_it_stood_alone(obs: pd.DataFrame, sets: CellSets) -> None:
    """Siblings and their order shift no other draw, bit for bit."""
    alone = {
        name: draw_scenario(obs, sets, request, named()(name), min_controls=1)
        for name, request in requests(half=SUBSET, some=SCATTERED, all={"kind": "cluster", "cluster": "rare"}).items()
    }
    found = draw(
        obs, sets, second=sibling("some"), half=SUBSET, some=SCATTERED, other=sibling("half"),
        all={"kind": "cluster", "cluster": "rare"},
    )  # fmt: skip
    assert list(found) == ["second", "half", "some", "other", "all"]
    for name, scenario in alone.items():
        for key, cells in vars(scenario.sets).items():
            np.testing.assert_array_equal(getattr(found[name].sets, key), cells)
        np.testing.assert_array_equal(found[name].group, scenario.group)
        np.testing.assert_array_equal(found[name].controls, scenario.controls)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([SUBSET, SCATTERED, {**SUBSET, "fraction": 0.5}]))
def test_draw_scenarios_gives_a_sibling_as_many_cells_of_the_kind_and_none_of_the_others(
    seed: int, request: dict[str, Any]
) -> None:
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame({"label": rng.choice(["B", "T"], N)})
    sets = split_cells(N, Fractions(train=0.5, stop=0.1, aside=0.15, unseen=0.25), rng)
    found = draw(obs, sets, seed, first=request, second=sibling("first"))
    first, second = found["first"].sets, found["second"].sets
    group = found["second"].group
    left = int(group[sets.train].sum()) - len(first.forget)
    assert len(second.forget) == len(np.unique(second.forget)) == min(len(first.forget), left)
    assert np.intersect1d(first.forget, second.forget).size == 0
    assert np.isin(second.forget, sets.train[group[sets.train]]).all()
    np.testing.assert_array_equal(np.sort(np.concatenate([second.forget, second.retain])), sets.train)
    np.testing.assert_array_equal(second.forget, np.sort(second.forget))
    assert second.forget.dtype == first.forget.dtype
    np.testing.assert_array_equal(second.stop, first.stop)
    np.testing.assert_array_equal(group, found["first"].group)
    np.testing.assert_array_equal(found["second"].controls, found["first"].controls)


def test_draw_scenarios_draws_a_sibling_by_its_own_name(obs: pd.DataFrame, sets: CellSets) -> None:
    found = draw(obs, sets, some=SCATTERED, one=sibling("some"), two=sibling("some"))
    again = draw(obs, sets, some=SCATTERED, two=sibling("some"))
    np.testing.assert_array_equal(found["two"].sets.forget, again["two"].sets.forget)
    assert not np.array_equal(found["one"].sets.forget, found["two"].sets.forget)
    other = draw(obs, sets, 1, some=SCATTERED, two=sibling("some"))
    assert not np.array_equal(found["two"].sets.forget, other["two"].sets.forget)


def test_draw_scenarios_gives_a_sibling_what_is_left_where_that_is_less(obs: pd.DataFrame, sets: CellSets) -> None:
    found = draw(obs, sets, most={**SUBSET, "fraction": 0.8}, rest=sibling("most"))
    members = sets.train[(obs["label"] == "T").to_numpy()[sets.train]]
    assert 0 < len(found["rest"].sets.forget) < len(found["most"].sets.forget)
    np.testing.assert_array_equal(found["rest"].sets.forget, np.setdiff1d(members, found["most"].sets.forget))


def test_draw_scenarios_draws_every_cell_that_is_left_as_often(obs: pd.DataFrame, sets: CellSets) -> None:
    """40 of 160 cells in 400 draws: each in a quarter of them, standard deviation 0.022."""
    request = requests(some=SCATTERED)["some"]
    first = draw_scenario(obs, sets, request, np.random.default_rng(0), min_controls=1)
    count = np.zeros(N)
    for seed in range(400):
        rng = np.random.default_rng(seed + 1)
        count[draw_scenario(obs, sets, request, rng, min_controls=1, other=first).sets.forget] += 1
    assert count[first.sets.forget].sum() == 0
    left = np.setdiff1d(sets.train, first.sets.forget)
    np.testing.assert_allclose(count[left] / 400, 40 / len(left), atol=0.09)


@pytest.mark.parametrize(
    "request_",
    [
        {"kind": "cluster", "cluster": "T"},
        {"kind": "donor", "donor": "d1"},
        {"kind": "query", "query": "label == 'B'"},
        {"kind": "subset", "cluster": "rare", "fraction": 0.99},
    ],
)
def test_draw_scenarios_refuses_a_sibling_of_a_request_that_leaves_no_cell(
    obs: pd.DataFrame, sets: CellSets, request_: dict[str, Any]
) -> None:
    with pytest.raises(EmptyGroupError, match="no training cell that the other does not hold already") as caught:
        draw(obs, sets, all=request_, none=sibling("all"))
    assert caught.value.what.startswith("sibling of {")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"a": SCATTERED, "b": sibling("c")}, "b is a sibling of 'c', which is not a scenario of this data set; .* a$"),
        ({"a": SCATTERED, "b": sibling("a"), "c": sibling("b")}, "c is a sibling of 'b', which is a sibling.*; .* a$"),
        ({"a": SCATTERED, "b": sibling("b")}, "b is a sibling of 'b', which is a sibling itself"),
        ({"b": sibling("c"), "c": sibling("b")}, "name one of those that you add"),
    ],
)  # fmt: skip
def test_check_siblings_refuses_what_has_no_cells_of_its_own(values: dict[str, dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_siblings(ADAPTER.validate_python(values))


def test_check_siblings_returns_what_it_was_given() -> None:
    found = ADAPTER.validate_python({"b": sibling("a"), "a": SCATTERED})
    assert check_siblings(found) is found


@pytest.mark.parametrize("wrong", [{}, {"of": 3}, {"of": "a", "cells": 3}])
def test_scenario_settings_refuse_what_is_no_sibling(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_python({"b": {"kind": "sibling", **wrong}})

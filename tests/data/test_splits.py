"""Cell sets and forget requests: partitions, every kind of request, and every request that cannot be met."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from scforget.data.splits import (
    CellSets,
    Fractions,
    Scenario,
    ScenarioSettings,
    deal_halves,
    draw_scenario,
    gene_cells,
    split_cells,
)
from scforget.errors import DataError, EmptyGroupError

FRACTIONS = Fractions(train=0.5, stop=0.1, aside=0.15, unseen=0.25)
N = 400


def request(**values: Any) -> ScenarioSettings:
    adapter: TypeAdapter[ScenarioSettings] = TypeAdapter(ScenarioSettings)
    return adapter.validate_python(values)


@pytest.fixture(scope="module")
def obs() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    table = {
        "label": pd.Categorical(rng.choice(["B", "T", "rare one"], N, p=[0.5, 0.4, 0.1])),
        "donor": pd.Categorical(rng.choice(["d1", "d2"], N)),
        "depth": rng.integers(100, 1000, N),
    }
    return pd.DataFrame(table, index=[f"cell_{i}" for i in range(N)])


@pytest.fixture(scope="module")
def sets() -> CellSets:
    return split_cells(N, FRACTIONS, np.random.default_rng(1))


def draw(obs: pd.DataFrame, sets: CellSets, seed: int = 0, **values: Any) -> Scenario:
    return draw_scenario(obs, sets, request(**values), np.random.default_rng(seed), min_controls=1)


@settings(deadline=None, max_examples=30)
@given(st.integers(50, 2000), st.integers(0, 2**32 - 1))
def test_split_cells_partitions_the_cells_in_the_shares_asked_for(n_cells: int, seed: int) -> None:
    found = split_cells(n_cells, FRACTIONS, np.random.default_rng(seed))
    parts = [found.train, found.stop, found.aside, found.unseen]
    assert sorted(np.concatenate(parts)) == list(range(n_cells))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert {part.dtype for part in parts} == {np.dtype(np.int64)}
    assert [len(part) for part in parts] == pytest.approx(n_cells * np.array([0.5, 0.1, 0.15, 0.25]), abs=1.001)


def test_split_cells_depends_on_its_generator_alone() -> None:
    first, again, other = (split_cells(N, FRACTIONS, np.random.default_rng(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.train, again.train)
    np.testing.assert_array_equal(first.unseen, again.unseen)
    assert not np.array_equal(first.train, other.train)
    assert not np.array_equal(first.train, np.arange(len(first.train)))


@pytest.mark.parametrize("n_cells", [0, 1, 3])
def test_split_cells_refuses_a_set_without_cells(n_cells: int) -> None:
    with pytest.raises(EmptyGroupError, match=f"split of {n_cells} cells: found no cell for '(train|stop)'"):
        split_cells(n_cells, FRACTIONS, np.random.default_rng(0))


@pytest.mark.parametrize("unseen", [0.2, 0.3])
def test_fractions_must_sum_to_1(unseen: float) -> None:
    with pytest.raises(ValidationError, match="must be 1"):
        Fractions(train=0.5, stop=0.1, aside=0.15, unseen=unseen)


def test_fractions_accept_a_sum_that_is_1_but_for_rounding() -> None:
    assert 0.7 + 0.1 + 0.1 + 0.1 != 1
    Fractions(train=0.7, stop=0.1, aside=0.1, unseen=0.1)


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "cluster", "cluster": "B"},
        {"kind": "donor", "donor": "d2"},
        {"kind": "query", "query": "depth > 600 and label != 'T'"},
        {"kind": "subset", "cluster": "T", "fraction": 0.3},
        {"kind": "scattered", "cells": 17},
    ],
)
def test_draw_scenario_partitions_the_training_cells(obs: pd.DataFrame, sets: CellSets, values: dict[str, Any]) -> None:
    scenario = draw(obs, sets, **values)
    found = scenario.sets
    np.testing.assert_array_equal(np.sort(np.concatenate([found.forget, found.retain])), sets.train)
    assert not np.intersect1d(found.forget, found.retain).size
    assert all((np.diff(part) > 0).all() for part in (found.forget, found.retain, found.stop))
    assert scenario.group[found.forget].all()
    assert np.isin(found.stop, sets.stop).all()
    np.testing.assert_array_equal(found.aside, sets.aside)


@pytest.mark.parametrize(
    ("values", "expression"),
    [
        ({"kind": "cluster", "cluster": "rare one"}, "label == 'rare one'"),
        ({"kind": "donor", "donor": "d1"}, "donor == 'd1'"),
        ({"kind": "query", "query": "depth > 600 and label != 'T'"}, "depth > 600 and label != 'T'"),
    ],
)
def test_draw_scenario_of_a_whole_kind_forgets_all_its_training_cells_and_clears_stop(
    obs: pd.DataFrame, sets: CellSets, values: dict[str, Any], expression: str
) -> None:
    wanted = np.flatnonzero(obs.eval(expression))
    scenario = draw(obs, sets, **values)
    np.testing.assert_array_equal(np.flatnonzero(scenario.group), wanted)
    np.testing.assert_array_equal(scenario.sets.forget, np.intersect1d(sets.train, wanted))
    np.testing.assert_array_equal(scenario.sets.stop, np.setdiff1d(sets.stop, wanted))
    assert len(scenario.sets.stop) < len(sets.stop)


def test_draw_scenario_of_a_subset_forgets_some_of_a_cluster_and_leaves_stop(obs: pd.DataFrame, sets: CellSets) -> None:
    members = np.intersect1d(sets.train, np.flatnonzero(obs["label"] == "T"))
    first, again, other = (draw(obs, sets, seed, kind="subset", cluster="T", fraction=0.3) for seed in (0, 0, 1))
    assert len(first.sets.forget) == round(0.3 * len(members))
    assert np.isin(first.sets.forget, members).all()
    np.testing.assert_array_equal(first.group, obs["label"] == "T")
    np.testing.assert_array_equal(first.sets.stop, sets.stop)
    np.testing.assert_array_equal(first.sets.forget, again.sets.forget)
    assert not np.array_equal(first.sets.forget, other.sets.forget)


def test_draw_scenario_of_scattered_cells_takes_as_many_as_asked_for_of_any_kind(
    obs: pd.DataFrame, sets: CellSets
) -> None:
    first, again, other = (draw(obs, sets, seed, kind="scattered", cells=60) for seed in (0, 0, 1))
    assert len(first.sets.forget) == 60
    assert set(obs["label"].iloc[first.sets.forget]) == {"B", "T", "rare one"}
    assert first.group.all()
    np.testing.assert_array_equal(first.sets.stop, sets.stop)
    np.testing.assert_array_equal(first.sets.forget, again.sets.forget)
    assert not np.array_equal(first.sets.forget, other.sets.forget)


def test_draw_scenario_of_a_share_takes_so_large_a_part_of_the_training_cells(
    obs: pd.DataFrame, sets: CellSets
) -> None:
    share, number = (draw(obs, sets, 0, kind="scattered", cells=cells) for cells in (0.3, 60))
    assert len(sets.train) == 200
    np.testing.assert_array_equal(share.sets.forget, number.sets.forget)
    assert len(draw(obs, sets, 0, kind="scattered", cells=1e-9).sets.forget) == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "cluster", "cluster": "b"}, "label 'b': found no cell; wanted one of B, T, rare one"),
        ({"kind": "subset", "cluster": "b", "fraction": 0.5}, "label 'b': found no cell"),
        ({"kind": "donor", "donor": "d3"}, "donor 'd3': found no cell; wanted one of d1, d2"),
        ({"kind": "query", "query": "depth > 1e9"}, "selects no cell"),
        ({"kind": "query", "query": "depth > 0"}, "selects every training cell"),
        ({"kind": "scattered", "cells": 200}, "selects every training cell"),
        ({"kind": "scattered", "cells": 201}, "found 200 training cells; wanted 201"),
    ],
)
def test_draw_scenario_refuses_a_request_that_cannot_be_met(
    obs: pd.DataFrame, sets: CellSets, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(EmptyGroupError, match=words):
        draw(obs, sets, **values)


@pytest.mark.parametrize(
    "query",
    ["depht > 3", "depth >", "", "label == B", "depth", "label + 1", "@depth > 3", "import os", "depth > 'x'"],
)
def test_draw_scenario_refuses_a_bad_query_in_one_line(obs: pd.DataFrame, sets: CellSets, query: str) -> None:
    with pytest.raises(DataError) as caught:
        draw(obs, sets, kind="query", query=query)
    assert type(caught.value) is DataError
    assert caught.value.wanted == "columns label, donor, depth"
    assert repr(query) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_draw_scenario_refuses_donors_where_none_are_known(obs: pd.DataFrame, sets: CellSets) -> None:
    with pytest.raises(DataError, match=r"no obs column 'donor'; wanted prepare\.donor_column"):
        draw(obs.drop(columns="donor"), sets, kind="donor", donor="d1")


def test_draw_scenario_refuses_what_no_cell_could_check(obs: pd.DataFrame, sets: CellSets) -> None:
    """Cells that lie in one set only: nothing was trained on, nothing is left to compare with, nothing stops."""
    where = pd.Series("aside", index=range(N))
    for name in ("train", "stop", "unseen"):
        where[getattr(sets, name)] = name
    table = obs.assign(where=where.to_numpy())
    cases = {
        "where == 'unseen'": "no training cell",
        "where == 'stop'": "no training cell",
        "where == 'stop' or label == 'T'": "no stop cell outside the request",
    }
    for query, words in cases.items():
        with pytest.raises(EmptyGroupError, match=words):
            draw(table, sets, kind="query", query=query)


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "clusters", "cluster": "B"},
        {"kind": "cluster"},
        {"kind": "cluster", "cluster": 3},
        {"kind": "cluster", "cluster": "B", "fraction": 0.5},
        {"kind": "subset", "cluster": "B", "fraction": 1.0},
        {"kind": "subset", "cluster": "B", "fraction": 0.0},
        {"kind": "scattered", "cells": 0},
        {"kind": "scattered", "cells": 5.0},
        {"kind": "scattered", "cells": 1.0},
        {"kind": "scattered", "cells": -0.1},
    ],
)
def test_scenario_settings_refuse_what_is_no_request(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        request(**values)


def test_draw_scenario_of_a_tiny_share_forgets_one_cell(obs: pd.DataFrame, sets: CellSets) -> None:
    assert len(draw(obs, sets, kind="subset", cluster="rare one", fraction=0.001).sets.forget) == 1


def test_draw_scenario_compares_with_the_unseen_cells_of_the_kind(obs: pd.DataFrame, sets: CellSets) -> None:
    found = draw(obs, sets, kind="cluster", cluster="T")
    assert found.controls.tolist() == [cell for cell in sets.unseen if obs["label"].iloc[cell] == "T"]


def test_draw_scenario_of_listed_training_cells_matches_controls_by_label(obs: pd.DataFrame, sets: CellSets) -> None:
    """A list of barcodes names no unseen cell: the controls have the labels of the listed cells, in their shares."""
    labels = obs["label"].astype(str).to_numpy()
    listed = [*sets.train[labels[sets.train] == "T"][:8], *sets.train[labels[sets.train] == "B"][:4]]
    names = [str(name) for name in obs.index[listed]]
    index = obs.set_axis(obs.index.astype(str))
    found = draw(index, sets, kind="query", query=f"index in {names}")
    assert sorted(listed) == found.sets.forget.tolist()
    assert np.isin(found.controls, sets.unseen).all()
    kinds, counts = np.unique(labels[found.controls], return_counts=True)
    shares = dict(zip(kinds, counts / counts.sum(), strict=True))
    assert set(shares) == {"T", "B"}
    assert shares["T"] == pytest.approx(2 / 3, abs=0.05)
    assert len(np.unique(found.controls)) == len(found.controls)


def test_draw_scenario_refuses_too_few_controls(obs: pd.DataFrame, sets: CellSets) -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(EmptyGroupError, match=r"audit\.min_controls = 1000"):
        draw_scenario(obs, sets, request(kind="cluster", cluster="T"), rng, min_controls=1000)


def test_gene_cells_are_those_that_the_source_names(obs: pd.DataFrame, sets: CellSets) -> None:
    scenarios = [draw(obs, sets, kind="cluster", cluster="T"), draw(obs, sets, kind="scattered", cells=5)]
    assert gene_cells("all", sets, scenarios) is None
    assert gene_cells("train", sets, scenarios) is sets.train
    assert gene_cells("unseen", sets, scenarios) is sets.unseen
    kept = set(sets.train.tolist()).difference(*(scenario.sets.forget.tolist() for scenario in scenarios))
    assert set(gene_cells("retain", sets, scenarios).tolist()) == kept


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 300), st.integers(1, 10), st.integers(0, 2**32 - 1))
def test_deal_halves_puts_each_cell_into_exactly_half_of_the_models(n_cells: int, pairs: int, seed: int) -> None:
    members = deal_halves(np.arange(n_cells), 2 * pairs, np.random.default_rng(seed))
    assert members.shape == (2 * pairs, n_cells)
    assert members.dtype == bool
    assert (members.sum(axis=0) == pairs).all()
    assert set(members.sum(axis=1)) <= {n_cells // 2, n_cells - n_cells // 2}


def test_deal_halves_draws_each_pair_anew_and_from_its_generator_alone() -> None:
    first, again, other = (deal_halves(np.arange(100), 6, np.random.default_rng(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(first[1::2], ~first[::2])
    assert len({row.tobytes() for row in first}) == 6


def test_deal_halves_gives_every_cell_the_same_chance() -> None:
    """Mean over 500 pairs of the first model's mask: 0.5, standard deviation 0.022 a cell."""
    members = deal_halves(np.arange(21), 1000, np.random.default_rng(1))
    np.testing.assert_allclose(members[::2].mean(axis=0), 10 / 21, atol=0.1)
    together = members[::2].astype(float).T @ members[::2] / 500
    np.testing.assert_allclose(together[np.triu_indices(21, 1)], 10 / 21 * 9 / 20, atol=0.1)


def test_deal_halves_of_single_cells_are_the_first_half_of_a_shuffled_row() -> None:
    members, generator = deal_halves(np.arange(7), 2, np.random.default_rng(3)), np.random.default_rng(3)
    assert set(np.flatnonzero(members[0])) == set(generator.permutation(7)[:3])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=40), st.integers(0, 2**32 - 1))
def test_deal_halves_keeps_what_one_owner_has_together(sizes: list[int], seed: int) -> None:
    owners = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)) * 3, sizes))
    members = deal_halves(owners, 4, np.random.default_rng(seed))
    for owner in set(owners.tolist()):
        assert (np.ptp(members[:, owners == owner].astype(int), axis=1) == 0).all()
    np.testing.assert_array_equal(members.sum(axis=0), 2)
    assert (np.abs(members.sum(axis=1) - len(owners) / 2) <= max(sizes) / 2).all()
    assert members.any(axis=1).all()


def test_deal_halves_refuses_a_single_person() -> None:
    with pytest.raises(DataError, match="2 on 1 cells or people"):
        deal_halves(np.zeros(9, dtype=np.int64), 2, np.random.default_rng(0))


@pytest.mark.parametrize(("n_cells", "models"), [(10, 0), (10, -2), (10, 1), (10, 7), (1, 2), (0, 2)])
def test_deal_halves_refuses_what_cannot_be_dealt_in_halves(n_cells: int, models: int) -> None:
    with pytest.raises(
        DataError, match=f"shadow models: found {models} on {n_cells} cells or people; wanted an even number"
    ):
        deal_halves(np.arange(n_cells), models, np.random.default_rng(0))

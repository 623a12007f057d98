"""The fold-out tables say all that is known, in words, and the pictures of many recipes bear what is far off."""

import copy
import math

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from scforget.report import comparisons, details, figures, tables

DASH = tables.DASH


def rows_of(table, method, column=0):
    return [row for row in table["rows"] if row[column] == method]


def test_primary_has_two_rows_for_each_method_that_is_judged(audits):
    audits["ssd"]["primary"]["trace"].update(models_needed=3.5, side="outside", interval=[9.9, 9.3])
    table = details.primary(audits)
    assert [row[:2] for row in table["rows"]] == [
        [method, key] for method in tables.ordered(audits) if method != "retrain" for key in ("membership", "trace")
    ]
    membership, trace = rows_of(table, "ssd")
    assert dict(zip(table["head"], membership, strict=True)) == {
        "method": "ssd", "statistic": "membership", "mean": "0.688", "retrains' mean": "0.520", "difference": "0.168",
        "90 % interval": "0.160, 0.176", "margin": "0.020", "p (TOST)": "0.010", "power": "0.910",
        "noise floor": "0.006", "side": "inside", "models needed (times as many)": DASH,
    }  # fmt: skip
    assert trace[4:6] == ["9.60", "9.30, 9.90"]
    assert trace[-2:] == ["outside", "3.5"]


def test_attacks_has_a_row_for_each_attack_group_and_method(audits):
    table = details.attacks(audits)
    attacks, groups = ["elbo", "kl", "knn", "reconstruction"], ["all_unseen", "matched_knn", "same_group"]
    places = [(a, g, m) for a in attacks for g in groups for m in tables.ordered(audits)]
    assert [tuple(row[:3]) for row in table["rows"]] == places
    row = table["rows"][places.index(("elbo", "same_group", "ssd"))]
    assert row[3:] == ["0.698", "0.598, 0.798", "0.396", "0.094, 0.222", "0.69 0.70 0.71"]
    audits["ssd"]["attacks"]["elbo"]["same_group"]["per_seed"] = [0.5, None]
    audits["original"]["attacks"]["elbo"]["same_group"]["per_seed"] = None
    rows = details.attacks(audits)["rows"]
    assert rows[places.index(("elbo", "same_group", "ssd"))][-1] == f"0.50 {DASH}"
    assert rows[places.index(("elbo", "same_group", "original"))][-1] == DASH


def test_utility_has_a_row_for_each_metric_and_a_column_for_each_method(audits):
    del audits["ssd"]["utility"]["outside"]["ari"]
    table = details.utility(audits)
    assert table["head"] == ["mean over models", *tables.ordered(audits)]
    names = ["ari, outside", "elbo, outside", "marker_r, outside", "elbo, inside", "kl, inside"]
    assert [row[0] for row in table["rows"]] == [f"{name} the group" for name in names]
    assert table["rows"][0][1:] == ["0.460" if m != "ssd" else DASH for m in tables.ordered(audits)]
    assert set(table["rows"][1][1:]) == {"−500.100"}


def test_costs_say_what_each_model_took(audits):
    audits["ssd"]["cost"] = {
        "models": 5, "seconds": 93.4, "steps": 1200.4, "forward_forget": 28, "backward_forget": 14,
        "forward_retain": 3000, "backward_retain": 0, "passes_ratio": 0.0432, "relative_change": 0.02,
        "peak_memory_mb": 812.6, "facts": {"epsilon": 9.47321, "shards": 4, "guarantee": "none", "unknown": None},
    }  # fmt: skip
    table = details.costs(audits)
    assert [row[0] for row in table["rows"]] == tables.ordered(audits)
    assert dict(zip(table["head"], rows_of(table, "ssd")[0], strict=True)) == {
        "method": "ssd", "models": "5", "time": "93 s", "steps": "1200", "passes over F": "28 + 14",
        "passes over R": "3000 + 0", "÷ retrain": "0.04", "moved": "0.020", "memory (MB)": "813",
        "facts": f"epsilon: 9.47; shards: 4; guarantee: none; unknown: {DASH}",
    }  # fmt: skip
    audits["ssd"]["cost"] = None
    unknown = f"{DASH} + {DASH}"
    assert rows_of(details.costs(audits), "ssd") == [["ssd", *3 * [DASH], unknown, unknown, *4 * [DASH]]]


def test_tables_are_four_of_text_alone_and_each_row_as_wide_as_its_head(audits):
    found = details.tables(audits)
    assert len({table["title"] for table in found}) == len(found) == 4
    for table in found:
        assert table["rows"]
        for row in table["rows"]:
            assert len(row) == len(table["head"])
            assert all(isinstance(cell, str) and cell for cell in row)
            assert not {"nan", "None", "inf"} & set(" ".join(row).split())


@pytest.mark.parametrize("method", ["ssd", "original", "retrain"])
def test_tables_survive_gaps(gaps, method):
    for audits in [*gaps(method), {}, {"ssd": {}}, {"retrain": {"cost": {"facts": []}}}]:
        for table in details.tables(audits):
            assert all(len(row) == len(table["head"]) for row in table["rows"])
            cells = [cell for row in table["rows"] for cell in row]
            assert all(isinstance(cell, str) and cell not in {"", "nan", "None"} for cell in cells)


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (None, DASH), ("", DASH), (math.nan, DASH), ({}, DASH), ([], DASH), ((), DASH), (0, "0"), (0.0, "0"),
        (3, "3"), (0.123456, "0.123"), (1e9, "1e+09"), ("none", "none"), (True, "True"),
        ([1, 2.5, None], f"1, 2.5, {DASH}"), ({"a": {"b": 1}, "c": [2]}, "a: b: 1; c: 2"),
    ],
)  # fmt: skip
def test_words_are_for_any_plain_value(found, wanted):
    assert details.words(found) == wanted


@pytest.fixture
def recipes():
    """Two recipes of two settings each in three scenarios; the dear one of the second is worse than a retrain."""
    rows = []
    for place, scenario in enumerate(["nk", "half", "scattered"]):
        for number, (recipe, ratio) in enumerate([("reset", 0.3), ("shrink", 0.1), ("reset", 0.1), ("shrink", 0.4)]):
            trace = 0.2 * number - 0.1 * place
            ends = {"trace": trace, "trace_lo": trace - 0.3, "trace_hi": trace + 0.5}
            elbo = -1.0 if number == 3 else 0.5
            rows.append({"scenario": scenario, "recipe": recipe, "passes_ratio": ratio, **ends, "elbo": elbo})
    return pd.DataFrame(rows)


def points(axes):
    """(x, y), both ends of the bar and the marker's inside, of each error bar."""
    for line, _, bars in axes.containers:
        x, y = line.get_xydata()[0]
        (_, low), (_, high) = bars[0].get_segments()[0]
        yield (x, y, low, high), to_hex(line.get_markerfacecolor()) == "#ffffff"


def test_frontier_draws_a_panel_for_each_scenario_with_every_recipe(recipes):
    figure = comparisons.frontier(recipes, 1.0)
    assert [axes.get_title(loc="left").split()[0] for axes in figure.axes] == ["nk", "half", "scattered"]
    for axes, (_, rows) in zip(figure.axes, recipes.groupby("scenario", sort=False), strict=True):
        wanted = {tuple(row) for row in rows[["passes_ratio", "trace", "trace_lo", "trace_hi"]].round(9).to_numpy()}
        found = list(points(axes))
        assert {tuple(np.round(at, 9)) for at, _ in found} == wanted
        assert [at[0] for at, hollow in found if hollow] == [0.4]
        assert (axes.get_xscale(), axes.get_yscale()) == ("linear", "linear")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["reset", "shrink"]


def test_frontier_joins_a_recipes_settings_in_the_order_of_their_cost(recipes):
    axes = comparisons.frontier(recipes, 1.0).axes[0]
    lines = [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2 and line.get_alpha() == 0.7]
    assert lines == [[0.1, 0.3], [0.1, 0.4]]


def test_frontier_gives_the_same_bytes_for_the_same_table(recipes):
    before, table = dict(mpl.rcParams), recipes.copy()
    svg = figures.svg_text(comparisons.frontier(recipes, 1.0))
    assert svg == figures.svg_text(comparisons.frontier(recipes, 1.0))
    pd.testing.assert_frame_equal(recipes, table)
    assert dict(mpl.rcParams) == before
    recipes.loc[0, "trace"] += 0.1
    assert svg != figures.svg_text(comparisons.frontier(recipes, 1.0))


def test_frontier_compresses_only_the_scenario_in_which_something_is_far_off(recipes):
    recipes.loc[0, ["trace", "trace_lo", "trace_hi"]] = [-500.0, -600.0, -400.0]
    figure = comparisons.frontier(recipes, 1.0)
    assert [axes.get_yscale() for axes in figure.axes] == ["symlog", "linear", "linear"]
    assert figures.png_bytes(figure, dpi=30).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("trace", "ratio", "scales"),
    [
        (9.6, 0.04, ("linear", "linear")),
        (29.0, 1.4, ("linear", "linear")),
        (31.0, 0.04, ("linear", "symlog")),
        (-31.0, 0.04, ("linear", "symlog")),
        (9.6, 1.6, ("log", "linear")),
        (-1e5, 300.0, ("log", "symlog")),
    ],
)
def test_cost_against_trace_compresses_an_axis_when_something_is_far_off(audits, trace, ratio, scales):
    audits = copy.deepcopy(audits)
    audits["ssd"]["primary"]["trace"].update(difference=trace, interval=[trace - 1, trace + 1])
    audits["ssd"]["cost"]["passes_ratio"] = ratio
    figure = comparisons.cost_against_trace(audits)
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == scales
    assert figures.png_bytes(figure, dpi=50).startswith(b"\x89PNG")


def test_cost_against_trace_has_no_logarithm_of_a_method_that_was_free(audits):
    audits["ssd"]["cost"]["passes_ratio"], audits["partial_reset"]["cost"]["passes_ratio"] = 0.0, 300.0
    axes = comparisons.cost_against_trace(audits).axes[0]
    assert axes.get_xscale() == "linear"
    assert axes.get_xlim()[0] == 0

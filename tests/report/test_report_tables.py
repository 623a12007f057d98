import io
import itertools
import json
import math
import random
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from scforget.report import tables

ODD = 'a<b>&"|[red]x[/red]'


def terminal(table, title="", width=120):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(tables.to_rich(table, title))
    return console.file.getvalue()


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_ordered_puts_references_first_then_the_closest(audits):
    wanted = ["original", "retrain", "partial_reset", "retain_finetune", "ssd", "gradient_ascent"]
    assert tables.ordered(audits) == wanted
    audits["partial_reset"]["primary"] = None
    assert tables.ordered(audits)[-1] == "partial_reset"


def test_look_knows_the_target_and_falls_back():
    assert tables.look("TARGET (retrain)") is tables.LOOKS["TARGET"]
    for verdict in (None, "", "PERHAPS", "  "):
        assert tables.look(verdict) is tables.UNJUDGED


def test_looks_differ_in_shape_and_are_readable_on_white():
    looks = [*tables.LOOKS.values(), tables.UNJUDGED]
    for a, b in itertools.combinations(looks, 2):
        assert (a.marker, a.filled) != (b.marker, b.filled)
        assert a.glyph != b.glyph
        assert a.words != b.words
    assert all(1.05 / (luminance(a.colour) + 0.05) >= 4.5 for a in looks)


@given(st.floats(-1e5, 1e5), st.integers(0, 5), st.booleans())
def test_number_reads_back_within_its_digits(x, digits, sign):
    text = tables.number(x, digits, sign=sign)
    assert "-" not in text
    assert abs(float(text.replace("−", "-")) - x) <= 0.5 * 10**-digits + 1e-9
    if sign and float(text.replace("−", "-")) > 0:
        assert text.startswith("+")


def test_number_names_what_is_not_a_number():
    assert [tables.number(x) for x in (math.nan, math.inf, -math.inf)] == ["–", "∞", "−∞"]
    assert tables.number(-0.0001, sign=True) == "0.000"
    assert tables.number(-2.5e9) == "−2.50e+09"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.31, "0.3 s"), (71.6, "72 s"), (600, "10 min"), (9000, "2.5 h"), (math.nan, "–"), (math.inf, "∞")],
)
def test_duration_uses_the_shortest_unit(seconds, text):
    assert tables.duration(seconds) == text


def test_value_takes_numbers_and_means_only():
    record = {"a": {"mean": np.float32(0.5)}, "b": True, "c": "7", "d": [1], "e": 3}
    assert tables.value(record, "a") == 0.5
    assert tables.value(record, "e") == 3
    assert all(math.isnan(tables.value(record, key)) for key in ("b", "c", "d", "missing"))
    assert math.isnan(tables.value(record, "e", "deeper"))


def test_bounds_are_ascending_or_nan():
    assert tables.bounds({"i": [2, 1]}, "i") == (1, 2)
    for bad in (None, [1], 3, [1, 2, 3]):
        assert all(map(math.isnan, tables.bounds({"i": bad}, "i")))
    low, high = tables.bounds({"i": [None, 4.0]}, "i")
    assert math.isnan(low)
    assert high == 4.0


def test_margin_is_the_known_one(audits):
    assert tables.margin(audits, "membership") == 0.02
    assert tables.margin({"retrain": audits["retrain"]}, "trace") == 0


def test_scenario_table_copies_the_record(audits):
    table = tables.scenario_table(audits).set_index("method")
    row, record = table.loc["ssd"], audits["ssd"]
    elbo = record["attacks"]["elbo"]["same_group"]
    assert row["auc"] == elbo["auc"]
    assert [row["auc_lo"], row["auc_hi"]] == elbo["interval"]
    assert row["signed"] == elbo["signed"]
    assert row["advantage"] == elbo["advantage"]
    assert (row["null_mean"], row["null_q95"]) == (elbo["null"]["mean"], elbo["null"]["q95"])
    for key in ("membership", "trace"):
        assert row[f"{key}_difference"] == record["primary"][key]["difference"]
        assert [row[f"{key}_lo"], row[f"{key}_hi"]] == record["primary"][key]["interval"]
    assert (row["verdict"], row["utility"]) == ("NOT_FORGOTTEN", "kept")
    assert (row["marker_r"], row["elbo"]) == (0.831, -500.1)
    assert (row["seconds_ratio"], row["passes_ratio"]) == (0.04, 0.04)
    assert table.loc["retrain"].filter(like="difference").isna().all()


def test_scenario_table_of_nothing_has_the_same_columns(audits):
    assert list(tables.scenario_table({}).columns) == list(tables.scenario_table(audits).columns)
    assert tables.to_markdown(tables.scenario_table({})).count("\n") == 2


def test_display_columns_are_explained(audits):
    shown = tables.display(tables.scenario_table(audits))
    assert list(shown.columns) == list(tables.display_columns("elbo"))
    assert shown["AUC"][4] == "0.698\n0.598, 0.798"
    assert shown["trace − retrain"][5] == "−6.40\n−6.80, −6.00"


@pytest.mark.parametrize("method", ["ssd", "original", "retrain"])
def test_tables_survive_every_gap(gaps, method):
    for audits in gaps(method):
        table = tables.scenario_table(audits)
        shown = tables.display(table)
        assert len(shown) == 6
        assert not shown.map(lambda text: "nan" in text or "None" in text).to_numpy().any()
        json.dumps(tables.summary({"a/b": audits}), allow_nan=False)
    tables.to_markdown(table)
    terminal(table)


def test_missing_numbers_are_an_en_dash(audits):
    shown = tables.display(tables.scenario_table({"ssd": {}}))
    found = shown.drop(columns=["method", "advantage"]).iloc[0]
    assert all(set(text) <= {"–", "\n"} for text in found)


def test_summary_is_strict_json_with_sorted_keys_and_six_digits(audits):
    audits["ssd"]["attacks"]["elbo"]["same_group"]["auc"] = 1 / 3
    audits["ssd"]["attacks"]["knn"]["same_group"]["auc"] = math.nan
    audits["ssd"]["cost"]["seconds"] = 12.3456
    names = list(audits)
    random.Random(1).shuffle(names)
    shuffled = {"z/z": {name: audits[name] for name in names}, "a/a": audits}
    found = tables.summary(shuffled)
    assert json.dumps(found, allow_nan=False) == json.dumps(found, sort_keys=True, allow_nan=False)
    assert found["a/a"] == found["z/z"]
    ssd = found["a/a"]["ssd"]
    assert set(ssd) == {"attacks", "cost", "primary", "utility", "verdict"}
    assert set(ssd["primary"]["trace"]) == {"difference", "interval", "margin", "power"}
    assert ssd["attacks"]["elbo"]["auc"] == 0.333333
    assert ssd["attacks"]["knn"]["auc"] is None
    assert ssd["attacks"]["kl"]["null"] == {"mean": 0.094, "q95": 0.222}
    assert ssd["cost"] == {"passes_ratio": 0.04, "seconds": 12.0, "steps": 120}
    assert ssd["utility"]["outside"]["marker_r"] == {"interval": [0.827, 0.835], "mean": 0.831}
    assert "per_seed" not in json.dumps(found)


def test_plain_turns_numpy_into_python():
    assert tables.plain({"b": np.float64(1.23456789), "a": (np.int64(3), True, math.inf, None)}) == {
        "a": [3, True, None, None],
        "b": 1.23457,
    }
    assert type(tables.plain(np.int64(3))) is int


def test_to_csv_reads_back(audits):
    audits[ODD] = audits.pop("ssd")
    table = tables.scenario_table(audits)
    back = pd.read_csv(io.StringIO(tables.to_csv(table)))
    pd.testing.assert_frame_equal(back, table.fillna(np.nan), check_dtype=False, rtol=1e-5)


def test_to_markdown_keeps_odd_names_in_their_cells(audits):
    audits[ODD] = audits.pop("ssd")
    lines = tables.to_markdown(tables.scenario_table(audits)).splitlines()
    bars = [line.replace("\\|", "").count("|") for line in lines]
    assert bars == [len(tables.display_columns("elbo")) + 1] * 8
    assert any("a&lt;b&gt;&amp;" in line for line in lines)
    assert not any("<b>" in line for line in lines)


def test_to_rich_shows_every_number_in_120_columns(audits):
    audits["contrastive_latent"] = {**audits.pop("ssd"), "method": "contrastive_latent"}
    audits["contrastive_latent"]["primary"]["trace"].update(difference=-112.345, interval=[-118.25, -106.44])
    table = tables.scenario_table(audits)
    text = terminal(table, "pbmc68k/cd56_nk")
    assert max(map(len, text.splitlines())) <= 120
    assert "…" not in text
    for row in tables.display(table).drop(columns=["verdict", "advantage"]).to_numpy().ravel():
        assert all(part in text for part in re.split(r"\n|, ", row))
    for words in ("NOT FORGOTTEN", "OVER-FORGOTTEN", "UNDETERMINED", "TARGET (RETRAIN)"):
        assert words in text


def test_to_rich_reads_no_markup_in_names(audits):
    audits["[red]x[/red]"] = audits.pop("ssd")
    assert "[red]x[/red]" in terminal(tables.scenario_table(audits), "[b]title[/b]")
    assert "[b]title[/b]" in terminal(tables.scenario_table(audits), "[b]title[/b]")

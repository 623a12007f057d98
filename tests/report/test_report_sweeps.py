"""Default against tuned settings, as a table of numbers and as a person reads it."""

from __future__ import annotations

import io
from typing import Any

import pandas as pd
import pytest

from scforget.report import tables
from scforget.report.sweeps import displayed, settings_in_words, sweep_table

DISTANCES = {"standard_error": 0.1, "scores": 0.5, "membership": 0.01, "cost": 0.25}


def record(method: str = "ssd", **changes: Any) -> dict[str, Any]:
    return {
        "study": {"dataset": "tiny", "scenario": "part", "method": method, "trials": 6},
        "default": {
            "settings": {"alpha": 5.0, "reference": "D"}, "development": {"distance": 1.25}, "optimism": 0.25,
            "final": {"distance": 1.5, **DISTANCES, "verdict": "NOT_FORGOTTEN", "utility": "kept"},
        },
        "tuned": {
            "settings": {"alpha": 0.000012345, "reference": "R"}, "development": {"distance": 0.3}, "optimism": 0.7,
            "final": {"distance": 1.0, **DISTANCES, "verdict": "FORGOTTEN", "utility": "undetermined"},
        },
        **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"alpha": 5.0, "reference": "D", "rewind": True, "epochs": 12},
            "alpha 5, reference D, rewind True, epochs 12",
        ),
        ({"learning_rate": 1e-5, "inner.steps": 3}, "learning_rate 1e-05, inner.steps 3"),
        ({}, ""),
    ],
)
def test_settings_in_words_names_every_one(settings, said):
    assert settings_in_words(settings) == said


def test_sweep_table_has_two_rows_for_each_study():
    table = sweep_table([record(), record("scrub")])
    assert table[["method", "settings"]].to_numpy().tolist() == [
        ["ssd", "default"], ["ssd", "tuned"], ["scrub", "default"], ["scrub", "tuned"],
    ]  # fmt: skip
    tuned = table.iloc[1].to_dict()
    assert tuned == {
        "data set": "tiny", "scenario": "part", "method": "ssd", "settings": "tuned", "trials": 6,
        "values": "alpha 1.2345e-05, reference R", "development": 0.3, "final": 1.0, "optimism": 0.7, **DISTANCES,
        "verdict": "FORGOTTEN", "utility": "undetermined",
    }  # fmt: skip


def test_sweep_table_of_a_study_without_a_feasible_trial_has_one_row():
    content = record()
    del content["tuned"]
    assert sweep_table([content])["settings"].tolist() == ["default"]
    assert sweep_table([]).empty
    assert displayed(sweep_table([])) == []


def test_displayed_is_what_a_person_reads():
    first, second = displayed(sweep_table([record()]))
    assert second == {
        "request": "tiny / part", "method": "ssd, tuned", "settings": "alpha 1.2345e-05, reference R",
        "distance, development": tables.number(0.3, 2),
        "distance, final (s.e.)": f"{tables.number(1.0, 2)} ({tables.number(0.1, 2)})",
        "optimism": tables.number(0.7, 2), "passes ÷ retrain": tables.number(0.25, 2), "verdict": "forgotten",
        "utility": "undetermined",
    }  # fmt: skip
    assert (first["verdict"], first["utility"]) == ("not forgotten", "kept")
    assert first["distance, development"] != second["distance, development"]


@pytest.mark.parametrize("others", [[], [record()]], ids=["alone", "beside others"])
def test_what_diverged_or_was_not_searched_has_dashes(others):
    """The default lies outside the ranges, and its final models diverge."""
    lost = record("scrub", default={"settings": {"alpha": 5.0}, "final": {"diverged": "the loss became NaN"}})
    del lost["tuned"]
    rows = displayed(sweep_table([*others, lost]))
    assert rows[-1] == {
        "request": "tiny / part", "method": "scrub, default", "settings": "alpha 5",
        "distance, development": tables.DASH, "distance, final (s.e.)": f"{tables.DASH} ({tables.DASH})",
        "optimism": tables.DASH, "passes ÷ retrain": tables.DASH, "verdict": "diverged", "utility": tables.DASH,
    }  # fmt: skip


def test_sweep_table_goes_into_a_csv_and_back():
    table = sweep_table([record()])
    again = pd.read_csv(io.StringIO(tables.to_csv(table)))
    pd.testing.assert_frame_equal(again, table)
    assert tables.to_csv(sweep_table([])).strip() == ""  # of a project that searches nothing

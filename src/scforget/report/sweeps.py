"""Default against tuned settings, on the request they were chosen on and on the one they are judged by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd

from scforget.report.tables import DASH, number

_COLUMNS = ("default", "tuned")


def settings_in_words(row: dict[str, Any]) -> str:
    """Settings as ``alpha 5, reference D``."""
    return ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())


def _row(record: dict[str, Any], name: str) -> dict[str, Any]:
    study, row = record["study"], record.get(name)
    if row is None:
        return {}
    chosen, final = row.get("development") or {}, row["final"]
    return {
        "data set": study["dataset"], "scenario": study["scenario"], "method": study["method"], "settings": name,
        "trials": study["trials"], "values": settings_in_words(row["settings"]),
        "development": chosen.get("distance"), "final": final.get("distance"),
        "standard_error": final.get("standard_error"), "optimism": row.get("optimism"),
        "scores": final.get("scores"), "membership": final.get("membership"), "cost": final.get("cost"),
        "verdict": final.get("verdict", "diverged"), "utility": final.get("utility"),
    }  # fmt: skip


def sweep_table(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Two rows for each study: the settings of params.yaml, and those that it chose.

    Parameters
    ----------
    records
        What a sweep leaves in ``best.yaml``.

    Returns
    -------
    DataFrame
        Distances to the retrained models in margins (``development``: of the request that settings were chosen on,
        ``final``: of the one they are judged by, ``optimism``: the second minus the first), the final distance's parts,
        cost as a share of a retrain's passes, verdict and utility. A study without a feasible trial has one row.
    """
    rows = [_row(record, name) for record in records for name in _COLUMNS]
    return pd.DataFrame([row for row in rows if row])


def displayed(table: pd.DataFrame) -> list[dict[str, str]]:
    """Return the table as a person reads it: numbers to three digits, parts of one thing in one column."""

    def text(row: dict[Any, Any], key: str, digits: int = 2) -> str:
        return number(float("nan") if row[key] is None else float(row[key]), digits)

    return [
        {
            "request": f"{row['data set']} / {row['scenario']}",
            "method": f"{row['method']}, {row['settings']}",
            "settings": row["values"],
            "distance, development": text(row, "development"),
            "distance, final (s.e.)": f"{text(row, 'final')} ({text(row, 'standard_error')})",
            "optimism": text(row, "optimism"),
            "passes ÷ retrain": text(row, "cost"),
            "verdict": str(row["verdict"]).lower().replace("_", " "),
            "utility": str(row["utility"] or DASH),
        }
        for row in table.to_dict("records")
    ]

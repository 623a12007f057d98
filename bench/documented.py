"""The two tables of a classifier's request as ``docs/results/classifiers.md`` has them, from a finished project.

``python -m bench.documented FOLDER DATASET SCENARIO [CSV]``, FOLDER: a project after ``dvc repro audit_classifier``.
Writes Markdown to standard output, and every number to CSV.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from scforget import artifacts, families, results, schema
from scforget.artifacts import Workspace
from scforget.report import classification, tables
from scforget.report.tables import DASH, Audits, bounds, dig, look, number, value

_FIRST = ["method", "verdict", "utility", "retain", "forget", "test", "LiRA TNR at 1 % FNR", "membership AUC − retrain",
          "trace − retrain", "W₁ of φ − retrain", "Cramér of φ − retrain"]  # fmt: skip
_SECOND = ["method", "F official", "F community", "final score official", "final score community", "U-LiRA AUC",
           "worst attack (AUC, corrected p)", "passes ÷ retrain", "time ÷ retrain"]  # fmt: skip


def _about(row: dict[str, Any], name: str, digits: int = 3, *, sign: bool = False) -> str:
    """A number ± half the width of its interval."""
    if not math.isfinite(row[name]):
        return DASH
    half = (row[f"{name}_hi"] - row[f"{name}_lo"]) / 2
    return f"{number(row[name], digits, sign=sign)} ± {number(half, digits)}"


def _between(found: object, digits: int) -> str:
    if not math.isfinite(value(found, "difference")):
        return DASH
    low, high = (number(end, digits, sign=True) for end in bounds(found, "interval"))
    return f"{number(value(found, 'difference'), digits, sign=True)} ({low}, {high})"


def _worst(audits: Audits, method: str) -> str:
    found = dig(audits[method], "worst_attack", "worst")
    name, p = dig(found, "name"), number(value(found, "p_adjusted"), 4)
    return DASH if name is None else f"{name} {number(value(found, 'auc'))}, {p}"


def _verdict(row: dict[str, Any]) -> str:
    return "target" if row["method"] == "retrain" else look(row["verdict"]).words.lower()


def _first(row: dict[str, Any], audits: Audits) -> list[str]:
    primary = dig(audits[row["method"]], "primary")
    shown = [_about(row, name) for name in ("retain", "forget", "test", "lira_tnr")]
    apart = [_between(dig(primary, "membership"), 3), _between(dig(primary, "trace"), 2)]
    far = [_about(row, "wasserstein_difference", 2, sign=True), _about(row, "cramer_difference", 3, sign=True)]
    utility = DASH if row["method"] == "retrain" else str(row["utility"])
    return [f"`{row['method']}`", _verdict(row), utility, *shown, *apart, *far]


def _second(row: dict[str, Any], audits: Audits) -> list[str]:
    if row["method"] == "retrain":
        quality = [f"ceiling {number(row[f'ceiling_{scorer}'])}" for scorer in classification.SCORERS]
        scores = [*quality, DASH, DASH, DASH]
    else:
        scores = [_about(row, f"{kind}_{scorer}") for kind in ("f", "final") for scorer in classification.SCORERS]
        scores.append(f"{number(row['u_lira'])} ({number(row['u_lira_lo'])}, {number(row['u_lira_hi'])})")
    slow = " too slow" if row["too_slow"] else ""
    cost = [number(row["passes_ratio"], 2), f"{number(row['seconds_ratio'], 2)}{slow}"]
    return [f"`{row['method']}`", *scores, _worst(audits, row["method"]), *cost]


def main(arguments: list[str]) -> None:
    """Print both tables of one request."""
    root, dataset, scenario, *csv = arguments
    family, params = families.CLASSIFIERS, schema.load(Path(root) / "params.yaml")
    found = results.audits(Workspace(Path(root)), dataset, scenario, family.plan(params).methods, family.suffix)
    table = classification.class_table(found)
    rows = table.to_dict("records")
    for head, make in ((_FIRST, _first), (_SECOND, _second)):
        print(tables.markdown(pd.DataFrame([make(row, found) for row in rows], columns=head)), end="\n\n")
    power = {name: number(power, 2) for name, power in (dig(found["retrain"], "design_power") or {}).items()}
    print("Power of the recipe to call two equal populations equal:", power)
    for method, audit in found.items():
        print(f"{method}: {dig(audit, 'explanation')}")
    for path in csv:
        artifacts.write_bytes(Path(path), tables.to_csv(table).encode())


if __name__ == "__main__":
    main(sys.argv[1:])

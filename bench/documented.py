"""Tables of the documents, from a finished project. Each command writes Markdown to standard output.

``python -m bench.documented classifiers FOLDER DATASET SCENARIO [CSV]``: the tables of ``docs/results/classifiers.md``.
``python -m bench.documented requests FOLDER DATASET``: the sections of ``docs/results/pbmc68k.md``.
``python -m bench.documented readme FOLDER DATASET SCENARIO…``: the table of the README between its two marks.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from scforget import artifacts, families, results, schema
from scforget.artifacts import Workspace
from scforget.families import Family
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


def _audits(root: str, family: Family, dataset: str, scenario: str) -> dict[str, results.Record]:
    params = schema.load(Path(root) / "params.yaml")
    return results.audits(Workspace(Path(root)), dataset, scenario, family.plan(params).methods, family.suffix)


def _power(found: Audits) -> str:
    power = [number(value(found["retrain"], "design_power", name), 2) for name in ("membership", "trace")]
    return f"Power of the recipe: {', '.join(power)}."


def requests(root: str, dataset: str) -> None:
    """Print every request to VAEs of a data set."""
    for scenario in schema.load(Path(root) / "params.yaml").pipeline.scenarios:
        found = _audits(root, families.VAES, dataset, scenario)
        sizes = {name: number(size, 0) for name, size in found["retrain"]["groups"].items()}
        floor = dig(found["retrain"], "noise_floor")
        floors = f"{number(value(floor, 'membership'), 4)} AUC, {number(value(floor, 'trace'), 2)} trace"
        print(f"## {scenario}\n")
        print(
            f"{sizes['forget']} cells to forget; controls: {sizes['same_group']} of the same kind, "
            f"{sizes['matched_knn']} nearest, {sizes['all_unseen']} unseen in all. Noise floor (retrains against "
            f"retrains): {floors}. {_power(found)}\n"
        )
        print(tables.to_markdown(tables.scenario_table(found)), end="\n")


def readme(root: str, dataset: str, *scenarios: str) -> None:
    """Print a row for each method, a column for each request; methods that are forgotten most often first."""
    found = [_audits(root, families.VAES, dataset, scenario) for scenario in scenarios]
    rows = [_across(method, found) for method in _by_success(found)]
    table = tables.markdown(pd.DataFrame(rows, columns=["method", *scenarios, "utility", "passes ÷ retrain"]))
    print(table.replace(" · ", "<br>"), end="")


def _by_success(found: Sequence[Audits]) -> list[str]:
    """The original, then methods by how often they are forgotten, undetermined, and how near they are in membership."""

    def rank(method: str) -> tuple[float, ...]:
        verdicts = [str(dig(audits[method], "verdict")) for audits in found]
        far = [abs(value(audits[method], "primary", "membership", "difference")) for audits in found]
        return (method != "original", -verdicts.count("FORGOTTEN"), -verdicts.count("UNDETERMINED"), sum(far))

    return sorted((method for method in found[0] if method != "retrain"), key=rank)


def _across(method: str, found: Sequence[Audits]) -> list[str]:
    cells = []
    for audits in found:
        seen, primary = look(dig(audits[method], "verdict")).words.lower(), dig(audits[method], "primary")
        membership, trace = (
            number(value(primary, name, "difference"), n, sign=True) for name, n in (("membership", 3), ("trace", 2))
        )
        cells.append(f"{f'**{seen}**' if seen == 'forgotten' else seen}\n{membership}, {trace}")
    utility = [str(dig(audits[method], "utility", "verdict")) for audits in found]
    utility = utility[:1] if len(set(utility)) == 1 else utility
    passes = [value(audits[method], "cost", "passes_ratio") for audits in found]
    return [f"`{method}`", *cells, " / ".join(utility), f"{number(min(passes), 2)}–{number(max(passes), 2)}"]


def classifiers(root: str, dataset: str, scenario: str, *csv: str) -> None:
    """Print both tables of one request; write every number to CSV, if asked."""
    found = _audits(root, families.CLASSIFIERS, dataset, scenario)
    table = classification.class_table(found)
    rows = table.to_dict("records")
    for head, make in ((_FIRST, _first), (_SECOND, _second)):
        print(tables.markdown(pd.DataFrame([make(row, found) for row in rows], columns=head)), end="\n\n")
    print(_power(found))
    for method, audit in found.items():
        print(f"{method}: {dig(audit, 'explanation')}")
    for path in csv:
        artifacts.write_bytes(Path(path), tables.to_csv(table).encode())


if __name__ == "__main__":
    {"classifiers": classifiers, "requests": requests, "readme": readme}[sys.argv[1]](*sys.argv[2:])

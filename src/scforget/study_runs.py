"""A finished study as MLflow runs: the study is the parent, its trials are nested, the chosen one is tagged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scforget.artifacts import read_bytes, read_json, read_table
from scforget.config import read_yaml
from scforget.report.sweeps import settings_in_words
from scforget.tracking import Run, flatten

#: The page of plots is several megabytes and the same in every sitting of a study; it is with the parent only.
_FILES = ("best.yaml", "trials.csv", "study.html", "cost.json")


def _metrics(record: Mapping[str, Any]) -> dict[str, float]:
    shown = {key: record[key] for key in ("original", "retrain", "default", "tuned") if key in record}
    for row in shown.values():
        row.pop("settings", None)
    flat = {key.replace(".", "/"): value for key, value in flatten(shown).items()}
    return {key: float(value) for key, value in flat.items() if isinstance(value, int | float)}


def _trial(row: Mapping[Any, Any], searched: list[str], fingerprint: str, tags: Mapping[str, str]) -> Run:
    said = {"optuna.trial": str(row["trial"]), "state": str(row["state"]), "feasible": str(row["feasible"]).lower()}
    said |= {name: "true" for name in ("default", "chosen") if row[name]}
    numbers = {
        key: float(value) for key, value in row.items()
        if key not in (*searched, "trial", "state", "feasible", "default", "chosen") and isinstance(value, int | float)
    }  # fmt: skip
    params = {key: row[key] for key in searched}
    return Run(f"trial {row['trial']}", f"{fingerprint}-{row['trial']}", {**tags, **said}, params, numbers)


def study_run(folder: Path, tags: Mapping[str, str], params: Mapping[str, object]) -> Run:
    """Build the runs of a study from what the sweep left in a folder.

    Parameters
    ----------
    folder
        With ``best.yaml``, ``trials.csv``, ``study.html`` and ``cost.json``.
    tags, params
        Of the item.
    """
    record, table = read_yaml(folder / "best.yaml"), read_table(folder / "trials.csv")
    study, searched = record["study"], list(record["ranges"])
    fingerprint = f"{study['fingerprint']}-{study['trials']}"  # a study that went on is another run
    common = {**tags, "kind": "trial", "optuna.study": study["name"]}
    children = tuple(_trial(row, searched, fingerprint, common) for row in table.to_dict("records"))
    said = {"kind": "study", "optuna.study": study["name"], "development": study["development"]}
    if "tuned" in record:
        final = record["tuned"]["final"]
        said |= {"best.trial": str(record["tuned"]["trial"]), "best.verdict": str(final.get("verdict", "diverged"))}
        said |= {"best.settings": settings_in_words(record["tuned"]["settings"])}
    cost = {"cost/seconds": float(read_json(folder / "cost.json")["seconds"])}
    counts = {f"study/{key}": float(study[key]) for key in ("trials", "diverged")}
    return Run(
        f"{study['method']} {study['scenario']} sweep", fingerprint, {**tags, **said}, params,
        {**_metrics(record), **counts, **cost},
        artifacts=lambda: {name: read_bytes(folder / name) for name in _FILES},
        tables=lambda: {"trials.json": table}, children=children,
    )  # fmt: skip

"""Reads back what the stages left in ``results/``: audit records with their costs, for the report and for tracking."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import Any

from scforget.artifacts import Workspace, read_json

Record = dict[str, Any]

#: The populations that every scenario is judged against; they are scored by the ``reference`` stage.
REFERENCES = ("original", "retrain")


def models_stage(dataset: str, scenario: str, method: str) -> tuple[str, ...]:
    """The stage and keys under which a population of models was made."""
    if method == "original":
        return ("train", dataset)
    if method == "retrain":
        return ("retrain", dataset, scenario)
    return ("unlearn", dataset, scenario, method)


def _mean(rows: Iterable[Record], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return fmean(values) if values else None


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def cost(workspace: Workspace, dataset: str, scenario: str, method: str) -> Record:
    """Mean cost of one model of a population, and its ratio to the early-stopped retrain's.

    Returns
    -------
    dict
        ``seconds``, ``peak_memory_mb`` (volatile), ``steps``, ``passes`` over cells, ``relative_change``
        ‖θ − θ0‖/‖θ0‖, and ``seconds_ratio``, ``passes_ratio`` (1 = as dear as retraining). Timings that are not on
        disk are ``None``.
    """

    def rows(name: str, file: str) -> list[Record]:
        path = workspace.results(*models_stage(dataset, scenario, name)) / file
        return list(read_json(path)["seeds"].values()) if path.exists() else []

    own, target = rows(method, "result.json"), rows("retrain", "result.json")
    own_times, target_times = rows(method, "cost.json"), rows("retrain", "cost.json")
    found: Record = {key: _mean(own, key) for key in ("steps", "passes", "relative_change")}
    found |= {key: _mean(own_times, key) for key in ("seconds", "peak_memory_mb")}
    found["passes_ratio"] = _ratio(found["passes"], _mean(target, "passes"))
    found["seconds_ratio"] = _ratio(found["seconds"], _mean(target_times, "seconds"))
    return found


def audits(workspace: Workspace, dataset: str, scenario: str, methods: Iterable[str]) -> dict[str, Record]:
    """Audit records of a scenario by method, originals and retrains first, each with its ``cost``."""
    records: dict[str, Record] = dict(read_json(workspace.results("reference", dataset, scenario) / "result.json"))
    for method in methods:
        records[method] = read_json(workspace.results("audit", dataset, scenario, method) / "result.json")[method]
    return {name: {**records[name], "cost": cost(workspace, dataset, scenario, name)} for name in records}

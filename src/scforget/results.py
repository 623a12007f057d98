"""Reads back what the stages left in ``results/``: audit records with their costs, for the report and for tracking."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import Any

from scforget.artifacts import Workspace, read_json

Record = dict[str, Any]

#: The populations that every scenario is judged against; they are scored by the ``reference`` stage.
REFERENCES = ("original", "retrain")


def models_stage(dataset: str, scenario: str, method: str, suffix: str = "") -> tuple[str, ...]:
    """The stage and keys under which a population of models was made; ``suffix`` is that of its family's stages."""
    if method == "original":
        return (f"train{suffix}", dataset)
    if method == "retrain":
        return (f"retrain{suffix}", dataset, scenario)
    return (f"unlearn{suffix}", dataset, scenario, method)


def _mean(rows: Iterable[Record], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return fmean(values) if values else None


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _facts(rows: list[Record]) -> Record:
    """Mean of each number that all models have, and the words that all share."""
    facts = [row.get("facts") or {} for row in rows]
    found: Record = {}
    for key in [key for key in facts[0] if all(key in row for row in facts)] if facts else []:
        values = [row[key] for row in facts]
        if all(isinstance(value, int | float) for value in values):
            found[key] = fmean(values)
        elif len(set(values)) == 1:
            found[key] = values[0]
    return found


def cost(workspace: Workspace, dataset: str, scenario: str, method: str, suffix: str = "") -> Record:
    """Mean cost of one model of a population, and its ratio to the early-stopped retrain's.

    Returns
    -------
    dict
        ``models``, how many there are; means over them of ``seconds``, ``peak_memory_mb`` (volatile), ``steps``,
        ``passes`` over cells, ``forward_forget``, ``backward_forget``, ``forward_retain``, ``backward_retain``,
        ``relative_change`` ‖θ − θ0‖/‖θ0‖; ``seconds_ratio``, ``passes_ratio`` (1 = as dear as retraining); ``facts``,
        what the method says of itself. Timings that are not on disk are ``None``.
    """

    def rows(name: str, file: str) -> list[Record]:
        path = workspace.results(*models_stage(dataset, scenario, name, suffix)) / file
        return list(read_json(path)["seeds"].values()) if path.exists() else []

    own, target = rows(method, "result.json"), rows("retrain", "result.json")
    own_times, target_times = rows(method, "cost.json"), rows("retrain", "cost.json")
    found: Record = {"models": len(own) or None}
    found |= {key: _mean(own, key) for key in ("steps", "passes", "relative_change")}
    found |= {
        f"{direction}_{cells}": _mean(({"n": (row.get(direction) or {}).get(cells, 0)} for row in own), "n")
        for direction in ("forward", "backward")
        for cells in ("forget", "retain")
    }
    found["facts"] = _facts(own)
    found |= {key: _mean(own_times, key) for key in ("seconds", "peak_memory_mb")}
    found["passes_ratio"] = _ratio(found["passes"], _mean(target, "passes"))
    found["seconds_ratio"] = _ratio(found["seconds"], _mean(target_times, "seconds"))
    return found


def audits(
    workspace: Workspace, dataset: str, scenario: str, methods: Iterable[str], suffix: str = ""
) -> dict[str, Record]:  # fmt: skip
    """Audit records of a scenario by method, originals and retrains first, with ``cost`` and ``failed_seeds``."""
    records: dict[str, Record] = dict(
        read_json(workspace.results(f"reference{suffix}", dataset, scenario) / "result.json")
    )
    for method in methods:
        records[method] = read_json(workspace.results(f"audit{suffix}", dataset, scenario, method) / "result.json")
    for name, record in records.items():
        made = read_json(workspace.results(*models_stage(dataset, scenario, name, suffix)) / "result.json")
        record |= {"failed_seeds": made["failed"], "cost": cost(workspace, dataset, scenario, name, suffix)}
    return records

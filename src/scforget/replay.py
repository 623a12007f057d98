"""Turns what a stage left on disk into tracked runs.

A stage calls it when its results are written, and ``scforget track`` calls it again for results that DVC restored: one
path for both, so a rebuilt store holds the same parameters, metrics, curves and figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scforget import pictures, results
from scforget.artifacts import Workspace, read_bytes, read_json, read_table
from scforget.pipeline import Inputs, Item
from scforget.report.figures import png_bytes, training_curves
from scforget.tracking import DatasetInput, Run, flatten

Record = dict[str, Any]
Artifacts = Callable[[], Mapping[str, bytes]]
_POPULATIONS = ("train", "retrain", "shadows", "unlearn")


def tags(item: Item, **more: object) -> dict[str, str]:
    """Tags that say what a run is of."""
    names = ("dataset", "shadow_block") if item.stage == "shadows" else ("dataset", "scenario", "method")
    axes = dict(zip(names, item.keys, strict=False))
    stage = Item(item.stage, item.keys[:2])  # one method's part has a third key
    named = {"stage": item.stage, "dvc.stage": stage.name, **axes, **more}
    return {key: str(value) for key, value in named.items()}


def _params(inputs: Inputs) -> dict[str, object]:
    """Flattened params without the names of data set and method, so that runs line up in one column."""
    dataset = f"datasets.{inputs.item.keys[0]}."
    method = f"unlearn.{inputs.item.keys[-1]}."
    return {key.removeprefix(dataset).removeprefix(method): value for key, value in flatten(inputs.params).items()}


def _dataset(inputs: Inputs, context: str) -> DatasetInput | None:
    """The data that the item read, by DVC's hash: the raw set for ``prepare``, the prepared cells for the rest."""
    for path, digest in inputs.deps.items():
        if path.startswith(("data/", "work/prepare/")):
            return DatasetInput(inputs.item.keys[0], path, digest, context)
    return None


def _numbers(record: Record, prefix: str) -> dict[str, float]:
    """Flatten to slash-separated metric keys; only numbers and truth values survive."""
    flat = {f"{prefix}{key.replace('.', '/')}": value for key, value in flatten(record).items()}
    return {key: float(value) for key, value in flat.items() if isinstance(value, int | float)}


def _evidence(record: Record) -> dict[str, float]:
    """What stands under the verdict, as far as it was measured."""
    worst, models = record.get("worst_attack") or {}, record.get("population") or {}
    found = {f"worst_attack/{key}": (worst.get("worst") or {}).get(key) for key in ("auc", "p_adjusted")}
    found |= {key: models.get(key) for key in ("forgetting_quality",)}
    found |= {f"klom/{key}": (models.get("klom") or {}).get(key) for key in ("value", "excess")}
    found["u_lira/auc"] = (models.get("u_lira") or {}).get("auc")
    for name, bound in (models.get("epsilon_bounds") or {}).items():
        found[f"epsilon_bound/{name}"] = bound.get("epsilon")
    found["exposed_share"] = (record.get("exposure") or {}).get("above_null")
    return _numbers(found, "audit/")


def audit_metrics(record: Record) -> dict[str, float]:
    """What a person compares methods by: ``audit/…``, ``utility/…``, ``cost/…``."""
    metrics: dict[str, float] = {}
    for attack, by_control in record["attacks"].items():
        for control, row in by_control.items():
            place = "audit" if control == "same_group" else f"other_controls/{control}"
            keys = ("auc", "signed", "advantage", "distance_to_retrain")
            metrics |= _numbers({key: row.get(key) for key in keys}, f"{place}/{attack}/")
    for statistic, row in (record.get("primary") or {}).items():
        shown = ("mean", "target_mean", "difference", "p_tost", "power", "noise_floor")
        metrics |= _numbers({key: row.get(key) for key in shown}, f"audit/{statistic}/")
        metrics |= _numbers(dict(zip(("low", "high"), row["interval"], strict=True)), f"audit/{statistic}/")
    metrics |= _evidence(record)
    for name in ("noise_floor", "design_power"):
        metrics |= _numbers(record.get(name) or {}, f"audit/{name}/")
    for place, prefix in (("outside", "utility/"), ("inside", "utility/inside/")):
        metrics |= _numbers({key: row["mean"] for key, row in record["utility"].get(place, {}).items()}, prefix)
    return metrics | _numbers(record.get("cost") or {}, "cost/")


def _seed_metrics(record: Record, index: int) -> dict[str, float]:
    """The same of one model of a population."""
    metrics = {}
    for attack, by_control in record["attacks"].items():
        row = by_control["same_group"]
        metrics[f"audit/{attack}/auc"] = row["per_seed"][index]
        if intervals := row.get("per_seed_intervals"):
            metrics |= {
                f"audit/{attack}/{end}": value for end, value in zip(("low", "high"), intervals[index], strict=True)
            }
    metrics["audit/trace"] = record["trace_per_seed"][index]
    for key, row in record["utility"].get("outside", {}).items():
        if row["per_seed"][index] is not None:
            metrics[f"utility/{key}"] = row["per_seed"][index]
    return metrics


def _audited(workspace: Workspace, inputs: Inputs, item: Item, method: str, record: Record) -> Run:
    """A row of the comparison: one population that an item audited, its models nested."""
    dataset, scenario = item.keys
    record = {**record, "cost": results.cost(workspace, dataset, scenario, method)}
    fingerprint = record.get("fingerprint") or f"{inputs.fingerprint}-{method}"
    common = {**tags(Item("audit", (dataset, scenario, method))), "dvc.stage": item.name}  # or `reference`
    verdict = {
        "verdict": str(record.get("verdict")),
        "utility_verdict": str(record["utility"].get("verdict")),
        "published_criterion": str(record.get("published_criterion")),
        "worst_attack": str(((record.get("worst_attack") or {}).get("worst") or {}).get("name")),
    }
    children = tuple(
        Run(f"{method} seed {seed}", f"{fingerprint}-{seed}", {**common, "seed": str(seed)}, {},
            _seed_metrics(record, index))
        for index, seed in enumerate(record["seeds"])
    )  # fmt: skip
    return Run(
        f"{method} {scenario} audit", fingerprint, {**common, **verdict, "kind": "comparison"},
        {"method": method, "scenario": scenario, **_params(inputs)},  # axes of the parallel-coordinates chart
        audit_metrics(record), artifacts=_audit_artifacts(workspace, inputs.item, method),
        dataset=_dataset(inputs, "audit"), children=children,
    )  # fmt: skip


def _audit_artifacts(workspace: Workspace, item: Item, method: str) -> Artifacts:
    def make() -> dict[str, bytes]:
        folder = workspace.results(item.stage, *item.keys)
        drawn = pictures.audited(workspace, item.keys[0], item.keys[1], method)
        files = {path.name: read_bytes(path) for path in sorted(folder.glob("*.*")) if path.suffix != ".npz"}
        return files | {f"{name}.png": png_bytes(figure) for name, figure in drawn.items()}

    return make


def _population_artifacts(folder: Path, history: pd.DataFrame, title: str) -> Artifacts:
    def make() -> dict[str, bytes]:
        contents = {name: read_bytes(folder / name) for name in ("result.json", "history.csv", "cost.json")}
        if len(history):
            contents["training_curves.png"] = png_bytes(training_curves(history, title))
        return contents

    return make


def _reference_runs(workspace: Workspace, inputs: Inputs) -> list[Run]:
    records = read_json(workspace.results(inputs.item.stage, *inputs.item.keys) / "result.json")
    return [_audited(workspace, inputs, inputs.item, name, record) for name, record in records.items()]


def _audit_runs(workspace: Workspace, inputs: Inputs) -> list[Run]:
    folder = workspace.results(inputs.item.stage, *inputs.item.keys)
    records = {name: read_json(folder / name / "result.json") for name in inputs.params["pipeline.methods"]}
    return [
        _audited(workspace, inputs.of_method(name, {}), inputs.item, name, record) for name, record in records.items()
    ]


def _unlearn_runs(workspace: Workspace, inputs: Inputs) -> list[Run]:
    parts = [inputs.of_method(name, {}) for name in inputs.params["pipeline.methods"]]
    return [_population_run(workspace, part.item, part) for part in parts]


def _curves(table: pd.DataFrame) -> dict[int, dict[str, float]]:
    rows = table.drop(columns="seed").to_dict("records")
    return {
        int(row.pop("epoch")): {f"train/{key}": float(value) for key, value in row.items() if np.isfinite(value)}
        for row in rows
    }  # phases of a run have columns of their own


def _said(row: Record) -> dict[str, str]:
    """What a method says of its model in words, as tags."""
    return {f"fact.{key}": value for key, value in (row.get("facts") or {}).items() if isinstance(value, str)}


def _population_run(workspace: Workspace, item: Item, inputs: Inputs) -> Run:
    folder = workspace.results(item.stage, *item.keys)
    result, costs = read_json(folder / "result.json"), read_json(folder / "cost.json")
    history = read_table(folder / "history.csv")
    fingerprint = result.get("fingerprint", inputs.fingerprint)
    children = []
    for seed, row in result["seeds"].items():
        own = history[history["seed"] == int(seed)]
        metrics = _numbers(row, "model/")
        metrics |= _numbers(costs["seeds"].get(seed, {}), "cost/")
        children.append(
            Run(f"{item.keys[-1]} seed {seed}", f"{fingerprint}-{seed}", tags(item, seed=seed, **_said(row)),
                metrics=metrics, curves=_curves(own))
        )  # fmt: skip
    for seed, why in result["failed"].items():
        failed = tags(item, seed=seed, failed=why)
        children.append(Run(f"{item.keys[-1]} seed {seed}", f"{fingerprint}-{seed}", failed))
    metrics = {}
    described = [_numbers(row, "model/") for row in result["seeds"].values()]
    for rows in (described, [_numbers(row, "cost/") for row in costs["seeds"].values()]):
        metrics |= {str(key): float(value) for key, value in pd.DataFrame(rows).mean().items()}
    artifacts = _population_artifacts(folder, history, item.name)
    made_by = tags(item, numerics=costs["machine"].get("numerics", "unknown"))
    return Run(
        f"{' '.join(reversed(item.keys))} {item.stage}", fingerprint, made_by, _params(inputs),
        metrics, artifacts=artifacts, dataset=_dataset(inputs, item.stage), children=tuple(children),
    )  # fmt: skip


def _report_artifacts(workspace: Workspace) -> dict[str, bytes]:
    files = sorted(path for path in workspace.report.rglob("*") if path.is_file() and path.name != ".gitignore")
    return {path.relative_to(workspace.report).as_posix(): read_bytes(path) for path in files}


def runs(workspace: Workspace, inputs: Inputs) -> list[Run]:
    """Build the tracked runs of a finished stage item: one for each model population it made or judged."""
    item = inputs.item
    several = {"unlearn": _unlearn_runs, "reference": _reference_runs, "audit": _audit_runs}
    if item.stage in several and len(item.keys) == 2:
        return several[item.stage](workspace, inputs)
    if item.stage in _POPULATIONS:
        return [_population_run(workspace, item, inputs)]
    if item.stage == "report":
        return [Run("report", inputs.fingerprint, tags(item), artifacts=lambda: _report_artifacts(workspace))]
    if item.stage not in ("prepare", "split"):
        return []
    path = workspace.results(item.stage, *item.keys) / "result.json"
    return [
        Run(
            f"{item.keys[0]} {item.stage}", inputs.fingerprint, tags(item), _params(inputs),
            _numbers(read_json(path), f"{item.stage}/"), artifacts=lambda: {"result.json": read_bytes(path)},
            dataset=_dataset(inputs, item.stage),
        )
    ]  # fmt: skip

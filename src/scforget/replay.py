"""Turns what a stage left on disk into tracked runs.

A stage calls it when its results are written, and ``scforget track`` calls it again for results that DVC restored: one
path for both, so a rebuilt store holds the same parameters, metrics, curves and figures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scforget import measures, pictures, results
from scforget.artifacts import Workspace, read_bytes, read_json, read_table
from scforget.pipeline import Inputs, Item
from scforget.report.figures import png_bytes, training_curves
from scforget.study_runs import study_run
from scforget.tracking import DatasetInput, Run, flatten

Record = dict[str, Any]
Tables = Callable[[], Mapping[str, pd.DataFrame]]
_THEORY = ("overlap", "proposition", "worlds", "ablation", "figures")
_POPULATIONS = ("train", "retrain", "shadows", "unlearn")
_SUFFIX = "_classifier"  # of the stages of the second family of models


def _kind(stage: str) -> str:
    """What a stage does, whichever family of models it does it to."""
    return stage.removesuffix(_SUFFIX)


def _suffix(stage: str) -> str:
    return stage.removeprefix(_kind(stage))


def tags(item: Item, **more: object) -> dict[str, str]:
    """Tags that say what a run is of."""
    names = ("dataset", "shadow_block") if _kind(item.stage) == "shadows" else ("dataset", "scenario", "method")
    axes = dict(zip(names, item.keys, strict=False))
    stage = Item(item.stage, item.keys[:2])  # one method's part has a third key
    named = {"stage": item.stage, "dvc.stage": stage.name, **axes, **more}
    return {key: str(value) for key, value in named.items()}


def _params(inputs: Inputs) -> dict[str, object]:
    """Flattened params without the names of data set and method, so that runs line up in one column."""
    first, last = inputs.item.keys[0], inputs.item.keys[-1]
    own, suffix = ("classifiers", _SUFFIX) if _suffix(inputs.item.stage) else ("datasets", "")
    names = f"{own}.{first}.", f"unlearn{suffix}.{last}."
    found: dict[str, object] = {}
    for key, value in flatten(inputs.params).items():
        known = next((name for name in names if key.startswith(name)), "")
        found[key.removeprefix(known)] = value
    return found


def _dataset(inputs: Inputs, context: str) -> DatasetInput | None:
    """The data that the item read, by DVC's hash: the raw set for ``prepare``, the prepared cells for the rest."""
    for path, digest in inputs.deps.items():
        if path.startswith(("data/", "work/prepare")):
            return DatasetInput(inputs.item.keys[0], path, digest, context)
    return None


def _audited(workspace: Workspace, inputs: Inputs, item: Item, method: str, record: Record) -> Run:
    """A row of the comparison: one population that an item audited, its models nested."""
    dataset, scenario = item.keys
    suffix = _suffix(inputs.item.stage)
    record = {**record, "cost": results.cost(workspace, dataset, scenario, method, suffix)}
    fingerprint = record.get("fingerprint") or f"{inputs.fingerprint}-{method}"
    common = {**tags(Item(f"audit{suffix}", (dataset, scenario, method))), "dvc.stage": item.name}  # or `reference`
    children = tuple(
        Run(f"{method} seed {seed}", f"{fingerprint}-{seed}", {**common, "seed": str(seed)}, {},
            measures.seed_metrics(record, index))
        for index, seed in enumerate(record["seeds"])
    )  # fmt: skip
    of_whom = suffix.replace("_", " of ")
    return Run(
        f"{method} {scenario} audit{of_whom}", fingerprint, {**common, **measures.words(record), "kind": "comparison"},
        {"method": method, "scenario": scenario, **_params(inputs)},  # axes of the parallel-coordinates chart
        measures.audit_metrics(record), artifacts=partial(_audit_artifacts, workspace, inputs.item, method),
        tables=_cell_tables(workspace.results(inputs.item.stage, *inputs.item.keys), record),
        dataset=_dataset(inputs, "audit"), children=children,
    )  # fmt: skip


def _audit_artifacts(workspace: Workspace, item: Item, method: str) -> dict[str, bytes]:
    folder = workspace.results(item.stage, *item.keys)
    drawn = pictures.audited(workspace, item.keys[0], item.keys[1], method, _suffix(item.stage))
    files = {path.name: read_bytes(path) for path in sorted(folder.glob("*.*")) if path.suffix != ".npz"}
    return files | {f"{name}.png": png_bytes(figure) for name, figure in drawn.items()}


def _cell_tables(folder: Path, record: Record) -> Tables:
    def make() -> dict[str, pd.DataFrame]:
        path = folder / "cells.csv"  # originals and retrains have none
        return {"cells.json": measures.cell_table(read_table(path), record)} if path.exists() else {}

    return make


def _population_artifacts(folder: Path, history: pd.DataFrame, title: str) -> dict[str, bytes]:
    contents = {name: read_bytes(folder / name) for name in ("result.json", "history.csv", "cost.json")}
    if len(history):
        contents["training_curves.png"] = png_bytes(training_curves(history, title))
    return contents


def _comparison_artifacts(
    workspace: Workspace, dataset: str, scenario: str, audits: dict[str, Record], suffix: str
) -> dict[str, bytes]:  # fmt: skip
    drawn = pictures.compared(workspace, dataset, scenario, audits, suffix)
    return {f"{name}.png": png_bytes(figure) for name, figure in drawn.items()}


def _reference_runs(workspace: Workspace, inputs: Inputs) -> list[Run]:
    records = read_json(workspace.results(inputs.item.stage, *inputs.item.keys) / "result.json")
    return [_audited(workspace, inputs, inputs.item, name, record) for name, record in records.items()]


def _comparison_runs(workspace: Workspace, inputs: Inputs, records: dict[str, Record]) -> list[Run]:
    """One run that shows all methods of a scenario in one table and on common axes.

    It stands for the records that it shows: when one of them changes, it is another run. None without the reference's
    results, which `track` then names as left out.
    """
    dataset, scenario = inputs.item.keys
    suffix = _suffix(inputs.item.stage)
    path = workspace.results(f"reference{suffix}", dataset, scenario) / "result.json"
    if not path.exists():
        return []
    records = {**read_json(path), **records}
    made_from = {name: record.get("fingerprint") or record for name, record in records.items()}
    content = json.dumps([dataset + suffix, scenario, made_from], sort_keys=True)
    audits = {
        name: {**record, "cost": results.cost(workspace, dataset, scenario, name, suffix)}
        for name, record in records.items()
    }
    said = {"kind": "comparison_table", "forgotten_and_kept": ", ".join(measures.forgotten(audits)) or "none"}
    shared = {key: value for key, value in _params(inputs).items() if not key.startswith("unlearn")}
    make = partial(_comparison_artifacts, workspace, dataset, scenario, audits, suffix)
    return [
        Run(
            f"comparison {dataset}{suffix} {scenario}", hashlib.sha256(content.encode()).hexdigest()[:32],
            {**tags(inputs.item), **said}, {"scenario": scenario, **shared}, measures.verdict_counts(audits),
            artifacts=make, tables=lambda: {"comparison.json": measures.comparison_table(audits)},
            dataset=_dataset(inputs, "audit"),
        )
    ]  # fmt: skip


def _audit_runs(workspace: Workspace, inputs: Inputs) -> list[Run]:
    folder = workspace.results(inputs.item.stage, *inputs.item.keys)
    records = {name: read_json(folder / name / "result.json") for name in _methods(inputs)}
    rows = [
        _audited(workspace, inputs.of_method(name, {}), inputs.item, name, record) for name, record in records.items()
    ]
    return [*rows, *_comparison_runs(workspace, inputs, records)]


def _methods(inputs: Inputs) -> list[str]:
    """Which methods the item treats."""
    return [name for key, names in inputs.params.items() if key.endswith(".methods") for name in names]


def _unlearn_runs(workspace: Workspace, inputs: Inputs) -> list[Run]:
    parts = [inputs.of_method(name, {}) for name in _methods(inputs)]
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
        metrics = measures.numbers(row, "model/")
        metrics |= measures.numbers(costs["seeds"].get(seed, {}), "cost/")
        children.append(
            Run(f"{item.keys[-1]} seed {seed}", f"{fingerprint}-{seed}", tags(item, seed=seed, **_said(row)),
                metrics=metrics, curves=_curves(own))
        )  # fmt: skip
    for seed, why in result["failed"].items():
        failed = tags(item, seed=seed, failed=why)
        children.append(Run(f"{item.keys[-1]} seed {seed}", f"{fingerprint}-{seed}", failed))
    metrics = {}
    described = [measures.numbers(row, "model/") for row in result["seeds"].values()]
    for rows in (described, [measures.numbers(row, "cost/") for row in costs["seeds"].values()]):
        metrics |= {str(key): float(value) for key, value in pd.DataFrame(rows).mean().items()}
    artifacts = partial(_population_artifacts, folder, history, item.name)
    made_by = tags(item, numerics=costs["machine"].get("numerics", "unknown"))
    return Run(
        f"{' '.join(reversed(item.keys))} {item.stage}", fingerprint, made_by, _params(inputs),
        metrics, artifacts=artifacts, dataset=_dataset(inputs, item.stage), children=tuple(children),
    )  # fmt: skip


def _report_artifacts(workspace: Workspace) -> dict[str, bytes]:
    own = (path for path in workspace.report.rglob("*") if path.is_file() and path.name != ".gitignore")
    files = sorted(path for path in own if workspace.report / "theory" not in path.parents)  # another pipeline's
    return {path.relative_to(workspace.report).as_posix(): read_bytes(path) for path in files}


def studies(workspace: Workspace, inputs: Inputs, folder: Path | None = None) -> list[Run]:
    """Build the runs of a finished study; ``folder`` is where it lies, if not among the pipeline's results."""
    item = inputs.item
    said = {**tags(item), "dvc.stage": item.name}
    return [study_run(folder or workspace.results(item.stage, *item.keys), said, _params(inputs))]


def _files_run(workspace: Workspace, inputs: Inputs) -> Run:
    """One run for the report, or for an item of the theory pipeline: its files, and every number of its result."""
    item = inputs.item
    if item.stage == "report":
        return Run("report", inputs.fingerprint, tags(item), artifacts=lambda: _report_artifacts(workspace))
    folder = workspace.theory(item.stage, *item.keys)

    def make() -> dict[str, bytes]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): read_bytes(path) for path in files}

    path = folder / "result.json"
    numbers = {key: value for key, value in flatten(read_json(path)).items() if isinstance(value, int | float)}
    metrics = {f"{item.stage}/{key.replace('.', '/')}": float(value) for key, value in numbers.items()}
    said = {**tags(item), "kind": "theory"}
    return Run(" ".join([*item.keys, item.stage]), inputs.fingerprint, said, flatten(inputs.params), metrics,
               artifacts=make)  # fmt: skip


def runs(workspace: Workspace, inputs: Inputs) -> list[Run]:
    """Build the tracked runs of a finished stage item: one for each model population it made or judged."""
    item = inputs.item
    if item.stage == "sweep":
        return studies(workspace, inputs)
    several = {"unlearn": _unlearn_runs, "reference": _reference_runs, "audit": _audit_runs}
    kind = _kind(item.stage)
    if kind in several and len(item.keys) == 2:
        return several[kind](workspace, inputs)
    if kind in _POPULATIONS:
        return [_population_run(workspace, item, inputs)]
    if item.stage in (*_THEORY, "report"):
        return [_files_run(workspace, inputs)]
    if kind not in ("prepare", "split"):
        return []
    path = workspace.results(item.stage, *item.keys) / "result.json"
    return [
        Run(
            f"{item.keys[0]} {item.stage}", inputs.fingerprint, tags(item), _params(inputs),
            measures.numbers(read_json(path), f"{item.stage}/"), artifacts=lambda: {"result.json": read_bytes(path)},
            dataset=_dataset(inputs, item.stage),
        )
    ]  # fmt: skip

"""One function for each DVC stage: load, call science, save, track.

Results are on disk before tracking is called, and finished models before their stage ends, so that neither an
unreachable server nor a kill loses work.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from anndata import AnnData

from scforget import artifacts, loading, parallel, replay, schema, scoring, seeding, tracking
from scforget.artifacts import FileCheckpoint, Workspace
from scforget.audit import assess
from scforget.data import genes, sources, splits
from scforget.data import prepare as preparing
from scforget.data.splits import ForgetSets
from scforget.errors import AllDivergedError, ConfigError, NonFiniteError, TrackingError
from scforget.methods import METHODS
from scforget.pipeline import Inputs, Item, Pipeline, dvc_md5
from scforget.progress import Progress
from scforget.results import Record
from scforget.tasks import VaeTask
from scforget.tracking import Store
from scforget.training import Trained, fit


@dataclass(frozen=True)
class Context:
    """One stage item being run: its project, settings and inputs."""

    workspace: Workspace
    params: schema.Params
    inputs: Inputs

    @property
    def item(self) -> Item:
        """Which item."""
        return self.inputs.item

    def seed(self, *names: object) -> int:
        """Seed of a named stream of this item."""
        return seeding.derive(self.params.seed, self.item.stage, *self.item.keys, *names)

    @property
    def work(self) -> Path:
        """Folder of the item's large outs."""
        return self.workspace.work(self.item.stage, *self.item.keys)

    @property
    def results(self) -> Path:
        """Folder of the item's small outs."""
        return self.workspace.results(self.item.stage, *self.item.keys)


def _open(stage: str, *keys: str) -> Context:
    """Check settings and names; hash what the item depends on."""
    root = Path.cwd()
    params = schema.load(root / "params.yaml")
    pipeline = Pipeline(root)
    item = Item(stage, keys)
    if item not in (known := pipeline.items(stage)):
        names = ", ".join(" ".join(other.keys) for other in known)
        why = f"{stage} {' '.join(keys)} is not part of it; it has {names}"
        raise ConfigError(root / "params.yaml", "pipeline", why)
    return Context(Workspace(root), params, pipeline.inputs(item))


def _track(context: Context) -> None:
    """Log what the stage left on disk. Under DVC a failure is a line, not an error: DVC would delete the results."""
    try:
        store = Store(context.workspace.root)
        for run in replay.runs(context.workspace, context.inputs):
            store.log(run, "live")
    except TrackingError as error:
        if "DVC_STAGE" not in os.environ:
            raise
        print(f"scforget: {error}", file=sys.stderr)


def prepare(dataset: str) -> None:
    """Read raw counts, filter and label cells."""
    context = _open("prepare", dataset)
    settings = context.params.datasets[dataset].prepare
    raw = sources.read(context.workspace.raw(dataset), layer=settings.layer)
    cells, summary = preparing.prepare(raw, settings, seed=context.seed())
    artifacts.write_cells(context.work / "cells.h5ad", cells)
    artifacts.write_json(context.results / "result.json", summary)
    _track(context)


def _choose_genes(
    context: Context, cells: AnnData, sets: splits.CellSets, scenarios: Sequence[splits.Scenario]
) -> dict[str, list[str]]:
    """Choose the modelled genes as ``genes_from`` says, and the markers among them."""
    dataset = context.item.keys[0]
    settings = context.params.datasets[dataset].split
    source = settings.genes_from
    if source in splits.GENE_SOURCES:
        chosen_on = splits.gene_cells(source, sets, scenarios)
        chosen = genes.select_genes(cells, chosen_on, settings.n_genes)
    else:
        listed = artifacts.read_bytes(context.workspace.raw(dataset) / source).decode(errors="replace").split()
        chosen = genes.listed_genes(cells, listed, source)
    marking = genes.choose_markers(cells, chosen, settings.markers, settings.markers_per_label)
    return {"genes": chosen, "markers": marking}


def split(dataset: str) -> None:
    """Deal the cells into sets, draw every scenario, choose genes and markers."""
    context = _open("split", dataset)
    settings = context.params.datasets[dataset]
    cells = artifacts.read_cells(context.workspace.work("prepare", dataset) / "cells.h5ad")
    sets = splits.split_cells(cells.n_obs, settings.split.fractions, seeding.numpy_generator(context.seed("cells")))
    scenarios = {
        name: splits.draw_scenario(
            cells.obs, sets, scenario, seeding.numpy_generator(context.seed("scenario", name)),
            context.params.audit.min_controls,
        )
        for name, scenario in settings.scenarios.items()
    }  # fmt: skip
    chosen = _choose_genes(context, cells, sets, list(scenarios.values()))
    artifacts.write_arrays(context.work / "sets.npz", vars(sets))
    for name, scenario in scenarios.items():
        artifacts.write_arrays(
            context.work / f"{name}.npz",
            {**vars(scenario.sets), "group": scenario.group, "controls": scenario.controls},
        )
    artifacts.write_json(context.work / "genes.json", chosen)
    counts = {
        name: {**{key: len(value) for key, value in vars(s.sets).items()}, "controls": len(s.controls)}
        for name, s in scenarios.items()
    }
    sizes = {name: len(members) for name, members in vars(sets).items()}
    artifacts.write_json(
        context.results / "result.json", {"sets": sizes, "scenarios": counts, "genes": len(chosen["genes"])}
    )
    _track(context)


def _peak_memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine() -> Record:
    """What the timings were measured on."""
    return {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "python": platform.python_version(), "torch": torch.__version__}  # fmt: skip


def _training_summary(trained: Trained) -> Record:
    scored = [row for row in trained.history if "stop_elbo" in row]
    best = max(scored, key=lambda row: row["stop_elbo"], default=None)
    found: Record = {**trained.effort.to_dict(), "epochs": len(trained.history), "facts": trained.facts}
    if best is not None:
        found |= {"best_epoch": int(best["epoch"]), "stop_elbo": best["stop_elbo"]}
    return found


def _check_finite(trained: Trained) -> None:
    """Refuse a model with a NaN or an infinity in it, whatever made it."""
    for name, parameter in trained.model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise NonFiniteError(trained.effort.steps, name)


def _is_finished(record_path: Path, model_path: Path) -> bool:
    """Whether a finished model lies here undamaged; a damaged one is made again."""
    if not (record_path.exists() and model_path.exists()):
        return False
    return bool(artifacts.read_json(record_path).get("md5") == dvc_md5(model_path))


@dataclass(frozen=True)
class Population:
    """How the models of a stage item are made, one for each seed; here: trained from scratch.

    Picklable, so that worker processes can make them.
    """

    context: Context
    task: VaeTask
    sets: ForgetSets
    cell_set: str

    def fingerprint(self, seed: int) -> str:
        """Identity of one model."""
        return self.context.inputs.model_fingerprint(seed, {})

    def build(self, seed: int, checkpoint: FileCheckpoint) -> Trained:
        """Make one model."""
        own = self.context.seed(seed)
        settings = self.context.params.datasets[self.context.item.keys[0]].training
        model, sets = self.task.new_model(own), self.sets
        return fit(
            model, self.task, sets.retain, sets.stop, settings, seed=own, checkpoint=checkpoint, cell_set=self.cell_set
        )

    def describe(self, _seed: int, trained: Trained) -> Record:
        """Deterministic numbers about one model."""
        return _training_summary(trained)

    def make(self, seed: int) -> tuple[Path, Record | str]:
        """Make one model in ``work/.resume``, or find it there; a diverged one is the reason in words."""
        folder = self.context.workspace.resume(self.fingerprint(seed))
        record_path, model_path = folder / "record.json", folder / "model.safetensors"
        if not _is_finished(record_path, model_path):
            checkpoint = FileCheckpoint(folder)
            try:
                trained = self.build(seed, checkpoint)
                _check_finite(trained)
            except NonFiniteError as error:
                return folder, str(error)
            artifacts.write_tensors(model_path, trained.model.state_dict())
            record = {
                "md5": dvc_md5(model_path),
                "history": trained.history,
                "metrics": self.describe(seed, trained),
                "cost": {"seconds": checkpoint.seconds, "peak_memory_mb": _peak_memory_mb()},
            }
            artifacts.write_json(record_path, record)
            (folder / "checkpoint.safetensors").unlink(missing_ok=True)
        return folder, dict(artifacts.read_json(record_path))


@dataclass(frozen=True)
class Unlearned(Population):
    """The same, from the original of the same seed by a method."""

    method: str

    @property
    def _originals(self) -> Path:
        return self.context.workspace.work("train", self.context.item.keys[0])

    def fingerprint(self, seed: int) -> str:
        """Identity of one model: of all originals, only its own matters."""
        original = loading.own_original(self.context.workspace, self.context.item.keys[0], seed)
        return self.context.inputs.model_fingerprint(seed, original)

    def build(self, seed: int, checkpoint: FileCheckpoint) -> Trained:
        """Unlearn from one original."""
        original = loading.load_original(self.task, self._originals / f"{seed}.safetensors")
        settings, own = getattr(self.context.params.unlearn, self.method), self.context.seed(seed)
        return METHODS[self.method].run(original, self.task, self.sets, settings, seed=own, checkpoint=checkpoint)

    def describe(self, seed: int, trained: Trained) -> Record:
        """Add how far the parameters moved."""
        moved = loading.relative_change(self.task, self._originals / f"{seed}.safetensors", trained.model)
        return {**_training_summary(trained), "relative_change": moved}


def _make_population(population: Population, seeds: Sequence[int]) -> None:
    """Make every model on all cores; write models, curves, counts and costs.

    A model that diverges is recorded and the others go on; only when all diverge is it an error.
    """
    context = population.context
    with Progress(context.item.name, len(seeds)) as progress:
        made = dict(zip(seeds, parallel.each(population.make, seeds, progress.advance, tracking.warm_up), strict=True))
    failed = {str(seed): record for seed, (_, record) in made.items() if isinstance(record, str)}
    if len(failed) == len(seeds):
        raise AllDivergedError(context.item.name, next(iter(failed.values())))
    records: dict[str, Record] = {}
    for seed, (folder, record) in made.items():
        if isinstance(record, dict):
            records[str(seed)] = record
            artifacts.copy(folder / "model.safetensors", context.work / f"{seed}.safetensors")
    rows = [{"seed": int(seed), **epoch} for seed, record in records.items() for epoch in record["history"]]
    history = pd.DataFrame(rows, columns=None if rows else ["seed", "epoch"])
    artifacts.write_table(context.results / "history.csv", history)
    metrics = {seed: record["metrics"] for seed, record in records.items()}
    artifacts.write_json(context.results / "result.json", {"seeds": metrics, "failed": failed})
    costs = {seed: record["cost"] for seed, record in records.items()}
    artifacts.write_json(context.results / "cost.json", {"seeds": costs, "machine": machine()})
    _track(context)


def train(dataset: str) -> None:
    """Train the originals on every training cell."""
    context = _open("train", dataset)
    task = loading.load_task(context.workspace, context.params.datasets[dataset].model, dataset)
    sets = loading.load_sets(context.workspace, dataset)
    nothing_forgotten = ForgetSets(sets.train[:0], sets.train, sets.stop, sets.aside)
    _make_population(Population(context, task, nothing_forgotten, "train"), context.params.train.seeds)


def retrain(dataset: str, scenario: str) -> None:
    """Train the target population on the retained cells, by the same recipe with new seeds."""
    context = _open("retrain", dataset, scenario)
    task = loading.load_task(context.workspace, context.params.datasets[dataset].model, dataset)
    sets = loading.load_scenario(context.workspace, dataset, scenario).sets
    _make_population(Population(context, task, sets, "retain"), context.params.retrain.seeds)


def unlearn(dataset: str, scenario: str, method: str) -> None:
    """Unlearn the forget set from each original once."""
    context = _open("unlearn", dataset, scenario, method)
    task = loading.load_task(context.workspace, context.params.datasets[dataset].model, dataset)
    sets = loading.load_scenario(context.workspace, dataset, scenario).sets
    made = artifacts.read_json(context.workspace.results("train", dataset) / "result.json")
    seeds = [int(seed) for seed in made["seeds"]]
    _make_population(Unlearned(context, task, sets, "retain", method), sorted(seeds))


def reference(dataset: str, scenario: str) -> None:
    """Score originals and retrains: what there is to forget, the target, and the noise between retrains."""
    context = _open("reference", dataset, scenario)
    workspace, settings = context.workspace, context.params.audit
    scorer = scoring.Scorer(workspace, context.params, dataset, scenario)
    folders = workspace.work("train", dataset), workspace.work("retrain", dataset, scenario)
    originals, retrains = scorer.populations(*folders, meanwhile=tracking.warm_up)
    groups = scorer.groups(folders[0])
    seed = context.params.seed  # not the item's: the null band of a scenario is one and the same for all methods
    records = {
        "original": assess.judge(
            "original", originals, originals=originals, target=retrains, groups=groups, settings=settings, seed=seed
        ),
        "retrain": assess.describe_target(retrains, len(originals.seeds), groups, settings, seed),
    }
    artifacts.write_json(context.results / "result.json", records)
    scores = {f"original/{name}": values for name, values in originals.scores.items()}
    scores |= {f"retrain/{name}": values for name, values in retrains.scores.items()}
    masks = {"cells": scorer.cells, "forget": groups.forget, **groups.controls}
    scores |= {"original/latent": originals.latent, "retrain/latent": retrains.latent}
    artifacts.write_arrays(context.results / "scores.npz", {**masks, "labels": scorer.labels, **scores})
    _track(context)


def audit(dataset: str, scenario: str, method: str) -> None:
    """Attack the unlearned models, test them against the retrains, and give the verdict."""
    context = _open("audit", dataset, scenario, method)
    workspace = context.workspace
    scorer = scoring.Scorer(workspace, context.params, dataset, scenario)
    folder = workspace.work("unlearn", dataset, scenario, method)
    (unlearned,) = scorer.populations(folder, meanwhile=tracking.warm_up)
    originals, retrains, groups = scorer.references(workspace.results("reference", dataset, scenario))
    record = assess.judge(
        method, unlearned, originals=originals, target=retrains, groups=groups,
        settings=context.params.audit, seed=context.params.seed,
    )  # fmt: skip
    made = artifacts.read_json(workspace.results("unlearn", dataset, scenario, method) / "result.json")
    record["failed_seeds"] = made["failed"]
    artifacts.write_json(context.results / "result.json", {method: record})
    scores = {f"{method}/{name}": values for name, values in unlearned.scores.items()}
    artifacts.write_arrays(context.results / "scores.npz", {**scores, f"{method}/latent": unlearned.latent})
    _track(context)

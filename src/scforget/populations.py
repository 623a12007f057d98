"""Populations of models, made one for each seed on all cores: trained from scratch, or unlearned from an original.

Finished models are on disk before their stage ends, and a stage that runs again takes them up from there.
"""

from __future__ import annotations

import itertools
import os
import platform
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from scforget import artifacts, engine, families, loading, parallel
from scforget.arrays import BoolArray, IntArray
from scforget.artifacts import FileCheckpoint
from scforget.context import Context
from scforget.data.splits import ForgetSets
from scforget.errors import NonFiniteError, TooManyDivergedError
from scforget.families import Family, Group
from scforget.pipeline import dvc_md5
from scforget.progress import Progress
from scforget.results import Record
from scforget.training import Trained


def _peak_memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine() -> Record:
    """What the timings were measured on."""
    return {
        "processor": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "python": platform.python_version(), "torch": torch.__version__, "numerics": str(engine.current()),
    }  # fmt: skip


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
    """How the models of a stage item are made, one for each seed; here: trained from scratch on ``sets.retain``.

    Picklable, so that worker processes can make them.
    """

    context: Context
    task: Any
    sets: ForgetSets
    cell_set: str

    @property
    def family(self) -> Family:
        """Whose models these are."""
        return families.of(self.context.item.stage)

    def fingerprint(self, seed: int) -> str:
        """Identity of one model."""
        return self.context.inputs.model_fingerprint(seed, {"numerics": str(engine.current())})

    @property
    def identity(self) -> dict[str, str]:
        """What the record of the models must say of itself, as ``dvc.lock`` does not."""
        return {}

    def build(self, seed: int, checkpoint: FileCheckpoint) -> Trained:
        """Make one model."""
        return self.family.fit(
            self.context.params, self.context.item.keys[0], self.task, self.cells(seed), self.sets.stop,
            seed=self.context.seed(seed), checkpoint=checkpoint, cell_set=self.cell_set,
        )  # fmt: skip

    def cells(self, _seed: int) -> IntArray:
        """What one model is trained on."""
        return self.sets.retain

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
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                return folder, "a batch of one item, of which BatchNorm has nothing to normalise; forget two or more"
            self._finish(seed, trained, checkpoint.seconds)
        return folder, dict(artifacts.read_json(record_path))

    def _finish(self, seed: int, trained: Trained, seconds: float) -> None:
        """Write a finished model, and then its record."""
        folder = self.context.workspace.resume(self.fingerprint(seed))
        artifacts.write_tensors(folder / "model.safetensors", trained.model.state_dict())
        record = {
            "md5": dvc_md5(folder / "model.safetensors"),
            "history": trained.history,
            "metrics": self.describe(seed, trained),
            "cost": {"seconds": seconds, "peak_memory_mb": _peak_memory_mb()},
        }
        artifacts.write_json(folder / "record.json", record)
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)

    @property
    def group(self) -> Group | None:
        """How one process makes several models side by side; none: one by one."""
        return None

    def make_group(self, seeds: Sequence[int]) -> list[tuple[Path, Record | str]]:
        """Make some models one after the other, or find them."""
        return [self.make(seed) for seed in seeds]


@dataclass(frozen=True)
class Unlearned(Population):
    """The same, from the original of the same seed by a method."""

    method: str

    @property
    def _originals(self) -> Path:
        return self.family.train_folder(self.context.workspace, self.context.item.keys[0])

    def fingerprint(self, seed: int) -> str:
        """Identity of one model: of all originals, only its own matters."""
        workspace, stage = self.context.workspace, self.family.stage("train")
        original = loading.own_original(workspace, self.context.item.keys[0], seed, stage)
        return self.context.inputs.model_fingerprint(seed, {**original, "numerics": str(engine.current())})

    @property
    def identity(self) -> dict[str, str]:
        """The run's fingerprint: ``dvc.lock`` knows what all methods together depend on, not one of them."""
        return {"fingerprint": self.context.inputs.fingerprint}

    def build(self, seed: int, checkpoint: FileCheckpoint) -> Trained:
        """Unlearn from one original."""
        settings, own = self.family.settings(self.context.params, self.method), self.context.seed(seed)
        run = self.family.methods[self.method].run
        return run(self._original(seed), self.task, self.sets, settings, seed=own, checkpoint=checkpoint)

    def _original(self, seed: int) -> nn.Module:
        return self.family.original(self.task, self._originals / f"{seed}.safetensors")

    def describe(self, seed: int, trained: Trained) -> Record:
        """Add how far the parameters moved."""
        moved = loading.relative_change(self._original(seed), trained.model)
        return {**_training_summary(trained), "relative_change": moved}


@dataclass(frozen=True)
class Shadows(Population):
    """The same, each on its own half of the cells that an audit may ask about."""

    members: BoolArray

    def cells(self, seed: int) -> IntArray:
        """The half of one model."""
        return self.sets.retain[self.members[seed]]

    @property
    def group(self) -> Group | None:
        """As the classifiers of the data set say; VAEs are made one by one."""
        return self.family.group(self.context.params, self.context.item.keys[0])

    def make_group(self, seeds: Sequence[int]) -> list[tuple[Path, Record | str]]:
        """Make some models side by side, or find them; where one diverges, each alone."""
        folders = [self.context.workspace.resume(self.fingerprint(seed)) for seed in seeds]
        missing = [not _is_finished(folder / "record.json", folder / "model.safetensors") for folder in folders]
        common = folders[0].with_name(f"{folders[0].name}-together")  # apart from the checkpoint of the first alone
        if self.group and len(seeds) > 1 and any(missing) and not (common / "diverged").exists():
            # all of them, so that a killed run's models are those of one that was not killed
            checkpoint = FileCheckpoint(common)
            own = [self.context.seed(seed) for seed in seeds]
            try:
                cells = [self.cells(seed) for seed in seeds]
                made = self.group.fit(self.task, cells, seeds=own, checkpoint=checkpoint, cell_set=self.cell_set)
                for trained in made:
                    _check_finite(trained)
            except NonFiniteError as error:
                artifacts.write_bytes(common / "diverged", str(error).encode())
            else:
                for seed, trained in zip(seeds, made, strict=True):
                    self._finish(seed, trained, checkpoint.seconds / len(seeds))
            (common / "checkpoint.safetensors").unlink(missing_ok=True)
        return super().make_group(seeds)


def make(population: Population, seeds: Sequence[int], meanwhile: Callable[[], None] | None = None) -> None:
    """Make every model on all cores; write models, curves, counts and costs.

    A model that diverges is recorded and the others go on; it is an error when fewer than two are left. ``meanwhile``
    is called while they are made; without it, the context's own :meth:`~scforget.context.Context.warm_up`.
    """
    context = population.context
    meanwhile = meanwhile or context.warm_up
    size = population.group.size if population.group else 1
    groups = [list(seeds[start : start + size]) for start in range(0, len(seeds), size)]
    with Progress(context.item.name, len(groups), "models" if size == 1 else f"groups of {size} models") as progress:
        found = parallel.each(population.make_group, groups, progress.advance, meanwhile)
    made = dict(zip(seeds, itertools.chain.from_iterable(found), strict=True))
    failed = {str(seed): record for seed, (_, record) in made.items() if isinstance(record, str)}
    if failed and len(seeds) - len(failed) < 2:
        how_many = f"{len(failed)} of {len(seeds)}"
        raise TooManyDivergedError(context.item.name, how_many, next(iter(failed.values())))
    records: dict[str, Record] = {}
    for seed, (folder, record) in made.items():
        if isinstance(record, dict):
            records[str(seed)] = record
            artifacts.copy(folder / "model.safetensors", context.work / f"{seed}.safetensors")
    rows = [{"seed": int(seed), **epoch} for seed, record in records.items() for epoch in record["history"]]
    history = pd.DataFrame(rows, columns=None if rows else ["seed", "epoch"])
    artifacts.write_table(context.results / "history.csv", history)
    metrics = {seed: record["metrics"] for seed, record in records.items()}
    artifacts.write_json(context.results / "result.json", {"seeds": metrics, "failed": failed, **population.identity})
    costs = {seed: record["cost"] for seed, record in records.items()}
    artifacts.write_json(context.results / "cost.json", {"seeds": costs, "machine": machine()})

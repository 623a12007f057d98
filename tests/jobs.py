"""Jobs for worker processes, in a module of its own: a new process can import it, as it cannot the tests."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_info
from torch import Tensor

from scforget import parallel
from scforget.arrays import FloatArray, IntArray
from scforget.artifacts import FileCheckpoint
from scforget.data.splits import ForgetSets
from scforget.errors import ArtifactError, DataError, NonFiniteError
from scforget.tasks import VaeTask
from scforget.training import TrainingSettings, fit


def square(item: int) -> tuple[int, int]:
    return item * item, os.getpid()


def slow_first(item: int) -> int:
    """The first is finished last."""
    time.sleep(0.5 if item == 0 else 0.0)
    return item


def threads(_item: int) -> set[int]:
    """How many threads torch, BLAS and OpenMP would use."""
    return {torch.get_num_threads(), *(library["num_threads"] for library in threadpool_info())}


@dataclass(frozen=True)
class Sum:
    """Needs a large array; says how it got it, too."""

    values: FloatArray

    def __call__(self, item: int) -> tuple[float, bool, set[int]]:
        return float(self.values.sum()) + item, isinstance(self.values, np.memmap), threads(item)


def refuse(item: int) -> int:
    if item == 0:
        raise NonFiniteError(7, "the loss")
    if item == 1:
        raise ArtifactError("work/model", "damaged")
    raise DataError("cells", item, "others")


def fail_at_once(item: int) -> int:
    if item == 3:
        raise ValueError(item)
    return item


class OddError(Exception):
    """Pickles, but cannot be made again."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def fail_oddly(item: int) -> int:
    raise OddError(item, 2)


def return_what_does_not_pickle(_item: int) -> Any:
    return lambda: None


def die(_item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Logged:
    """Notes in a folder who did what; the items in ``kills`` kill their process so many times."""

    folder: Path
    kills: dict[int, int]

    def __call__(self, item: int) -> int:
        with (self.folder / str(item)).open("a") as log:
            log.write(f"{os.getpid()}\n")
        if len(self.attempts(item)) <= self.kills.get(item, 0):
            time.sleep(0.3)  # time enough for others to be at work
            die(item)
        time.sleep(0.1)
        return -item

    def attempts(self, item: int) -> list[str]:
        return (self.folder / str(item)).read_text().split()


@dataclass(frozen=True)
class Sleeper:
    """Says where it is and stays there."""

    folder: Path

    def __call__(self, item: int) -> None:
        (self.folder / f"{item}.pid").write_text(str(os.getpid()))
        time.sleep(60)


class _KillingCheckpoint(FileCheckpoint):
    """Kills its process after a save, once."""

    def __init__(self, folder: Path, after: int) -> None:
        super().__init__(folder, every=0.0)
        self._left, self._mark = after, folder / "killed"

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        super().save(tensors, state)
        self._left -= 1
        if self._left == 0 and not self._mark.exists():
            self._mark.touch()
            die(0)


@dataclass(frozen=True)
class Training:
    """Trains a model for each seed; the process of one is killed after two epochs, and the next one resumes."""

    folder: Path
    task: VaeTask
    cells: IntArray
    stop: IntArray
    settings: TrainingSettings
    killed: int | None = None

    def __call__(self, seed: int) -> dict[str, Any]:
        own = self.folder / str(seed)
        own.mkdir(parents=True, exist_ok=True)
        checkpoint = _KillingCheckpoint(own, 2 if seed == self.killed else 0)
        resumed = checkpoint.load() is not None
        trained = fit(
            self.task.new_model(seed), self.task, self.cells, self.stop, self.settings, seed=seed, checkpoint=checkpoint
        )
        weights = {name: value.numpy().tobytes() for name, value in trained.model.state_dict().items()}
        return {"weights": weights, "history": trained.history, "resumed": resumed, "pid": os.getpid()}


def trained_twice(
    folder: Path, task: VaeTask, sets: ForgetSets, settings: TrainingSettings
) -> tuple[list[tuple[Any, Any]], list[dict[str, Any]]]:
    """Histories and weights of four serial trainings; the same trainings by ``each``, a worker killed in the third."""
    serial, killed = (
        Training(folder / name, task, sets.retain, sets.stop, settings, dies)
        for name, dies in (("serial", None), ("killed", 2))
    )
    alone = [serial(seed) for seed in range(4)]
    return [(one["history"], one["weights"]) for one in alone], parallel.each(killed, range(4), lambda: None)

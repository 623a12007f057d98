"""A toy study, of which settings are judged by arithmetic; run as a program it is a worker that may kill itself."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from optuna.storages import BaseStorage
from optuna.study import Study

from scforget.search import Choice, Range
from scforget.sweeps import storages, studies

SPACE: dict[str, Range | Choice] = {
    "rate": Range(1e-4, 1e-1, log=True), "inner.steps": Range(1, 50), "mode": Choice("a", "b", "c")
}  # fmt: skip
FIRST = {"rate": 0.01, "inner.steps": 20, "mode": "c"}
SEED, STARTUP = 5, 3


def judge(values: dict[str, Any], place: int) -> dict[str, Any] | str:
    """Depends on the place too, as models do: their seeds are derived from it."""
    rate, steps = values["rate"], values["inner.steps"]
    if steps > 44:
        return "the loss became NaN"
    noise = float(np.random.default_rng(place).normal(scale=0.05))
    distance = abs(math.log10(rate) + 2.5) + 0.3 * (values["mode"] == "b") + noise
    return {
        "distance": abs(distance), "standard_error": 0.1, "scores": rate, "membership": noise, "cost": steps / 50,
        "elbo_loss": 3 * rate / 0.1, "marker_r_loss": 0.5,
        "settings": {key: float(f"{one:.4g}") if isinstance(one, float) else one for key, one in values.items()},
    }  # fmt: skip


def toy(storage: BaseStorage, name: str = "toy", first: dict[str, Any] | None = FIRST) -> Study:
    study = studies.open_study(storage, name, first)
    study.sampler = studies.SeededSampler(SEED, STARTUP)
    return study


def identity(process: psutil.Process) -> list[Any]:
    """What a worker signs its trials with."""
    return [platform.node(), process.pid, process.create_time()]


@dataclass
class Worker:
    """A process that works on the toy study.

    Attributes
    ----------
    dies_at, hangs_at
        The process kills itself, or stays where it is, in its judgement of so many-eth settings.
    awaits
        It judges nothing until another has begun its second judgement, by that one's log.
    node
        The machine that it believes to be on.
    """

    where: str
    log: Path
    trials: int
    name: str = "toy"
    dies_at: int | None = None
    hangs_at: int | None = None
    slow: float = 0.0
    awaits: str | None = None
    node: str | None = None
    grace: int = 120

    def start(self) -> subprocess.Popen[bytes]:
        values = json.dumps({**vars(self), "log": str(self.log)})
        return subprocess.Popen([sys.executable, __file__, values], stderr=subprocess.PIPE)

    def run(self) -> tuple[int, str]:
        """Exit code and what it said."""
        process = self.start()
        _, said = process.communicate(timeout=120)
        return process.returncode, said.decode()

    def __call__(self, values: dict[str, Any], place: int) -> dict[str, Any] | str:
        with self.log.open("a") as log:
            log.write(json.dumps([os.getpid(), place, values]) + "\n")
        self._judged = getattr(self, "_judged", 0) + 1
        while self.awaits is not None and not (Path(self.awaits).exists() and len(judged(Path(self.awaits))) >= 2):
            time.sleep(0.05)
        time.sleep(self.slow)
        if self._judged == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._judged == self.hangs_at:
            time.sleep(120)
        return judge(values, place)

    def work(self) -> None:
        if self.node is not None:
            here = self.node
            platform.node = lambda: here
        storage = storages.open_storage(self.where, heartbeat=1, grace=self.grace)
        studies.run(toy(storage, self.name), studies.Objective(SPACE, self, self.trials), self.trials, pause=0.2)


def judged(log: Path) -> list[tuple[int, int, dict[str, Any]]]:
    """Process, place and settings of every judgement that was begun."""
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()]


if __name__ == "__main__":
    Worker(**{key: Path(value) if key == "log" else value for key, value in json.loads(sys.argv[1]).items()}).work()

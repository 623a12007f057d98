"""Learning curves: how near a run has come to the retrained models, epoch by epoch, against seconds and passes.

A :class:`Recorder` stands where a checkpoint does, so every method that runs epochs gives its curve unchanged; one that
takes a single step gives a single point.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Annotated, Generic, NamedTuple, TypeVar

import numpy as np
from pydantic import Field
from torch import Tensor

from scforget.errors import NonFiniteError
from scforget.models.mixture import Mixture, Model
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.theory.ablations import Job, train
from scforget.theory.judging import Judge, Record, Scored, contrast
from scforget.training import State

SeenT = TypeVar("SeenT")
#: Statistics that a curve shows.
MEASURES = ("membership", "trace", "distance", "elbo")


class CurveSettings(Settings):
    """Settings of the learning curves.

    Attributes
    ----------
    methods
        Whose curves are drawn beside retraining from scratch.
    runs
        Runs of each, from as many originals.
    growth
        An epoch is looked at when at least this many times as many have passed as at the last look; 1 looks at all.
    """

    methods: list[str]
    runs: Annotated[int, Field(ge=2)]
    growth: Annotated[float, Field(ge=1)]


class Point(NamedTuple, Generic[SeenT]):
    """A run at one moment: epochs, passes over cells and seconds so far, and what was seen of the model."""

    epoch: int
    passes: int
    seconds: float
    seen: SeenT


class Recorder(Generic[SeenT]):
    """A checkpoint that keeps nothing to resume from, but looks at the model after some epochs.

    Parameters
    ----------
    watch
        What is wanted of the model, from its tensors; those are the run's own: copy what is to be kept.
    growth
        At least 1: after epoch n, the next that is looked at is the first from ``growth``·n on.
    clock
        Seconds.

    Attributes
    ----------
    points
        What was seen, in order. The time that looking took is not counted.
    """

    def __init__(
        self, watch: Callable[[dict[str, Tensor]], SeenT], growth: float, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.points: list[Point[SeenT]] = []
        self._watch, self._growth, self._clock = watch, growth, clock
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin anew: what went before was preparation."""
        self.points.clear()
        self._epoch, self._due, self._looking, self._started = 0, 1, 0.0, self._clock()

    def load(self) -> None:
        """There is nothing to resume from."""

    def save(self, tensors: dict[str, Tensor], state: State) -> None:
        """Take a look, if it is time to."""
        self._epoch += 1
        if self._epoch >= self._due:
            model = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
            self._look(model, state["effort"]["passes"])
            self._due = max(self._epoch + 1, math.ceil(self._epoch * self._growth))

    def finish(self, tensors: dict[str, Tensor], passes: int) -> None:
        """Look at the finished model, which may be an earlier epoch's."""
        self._look(tensors, passes)

    def _look(self, tensors: dict[str, Tensor], passes: int) -> None:
        now = self._clock()
        seen = self._watch(tensors)
        self.points.append(Point(self._epoch, passes, now - self._started - self._looking, seen))
        self._looking += self._clock() - now


def model_of(task: VaeTask, tensors: dict[str, Tensor]) -> Model:
    """A model, or a mixture of models, of the task's architecture with the given parameters, in eval mode."""
    members = {name.split(".")[1] for name in tensors if name.startswith("members.")}
    model: Model = Mixture([task.new_model(0) for _ in members]) if members else task.new_model(0)
    model.load_state_dict(tensors)
    return model.eval()


def record(job: Job, growth: float) -> list[Point[Scored]] | str:
    """Make the model of a job and score it on the way; a diverged one is the reason in words.

    Returns
    -------
    list of Point
        At growing numbers of epochs, and last the finished model. An epoch's point is of the weights as they stood:
        early stopping chooses among them only in the end.
    """

    def watch(tensors: dict[str, Tensor]) -> Scored:
        return job.case.score(model_of(job.case.task, tensors)).short()

    recorder = Recorder(watch, growth)
    try:
        trained = train(job, recorder)
    except NonFiniteError as error:
        return str(error)
    recorder.finish(trained.model.state_dict(), trained.effort.passes)
    finite = all(np.isfinite(point.seen.features).all() for point in recorder.points)
    return recorder.points if finite else f"{job.method}: what it says of cells is not finite"


def _band(values: Sequence[float], level: float) -> Record:
    """Mean of some runs, and Student's interval of it."""
    mean, interval = contrast([(1, np.array(values, dtype=np.float64))], level)
    return {"mean": mean, "interval": interval}


def _place(judge: Judge, method: str, points: Sequence[Point[Scored]], end: bool) -> tuple[Record, Record]:
    """The runs of one method at one number of epochs: what is the same each time, and the seconds."""
    level, found = judge.settings.interval_level, judge.statistics([point.seen for point in points])
    epoch = float(np.mean([point.epoch for point in points]))
    label = {"method": method, "epoch": epoch, "end": end, "runs": len(points)}
    measures: Record = {name: judge.compare(found[name], judge.target[name]) for name in MEASURES}
    passes = _band([point.passes for point in points], level)
    return label | {"passes": passes} | measures, label | {"seconds": _band([p.seconds for p in points], level)}


def curve_rows(
    judge: Judge, jobs: Sequence[Job], results: Sequence[list[Point[Scored]] | str]
) -> tuple[list[Record], list[Record]]:
    """Judge the runs of some jobs; those of one method are averaged at equal numbers of epochs.

    Returns
    -------
    rows
        For each method and each number of epochs that all its runs reached before they ended, and for the finished
        models (``end``): ``method``, ``epoch`` (mean, of the finished ones), ``end``, ``runs``, ``passes`` (``mean``
        and ``interval``), and :meth:`Judge.compare`'s record of each of :data:`MEASURES`.
    seconds
        The same rows with ``seconds`` in place of all that is the same each time; of whatever machine this is.
    """
    runs: dict[str, list[list[Point[Scored]]]] = defaultdict(list)
    for job, result in zip(jobs, results, strict=True):
        if not isinstance(result, str):
            runs[job.method].append(result)
    places = []
    for method, found in runs.items():
        for i in range(min(map(len, found)) - 1):
            places.append(_place(judge, method, [points[i] for points in found], end=False))
        places.append(_place(judge, method, [points[-1] for points in found], end=True))
    return [row for row, _ in places], [seconds for _, seconds in places]

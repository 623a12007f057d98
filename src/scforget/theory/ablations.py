"""Ablations over the project's own methods: models as jobs, and how sensitive a method is to its settings.

A caller applies :func:`make` to each job, side by side, and hands back what it returned.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated

import numpy as np
from pydantic import Field

from scforget import seeding
from scforget.errors import NonFiniteError
from scforget.methods import METHODS
from scforget.models.vae import VAE
from scforget.search import Value, fill
from scforget.settings import Settings
from scforget.theory.judging import Case, Judge, Record, Scored
from scforget.training import Checkpoint, Trained, TrainingSettings, fit

#: Trained from scratch: on all training cells, or on the retained ones.
ORIGINAL, RETRAIN = "original", "retrain"


class GridSettings(Settings):
    """Settings of one sensitivity analysis.

    Attributes
    ----------
    method
        Of the registry.
    fixed, grid
        Values, and lists of values, by dotted key of the method's settings; every combination of the lists is run.
    """

    method: str
    fixed: dict[str, Value]
    grid: Annotated[dict[str, Annotated[list[Value], Field(min_length=1)]], Field(min_length=1)]


@dataclass(frozen=True)
class Job:
    """One model to be made for a case.

    Attributes
    ----------
    row
        What the model belongs to: models of one row are judged together.
    method
        Of the registry, or ``original`` or ``retrain``; those two have :class:`TrainingSettings`.
    seed
        Of every random stream.
    original
        Where a method starts; ``None`` for those two.
    """

    row: int
    case: Case
    method: str
    settings: Settings
    seed: int
    original: VAE | None


def scratch_jobs(case: Case, method: str, recipe: TrainingSettings, seeds: Sequence[int], row: int = 0) -> list[Job]:
    """Models trained from scratch: ``original`` on all training cells, ``retrain`` on the retained ones."""
    return [Job(row, case, method, recipe, seed, None) for seed in seeds]


def method_jobs(
    case: Case, method: str, settings: Settings, originals: Sequence[VAE], seed: int, *, row: int = 0
) -> list[Job]:
    """A method, from each original."""
    return [
        Job(row, case, method, settings, seeding.derive(seed, method, i), original)
        for i, original in enumerate(originals)
    ]


def train(job: Job, checkpoint: Checkpoint | None = None) -> Trained:
    """Make the model of a job."""
    case, settings = job.case, job.settings
    if job.method in (ORIGINAL, RETRAIN) and isinstance(settings, TrainingSettings):
        sets = case.sets
        cells = sets.retain if job.method == RETRAIN else np.union1d(sets.forget, sets.retain)
        model = case.task.new_model(job.seed)
        return fit(model, case.task, cells, sets.stop, settings, seed=job.seed, checkpoint=checkpoint)
    start = copy.deepcopy(job.original)  # a method changes what it is given
    return METHODS[job.method].run(start, case.task, case.sets, settings, seed=job.seed, checkpoint=checkpoint)


def make(job: Job) -> Scored | str:
    """Make and score the model of a job; a diverged one is the reason in words."""
    try:
        trained = train(job)
    except NonFiniteError as error:
        return str(error)
    scored = job.case.score(trained.model, trained.effort.passes)
    return scored if np.isfinite(scored.features).all() else f"{job.method}: what it says of cells is not finite"


def rows_of(jobs: Sequence[Job], results: Sequence[Scored | str]) -> tuple[dict[int, list[Scored]], dict[int, int]]:
    """Return the models of each row, and how many of each row diverged."""
    models: dict[int, list[Scored]] = {job.row: [] for job in jobs}
    failed = dict.fromkeys(models, 0)
    for job, result in zip(jobs, results, strict=True):
        if isinstance(result, Scored):
            models[job.row].append(result)
        else:
            failed[job.row] += 1
    return models, failed


def judged(judge: Judge, models: Sequence[Scored], originals: Sequence[Scored], failed: int) -> Record:
    """:meth:`Judge.judge`'s record with the number of diverged models; ``models`` 0 and no more where none is left."""
    return {"failed": failed, **(judge.judge(models, originals) if models else {"models": 0})}


def combinations(settings: GridSettings) -> list[dict[str, Value]]:
    """Every combination of the grid's values, the last key running fastest."""
    return [dict(zip(settings.grid, values, strict=True)) for values in product(*settings.grid.values())]


def grid_jobs(case: Case, originals: Sequence[VAE], base: Settings, settings: GridSettings, seed: int) -> list[Job]:
    """Models of a sensitivity analysis: one for each combination and original.

    Parameters
    ----------
    base
        The method's settings, of which ``fixed`` and the grid replace some.
    seed
        The same for all combinations, so that they differ in nothing but their values.

    Raises
    ------
    pydantic.ValidationError
        If a key or a value is not one of the method's.
    """
    filled = [fill(base, {**settings.fixed, **values}) for values in combinations(settings)]
    return [
        job
        for row, own in enumerate(filled)
        for job in method_jobs(case, settings.method, own, originals, seed, row=row)
    ]


def grid_rows(
    judge: Judge, starts: Sequence[Scored], jobs: Sequence[Job], results: Sequence[Scored | str],
    settings: GridSettings,
) -> list[Record]:  # fmt: skip
    """Judge the models of :func:`grid_jobs`.

    Parameters
    ----------
    starts
        The originals, scored.

    Returns
    -------
    list of dict
        For each combination: ``method``, ``values`` by key, ``failed`` and :meth:`Judge.judge`'s record.
    """
    models, failed = rows_of(jobs, results)
    return [
        {"method": settings.method, "values": values, **judged(judge, models[row], starts, failed[row])}
        for row, values in enumerate(combinations(settings))
    ]

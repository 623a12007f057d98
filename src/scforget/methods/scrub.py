"""SCRUB: a student disobeys the original on the forgotten cells, obeys it on the others, and rewinds to be discreet."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from scforget import seeding
from scforget.arrays import IntArray
from scforget.class_tasks import ClassifierTask
from scforget.class_training import OptimiserSettings, class_batches, new_optimiser
from scforget.data.splits import ForgetSets
from scforget.errors import NonFiniteError
from scforget.models.classifiers import Classifier
from scforget.search import Range
from scforget.settings import Settings
from scforget.tasks import Task
from scforget.training import Checkpoint, Effort, Epoch, Loop, Trained, adam, descend


class ScrubBase(Settings):
    """Settings of SCRUB, but for the optimiser.

    Attributes
    ----------
    batch_size
        Of both kinds of passes.
    epochs
        Passes over the retained cells; 0 returns the original bit for bit.
    max_epochs
        The first so many epochs begin with a pass over the forgotten cells.
    alpha_f
        Weight of the divergence that is raised on the forgotten cells.
    alpha_r
        Weight of the divergence that is lowered on the retained cells, beside their loss.
    rewind
        Return the epoch whose forget error is nearest to that of like cells which were never trained on.
    neighbours
        ``aside`` cells that stand for each forgotten one there, nearest in the original's latent means (a classifier's
        features).

    Ranges: the weights as scales to either side of 1; up to the single-cell paper's 20 epochs.
    """

    batch_size: Annotated[int, Field(gt=0)]
    epochs: Annotated[int, Field(ge=0), Range(3, 20)]
    max_epochs: Annotated[int, Field(ge=0), Range(1, 20)]
    alpha_f: Annotated[float, Field(gt=0), Range(0.01, 10.0, log=True)]
    alpha_r: Annotated[float, Field(ge=0), Range(0.01, 10.0, log=True)]
    rewind: bool
    neighbours: Annotated[int, Field(gt=0)]

    @abstractmethod
    def new_optimiser(self, model: nn.Module) -> Optimizer:
        """Return the one optimiser of both kinds of passes."""


class ScrubSettings(ScrubBase):
    """Settings of SCRUB for a VAE.

    Attributes
    ----------
    learning_rate
        Of Adam. Its range is about Kurmanji's 5e-4, the single-cell paper's 1e-4 inside, at which it hardly moves.
    """

    learning_rate: Annotated[float, Field(gt=0), Range(5e-5, 3e-3, log=True)]

    def new_optimiser(self, model: nn.Module) -> Optimizer:
        """Return Adam of all parameters."""
        return adam(model, self.learning_rate)


class ClassScrubSettings(ScrubBase):
    """Settings of SCRUB for a classifier.

    Attributes
    ----------
    optimiser
        Of both kinds of passes; Kurmanji: Adam 5e-4.
    temperature
        T of the divergence between class probabilities, > 0; Kurmanji: 2.
    """

    optimiser: OptimiserSettings
    temperature: Annotated[float, Field(gt=0)]

    def new_optimiser(self, model: nn.Module) -> Optimizer:
        """Return the optimiser of all parameters."""
        return new_optimiser(model.parameters(), self.optimiser)


def reference_cells(model: nn.Module, task: Task, sets: ForgetSets, neighbours: int) -> IntArray:
    """Never-trained ``aside`` cells that are most like the forgotten ones, by the original's latent means.

    Others of the ``aside`` cells are easier or harder for reasons of biology.

    Raises
    ------
    EmptyGroupError
        If there are fewer ``aside`` cells than neighbours.
    """
    from scforget.data.controls import matched_knn

    forget_mu, aside_mu = (task.signals(model, cells).latent for cells in (sets.forget, sets.aside))
    return sets.aside[matched_knn(forget_mu, aside_mu, neighbours)]


def _passes(
    model: nn.Module, teacher: nn.Module, task: Task, sets: ForgetSets, settings: ScrubBase, *,
    with_max: bool, optimiser: Optimizer, effort: Effort, noise: torch.Generator,
) -> Epoch:  # fmt: skip
    """Make a max pass over F, if any, and a min pass over R; return mean divergences and loss on the way."""
    model.train()
    row: Epoch = {}
    if with_max:
        row["forget_divergence"] = 0.0
        for part in class_batches(sets.forget, settings.batch_size, noise):
            divergence = task.divergence(model, teacher, task.batch(part)).total
            descend(optimiser, -settings.alpha_f * divergence.mean(), effort)
            effort.count("forget", len(part), forward=2)  # the teacher's pass and the student's
            row["forget_divergence"] += float(divergence.detach().double().sum()) / len(sets.forget)
    row |= {"retain_divergence": 0.0, "train_loss": 0.0}
    for part in class_batches(sets.retain, settings.batch_size, noise):
        batch = task.batch(part)
        divergence, loss = task.divergence(model, teacher, batch).total, task.loss(model, batch, noise).total
        descend(optimiser, (settings.alpha_r * divergence + loss).mean(), effort)
        effort.count("retain", len(part), forward=3, backward=2)  # the student's two terms, and the teacher
        row["retain_divergence"] += float(divergence.detach().double().sum()) / len(sets.retain)
        row["train_loss"] += float(loss.detach().double().sum()) / len(sets.retain)
    return row


def _errors(model: nn.Module, task: Task, forget: IntArray, reference: IntArray, effort: Effort) -> Epoch:
    """Mean error of the forgotten cells and of those they are compared with, nats per cell."""
    row = {"forget_error": task.error(model, forget), "reference_error": task.error(model, reference)}
    if not all(map(math.isfinite, row.values())):
        raise NonFiniteError(effort.steps, "the error of the forgotten cells or of their neighbours")
    effort.count("forget", len(forget), backward=0)
    effort.count("aside", len(reference), backward=0)
    return row


def rewound_to(history: list[Epoch]) -> int:
    """Number (from 1) of the epoch whose forget error is nearest to the reference error at the end of training."""
    wanted = history[-1]["reference_error"]
    return 1 + int(np.argmin([abs(row["forget_error"] - wanted) for row in history]))


def scrub(
    model: nn.Module, task: Task, sets: ForgetSets, settings: ScrubBase, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Alternate max passes over the forgotten cells with min passes over the retained ones, then rewind.

    Raises
    ------
    NonFiniteError
        If the divergence, which nothing bounds, runs away.

    Notes
    -----
    Kurmanji et al. 2023 (SCRUB, and SCRUB+R where ``rewind``). Max pass: raise α_f·D(θ; θ0) on F; min pass: lower
    α_r·D(θ; θ0) + ℓ(θ) on R; D is the task's ``divergence`` (of a VAE each model decodes its own z = μ). At θ0 itself D
    is least, so the first step away is dropout's, or of a net without it that of BatchNorm's batches. Rewinding: error
    is −ELBO or cross-entropy; the target is the error that the final model makes on cells like the forgotten ones that
    it never saw.
    Weights of past epochs are not kept (they may be hundreds of megabytes, in every checkpoint too): the chosen
    epoch is reached again from θ0, on the same random streams and so bit for bit, and that effort counts.
    """
    if not settings.epochs:
        return Trained(model)
    teacher = copy.deepcopy(model).eval()
    reference = reference_cells(teacher, task, sets, settings.neighbours) if settings.rewind else sets.aside[:0]
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    if settings.rewind and not loop.history:  # a resumed run has counted it
        loop.effort.count("forget", len(sets.forget), backward=0)
        loop.effort.count("aside", len(sets.aside), backward=0)

    def run(phase: str, epochs: int) -> None:
        # one optimiser, as in the paper's algorithm: an Adam for the max passes alone would divide α_f out again
        optimiser = settings.new_optimiser(model)

        def epoch(number: int, _noise: torch.Generator) -> Epoch:
            if number == 1:
                model.load_state_dict(teacher.state_dict())
            with seeding.scope(seed, "scrub and rewind", number) as noise:
                row = _passes(
                    model, teacher, task, sets, settings, with_max=number <= settings.max_epochs,
                    optimiser=optimiser, effort=loop.effort, noise=noise,
                )  # fmt: skip
            return row | (_errors(model, task, sets.forget, reference, loop.effort) if settings.rewind else {})

        loop.run(phase, epoch, epochs, parts={"adam": optimiser})

    run("scrub", settings.epochs)
    facts: dict[str, float | str] = {}
    if settings.rewind:
        first = loop.history[: settings.epochs]
        chosen = rewound_to(first)
        if chosen < settings.epochs:
            run("rewind", chosen)
        facts = {"rewound_to": float(chosen), "reference_cells": float(len(reference)),
                 "forget_error": first[chosen - 1]["forget_error"],
                 "reference_error": first[-1]["reference_error"]}  # fmt: skip
    return Trained(model, loop.history, loop.effort, facts)


def class_scrub(
    model: Classifier, task: ClassifierTask, sets: ForgetSets, settings: ClassScrubSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """:func:`scrub` with the divergence of softened class probabilities."""
    return scrub(model, task.softened(settings.temperature), sets, settings, seed=seed, checkpoint=checkpoint)

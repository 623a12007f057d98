"""SCRUB: a student disobeys the original on the forgotten cells, obeys it on the others, and rewinds to be discreet."""

from __future__ import annotations

import copy
import math
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch.optim import Optimizer

from scforget import seeding
from scforget.arrays import IntArray
from scforget.data.splits import ForgetSets
from scforget.errors import NonFiniteError
from scforget.models.vae import VAE
from scforget.search import Range
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Effort, Epoch, Loop, Trained, adam, batches, descend, mean_elbo


class ScrubSettings(Settings):
    """Settings of SCRUB.

    Attributes
    ----------
    learning_rate, batch_size
        Of Adam, for both kinds of passes.
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
        ``aside`` cells that stand for each forgotten one there, nearest in the original's latent means.

    Ranges: the weights as scales to either side of 1; the rate about Kurmanji's 5e-4, the single-cell paper's 1e-4
    inside, at which it hardly moves; up to the latter's 20 epochs.
    """

    learning_rate: Annotated[float, Field(gt=0), Range(5e-5, 3e-3, log=True)]
    batch_size: Annotated[int, Field(gt=0)]
    epochs: Annotated[int, Field(ge=0), Range(3, 20)]
    max_epochs: Annotated[int, Field(ge=0), Range(1, 20)]
    alpha_f: Annotated[float, Field(gt=0), Range(0.01, 10.0, log=True)]
    alpha_r: Annotated[float, Field(ge=0), Range(0.01, 10.0, log=True)]
    rewind: bool
    neighbours: Annotated[int, Field(gt=0)]


def reference_cells(model: VAE, task: VaeTask, sets: ForgetSets, neighbours: int) -> IntArray:
    """Never-trained ``aside`` cells that are most like the forgotten ones, by the original's latent means.

    Others of the ``aside`` cells are easier or harder for reasons of biology.

    Raises
    ------
    EmptyGroupError
        If there are fewer ``aside`` cells than neighbours.
    """
    from scforget.data.controls import matched_knn

    forget_mu, aside_mu = (task.signals(model, cells).mu for cells in (sets.forget, sets.aside))
    return sets.aside[matched_knn(forget_mu, aside_mu, neighbours)]


def _passes(
    model: VAE, teacher: VAE, task: VaeTask, sets: ForgetSets, settings: ScrubSettings, *,
    with_max: bool, optimiser: Optimizer, effort: Effort, noise: torch.Generator,
) -> Epoch:  # fmt: skip
    """Make a max pass over F, if any, and a min pass over R; return mean divergences and loss on the way."""
    model.train()
    row: Epoch = {}
    if with_max:
        row["forget_divergence"] = 0.0
        for part in batches(sets.forget, settings.batch_size, noise):
            divergence = task.divergence(model, teacher, task.batch(part)).total
            descend(optimiser, -settings.alpha_f * divergence.mean(), effort)
            effort.count("forget", len(part), forward=2)  # the teacher's pass and the student's
            row["forget_divergence"] += float(divergence.detach().double().sum()) / len(sets.forget)
    row |= {"retain_divergence": 0.0, "train_loss": 0.0}
    for part in batches(sets.retain, settings.batch_size, noise):
        batch = task.batch(part)
        divergence, loss = task.divergence(model, teacher, batch).total, task.loss(model, batch, noise).total
        descend(optimiser, (settings.alpha_r * divergence + loss).mean(), effort)
        effort.count("retain", len(part), forward=3, backward=2)  # the student's two terms, and the teacher
        row["retain_divergence"] += float(divergence.detach().double().sum()) / len(sets.retain)
        row["train_loss"] += float(loss.detach().double().sum()) / len(sets.retain)
    return row


def _errors(model: VAE, task: VaeTask, forget: IntArray, reference: IntArray, effort: Effort) -> Epoch:
    """Mean −ELBO at z = μ of the forgotten cells and of those they are compared with, nats per cell."""
    row = {"forget_error": -mean_elbo(task, model, forget), "reference_error": -mean_elbo(task, model, reference)}
    if not all(map(math.isfinite, row.values())):
        raise NonFiniteError(effort.steps, "the ELBO of the forgotten cells or of their neighbours")
    effort.count("forget", len(forget), backward=0)
    effort.count("aside", len(reference), backward=0)
    return row


def rewound_to(history: list[Epoch]) -> int:
    """Number (from 1) of the epoch whose forget error is nearest to the reference error at the end of training."""
    wanted = history[-1]["reference_error"]
    return 1 + int(np.argmin([abs(row["forget_error"] - wanted) for row in history]))


def scrub(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: ScrubSettings, *,
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
    α_r·D(θ; θ0) + ℓ(θ) on R; D is :meth:`~scforget.tasks.VaeTask.divergence`, each model decoding its own z = μ. At
    θ0 itself D is least, so the first step away is dropout's. Rewinding: error is −ELBO; the target is the error
    that the final model makes on cells like the forgotten ones that it never saw.
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
        optimiser = adam(model, settings.learning_rate)

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

"""Gradient ascent: climb the loss on the forgotten cells for a few steps, then repair on the retained ones."""

from __future__ import annotations

from itertools import chain, count, islice
from typing import Annotated

import torch
from pydantic import Field

from scforget import optimisers
from scforget.arrays import IntArray
from scforget.data.splits import ForgetSets
from scforget.models.vae import VAE
from scforget.search import Range
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Epoch, Loop, Trained, TrainingSettings, batches, descend, fit


class GradientAscentSettings(Settings):
    """Settings of gradient ascent.

    Attributes
    ----------
    steps
        Ascent steps k, each on one batch of forgotten cells.
    learning_rate
        η of plain gradient ascent; parameters move by at most k·η·``clip`` in all (L2).
    batch_size
        Forgotten cells a step.
    clip
        Largest L2 norm of a step's gradient.
    finetune
        Recipe of the training that follows. With 0 steps and 0 epochs the original comes back bit for bit.

    Ranges: the single-cell paper compared 10 to 100 steps at rates of 1e-5 and 1e-4, which move the parameters by 0.01
    at most; both are scales, and the rate goes a decade beyond either end.
    """

    steps: Annotated[int, Field(ge=0), Range(1, 100, log=True)]
    learning_rate: Annotated[float, Field(gt=0), Range(1e-6, 1e-3, log=True)]
    batch_size: Annotated[int, Field(gt=0)]
    clip: Annotated[float, Field(gt=0)]
    finetune: TrainingSettings


def ascend(
    model: VAE, task: VaeTask, cells: IntArray, loop: Loop, *,
    steps: int, learning_rate: float, batch_size: int, clip: float,
) -> None:  # fmt: skip
    """Climb the mean loss of some cells in place, as one row of the loop's history; 0 steps change nothing.

    Batches are drawn without replacement; when the cells are through, they start over in a new order.

    Raises
    ------
    NonFiniteError
        If the loss becomes NaN or infinite.
    """
    optimiser, effort = optimisers.SGD(model.parameters(), learning_rate), loop.effort

    def epoch(_number: int, noise: torch.Generator) -> Epoch:
        model.train()
        total, seen = 0.0, 0
        for part in islice(chain.from_iterable(batches(cells, batch_size, noise) for _ in count()), steps):
            loss = task.loss(model, task.batch(part), noise).total
            descend(optimiser, -loss.mean(), effort, clip=clip)
            effort.count("forget", len(part))
            total, seen = total + float(loss.detach().double().sum()), seen + len(part)
        return {"forget_loss": total / seen}

    # plain SGD keeps no state, and the steps take seconds: all of them are one epoch of the loop
    loop.run("ascent", epoch, min(steps, 1), parts={})


def gradient_ascent(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: GradientAscentSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Take ascent steps on the loss of the forgotten cells, then minimise the loss on the retained ones.

    Notes
    -----
    k times θ ← θ + η·clip(∇L_F(θ)) on batches of F, one latent draw a cell, with dropout; then argmin L_R(θ).
    L_F has no upper bound: nothing but k, η and the clip says when to stop.
    """
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    ascend(
        model, task, sets.forget, loop, steps=settings.steps, learning_rate=settings.learning_rate,
        batch_size=settings.batch_size, clip=settings.clip,
    )  # fmt: skip
    return fit(model, task, sets.retain, sets.stop, settings.finetune, seed=seed, loop=loop)

"""DP-SGD as published: the epoch to keep is chosen on retained cells without noise."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from scforget import optimisers, private, published, seeding
from scforget.arrays import IntArray
from scforget.data.splits import ForgetSets
from scforget.models.vae import VAE
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Epoch, Loop, Trained


class DPSGDPublishedSettings(Settings):
    """Settings of the published DP-SGD.

    Attributes
    ----------
    epsilon, delta
        Privacy budget that the noise is set for.
    clip
        C, the largest L2 norm of a cell's gradient.
    patience
        Epochs without a lower loss on the validation cells.
    validation_cells
        Retained cells that are not trained on; at most a quarter of them.
    """

    variant: Literal["published"]
    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    learning_rate: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(gt=0)]
    max_epochs: Annotated[int, Field(gt=0)]
    patience: Annotated[int, Field(gt=0)]
    validation_cells: Annotated[int, Field(gt=0)]


def split(retain: IntArray, validation_cells: int, seed: int) -> tuple[IntArray, IntArray]:
    """Retained cells to train on, and those set aside for validation: as many as wanted, at most a quarter."""
    wanted = max(1, min(validation_cells, len(retain) // 4))
    validation = seeding.numpy_generator(seed, "validation").choice(retain, wanted, replace=False)
    return np.setdiff1d(retain, validation), np.sort(validation)


def mechanism_as_published(settings: DPSGDPublishedSettings, cells: int) -> private.Mechanism:
    """The noise for ``cells`` training cells.

    Notes
    -----
    σ is found for q = batch/N and ⌊N/batch⌋ steps an epoch, but the loader draws with q = 1/⌈N/batch⌉ and takes
    ⌈N/batch⌉ steps: this is how 10.03 was spent where 10 was asked for.
    """
    size = min(settings.batch_size, cells)
    sigma = private.noise_multiplier(
        settings.epsilon, settings.delta, size / cells, cells // size * settings.max_epochs
    )  # fmt: skip
    steps = math.ceil(cells / size)
    return private.Mechanism(settings.clip, sigma, 1 / steps, cells // steps, steps)


def dp_sgd_published(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: DPSGDPublishedSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Train a new model on most retained cells by Adam on privatised gradients; keep the best epoch of the others.

    Notes
    -----
    Departs from :func:`scforget.methods.dp_sgd.dp_sgd` in that some retained cells decide without noise when to stop
    and which epoch to keep, that slightly more than ε is spent, and that the dispersion head stays as initialised.
    The ε in the facts is that of the training cells for the epochs run; what the choice of the epoch gives away of
    the validation cells, nothing bounds.
    """
    model.load_state_dict(task.new_model(seed).state_dict())
    train, validation = split(sets.retain, settings.validation_cells, seed)
    mechanism = mechanism_as_published(settings, len(train))
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    parameters = {n: p for n, p in model.named_parameters() if not n.startswith("dispersion.")}
    optimiser = optimisers.Adam(parameters.values(), settings.learning_rate)

    def epoch(number: int, noise: torch.Generator) -> Epoch:
        gaussian = seeding.torch_generator(seed, "privacy", number)
        return private.train_epoch(model, task, train, mechanism, optimiser, parameters, noise, gaussian, loop.effort)

    def score() -> float:
        loop.effort.count("retain", len(validation), backward=0)
        return -published.mean_loss(task, model, validation, "sum")

    loop.run(
        "private", epoch, settings.max_epochs, parts={"adam": optimiser}, score=score, patience=settings.patience
    )  # fmt: skip
    sigma = mechanism.noise_multiplier
    epsilon = private.epsilon_spent(sigma, mechanism.rate, mechanism.steps * len(loop.history), settings.delta)
    group_epsilon, group_delta = private.group_guarantee(epsilon, settings.delta, len(sets.forget))
    facts: dict[str, float | str] = {
        "noise_multiplier": sigma, "epsilon": epsilon, "delta": settings.delta,
        "group_epsilon": group_epsilon, "group_delta": group_delta,
        "guarantee": "none for the validation cells, which chose the epoch without noise",
    }  # fmt: skip
    return Trained(model, loop.history, loop.effort, facts)

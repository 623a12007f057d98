"""Retraining as published: the paper's target, which had another recipe than its original."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from scforget import published, seeding
from scforget.arrays import IntArray
from scforget.data.splits import ForgetSets
from scforget.errors import EmptyGroupError
from scforget.models.vae import VAE
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Epoch, Loop, Trained, TrainingSettings, adam, train_epoch


class RetrainPublishedSettings(Settings):
    """Settings as published: Adam 1e-4, batches of 256, up to 100 epochs, patience 10, 15 % held out.

    Attributes
    ----------
    patience
        Epochs without a lower loss on the held-out retained cells.
    validation_fraction
        Share of the retained cells that is held out, and so never trained on.
    """

    variant: Literal["published"]
    learning_rate: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(gt=0)]
    max_epochs: Annotated[int, Field(gt=0)]
    patience: Annotated[int, Field(gt=0)]
    validation_fraction: Annotated[float, Field(gt=0, lt=1)]


def held_out(retain: IntArray, fraction: float, seed: int) -> tuple[IntArray, IntArray]:
    """Deal the retained cells at random into those to train on and those held out, each sorted.

    Raises
    ------
    EmptyGroupError
        If one of them would get no cell.
    """
    order = seeding.numpy_generator(seed, "validation").permutation(retain)
    train, validation = np.split(order, [len(order) - round(fraction * len(order))])
    if not (len(train) and len(validation)):
        raise EmptyGroupError("retrain_published", f"{len(retain)} retained cells", "some to train on, some held out")
    return np.sort(train), np.sort(validation)


def retrain_published(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: RetrainPublishedSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Train a new model on most of the retained cells; keep the epoch with the lowest loss on the rest.

    Nothing of the given model is used.

    Notes
    -----
    Unlike the original it has full KL weight from the first epoch, no free bits, fewer cells and another choice of
    epoch: what sets it apart from the original is not only that it never saw the forgotten cells.
    """
    train, validation = held_out(sets.retain, settings.validation_fraction, seed)
    model.load_state_dict(task.new_model(seed).state_dict())
    recipe = TrainingSettings(
        learning_rate=settings.learning_rate, batch_size=settings.batch_size, max_epochs=settings.max_epochs,
        patience=settings.patience, schedule="constant", kl_warmup_epochs=0, free_bits=0.0,
    )  # fmt: skip
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    optimiser, effort = adam(model, settings.learning_rate), loop.effort

    def epoch(_number: int, noise: torch.Generator) -> Epoch:
        return train_epoch(model, task, train, recipe, optimiser, noise, effort)

    def score() -> float:
        effort.count("retain", len(validation), backward=0)
        return -published.mean_loss(task, model, validation, "sum")

    loop.run(
        "retrain", epoch, settings.max_epochs, parts={"adam": optimiser}, score=score, patience=settings.patience
    )  # fmt: skip
    return Trained(model, loop.history, effort)

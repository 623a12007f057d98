"""Training of classifiers: the recipe of originals, retrains and fine-tuning, on the one training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from scforget import engine, optimisers
from scforget.arrays import IntArray
from scforget.class_tasks import ClassifierTask
from scforget.models.classifiers import Classifier
from scforget.settings import Settings
from scforget.training import Checkpoint, Effort, Epoch, Loop, Trained, batches, descend, one_cycle

Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0)]


class AdamSettings(Settings):
    """Adam; the decay is added to the gradient (L2)."""

    kind: Literal["adam"]
    learning_rate: Rate
    weight_decay: Decay


class SGDSettings(Settings):
    """Stochastic gradient descent with heavy-ball momentum; the decay is added to the gradient (L2)."""

    kind: Literal["sgd"]
    learning_rate: Rate
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Decay


OptimiserSettings = Annotated[AdamSettings | SGDSettings, Field(discriminator="kind")]


class ClassTrainingSettings(Settings):
    """Recipe of a classifier's training run.

    Attributes
    ----------
    optimiser
        With its learning rate; the highest one under a schedule.
    schedule
        ``constant``; ``cosine``: half a cosine from the rate to 0 over all steps; ``one_cycle``: see
        :func:`~scforget.training.one_cycle`.
    batch_size
        Items a step.
    epochs
        Passes over the items, all of them: no held-out set decides; 0 returns the model as it came.
    """

    optimiser: OptimiserSettings
    schedule: Literal["constant", "cosine", "one_cycle"]
    batch_size: Annotated[int, Field(gt=0)]
    epochs: Annotated[int, Field(ge=0)]


def new_optimiser(parameters: Iterable[Tensor], settings: OptimiserSettings) -> Optimizer:
    """Return the optimiser that settings describe, of some parameters."""
    if isinstance(settings, AdamSettings):
        return optimisers.Adam(parameters, settings.learning_rate, settings.weight_decay)
    return optimisers.SGD(parameters, settings.learning_rate, settings.momentum, settings.weight_decay)


def class_rates(settings: ClassTrainingSettings, items: int, epoch: int) -> list[float]:
    """Learning rate of each step of an epoch, numbered from 1, over so many items."""
    steps, highest = -(-items // settings.batch_size), settings.optimiser.learning_rate
    steps -= steps > 1 and items - (steps - 1) * settings.batch_size == 1  # class_batches joins a lone last item
    total, first = settings.epochs * steps, (epoch - 1) * steps
    if settings.schedule == "constant":
        return [highest] * steps
    if settings.schedule == "one_cycle":
        return [highest * one_cycle((first + k) / total) for k in range(1, steps + 1)]
    return [highest * 0.5 * (1 + math.cos(math.pi * (first + k) / total)) for k in range(steps)]


def class_batches(cells: IntArray, size: int, noise: torch.Generator) -> Iterator[IntArray]:
    """One pass in random order as :func:`~scforget.training.batches`, but for a last item on its own.

    It joins the batch before: of a single small image nothing is left to normalise over, and BatchNorm refuses.
    """
    parts = list(batches(cells, size, noise))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [np.concatenate(parts[-2:])]
    return iter(parts)


def class_epoch(  # noqa: PLR0917
    model: Classifier, task: ClassifierTask, cells: IntArray, batch_size: int, optimiser: Optimizer,
    noise: torch.Generator, effort: Effort, *, rates: Sequence[float] | None = None, cell_set: str = "retain",
) -> Epoch:  # fmt: skip
    """Make one pass over the items in random order, each in a random view, minimising the mean cross-entropy.

    ``rates`` gives the learning rate of each step; without it the optimiser's own stays.

    Returns
    -------
    dict
        ``train_loss`` (mean, nats) and ``train_accuracy``, both on the way.
    """
    model.train()
    loss_sum, right = 0.0, 0
    for step, part in enumerate(class_batches(cells, batch_size, noise)):
        if rates is not None:
            optimiser.param_groups[0]["lr"] = rates[step]
        batch = task.batch(part, noise)
        with engine.autocast():
            logits = model(batch.inputs)
        losses = task.cross_entropy(logits, batch.labels)
        descend(optimiser, losses.mean(), effort)
        effort.count(cell_set, len(part))
        loss_sum += float(losses.detach().double().sum())
        right += int((logits.detach().argmax(1) == batch.labels).sum())
    return {"train_loss": loss_sum / len(cells), "train_accuracy": right / len(cells)}


def fit_classifier(
    model: Classifier, task: ClassifierTask, cells: IntArray, settings: ClassTrainingSettings, *,
    seed: int, checkpoint: Checkpoint | None = None, cell_set: str = "retain", loop: Loop | None = None,
    phase: str = "fit", on_epoch: Callable[[Epoch], None] | None = None,
) -> Trained:  # fmt: skip
    """Train a classifier in place on the mean cross-entropy for a fixed number of epochs.

    Parameters
    ----------
    cells : ``[N]``
        Items to train on.
    seed
        Names every random stream of the run.
    checkpoint
        Saved after each epoch; a saved state is taken up.
    cell_set
        Under which name the passes are counted.
    loop
        A run of which this is a further phase, by the name ``phase``; ``seed`` and ``checkpoint`` are its own.
    on_epoch
        Called with each finished epoch's row (for progress).

    Returns
    -------
    Trained
        ``model`` in eval mode.

    Raises
    ------
    NonFiniteError
        If a loss is NaN or infinite.
    """
    loop = loop or Loop(model, seed=seed, checkpoint=checkpoint)
    optimiser, effort = new_optimiser(model.parameters(), settings.optimiser), loop.effort

    def epoch(number: int, noise: torch.Generator) -> Epoch:
        return class_epoch(
            model, task, cells, settings.batch_size, optimiser, noise, effort,
            rates=class_rates(settings, len(cells), number), cell_set=cell_set,
        )  # fmt: skip

    loop.run(phase, epoch, settings.epochs, parts={"optimiser": optimiser}, on_epoch=on_epoch)
    model.eval()
    return Trained(model, loop.history, effort)

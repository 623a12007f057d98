"""What the published variants share: the fine-tuning, the loss scales and the Fisher estimate of the released code.

They are kept for comparison, departures from the cited papers included; the canonical methods use none of this.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from scforget import seeding
from scforget.arrays import IntArray
from scforget.data.splits import ForgetSets
from scforget.fisher import Diagonal
from scforget.models.vae import VAE, Batch
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Epoch, Loop, Trained, adam, batches, descend

#: ``sum``: summed over genes, as the KL is over latent dimensions. ``mean_genes``: the mean over genes beside the
#: summed KL, which weighs the KL G times too much; ``mean``: both means.
Scale = Literal["sum", "mean_genes", "mean"]


class FinetuneSettings(Settings):
    """Fine-tuning as published.

    Attributes
    ----------
    patience
        Epochs without a lower loss on ``validation_cells`` retained cells (a tenth of them at most), which are
        trained on too.
    """

    learning_rate: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(gt=0)]
    max_epochs: Annotated[int, Field(ge=0)]
    patience: Annotated[int, Field(gt=0)]
    validation_cells: Annotated[int, Field(gt=0)]


def loss(task: VaeTask, model: VAE, batch: Batch, noise: torch.Generator | None, scale: Scale) -> Tensor:
    """Negative ELBO of each cell, ``[B]``, on one of the published scales."""
    parts = task.loss(model, batch, noise)
    genes = batch.counts.shape[1] if scale != "sum" else 1
    dimensions = task.settings.latent if scale == "mean" else 1
    return parts.kl / dimensions - parts.reconstruction / genes


@torch.no_grad()
def mean_loss(task: VaeTask, model: VAE, cells: IntArray, scale: Scale) -> float:
    """Mean of :func:`loss` over cells in eval mode, at z = μ."""
    model.eval()
    parts = [loss(task, model, task.batch(part), None, scale) for part in np.array_split(cells, -(-len(cells) // 1024))]
    return float(torch.cat(parts).double().mean())


def finetune(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: FinetuneSettings, *,
    seed: int, loop: Loop, scale: Scale = "sum",
) -> Trained:  # fmt: skip
    """Fine-tune on the retained cells; keep the epoch that is best on some of the very cells trained on."""
    generator = seeding.numpy_generator(seed, "validation")
    size = min(settings.validation_cells, max(1, len(sets.retain) // 10))
    validation = generator.choice(sets.retain, size, replace=False)
    optimiser, effort = adam(model, settings.learning_rate), loop.effort

    def epoch(_number: int, noise: torch.Generator) -> Epoch:
        model.train()
        total = 0.0
        for part in batches(sets.retain, settings.batch_size, noise):
            losses = loss(task, model, task.batch(part), noise, scale)
            descend(optimiser, losses.mean(), effort)
            effort.count("retain", len(part))
            total += float(losses.detach().double().sum())
        return {"train_loss": total / len(sets.retain)}

    def score() -> float:
        effort.count("retain", len(validation), backward=0)
        return -mean_loss(task, model, validation, scale)

    loop.run("finetune", epoch, settings.max_epochs, parts={"adam": optimiser}, score=score, patience=settings.patience)
    return Trained(model, loop.history, effort)


def batch_fisher(
    model: VAE, task: VaeTask, cells: IntArray, *,
    batch_size: int, reduction: Literal["sum", "mean"], damping: float, seed: int,
) -> Diagonal:  # fmt: skip
    """Sum over batches of the squared gradient of the batch's loss, over the number of cells, plus a damping.

    Notes
    -----
    The published estimator. It squares after summing over cells, so cross terms between cells dominate, and it runs
    in train mode with one latent draw. Not a Fisher information: see :func:`scforget.fisher.diagonal`.
    """
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    model.train()
    with seeding.scope(seed, "batch fisher") as noise:
        for start in range(0, len(cells), batch_size):
            losses = loss(task, model, task.batch(cells[start : start + batch_size]), noise, "sum")
            model.zero_grad(set_to_none=True)
            (losses.sum() if reduction == "sum" else losses.mean()).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    total[name] += parameter.grad.square()
    model.zero_grad(set_to_none=True)
    return {name: value / len(cells) + damping for name, value in total.items()}

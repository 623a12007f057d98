"""Fisher scrubbing as published: clamped ascent by the squared gradients of batches, then training on another scale."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from scforget import published
from scforget.curvature import require_finite
from scforget.data.splits import ForgetSets
from scforget.errors import NonFiniteError
from scforget.fisher import Diagonal
from scforget.models.vae import VAE
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Epoch, Loop, Trained


class FisherScrubPublishedSettings(Settings):
    """Settings of the published rule.

    Attributes
    ----------
    alpha
        Rate of the ascent.
    damping
        Added to the information.
    clamp
        Largest change of a parameter in one step.
    steps
        How many; 0 scrubs nothing.
    batch_size
        Retained cells whose summed gradient is squared as one.
    finetune
        The training that follows; with ``max_epochs: 0`` and no step the original comes back bit for bit.
    """

    variant: Literal["published"]
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    damping: Annotated[float, Field(gt=0)]
    clamp: Annotated[float, Field(gt=0)]
    steps: Annotated[int, Field(ge=0)]
    batch_size: Annotated[int, Field(gt=0)]
    finetune: published.FinetuneSettings


@torch.no_grad()
def climb(model: nn.Module, information: Diagonal, alpha: float, clamp: float) -> None:
    """Apply θ ← θ + clamp(α·∂L/F̂, ±clamp) in place, by the gradients that the parameters hold; F̂ is damped."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parameter.add_((alpha * parameter.grad / information[name]).clamp(-clamp, clamp))


def fisher_scrub_published(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: FisherScrubPublishedSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Climb the loss of the forgotten cells, then fine-tune with the reconstruction averaged over genes.

    Raises
    ------
    NonFiniteError
        If the information, a loss or a parameter becomes NaN or infinite.

    Notes
    -----
    θ ← θ + clamp(α·∂L_F/F̂_R, ±clamp), L_F the sum over all forgotten cells in one batch, in train mode with a fresh
    latent draw and dropout in every step; F̂_R is :func:`~scforget.published.batch_fisher` of the summed loss, once,
    at the original's parameters. The clamp acts as a sign step. The fine-tuning adds the mean over genes of the
    reconstruction to the KL summed over latent dimensions, so the KL weighs G times too much and the posterior
    collapses. Kept for comparison with :mod:`~scforget.methods.fisher_scrub`.
    """
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    effort = loop.effort

    def scrub(_number: int, noise: torch.Generator) -> Epoch:
        information = published.batch_fisher(
            model, task, sets.retain,
            batch_size=settings.batch_size, reduction="sum", damping=settings.damping, seed=seed,
        )  # fmt: skip
        effort.count("retain", len(sets.retain))
        require_finite(information.values(), effort.steps, "the Fisher information")
        batch, total = task.batch(sets.forget), 0.0
        model.train()
        for _ in range(settings.steps):
            loss = published.loss(task, model, batch, noise, "sum").sum()
            if not torch.isfinite(loss):
                raise NonFiniteError(effort.steps, "the loss")
            model.zero_grad(set_to_none=True)
            loss.backward()
            climb(model, information, settings.alpha, settings.clamp)
            effort.count("forget", len(sets.forget))
            effort.steps += 1
            total = float(loss.detach())
        model.zero_grad(set_to_none=True)
        require_finite(model.parameters(), effort.steps, "a parameter")
        return {"forget_loss": total}

    loop.run("scrub", scrub, 1 if settings.steps else 0, parts={})
    return published.finetune(model, task, sets, settings.finetune, seed=seed, loop=loop, scale="mean_genes")

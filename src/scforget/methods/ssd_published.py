"""SSD as published for single cells: shrink every parameter by its share of the largest ratio, then train."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from scforget import published, seeding
from scforget.curvature import require_finite
from scforget.data.splits import ForgetSets
from scforget.fisher import Diagonal
from scforget.models.vae import VAE
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Epoch, Loop, Trained

#: Keeps the published ratio finite; beside the damping it does nothing.
_EPSILON = 1e-10


class SSDPublishedSettings(Settings):
    """Settings of the published rule.

    Attributes
    ----------
    alpha
        Strength; past 1 signs turn round. 0 dampens nothing.
    damping
        Added to both informations.
    batch_size
        Retained cells whose mean gradient is squared as one; the forgotten cells are one batch.
    finetune
        The training that follows; with ``max_epochs: 0`` and ``alpha: 0`` the original comes back bit for bit.
    """

    variant: Literal["published"]
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    damping: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(gt=0)]
    finetune: published.FinetuneSettings


@torch.no_grad()
def dampen_all(model: nn.Module, forget: Diagonal, retain: Diagonal, alpha: float) -> None:
    """Apply θ ← θ·(1 − α·I/max I) in place, I = F_F/(F_R + 1e-10), the largest of each tensor."""
    for name, parameter in model.named_parameters():
        ratio = forget[name] / (retain[name] + _EPSILON)
        parameter.mul_(1 - alpha * ratio / ratio.max())


def ssd_published(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: SSDPublishedSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Dampen all parameters by the squared gradients of batches, then fine-tune.

    Raises
    ------
    NonFiniteError
        If an information, a loss or a parameter becomes NaN or infinite.

    Notes
    -----
    Both informations are :func:`~scforget.published.batch_fisher` of the mean loss. There is no selection. Where no
    gradient arrives both are the damping, the ratio is the same everywhere and so its own maximum: at α = 1 the
    dispersion head of ``log_mse`` becomes 0 altogether. Kept for comparison with :mod:`~scforget.methods.ssd`.
    """
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    effort = loop.effort

    def dampening(_number: int, _noise: torch.Generator) -> Epoch:
        forget, retain = (
            published.batch_fisher(
                model, task, cells,
                batch_size=size, reduction="mean", damping=settings.damping, seed=seeding.derive(seed, name),
            )
            for name, cells, size in (
                ("forget", sets.forget, len(sets.forget)),
                ("retain", sets.retain, settings.batch_size),
            )
        )  # fmt: skip
        effort.count("forget", len(sets.forget))
        effort.count("retain", len(sets.retain))
        require_finite([*forget.values(), *retain.values()], effort.steps, "the Fisher information")
        dampen_all(model, forget, retain, settings.alpha)
        require_finite(model.parameters(), effort.steps, "a parameter")
        return {}

    loop.run("dampen", dampening, 1 if settings.alpha else 0, parts={})
    return published.finetune(model, task, sets, settings.finetune, seed=seed, loop=loop, scale="sum")

"""Shrink and perturb: mix the parameters with fresh ones, then train on the retained cells."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from scforget.data.splits import ForgetSets
from scforget.models.vae import VAE
from scforget.search import Follows, Range
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Trained, TrainingSettings, fit


class ShrinkPerturbSettings(TrainingSettings):
    """How much of the original stays, and the recipe of the training that follows.

    Attributes
    ----------
    lam
        λ, the share of the original's parameters; 1 returns the original bit for bit, 0 is a retrain.

    Ranges: λ short of the original itself; the rest as for the partial reset.
    """

    learning_rate: Annotated[float, Field(gt=0), Range(1e-3, 1e-2, log=True)]
    max_epochs: Annotated[int, Field(ge=0), Range(4, 30)]
    patience: Annotated[int, Field(gt=0), Follows("max_epochs")]
    lam: Annotated[float, Field(ge=0, le=1), Range(0.0, 0.9)]


@torch.no_grad()
def shrink_and_perturb(model: VAE, fresh: VAE, lam: float) -> None:
    """Apply θ ← λ·θ + (1 − λ)·θ_fresh in place."""
    for parameter, other in zip(model.parameters(), fresh.parameters(), strict=True):
        parameter.mul_(lam).add_(other, alpha=1 - lam)


def shrink_perturb(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: ShrinkPerturbSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Mix with fresh parameters, then minimise the loss on the retained cells; the forgotten cells are never touched.

    Notes
    -----
    θ ← λ·θ0 + (1 − λ)·θ_fresh (Ash and Adams 2020, section 4, where it warm-starts training), then argmin L_R.
    """
    if settings.lam == 1:
        return Trained(model)
    shrink_and_perturb(model, task.new_model(seed), settings.lam)
    return fit(model, task, sets.retain, sets.stop, settings, seed=seed, checkpoint=checkpoint)

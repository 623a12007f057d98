"""Contrastive latent unlearning as published: drift averaged over latent dimensions, the published fine-tuning."""

from __future__ import annotations

import copy
from typing import Annotated, Literal

from pydantic import Field

from scforget import published
from scforget.data.splits import ForgetSets
from scforget.methods.contrastive_latent import contrast
from scforget.models.vae import VAE
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Loop, Trained


class ContrastiveLatentPublishedSettings(Settings):
    """Settings as published: γ = λ = 1, Adam 1e-4, batches of 256, 20 epochs, then 10 of fine-tuning.

    Attributes
    ----------
    gamma, lam
        Weights of the forgotten cells' KL to the prior and of the retained cells' drift.
    learning_rate, batch_size, epochs
        Of the first phase: passes over the retained cells, the encoder alone.
    finetune
        The published fine-tuning. With 0 epochs of either the original comes back bit for bit.
    """

    variant: Literal["published"]
    gamma: Annotated[float, Field(gt=0)]
    lam: Annotated[float, Field(gt=0)]
    learning_rate: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(gt=0)]
    epochs: Annotated[int, Field(ge=0)]
    finetune: published.FinetuneSettings


def contrastive_latent_published(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: ContrastiveLatentPublishedSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Train the encoder to send the forgotten cells to the prior, then fine-tune everything as published.

    Notes
    -----
    γ·mean KL(q(z|x_F) ‖ N(0, I)) + λ·(mean Δμ² + 0.1 mean (Δ log σ²)²), where the KL is a sum over the Z latent
    dimensions but the drift is a mean over them: the retained cells weigh Z times less than in the canonical method.
    """
    teacher = copy.deepcopy(model).eval()
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    contrast(
        model, teacher, task, sets, loop, gamma=settings.gamma, lam=settings.lam / task.settings.latent,
        learning_rate=settings.learning_rate, batch_size=settings.batch_size, epochs=settings.epochs,
    )  # fmt: skip
    return published.finetune(model, task, sets, settings.finetune, seed=seed, loop=loop)

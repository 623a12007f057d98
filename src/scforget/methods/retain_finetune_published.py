"""Retain-only fine-tuning as published: the epoch is chosen on cells that are trained on."""

from __future__ import annotations

from typing import Literal

from scforget import published
from scforget.data.splits import ForgetSets
from scforget.models.vae import VAE
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Loop, Trained


class RetainFinetunePublishedSettings(Settings):
    """Settings as published: Adam 1e-4, batches of 256, up to 50 epochs, patience 10.

    Attributes
    ----------
    finetune
        The published fine-tuning; with 0 epochs the original comes back bit for bit.
    """

    variant: Literal["published"]
    finetune: published.FinetuneSettings


def retain_finetune_published(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: RetainFinetunePublishedSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Minimise the loss on the retained cells from the original's parameters; see :func:`published.finetune`."""
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    return published.finetune(model, task, sets, settings.finetune, seed=seed, loop=loop)

"""Retain-only fine-tuning: go on training on the cells that stay, and hope that the others fade."""

from __future__ import annotations

from scforget.data.splits import ForgetSets
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Trained, TrainingSettings, fit


class RetainFinetuneSettings(TrainingSettings):
    """The training recipe of the fine-tuning; ``max_epochs: 0`` returns the original bit for bit."""


def retain_finetune(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: RetainFinetuneSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Minimise the loss on the retained cells from the original's parameters.

    Notes
    -----
    θ ← argmin L_R(θ) from θ0, early-stopped on ``stop``; the forgotten cells are never touched.
    """
    return fit(model, task, sets.retain, sets.stop, settings, seed=seed, checkpoint=checkpoint)

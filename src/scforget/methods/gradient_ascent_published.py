"""Gradient ascent as published: ten steps that move the parameters by 1e-4 at most, then a long fine-tuning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from scforget import published
from scforget.data.splits import ForgetSets
from scforget.methods.gradient_ascent import ascend
from scforget.models.vae import VAE
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Loop, Trained


class GradientAscentPublishedSettings(Settings):
    """Settings as published: 10 steps, 1e-5, batches of 32, norm 1; fine-tuning of up to 30 epochs, patience 10.

    Attributes
    ----------
    steps, learning_rate, batch_size, clip
        Of the ascent: how many, η, forgotten cells a step, largest L2 norm of a step's gradient.
    finetune
        The published fine-tuning. With 0 steps and 0 epochs the original comes back bit for bit.
    """

    variant: Literal["published"]
    steps: Annotated[int, Field(ge=0)]
    learning_rate: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(gt=0)]
    clip: Annotated[float, Field(gt=0)]
    finetune: published.FinetuneSettings


def gradient_ascent_published(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: GradientAscentPublishedSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Ascend on the forgotten cells as published, then fine-tune as published.

    Notes
    -----
    ‖θ − θ0‖ <= k·η·clip = 1e-4 after the ascent: what the published method does is done by its fine-tuning.
    """
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    ascend(
        model, task, sets.forget, loop, steps=settings.steps, learning_rate=settings.learning_rate,
        batch_size=settings.batch_size, clip=settings.clip,
    )  # fmt: skip
    return published.finetune(model, task, sets, settings.finetune, seed=seed, loop=loop)

"""SCRUB as published for single-cell VAEs: the posteriors alone diverge, with two optimisers, then fine-tuning."""

from __future__ import annotations

import copy
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from scforget import published, seeding
from scforget.arrays import IntArray
from scforget.data.splits import ForgetSets
from scforget.models.vae import VAE, Batch
from scforget.settings import Settings
from scforget.tasks import VaeTask, posterior_kl
from scforget.training import Checkpoint, Epoch, Loop, Trained, adam, batches, descend


class ScrubPublishedSettings(Settings):
    """Settings as published: 20 epochs of 5 and 10 steps, both Adams 1e-4, α_f = α_r = 1, norm 1, then 10 epochs.

    Attributes
    ----------
    alpha_f
        Weight of the divergence on the forgotten cells; Adam and the clip make it all but void.
    alpha_r
        Weight of the divergence beside the loss on the retained cells.
    learning_rate, batch_size, clip
        Of both kinds of steps; the clip is the largest L2 norm of a step's gradient.
    epochs, forget_steps, retain_steps
        Epochs, and steps of each kind in one.
    finetune
        The published fine-tuning. With 0 epochs of either the original comes back bit for bit.
    """

    variant: Literal["published"]
    alpha_f: Annotated[float, Field(gt=0)]
    alpha_r: Annotated[float, Field(ge=0)]
    learning_rate: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(gt=0)]
    clip: Annotated[float, Field(gt=0)]
    epochs: Annotated[int, Field(ge=0)]
    forget_steps: Annotated[int, Field(ge=0)]
    retain_steps: Annotated[int, Field(ge=0)]
    finetune: published.FinetuneSettings


def nth_batch(cells: IntArray, size: int, step: int, seed: int, name: str) -> IntArray:
    """Batch number ``step`` (from 0) of endless passes over the cells, each pass in an order of its own.

    The passes go on from epoch to epoch; a step's batch depends on its number alone, so a resumed run draws the same.
    """
    done, place = divmod(step, -(-len(cells) // size))
    return list(batches(cells, size, seeding.torch_generator(seed, name, done)))[place]


def reverse_kl(model: VAE, teacher: VAE, batch: Batch) -> Tensor:
    """KL(q_model ‖ q_teacher) of the posteriors, ``[B]`` nats; differentiable in the model."""
    with torch.no_grad():
        other = teacher.encode(batch.inputs)
    return posterior_kl(*model.encode(batch.inputs), *other)


def scrub_published(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: ScrubPublishedSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Alternate steps away from the original on F with steps towards it on R, then fine-tune as published.

    Notes
    -----
    Forget steps: min −α_f·KL(q_s ‖ q_t) on F; retain steps: min α_r·KL(q_s ‖ q_t) + ELBO loss on R. The decoder gets no
    forget signal, and the forget steps have an Adam of their own behind a clip, which divides α_f out again.
    """
    teacher = copy.deepcopy(model).eval()
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    effort, clip, size = loop.effort, settings.clip, settings.batch_size
    away, back = adam(model, settings.learning_rate), adam(model, settings.learning_rate)

    def epoch(number: int, noise: torch.Generator) -> Epoch:
        model.train()
        row = {"forget_loss": 0.0, "retain_loss": 0.0}
        for step in range(settings.forget_steps):
            part = nth_batch(sets.forget, size, (number - 1) * settings.forget_steps + step, seed, "forget batches")
            loss = -settings.alpha_f * reverse_kl(model, teacher, task.batch(part)).mean()
            descend(away, loss, effort, clip=clip)
            effort.count("forget", len(part), forward=2)
            row["forget_loss"] += loss.item() / settings.forget_steps
        for step in range(settings.retain_steps):
            part = nth_batch(sets.retain, size, (number - 1) * settings.retain_steps + step, seed, "retain batches")
            batch = task.batch(part)
            losses = published.loss(task, model, batch, noise, "sum")
            loss = (settings.alpha_r * reverse_kl(model, teacher, batch) + losses).mean()
            descend(back, loss, effort, clip=clip)
            effort.count("retain", len(part), forward=3, backward=2)  # encoded once for each term, and by the teacher
            row["retain_loss"] += loss.item() / settings.retain_steps
        return row

    loop.run("scrub", epoch, settings.epochs, parts={"away": away, "back": back})
    return published.finetune(model, task, sets, settings.finetune, seed=seed, loop=loop)

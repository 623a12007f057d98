"""UnGAN: a critic tells forgotten items from others by what the model says of them, and the model learns to foil it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from scforget import cramer, engine, optimisers
from scforget.arrays import IntArray
from scforget.class_tasks import ClassifierTask, class_kl
from scforget.class_training import class_batches
from scforget.cramer import EmbeddingSettings, Sample
from scforget.data.splits import ForgetSets
from scforget.errors import EmptyGroupError
from scforget.search import Range
from scforget.settings import Settings
from scforget.tasks import Task
from scforget.training import Checkpoint, Effort, Epoch, Loop, Part, Trained, descend


class UnganSettings(Settings):
    """Settings of the game, of VAEs and of classifiers.

    Attributes
    ----------
    critic
        See :class:`~scforget.cramer.EmbeddingSettings`.
    learning_rate, weight_decay
        Of the model's one Adam, for generator steps and for fine-tuning.
    alpha, gamma
        Weights of the loss and of the divergence from the original on the retained items.
    epochs
        N_e; 0 returns the original bit for bit.
    critic_steps, generator_steps
        T_d and T_g, each epoch.
    finetune_steps
        T_f, each epoch; ``null``: one pass over the retained items.
    batch_size
        Items of each kind a step; fewer where there are fewer forgotten or ``aside`` ones.

    Ranges: the rate about the paper's 5e-4, the weights from a sixth of the paper's smaller one up to 1, epochs and
    steps from a quarter of the paper's to twice or four times them.
    """

    critic: EmbeddingSettings
    learning_rate: Annotated[float, Field(gt=0), Range(5e-5, 3e-3, log=True)]
    weight_decay: Annotated[float, Field(ge=0)]
    alpha: Annotated[float, Field(ge=0), Range(0.005, 1.0, log=True)]
    gamma: Annotated[float, Field(ge=0), Range(0.005, 1.0, log=True)]
    epochs: Annotated[int, Field(ge=0), Range(2, 16)]
    critic_steps: Annotated[int, Field(gt=0), Range(1, 16)]
    generator_steps: Annotated[int, Field(gt=0), Range(1, 16)]
    finetune_steps: Annotated[int, Field(ge=0)] | None
    batch_size: Annotated[int, Field(gt=0)]


def departure(task: Task, model: Any, original: Any, batch: Any) -> Tensor:
    """How far a model has gone from the original on each item, ``[B]`` nats; differentiable in the model.

    Notes
    -----
    Of classifiers KL(G ‖ Ĝ) of the class probabilities, in the order in which the paper prints it. Of VAEs the task's
    divergence, which is the other way round: that of the decoders is known in closed form only at one dispersion, the
    original's. Near the original the two directions agree to second order.
    """
    if isinstance(task, ClassifierTask):
        with torch.no_grad():
            wanted = original(batch.inputs)
        return class_kl(model(batch.inputs).float(), wanted.float())
    found: Tensor = task.divergence(model, original, batch).total
    return found


def _passes(items: IntArray, size: int, steps: int | None, noise: torch.Generator) -> Iterator[IntArray]:
    """Batches of one pass over the items, or of as many passes as so many steps need."""
    if steps is None:
        yield from class_batches(items, size, noise)
        return
    while steps > 0:
        for part in class_batches(items, size, noise):
            yield part
            steps -= 1
            if not steps:
                return


def _means(rows: list[Epoch]) -> Epoch:
    """Mean of each column over steps."""
    return {name: float(np.mean([row[name] for row in rows])) for name in (rows[0] if rows else {})}


@dataclass(frozen=True)
class _Game:
    """Who plays, and for what; every method is one step and returns what it saw before it."""

    model: nn.Module
    original: nn.Module
    embed: nn.Module
    task: Task
    sets: ForgetSets
    settings: UnganSettings
    effort: Effort
    optimiser: Optimizer
    critic_optimiser: Optimizer

    def _sample(self, noise: torch.Generator, *, backward: bool) -> Sample:
        """Draw outputs of equally many items of each kind; only the model's are differentiated, and only if asked."""
        forget, aside = self.sets.forget, self.sets.aside
        size = min(self.settings.batch_size, len(forget), len(aside))
        # shuffled even where all are drawn: the two draws of forgotten items must be independent of each other
        drawn = [cells[torch.randperm(len(cells), generator=noise)[:size].numpy()] for cells in (aside, forget, forget)]
        unseen, *batches = (self.task.batch(cells) for cells in drawn)
        self.model.eval()
        with torch.no_grad():
            z_unseen = self.task.outputs(self.original, unseen)
        with torch.set_grad_enabled(backward):
            z_forget = [self.task.outputs(self.model, batch) for batch in batches]
        self.effort.count("aside", size, backward=0)
        self.effort.count("forget", 2 * size, backward=int(backward))
        return Sample(z_unseen, *z_forget)

    def critic_step(self, noise: torch.Generator) -> Epoch:
        """Algorithm 2."""
        z = self._sample(noise, backward=False)
        mixture = torch.rand(len(z.unseen), 1, generator=noise).to(z.unseen)
        loss = cramer.embedding_loss(self.embed, z, mixture, self.settings.critic)
        descend(self.critic_optimiser, loss.total, self.effort)
        return {"critic_loss": float(loss.total.detach()), "distance": float(loss.distance.detach()),
                "slope": float(loss.slope.detach())}  # fmt: skip

    def generator_step(self, noise: torch.Generator) -> Epoch:
        """Algorithm 3."""
        z = self._sample(noise, backward=True)
        loss = cramer.generator_loss(self.embed, z, self.settings.critic.surrogate)
        descend(self.optimiser, loss, self.effort)
        return {"generator_loss": float(loss.detach())}

    def finetune_step(self, items: IntArray, noise: torch.Generator) -> Epoch:
        """Algorithm 4."""
        self.model.train()
        batch = self.task.batch(items)
        with engine.autocast():
            loss = self.task.loss(self.model, batch, noise).total.mean()
            apart = departure(self.task, self.model, self.original, batch).mean()
        descend(self.optimiser, self.settings.alpha * loss + self.settings.gamma * apart, self.effort)
        self.effort.count("retain", len(items), forward=3, backward=2)  # the model's two terms, and the original
        return {"train_loss": float(loss.detach()), "retain_divergence": float(apart.detach())}


def _refuse_empty(sets: ForgetSets) -> None:
    for name in ("forget", "retain", "aside"):
        if not len(getattr(sets, name)):
            raise EmptyGroupError(f"{name} items for UnGAN", "none", "at least one")


def ungan(
    model: Any, task: Task, sets: ForgetSets, settings: UnganSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Play the game: the forgotten items' outputs are to be told from those of ``aside`` items by no critic.

    Returns
    -------
    Trained
        History, means over an epoch's steps: ``critic_loss``, the ``distance`` that the critic sees (f(z_u) − f(z_f))
        and its ``slope``, ``generator_loss``, ``train_loss`` and ``retain_divergence`` (nats per retained item).

    Raises
    ------
    EmptyGroupError
        If there is no forgotten, retained or ``aside`` item.
    NonFiniteError
        If a loss is NaN or infinite.

    Notes
    -----
    Zhavoronkin et al. 2024, Algorithms 1 to 4, in :func:`~scforget.cramer.embedding_loss`,
    :func:`~scforget.cramer.generator_loss`, and α·ℓ + γ·KL (:func:`departure`) on the retained items; outputs z are
    the task's (of a classifier logits and the label's one-hot). What the paper leaves open: outputs for the critic are
    those that an auditor sees, in eval mode (running statistics of BatchNorm, no dropout) and of items without
    augmentation; fine-tuning is in train mode, so that retained items alone move the running statistics; the original
    is always in eval mode. One Adam serves both kinds of steps: with one each, α and γ would weigh only against each
    other, as Adam's steps do not depend on the scale of a loss. N_e epochs, though the loop is printed from 0 to N_e.
    Forgotten items are compared with ``aside`` ones of their own labels only where both sets have the same labels: a
    request for a whole class lets the critic read the label alone.
    """
    _refuse_empty(sets)
    if not settings.epochs:
        return Trained(model.eval())
    original = copy.deepcopy(model).eval()
    with torch.no_grad():
        outputs = task.outputs(original, task.batch(sets.aside[:1])).shape[1]
    embed = cramer.new_embedding(outputs, settings.critic, seed=seed)
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    optimiser = optimisers.Adam(model.parameters(), settings.learning_rate, settings.weight_decay)
    rates = {"learning_rate": settings.critic.learning_rate, "weight_decay": settings.critic.weight_decay}
    critic_optimiser = optimisers.SGD(embed.parameters(), **rates)
    game = _Game(model, original, embed, task, sets, settings, loop.effort, optimiser, critic_optimiser)

    def epoch(_number: int, noise: torch.Generator) -> Epoch:
        row = _means([game.critic_step(noise) for _ in range(settings.critic_steps)])
        row |= _means([game.generator_step(noise) for _ in range(settings.generator_steps)])
        parts = _passes(sets.retain, settings.batch_size, settings.finetune_steps, noise)
        return row | _means([game.finetune_step(part, noise) for part in parts])

    players: dict[str, Part] = {"critic": embed, "adam": optimiser, "critic_sgd": critic_optimiser}
    loop.run("ungan", epoch, settings.epochs, parts=players)
    return Trained(model, loop.history, loop.effort)

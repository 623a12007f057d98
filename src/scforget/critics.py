"""Critics: small networks that tell forgotten cells from others by what a model says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.utils.parametrizations import spectral_norm

from scforget import optimisers, seeding
from scforget.arrays import IntArray
from scforget.data.splits import ForgetSets
from scforget.errors import DataError, EmptyGroupError, NonFiniteError
from scforget.models.vae import VAE
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Effort, descend, mean_elbo

View = Literal["all", "no_norms", "bounds"]
#: Which columns of ``VaeTask.features`` a critic sees: all, without the two norms, or reconstruction, KL and ELBO.
COLUMNS: dict[View, slice] = {"all": slice(None), "no_norms": slice(-2), "bounds": slice(3)}
_BATCH = 1024
#: A column that varies less is as good as constant: it is centred and not scaled.
_SMALLEST_SD = 1e-6

Widths = Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)]


class CriticSettings(Settings):
    """How critics look and how they are trained on the original's features.

    Attributes
    ----------
    number
        1 critic sees all features; 3 see all, all but the norms, and the bounds.
    hidden
        Widths of the hidden layers.
    dropout
        Probability after every hidden layer.
    learning_rate, weight_decay
        Of Adam.
    steps
        Full-batch steps; 0 leaves the critics as initialised.
    """

    number: Annotated[int, Field(ge=1, le=3)]
    hidden: Widths
    dropout: Annotated[float, Field(ge=0, lt=1)]
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    steps: Annotated[int, Field(ge=0)]


class PublishedCriticSettings(CriticSettings):
    """The same as published, where the other class is a batch of retained cells.

    Attributes
    ----------
    retain_cells
        Size of that batch, drawn once.
    """

    retain_cells: Annotated[int, Field(gt=0)]


class Critic(nn.Module):
    """Columns of the features, standardised, through an MLP with ReLU and dropout to one logit.

    Parameters
    ----------
    view
        Which columns, see :data:`COLUMNS`.
    mean, sd : ``[5 + 2 Z]``, sd > 0
        Of all features; fixed, whatever the model later says.
    hidden, dropout
        See :class:`CriticSettings`.
    spectral
        Whether every layer's weight is divided by its largest singular value (Miyato et al. 2018).
    """

    mean: Tensor
    sd: Tensor

    def __init__(
        self, view: View, mean: Tensor, sd: Tensor, hidden: Sequence[int], dropout: float, *, spectral: bool = True
    ) -> None:
        super().__init__()
        self.view = view
        # views of one tensor would share memory, which a checkpoint cannot hold
        self.register_buffer("mean", mean[COLUMNS[view]].clone())
        self.register_buffer("sd", sd[COLUMNS[view]].clone())
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise([len(self.mean), *hidden, 1]):
            linear = nn.Linear(inputs, outputs)
            layers += [spectral_norm(linear) if spectral else linear, nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers[:-2])

    def forward(self, features: Tensor) -> Tensor:
        """``[B, 5 + 2 Z]`` → logits ``[B]``; higher = more member-like."""
        logits: Tensor = self.layers((features[:, COLUMNS[self.view]] - self.mean) / self.sd)
        return logits.squeeze(-1)


class Critics(nn.Module):
    """Several critics that answer side by side."""

    def __init__(self, members: Sequence[Critic]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, features: Tensor) -> Tensor:
        """``[B, 5 + 2 Z]`` → logits ``[J, B]``, one row a critic."""
        return torch.stack([member(features) for member in self.members])


def refusal(logits: Tensor) -> Tensor:
    """Binary cross-entropy against label 0, "not a member": logits ``[J, B]`` → ``[J]`` nats, means over cells."""
    return softplus(logits).mean(1)


def balanced_bce(members: Tensor, others: Tensor) -> Tensor:
    """Cross-entropy of members (1) and others (0): logits ``[J, F]``, ``[J, A]`` → ``[J]``, mean of class means."""
    return 0.5 * (softplus(-members).mean(1) + softplus(others).mean(1))


def plain_bce(members: Tensor, others: Tensor) -> Tensor:
    """As :func:`balanced_bce`, but the mean over all cells, so that the larger class weighs more (as published)."""
    return (softplus(-members).sum(1) + softplus(others).sum(1)) / (members.shape[1] + others.shape[1])


def auc(members: Tensor, others: Tensor) -> float:
    """Chance that a member's logit is above another cell's, ties as halves: ``[F]``, ``[A]`` → [0, 1]."""
    labels = np.repeat([1, 0], [len(members), len(others)])
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, torch.cat([members, others]).cpu().numpy()))


def draw(cells: IntArray, size: int, noise: torch.Generator) -> IntArray:
    """Draw ``size`` of the cells without replacement; if there are no more, all of them and nothing of the stream."""
    if len(cells) <= size:
        return cells
    return cells[torch.randperm(len(cells), generator=noise)[:size].numpy()]


@torch.no_grad()
def features_of(task: VaeTask, model: VAE, cells: IntArray, noise: torch.Generator | None = None) -> Tensor:
    """Features ``[N, 5 + 2 Z]`` of cells in eval mode, at z = μ or (with noise) at one draw of the posterior.

    Raises
    ------
    EmptyGroupError
        If there is no cell.
    """
    if not len(cells):
        raise EmptyGroupError("cells for the critics", "none", "at least one")
    model.eval()
    starts = range(0, len(cells), _BATCH)
    return torch.cat([task.features(model, task.batch(cells[i : i + _BATCH]), noise) for i in starts])


def standardisation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sd of each column of ``[N, 5 + 2 Z]``; the sd of a constant column is 1.

    Raises
    ------
    NonFiniteError
        If a feature is NaN or infinite.
    """
    values = features.double()
    mean, sd = values.mean(0).float(), values.std(0, correction=0).float()
    if not (torch.isfinite(mean) & torch.isfinite(sd)).all():
        raise NonFiniteError(0, "a critic's feature")
    return mean, torch.where(sd > _SMALLEST_SD, sd, 1.0)


def new_critics(settings: CriticSettings, mean: Tensor, sd: Tensor, *, seed: int) -> Critics:
    """Untrained critics that differ in view and in initialisation."""
    members = []
    for view in list(COLUMNS)[: settings.number]:
        with seeding.scope(seed, "critic", view):
            members.append(Critic(view, mean, sd, settings.hidden, settings.dropout))
    return Critics(members).to(mean.device)


def train(
    critics: Critics, forget: Tensor, others: Tensor, effort: Effort, *,
    learning_rate: float, weight_decay: float, steps: int, loss: Callable[[Tensor, Tensor], Tensor] = balanced_bce,
) -> None:  # fmt: skip
    """Train critics in place by full-batch Adam on the loss of forget features ``[F, ·]`` against others ``[A, ·]``.

    Notes
    -----
    The losses are summed over critics; Adam treats every parameter by itself, so each is trained as if alone. Dropout
    draws from torch's global stream. The critics are left in eval mode.
    """
    optimiser = optimisers.Adam(critics.parameters(), learning_rate, weight_decay)
    critics.train()
    both = torch.cat([forget, others])
    for _ in range(steps):
        logits = critics(both)
        descend(optimiser, loss(logits[:, : len(forget)], logits[:, len(forget) :]).sum(), effort)
    critics.eval()


def trained_critics(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: CriticSettings, effort: Effort, *, seed: int
) -> tuple[Critics, float]:
    """Critics that tell forgotten cells (1) from ``aside`` cells (0) by the features of a model at z = μ.

    Parameters
    ----------
    effort
        Counts one forward pass of the model over each cell, and the critics' optimiser steps. What a critic does with
        a feature is no pass over a cell.

    Returns
    -------
    critics, auc
        In eval mode; and the AUC in [0, 1] of their mean logit on the cells that they were trained on.

    Raises
    ------
    EmptyGroupError
        If there is no ``aside`` cell.
    NonFiniteError
        If a feature or a loss is NaN or infinite.
    """
    forget, others = (features_of(task, model, cells) for cells in (sets.forget, sets.aside))
    effort.count("forget", len(forget), backward=0)
    effort.count("aside", len(others), backward=0)
    critics = new_critics(settings, *standardisation(torch.cat([forget, others])), seed=seed)
    with seeding.scope(seed, "critics"):
        train(
            critics, forget, others, effort, learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay, steps=settings.steps,
        )  # fmt: skip
    return critics, mean_logit_auc(critics, forget, others)


def published_critics(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: PublishedCriticSettings, effort: Effort, *, seed: int
) -> Critics:
    """Critics as published: forgotten cells against one batch of *retained* ones, so against other members.

    Notes
    -----
    Features at one draw of z, not standardised, and a loss that does not balance the classes.
    """
    with seeding.scope(seed, "critics") as noise:
        retain = draw(sets.retain, settings.retain_cells, noise)
        forget, others = (features_of(task, model, cells, noise) for cells in (sets.forget, retain))
        effort.count("forget", len(forget), backward=0)
        effort.count("retain", len(others), backward=0)
        width = forget.shape[1]
        critics = new_critics(settings, forget.new_zeros(width), forget.new_ones(width), seed=seed)
        train(
            critics, forget, others, effort, learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay, steps=settings.steps, loss=plain_bce,
        )  # fmt: skip
    return critics


@torch.no_grad()
def mean_logit_auc(critics: Critics, members: Tensor, others: Tensor, step: int = 0) -> float:
    """AUC in [0, 1] of the mean logit of critics in eval mode on features ``[F, ·]`` against ``[A, ·]``.

    Raises
    ------
    NonFiniteError
        If a logit is NaN or infinite; ``step`` says when.
    """
    scores = [critics(features).mean(0) for features in (members, others)]
    if not torch.isfinite(torch.cat(scores)).all():
        raise NonFiniteError(step, "a critic's logit")
    return auc(*scores)


def worst_refusal(task: VaeTask, model: VAE, critics: Critics, forget: IntArray, effort: Effort) -> float:
    """Largest :func:`refusal` of critics over all forgotten cells at z = μ, nats; one forward pass.

    Raises
    ------
    NonFiniteError
        If it is NaN or infinite.
    """
    with torch.no_grad():
        found = float(refusal(critics(features_of(task, model, forget))).max())
    effort.count("forget", len(forget), backward=0)
    if not np.isfinite(found):
        raise NonFiniteError(effort.steps, "a critic's loss")
    return found


@torch.no_grad()
def follow(averaged: nn.Module, module: nn.Module, decay: float) -> None:
    """Move an exponential moving average one step: parameters decay·a + (1 − decay)·θ; buffers are copied."""
    for average, value in zip(averaged.parameters(), module.parameters(), strict=True):
        average.lerp_(value, 1 - decay)
    for copied, buffer in zip(averaged.buffers(), module.buffers(), strict=True):
        copied.copy_(buffer)


def kept_loss(task: VaeTask, model: VAE, retain: IntArray, effort: Effort) -> float:
    """The unit of what is kept: the absolute value of L_R at z = μ, nats per cell, > 0; one pass over R.

    Raises
    ------
    NonFiniteError
        If it is NaN or infinite.
    DataError
        If it is 0, so that nothing can be measured in it.
    """
    effort.count("retain", len(retain), backward=0)
    found = abs(mean_elbo(task, model, retain))
    if not np.isfinite(found):
        raise NonFiniteError(0, "the original's loss on the retained cells")
    if found == 0:
        raise DataError("the original's loss on the retained cells", found, "a number other than 0")
    return found

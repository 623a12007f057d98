"""Contrastive fine-tuning: flatten the forgotten items' answers, then tell them apart from retained ones no more."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from scforget.arrays import IntArray
from scforget.class_tasks import ClassifierTask, class_kl
from scforget.class_training import OptimiserSettings, class_batches, class_epoch, new_optimiser
from scforget.data.splits import ForgetSets
from scforget.errors import DataError, EmptyGroupError
from scforget.models.classifiers import Classifier
from scforget.search import Range
from scforget.settings import Settings
from scforget.training import Checkpoint, Effort, Epoch, Loop, Trained, descend

_LOWEST_RATE = 1e-6  # where the forget rounds' cosine ends


class ContrastiveFinetuneSettings(Settings):
    """Settings of contrastive fine-tuning.

    Attributes
    ----------
    uniform_optimiser, forget_optimiser, retain_optimiser
        Of the first stage, of the forget rounds (its rate falls along half a cosine to 1e-6 over all of them) and of
        the retain rounds.
    uniform_epochs
        Passes over the forgotten items in the first stage.
    uniform_loss
        ``winner``, KL(uniform ‖ output) as the solution's code has it, or ``printed``, KL(output ‖ uniform).
    epochs
        Rounds of either kind in the second stage; with no epoch in either stage the original comes back bit for bit.
    forget_loss
        ``equal``, or ``augmented``: see :func:`equal_loss` and :func:`augmented_loss`.
    tau
        τ, the temperature of similarities.
    batch_size
        Items a step, and retained items that a batch of forgotten ones is compared with.

    Ranges: τ as a scale about the solution's 1.15, up to twice its 8 epochs.
    """

    uniform_optimiser: OptimiserSettings
    forget_optimiser: OptimiserSettings
    retain_optimiser: OptimiserSettings
    uniform_epochs: Annotated[int, Field(ge=0), Range(0, 3)]
    uniform_loss: Literal["winner", "printed"]
    epochs: Annotated[int, Field(ge=0), Range(2, 16)]
    forget_loss: Literal["equal", "augmented"]
    tau: Annotated[float, Field(gt=0), Range(0.1, 10.0, log=True)]
    batch_size: Annotated[int, Field(gt=0)]


def uniform_loss(logits: Tensor, kind: str) -> Tensor:
    """KL(uniform ‖ softmax(logits)), or if ``printed`` the other way round, of each item: ``[B, C]`` → ``[B]`` nats.

    The printed one's gradient vanishes where the model is sure, which is where there is most to forget.
    """
    uniform = torch.zeros_like(logits)
    return class_kl(logits, uniform) if kind == "printed" else class_kl(uniform, logits)


def equal_loss(forget: Tensor, retain: Tensor, tau: float) -> Tensor:
    """Cross-entropy from the uniform distribution over retained items to a forgotten item's similarities, ``[B]`` nats.

    Parameters
    ----------
    forget, retain : ``[B, C]``, ``[B', C]``
        Logits x and y.
    tau : τ > 0

    Notes
    -----
    −(1/B') Σ_t log softmax_t(x·y_t/τ): least, log B', where all retained items are equally like it.
    """
    return -(forget @ retain.T / tau).log_softmax(-1).mean(-1)


def augmented_loss(forget: Tensor, views: Tensor, retain: Tensor, tau: float) -> Tensor:
    """How much less a forgotten item is like another view of itself than like retained items, ``[B]``, of any sign.

    Parameters
    ----------
    forget, views, retain : ``[B, C]``, ``[B, C]``, ``[B', C]``
        Logits x, x' and y.
    tau : τ > 0

    Notes
    -----
    −log(e^{x·x'/τ} / Σ_j e^{x·y_j/τ}). The positive pair is not among the pairs below, as it is in the contrastive
    losses that this is modelled on, so nothing bounds it: it falls for ever as the logits of forgotten items grow.
    """
    return (forget @ retain.T / tau).logsumexp(-1) - (forget * views).sum(-1) / tau


def _forget_loss(  # noqa: PLR0917
    model: Classifier, task: ClassifierTask, forget: IntArray, retain: IntArray, settings: ContrastiveFinetuneSettings,
    noise: torch.Generator,
) -> Tensor:  # fmt: skip
    """The chosen loss of some forgotten items against some retained ones, which are constants, ``[B]``."""
    with torch.no_grad():
        fixed = model(task.batch(retain, noise).inputs).float()
    if settings.forget_loss == "equal":
        return equal_loss(model(task.batch(forget, noise).inputs).float(), fixed, settings.tau)
    plain, view = task.batch(forget), task.batch(forget, noise)
    found, views = model(torch.cat([plain.inputs, view.inputs])).float().chunk(2)
    return augmented_loss(found, views, fixed, settings.tau)


def _forget_round(  # noqa: PLR0917
    model: Classifier, task: ClassifierTask, sets: ForgetSets, settings: ContrastiveFinetuneSettings, number: int,
    optimiser: Optimizer, noise: torch.Generator, effort: Effort,
) -> Epoch:  # fmt: skip
    """Compare each batch of forgotten items with a batch of retained ones; a pass over the shorter of the two."""
    model.train()
    views = 2 if settings.forget_loss == "augmented" else 1
    pairs = list(zip(*(class_batches(items, settings.batch_size, noise) for items in (sets.forget, sets.retain))))  # noqa: B905
    highest, total, seen = settings.forget_optimiser.learning_rate, 0.0, 0
    lowest = min(_LOWEST_RATE, highest)
    for step, (forget, retain) in enumerate(pairs):
        progress = ((number - 1) * len(pairs) + step) / (settings.epochs * len(pairs))
        fall = 0.5 * (1 + math.cos(math.pi * progress))
        optimiser.param_groups[0]["lr"] = lowest + (highest - lowest) * fall
        losses = _forget_loss(model, task, forget, retain, settings, noise)
        descend(optimiser, losses.mean(), effort)
        effort.count("forget", len(forget), forward=views, backward=views)
        effort.count("retain", len(retain), backward=0)
        total, seen = total + float(losses.detach().double().sum()), seen + len(forget)
    return {"forget_loss": total / seen}


def _uniform_epoch(  # noqa: PLR0917
    model: Classifier, task: ClassifierTask, forget: IntArray, settings: ContrastiveFinetuneSettings,
    optimiser: Optimizer, noise: torch.Generator, effort: Effort,
) -> Epoch:  # fmt: skip
    """Make one pass over the forgotten items, towards equal probabilities."""
    model.train()
    total = 0.0
    for part in class_batches(forget, settings.batch_size, noise):
        losses = uniform_loss(model(task.batch(part, noise).inputs).float(), settings.uniform_loss)
        descend(optimiser, losses.mean(), effort)
        effort.count("forget", len(part))
        total += float(losses.detach().double().sum())
    return {"uniform_divergence": total / len(forget)}


def contrastive_finetune(
    model: Classifier, task: ClassifierTask, sets: ForgetSets, settings: ContrastiveFinetuneSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Flatten the answers on forgotten items; then alternate contrastive forget rounds with rounds of training on R.

    Returns
    -------
    Trained
        History: ``uniform_divergence`` (nats) of the first stage; then ``forget_loss`` (nats), ``train_loss`` (nats)
        and ``train_accuracy``, means over items on the way.

    Raises
    ------
    EmptyGroupError
        If there is no item to forget or none to retain.
    DataError
        If ``augmented`` views are wanted of a data set without augmentation.
    NonFiniteError
        If a loss is NaN or infinite.

    Notes
    -----
    Suprun (2023), §6.1.2, after a Kaggle solution (first in the end, second in the report), whose code is followed
    where the report is open: :func:`uniform_loss` has the uniform distribution first by default; a forget round ends
    with the shorter of the two passes; the retained batch is a constant; similarities are dot products of logits.
    """
    for name in ("forget", "retain"):
        if not len(getattr(sets, name)):
            raise EmptyGroupError(f"{name} items for contrastive fine-tuning", "none", "at least one")
    if settings.forget_loss == "augmented" and not task.augmentation.any:
        wanted = "crop, flip or noise in the data set's augmentation; or forget_loss: equal"
        raise DataError("forget_loss: augmented", "views of an item that are all the same", wanted)
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    effort, size = loop.effort, settings.batch_size
    uniform, forgetting, retaining = (
        new_optimiser(model.parameters(), one)
        for one in (settings.uniform_optimiser, settings.forget_optimiser, settings.retain_optimiser)
    )

    def first(_number: int, noise: torch.Generator) -> Epoch:
        return _uniform_epoch(model, task, sets.forget, settings, uniform, noise, effort)

    def second(number: int, noise: torch.Generator) -> Epoch:
        row = _forget_round(model, task, sets, settings, number, forgetting, noise, effort)
        return row | class_epoch(model, task, sets.retain, size, retaining, noise, effort)

    loop.run("flatten", first, settings.uniform_epochs, parts={"uniform": uniform})
    loop.run("contrast", second, settings.epochs, parts={"forgetting": forgetting, "retaining": retaining})
    return Trained(model, loop.history, effort)

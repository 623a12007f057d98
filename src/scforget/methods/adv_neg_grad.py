"""Advanced negative gradient: descend the retained items' cross-entropy and climb the forgotten ones' in one step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, count
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from scforget import engine
from scforget.class_tasks import ClassifierTask
from scforget.class_training import (
    ClassTrainingSettings,
    OptimiserSettings,
    class_batches,
    fit_classifier,
    new_optimiser,
)
from scforget.curvature import require_finite
from scforget.data.splits import ForgetSets
from scforget.errors import EmptyGroupError
from scforget.models.classifiers import Classifier
from scforget.search import Range
from scforget.settings import Settings
from scforget.training import Checkpoint, Effort, Epoch, Loop, Trained, descend


class AdvNegGradSettings(Settings):
    """Settings of the advanced negative gradient.

    Attributes
    ----------
    optimiser
        Of the joint loss.
    batch_size
        Items of each set a step.
    epochs
        Passes over the retained items; 0 returns the original bit for bit.
    lam
        λ, weight of the forgotten items' cross-entropy; 0 is plain fine-tuning, which never reads them.

    Ranges: λ from a tenth of the Kaggle report's 0.1 to UnGAN's 1; the epochs about the report's 1.
    """

    optimiser: OptimiserSettings
    batch_size: Annotated[int, Field(gt=0)]
    epochs: Annotated[int, Field(ge=0), Range(1, 10, log=True)]
    lam: Annotated[float, Field(ge=0, allow_inf_nan=False), Range(0.01, 1.0, log=True)]


def opposed_epoch(  # noqa: PLR0917
    model: Classifier, task: ClassifierTask, sets: ForgetSets, batch_size: int, optimiser: Optimizer,
    noise: torch.Generator, effort: Effort, joint: Callable[[Tensor, Tensor], Tensor],
) -> Epoch:  # fmt: skip
    """Make one pass over the retained items, each batch beside one of forgotten items, descending a joint loss.

    Parameters
    ----------
    joint
        Of the mean loss of a batch of R and that of a batch of F, nats; both scalars.

    Returns
    -------
    dict
        ``train_loss`` and ``forget_loss``: means over the items as they went by, nats.

    Raises
    ------
    EmptyGroupError
        If there is nothing to forget.
    NonFiniteError
        If the joint loss is NaN or infinite.

    Notes
    -----
    When the forgotten items are through, they start over in a new order. The two batches pass through the net apart, so
    that BatchNorm normalises each by itself; its running statistics take in both.
    """
    if not len(sets.forget):
        raise EmptyGroupError("items to forget", "none", "at least one")
    model.train()
    again = chain.from_iterable(class_batches(sets.forget, batch_size, noise) for _ in count())
    sums, seen = {"retain": 0.0, "forget": 0.0}, {"retain": 0, "forget": 0}
    for pair in zip(class_batches(sets.retain, batch_size, noise), again, strict=False):
        means = []
        for name, part in zip(sums, pair, strict=True):
            with engine.autocast():
                loss = task.loss(model, task.batch(part, noise)).total
            means.append(loss.mean())
            effort.count(name, len(part))
            sums[name] += float(loss.detach().double().sum())
            seen[name] += len(part)
        descend(optimiser, joint(*means), effort)
    return {"train_loss": sums["retain"] / seen["retain"], "forget_loss": sums["forget"] / seen["forget"]}


def adv_neg_grad(
    model: Classifier, task: ClassifierTask, sets: ForgetSets, settings: AdvNegGradSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Minimise the retained items' cross-entropy minus λ times the forgotten items'.

    Raises
    ------
    NonFiniteError
        If the joint loss, which nothing bounds from below, or a parameter is NaN or infinite.

    Notes
    -----
    θ ← argmin L_R(θ) − λ·L_F(θ) from θ0 (Choi and Na 2023 with λ = 1; the Kaggle report weighs the second term), a
    batch of each a step.
    """
    if not settings.lam:
        plain = ClassTrainingSettings(
            optimiser=settings.optimiser, schedule="constant", batch_size=settings.batch_size, epochs=settings.epochs
        )
        return fit_classifier(model, task, sets.retain, plain, seed=seed, checkpoint=checkpoint)
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    optimiser = new_optimiser(model.parameters(), settings.optimiser)

    def joint(retain: Tensor, forget: Tensor) -> Tensor:
        return retain - settings.lam * forget

    def epoch(_number: int, noise: torch.Generator) -> Epoch:
        return opposed_epoch(model, task, sets, settings.batch_size, optimiser, noise, loop.effort, joint)

    loop.run("fit", epoch, settings.epochs, parts={"optimiser": optimiser})
    require_finite(model.parameters(), loop.effort.steps, "a parameter")
    return Trained(model, loop.history, loop.effort)

"""GISA: a joint loss of both sets, and for each tensor a rate by how much more it matters to the forgotten items."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from scforget import fisher
from scforget.class_tasks import ClassifierTask
from scforget.class_training import OptimiserSettings, new_optimiser
from scforget.curvature import require_finite
from scforget.data.splits import ForgetSets
from scforget.methods.adv_neg_grad import opposed_epoch
from scforget.models.classifiers import Classifier
from scforget.search import Range
from scforget.settings import Settings
from scforget.training import Checkpoint, Epoch, Loop, Trained


class GisaSettings(Settings):
    """Settings of GISA.

    Attributes
    ----------
    optimiser
        ``sgd`` without momentum and decay is eq. 13; ``adam`` has one parameter group for each tensor. Its rate is η.
    batch_size
        Items of each set a step.
    epochs
        Passes over the retained items; 0 returns the original bit for bit.
    eps
        ε of both equations, > 0; the source gives none.

    Ranges: the epochs about the report's 1.
    """

    optimiser: OptimiserSettings
    batch_size: Annotated[int, Field(gt=0)]
    epochs: Annotated[int, Field(ge=0), Range(1, 10, log=True)]
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)]


def rate_factors(forget: fisher.Diagonal, retain: fisher.Diagonal, eps: float) -> dict[str, float]:
    """By how much each tensor's learning rate is raised, >= 1: 1 + mean(max(log(I_F/(I_R + ε)), 0)).

    Notes
    -----
    Eq. 11 of the Kaggle report. Its text has such tensors updated "with a dampened learning rate"; the factor is never
    below 1.
    """
    # where I_F is 0 the logarithm is −∞, and the maximum 0
    return {name: 1 + float((value / (retain[name] + eps)).log().clamp(min=0).mean()) for name, value in forget.items()}


def joint_loss(retain: Tensor, forget: Tensor, eps: float) -> Tensor:
    """L_R²/(L_F + ε), a scalar, nats; eq. 12 of the Kaggle report."""
    return retain.square() / (forget + eps)


def _optimiser(model: Classifier, settings: OptimiserSettings, factors: dict[str, float]) -> Optimizer:
    """One parameter group for each tensor, with its own rate."""
    optimiser = new_optimiser(model.parameters(), settings)
    (group,) = optimiser.param_groups
    optimiser.param_groups = [
        {**group, "params": [parameter], "lr": settings.learning_rate * factors[name]}
        for name, parameter in model.named_parameters()
    ]
    return optimiser


def gisa(
    model: Classifier, task: ClassifierTask, sets: ForgetSets, settings: GisaSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Minimise L_R²/(L_F + ε), faster in the tensors that matter more to the forgotten items.

    Returns
    -------
    Trained
        With the least and the largest factor of the rates, ``lowest_factor`` and ``highest_factor``, among its facts.

    Raises
    ------
    NonFiniteError
        If an information, the loss or a parameter is NaN or infinite.

    Notes
    -----
    Eq. 11–13 of the Kaggle report, a batch of each set a step: θ_i ← θ_i − η_i ∂(L_R²/(L_F + ε))/∂θ_i. I_F and I_R are
    exact, of single items, at θ0 in eval mode. The gradient is 2 L_R/(L_F + ε)·∇L_R − (L_R/(L_F + ε))²·∇L_F: where the
    original fits F far better than R its second term moves the model, and under ``sgd`` by as much as ε lets it.
    """
    if not settings.epochs:
        return Trained(model.eval())
    forget, retain = (fisher.diagonal(model, task, cells, draws=1, seed=seed) for cells in (sets.forget, sets.retain))
    require_finite([*forget.values(), *retain.values()], 0, "the Fisher information")
    factors = rate_factors(forget, retain, settings.eps)
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    if not loop.history:  # a resumed run has counted it
        loop.effort.count("forget", len(sets.forget))
        loop.effort.count("retain", len(sets.retain))
    optimiser = _optimiser(model, settings.optimiser, factors)

    def joint(retain_loss: Tensor, forget_loss: Tensor) -> Tensor:
        return joint_loss(retain_loss, forget_loss, settings.eps)

    def epoch(_number: int, noise: torch.Generator) -> Epoch:
        return opposed_epoch(model, task, sets, settings.batch_size, optimiser, noise, loop.effort, joint)

    loop.run("fit", epoch, settings.epochs, parts={"optimiser": optimiser})
    require_finite(model.parameters(), loop.effort.steps, "a parameter")
    facts: dict[str, float | str] = {"lowest_factor": min(factors.values()), "highest_factor": max(factors.values())}
    return Trained(model, loop.history, loop.effort, facts)

"""Langevin unlearning: noisy, projected fine-tuning on the cells that stay."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from scforget import engine, optimisers
from scforget.data.splits import ForgetSets
from scforget.errors import DataError, NonFiniteError
from scforget.models.vae import VAE
from scforget.search import Range
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Epoch, Loop, Trained, batches, descend


class NoisyFinetuneSettings(Settings):
    """Settings of the noisy fine-tuning.

    Attributes
    ----------
    learning_rate
        η.
    sigma
        σ; a step adds noise of standard deviation √(2η)·σ to every parameter. With 0 it is clipped SGD.
    clip
        C, the largest L2 norm of a batch's gradient; ``.inf`` leaves it.
    radius
        ρ as a multiple of ‖θ0‖: parameters are projected onto the ball of that radius about the origin; ``.inf``
        leaves them.
    epochs
        0 returns the original bit for bit.

    Ranges: as scales, σ so that the noise of 200 steps at a rate of 1e-3 adds up to between 6e-5 and 0.06 a parameter,
    which is what a weight of a layer with 256 inputs is; the rate a decade to either side of that; the epochs to twice
    those of ``params.yaml``.
    """

    learning_rate: Annotated[float, Field(gt=0), Range(1e-4, 1e-2, log=True)]
    sigma: Annotated[float, Field(ge=0), Range(1e-4, 1e-1, log=True)]
    clip: Annotated[float, Field(gt=0)]
    radius: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(gt=0)]
    epochs: Annotated[int, Field(ge=0), Range(3, 40)]


def langevin_renyi(
    order: float, start_distance: float, *, learning_rate: float, sigma: float,
    strong_convexity: float, smoothness: float, steps: int,
) -> float:  # fmt: skip
    """Bound the Rényi divergence of two noisy descents of one loss from different starts.

    Parameters
    ----------
    order
        α > 1.
    start_distance
        Z >= 0, the largest distance between the two starts.
    learning_rate, sigma
        η and σ of the step θ ← θ − η∇L(θ) + √(2η)·σ·ξ, which a projection onto a convex set may follow.
    strong_convexity, smoothness
        m and L of the loss: its curvature lies in [m, L] everywhere.
    steps
        K >= 0.

    Returns
    -------
    float
        Upper bound of D_α in nats; infinite where two different starts were not blurred at all.

    Raises
    ------
    DataError
        If a step is no contraction: a loss that is not strongly convex, or a learning rate of 2/L or more.

    Notes
    -----
    Privacy amplification by iteration (Feldman et al. 2018): a step contracts by c = max(|1−ηm|, |1−ηL|) and adds
    N(0, 2ησ²); shifting the starts together by a_k ∝ c^{K−k} gives
    D_α ≤ α·c^{2K}·Z² / (2·2ησ²·Σ_{j<K} c^{2j}), with equality for a quadratic in one dimension.
    """
    contraction = max(abs(1 - learning_rate * strong_convexity), abs(1 - learning_rate * smoothness))
    if contraction >= 1:
        found = f"a factor of {contraction:g} a step"
        raise DataError(
            "Langevin bound", found, "a contraction: strong convexity and a learning rate below 2/smoothness"
        )
    blur = 2 * learning_rate * sigma**2 * math.fsum(contraction ** (2 * j) for j in range(steps))
    distance = contraction**steps * start_distance
    if distance == 0:
        return 0.0
    return order * distance**2 / (2 * blur) if blur > 0 else math.inf


@torch.no_grad()
def perturb(parameters: list[Tensor], scale: float, radius: float, noise: torch.Generator) -> None:
    """Add N(0, scale²) to every parameter, then project all of them together onto the ball of a radius, in place."""
    if scale:
        for parameter in parameters:
            parameter.add_(engine.normal(parameter.shape, noise), alpha=scale)
    norm = norm_of(parameters)
    if norm > radius:
        for parameter in parameters:
            parameter.mul_(radius / norm)


def norm_of(parameters: list[Tensor]) -> float:
    """L2 norm of all parameters together."""
    return math.sqrt(math.fsum(float(parameter.detach().double().square().sum()) for parameter in parameters))


def noisy_finetune(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: NoisyFinetuneSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Descend the loss on the retained cells in noisy steps; the forgotten cells are never touched.

    Notes
    -----
    θ ← Π_ρ(θ − η·clip_C(∇L_R) + √(2η)·σ·ξ), ξ ~ N(0, I), on batches of R: Langevin unlearning (Chien et al. 2024,
    arXiv 2401.10371). Its bound, :func:`langevin_renyi`, needs a strongly convex loss and an original that was
    trained the same way; a VAE's loss is not convex, so nothing is guaranteed. The last epoch's weights are kept.
    """
    parameters: list[Tensor] = list(model.parameters())
    # before the loop, which may put the weights of a killed run in place of the original's
    radius = settings.radius * norm_of(parameters)
    scale = math.sqrt(2 * settings.learning_rate) * settings.sigma
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    optimiser, effort = optimisers.SGD(parameters, settings.learning_rate), loop.effort

    def epoch(_number: int, noise: torch.Generator) -> Epoch:
        model.train()
        total = 0.0
        for part in batches(sets.retain, settings.batch_size, noise):
            losses = task.loss(model, task.batch(part), noise).total
            descend(optimiser, losses.mean(), effort, clip=settings.clip)
            perturb(parameters, scale, radius, noise)
            effort.count("retain", len(part))
            total += float(losses.detach().double().sum())
        if not math.isfinite(norm_of(parameters)):
            raise NonFiniteError(effort.steps, "the weights")
        return {"train_loss": total / len(sets.retain)}

    loop.run("langevin", epoch, settings.epochs, parts={"sgd": optimiser})
    return Trained(model, loop.history, effort, {"guarantee": "none: the loss is not strongly convex"})

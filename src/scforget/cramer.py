"""An embedding in which two samples are as far apart as it can make them: Cramér's distance, or Wasserstein's.

In one dimension twice the squared Cramér distance ∫(F_P − F_Q)² is the energy distance 2E‖X−Y‖ − E‖X−X'‖ − E‖Y−Y'‖,
which is a distance in any dimension (Székely and Rizzo 2013).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from scforget import engine, seeding
from scforget.search import Range
from scforget.settings import Settings

# Keeps the second derivative of a norm finite at 0, where a dead embedding puts two items; a norm of 1 does not see it.
_TINY = 1e-12


class EmbeddingSettings(Settings):
    """How the embedding looks, what it maximises and how it is trained.

    Attributes
    ----------
    surrogate
        ``cramer``, or ``wasserstein``: one number instead of an embedding, and differences of it instead of norms.
    widths
        Of the layers, input side first, ReLU between them; for ``wasserstein`` the last one is 1 instead.
    penalty
        Of a slope g: ``squared`` (g − 1)², or ``printed`` g − 1, which rewards an embedding for being flat.
    penalised
        Whose slope: the ``critic``'s, or that of the ``embedding`` under it (the Frobenius norm of its Jacobian).
    lam
        λ, weight of the penalty.
    learning_rate, weight_decay
        Of gradient descent without momentum.

    Ranges: λ as a scale about the 10 of gradient penalties, the rate about the UnGAN paper's 1e-3.
    """

    surrogate: Literal["cramer", "wasserstein"]
    widths: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)]
    penalty: Literal["squared", "printed"]
    penalised: Literal["critic", "embedding"]
    lam: Annotated[float, Field(ge=0), Range(0.1, 100.0, log=True)]
    learning_rate: Annotated[float, Field(gt=0), Range(1e-4, 1e-1, log=True)]
    weight_decay: Annotated[float, Field(ge=0)]


class Sample(NamedTuple):
    """Outputs of a model on items, ``[B, K]`` each: of items never trained on, and two independent draws of others."""

    unseen: Tensor
    forget: Tensor
    other: Tensor


class EmbeddingLoss(NamedTuple):
    """What the embedding minimises, ``total``; the mean ``distance`` it sees and its mean ``slope``; scalars."""

    total: Tensor
    distance: Tensor
    slope: Tensor


def new_embedding(inputs: int, settings: EmbeddingSettings, *, seed: int) -> nn.Sequential:
    """Return a freshly initialised embedding D of outputs ``[B, inputs]``; equal seeds give equal parameters."""
    last = 1 if settings.surrogate == "wasserstein" else settings.widths[-1]
    layers: list[nn.Module] = []
    with seeding.scope(seed, "embedding"):
        for before, after in pairwise([inputs, *settings.widths[:-1], last]):
            layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(engine.device())


def norm(vectors: Tensor) -> Tensor:
    """L2 norm of each row, ``[B, K]`` → ``[B]``; its derivatives are finite at 0 too."""
    return (vectors.square().sum(-1) + _TINY).sqrt()


def critic(embed: nn.Module, z: Tensor, other: Tensor, surrogate: str) -> Tensor:
    """How far from the others' outputs each one lies, ``[B]``.

    Notes
    -----
    Cramér: f(z) = ‖D(z) − D(z'_f)‖ − ‖D(z)‖ (Bellemare et al. 2017, with one draw z'_f for the expectation).
    Wasserstein: D(z) itself.
    """
    placed = embed(z)
    if surrogate == "wasserstein":
        return placed.squeeze(-1)
    return norm(placed - embed(other)) - norm(placed)


def energy(unseen: Tensor, forget: Tensor, other: Tensor) -> Tensor:
    """‖u − f‖ + ‖u − f'‖ − ‖f − f'‖ of each row, ``[B, K]`` thrice → ``[B]``.

    Notes
    -----
    Over independent draws its mean is 2E‖U − F‖ − E‖F − F'‖: the energy distance plus E‖U − U'‖, which no model
    changes.
    """
    return norm(unseen - forget) + norm(unseen - other) - norm(forget - other)


def slope(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Norm of each row's gradient, or the Frobenius norm of its Jacobian; differentiable.

    Parameters
    ----------
    function
        ``[B, K]`` → ``[B]`` or ``[B, E]``, each row of it from that row alone.
    at : ``[B, K]``

    Returns
    -------
    ``[B]``
    """
    at = at.detach().requires_grad_()
    found = function(at)
    found = found.reshape(len(at), -1)
    each = torch.eye(found.shape[1], device=at.device)[:, None].expand(-1, *found.shape)
    (jacobian,) = torch.autograd.grad(found, at, each, is_grads_batched=True, create_graph=True)  # [E, B, K]
    return norm(jacobian.transpose(0, 1).flatten(1))


def embedding_loss(embed: nn.Module, z: Sample, mixture: Tensor, settings: EmbeddingSettings) -> EmbeddingLoss:
    """What the embedding minimises: minus the distance that it sees, and a penalty on its slope in between.

    Parameters
    ----------
    embed
        D.
    z
        Constants here.
    mixture : ``[B, 1]``, in [0, 1]
        ε, the share of the unseen item in the point where the slope is taken.

    Notes
    -----
    L_D = −mean(f(z_u) − f(z_f)) + λ·mean((‖∇_ẑ f(ẑ)‖₂ − 1)²), ẑ = ε·z_u + (1 − ε)·z_f (Zhavoronkin et al. 2024,
    Algorithm 2, with the square of Gulrajani et al. 2017; as printed it has none, and D in the place of f).
    """
    between = mixture * z.unseen + (1 - mixture) * z.forget
    apart = [critic(embed, one, z.other, settings.surrogate) for one in (z.unseen, z.forget)]
    distance = (apart[0] - apart[1]).mean()

    def value(at: Tensor) -> Tensor:
        return critic(embed, at, z.other, settings.surrogate)

    slopes = slope(value if settings.penalised == "critic" else embed, between)
    excess = slopes - 1
    penalty = (excess.square() if settings.penalty == "squared" else excess).mean()
    return EmbeddingLoss(settings.lam * penalty - distance, distance, slopes.mean())


def generator_loss(embed: nn.Module, z: Sample, surrogate: str) -> Tensor:
    """What the model minimises so that its outputs on the others look like those on items never trained on; a scalar.

    Notes
    -----
    Cramér: the mean :func:`energy` of D(z_u), D(z_f), D(z'_f) (Zhavoronkin et al. 2024, eq. 6). Wasserstein:
    mean D(z_u) − mean D(z_f).
    """
    if surrogate == "wasserstein":
        return (embed(z.unseen) - embed(z.forget)).mean()
    return energy(*(embed(part) for part in z)).mean()

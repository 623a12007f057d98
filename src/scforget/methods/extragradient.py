"""Extragradient: model and critics play a game, each step taken where both would be after one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from scforget import critics as critic
from scforget.arrays import IntArray
from scforget.critics import Critics, CriticSettings, balanced_bce, draw, features_of
from scforget.data.splits import ForgetSets
from scforget.errors import NonFiniteError
from scforget.models.vae import VAE
from scforget.search import Range
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Effort, Epoch, Loop, Part, Trained, adam, batches


class ExtragradientSettings(Settings):
    """Settings of the game.

    Attributes
    ----------
    critics
        See :class:`~scforget.critics.CriticSettings`; ``steps`` of training before the game.
    lam
        λ, the weight of what is **kept**: the larger, the less is unlearned.
    learning_rate
        Of the model's Adam.
    ttur
        The critics' learning rate over the model's (two time-scale update rule).
    ema_decay
        Of the critics' exponential moving average, once a step; it only watches.
    batch_size
        Retained cells a step, and at most so many forgotten and so many ``aside`` ones.
    epochs
        Passes over the retained cells; 0 returns the original bit for bit.

    Ranges: λ and the rate as for the frozen critics; ``ttur`` from critics no faster than the model to twice the 5 of
    the single-cell paper; at most 40 epochs, which are more steps than its release ever takes.
    """

    critics: CriticSettings
    lam: Annotated[float, Field(gt=0), Range(0.1, 100.0, log=True)]
    learning_rate: Annotated[float, Field(gt=0), Range(1e-5, 1e-3, log=True)]
    ttur: Annotated[float, Field(gt=0), Range(1.0, 10.0)]
    ema_decay: Annotated[float, Field(gt=0, lt=1)]
    batch_size: Annotated[int, Field(gt=0)]
    epochs: Annotated[int, Field(ge=0), Range(3, 40)]


class Player(NamedTuple):
    """Whose parameters move, and by what; the optimiser holds all of the module's parameters and no others."""

    module: nn.Module
    optimiser: Optimizer


def _differentiate(players: Sequence[Player], losses: Sequence[Tensor], step: int) -> None:
    """Give every player the gradient of its own loss, before anybody moves."""
    for player, loss in zip(players, losses, strict=True):
        if not torch.isfinite(loss):
            raise NonFiniteError(step, "the loss")
        own = list(player.module.parameters())
        # one graph serves all players, and a parameter may have no part in the loss
        gradients = torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True)
        for parameter, gradient in zip(own, gradients, strict=True):
            parameter.grad = gradient


@torch.no_grad()
def _put_back(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def extragradient_step(
    players: Sequence[Player], losses: Callable[[], Sequence[Tensor]], effort: Effort,
    noise: torch.Generator | None = None,
) -> list[float]:  # fmt: skip
    """Move every player by the gradients found where all would be after one step.

    Parameters
    ----------
    players
        Each minimises its own loss over its own parameters.
    losses
        One scalar a player at the parameters of the moment. Called twice, with ``noise``, torch's global stream and
        the modules' buffers (power iterations) as they were the first time: only the parameters differ.
    effort
        Counts each optimiser step, extrapolations too: two a player.

    Returns
    -------
    list
        The losses at the starting point.

    Raises
    ------
    NonFiniteError
        If a loss is NaN or infinite, at the starting point or the extrapolated one.

    Notes
    -----
    ω' = ω − η·v(ω), ω⁺ = ω − η·v(ω'), v the players' gradients: Korpelevich (1976) with SGD. With Adam the moments go
    on through both steps, two a round: ExtraAdam, Gidel et al. (2019), Algorithm 4, on one batch instead of two.
    Chavdarova et al. (2019) use the method for GANs.
    """
    parameters = [value for player in players for value in player.module.parameters()]
    buffers = [value for player in players for value in player.module.buffers()]
    start, memory = ([value.detach().clone() for value in values] for values in (parameters, buffers))
    stream, own_stream = torch.get_rng_state(), None if noise is None else noise.get_state()
    found = losses()
    _differentiate(players, found, effort.steps)
    for player in players:
        player.optimiser.step()
        effort.steps += 1
    _put_back(buffers, memory)
    torch.set_rng_state(stream)
    if noise is not None and own_stream is not None:
        noise.set_state(own_stream)
    _differentiate(players, losses(), effort.steps)
    _put_back(parameters, start)
    for player in players:
        player.optimiser.step()
        player.optimiser.zero_grad(set_to_none=True)
        effort.steps += 1
    return [float(loss.detach()) for loss in found]


class Cells(NamedTuple):
    """The cells of one step."""

    retain: IntArray
    forget: IntArray
    aside: IntArray


def game(
    task: VaeTask, model: VAE, critics: Critics, cells: Cells, *, noise: torch.Generator, weight: float
) -> tuple[Tensor, Tensor]:
    """What the model pays, V, and what the critics pay: minus the pay-off; scalars.

    Notes
    -----
    V(θ, ψ) = −mean_j BCE_j(θ, ψ) + w·L_R(θ), BCE_j the j-th critic's balanced cross-entropy, forgotten cells 1 and
    ``aside`` cells 0, on features at z = μ in eval mode; w = λ/L_R(θ0).
    """
    kept = task.loss(model.train(), task.batch(cells.retain), noise).total.mean()
    both = task.features(model.eval(), task.batch(np.concatenate([cells.forget, cells.aside])))
    # one forward of the critics is one power iteration, and both classes meet the same weights
    logits, members = critics(both), len(cells.forget)
    payoff = -balanced_bce(logits[:, :members], logits[:, members:]).mean()
    return payoff + weight * kept, -payoff


def extragradient(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: ExtragradientSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Play min over θ, max over ψ of the critics' membership pay-off plus λ·L_R(θ)/L_R(θ0) by ExtraAdam.

    Returns
    -------
    Trained
        History: ``train_loss`` (V), ``payoff`` (minus the critics' cross-entropy, nats; −log 2 when they guess),
        ``train_elbo`` (nats per retained cell), all before each step; ``ema_auc`` in [0, 1], of the averaged critics'
        mean logit, forgotten against ``aside`` cells, after the epoch. Facts: ``critic_auc``, before the game.

    Raises
    ------
    NonFiniteError
        If a loss or a logit is NaN or infinite.

    Notes
    -----
    See :func:`game` and :func:`extragradient_step`. In the game there is no weight decay: it is no part of V.
    """
    if not settings.epochs:
        return Trained(model.eval())
    before = Effort()
    weight = settings.lam / critic.kept_loss(task, model, sets.retain, before)
    critics, critic_auc = critic.trained_critics(model, task, sets, settings.critics, before, seed=seed)
    averaged = copy.deepcopy(critics)
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    if not loop.history:  # what was saved counts it already
        loop.effort.restore(before.to_dict())
    effort, rate = loop.effort, settings.learning_rate
    players = [Player(model, adam(model, rate)), Player(critics, adam(critics, settings.ttur * rate))]

    def epoch(_number: int, noise: torch.Generator) -> Epoch:
        critics.train()
        sums = np.zeros(2)
        for part in batches(sets.retain, settings.batch_size, noise):
            drawn = [draw(cells, settings.batch_size, noise) for cells in (sets.forget, sets.aside)]
            cells = Cells(part, *drawn)
            losses = partial(game, task, model, critics, cells, noise=noise, weight=weight)
            sums += len(part) * np.array(extragradient_step(players, losses, effort, noise))
            critic.follow(averaged, critics, settings.ema_decay)
            for name, some in cells._asdict().items():
                effort.count(name, len(some), forward=2, backward=2)
        averaged.eval()
        members, others = (features_of(task, model, some) for some in (sets.forget, sets.aside))
        effort.count("forget", len(members), backward=0)
        effort.count("aside", len(others), backward=0)
        value, paid = sums / len(sets.retain)
        watched = critic.mean_logit_auc(averaged, members, others, effort.steps)
        return {"train_loss": value, "payoff": -paid, "train_elbo": -(value + paid) / weight, "ema_auc": watched}

    parts: dict[str, Part] = {"critics": critics, "ema": averaged}
    parts |= {"adam": players[0].optimiser, "critics_adam": players[1].optimiser}
    loop.run("game", epoch, settings.epochs, parts=parts)
    return Trained(model, loop.history, effort, {"critic_auc": critic_auc})

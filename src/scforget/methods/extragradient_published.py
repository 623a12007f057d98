"""Extragradient as published: no extrapolation at all, but one descent step an epoch, taken in turns with critics."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field

from scforget import critics as critic
from scforget import optimisers, published
from scforget.critics import Critics, PublishedCriticSettings, Widths, draw, features_of, plain_bce, published_critics
from scforget.data.splits import ForgetSets
from scforget.models.vae import VAE
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Effort, Epoch, Loop, Trained, adam, descend


class ShadowSettings(Settings):
    """The attacker that is trained afresh every epoch, without spectral normalisation, to say when to stop.

    Attributes
    ----------
    steps
        Of Adam, on one batch.
    retain_cells
        Retained cells in that batch, beside all forgotten ones.
    scored_cells
        At most so many retained cells are scored, drawn afresh every epoch (the release scored all, one by one).
    """

    hidden: Widths
    dropout: Annotated[float, Field(ge=0, lt=1)]
    learning_rate: Annotated[float, Field(gt=0)]
    steps: Annotated[int, Field(gt=0)]
    retain_cells: Annotated[int, Field(gt=0)]
    scored_cells: Annotated[int, Field(gt=0)]


class ExtragradientPublishedSettings(Settings):
    """Settings of the release.

    Attributes
    ----------
    lam
        λ, the weight of what is **kept**: a mean over genes beside a KL summed over dimensions.
    critic_learning_rate
        Of the critics' plain SGD in the game.
    critic_updates
        Their steps an epoch.
    epochs
        Steps of the model, one each; 0 returns the original bit for bit.
    abort_after
        Stop when the last so many shadow values strictly increase.
    """

    variant: Literal["published"]
    critics: PublishedCriticSettings
    lam: Annotated[float, Field(gt=0)]
    learning_rate: Annotated[float, Field(gt=0)]
    critic_learning_rate: Annotated[float, Field(gt=0)]
    critic_updates: Annotated[int, Field(ge=0)]
    batch_size: Annotated[int, Field(gt=0)]
    epochs: Annotated[int, Field(ge=0)]
    shadow: ShadowSettings
    abort_after: Annotated[int, Field(gt=1)]


def rising(values: Sequence[float], count: int) -> bool:
    """Whether there are ``count`` > 1 values and the last so many strictly increase."""
    return len(values) >= count and all(one < two for one, two in pairwise(values[-count:]))


def shadow_auc(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: ShadowSettings, *, noise: torch.Generator, effort: Effort
) -> float:
    """Mean of a fresh attacker's AUCs in [0, 1], forgotten against ``aside`` and against retained cells.

    Notes
    -----
    The release compared with the *unseen* cells, on which its models were then judged; no method sees those here.
    """
    forget = features_of(task, model, sets.forget, noise)
    batch = features_of(task, model, draw(sets.retain, settings.retain_cells, noise), noise)
    retain = features_of(task, model, draw(sets.retain, settings.scored_cells, noise), noise)
    aside = features_of(task, model, sets.aside, noise)
    for name, cells in (("forget", forget), ("retain", batch), ("retain", retain), ("aside", aside)):
        effort.count(name, len(cells), backward=0)
    width = forget.shape[1]
    ones, zeros = forget.new_ones(width), forget.new_zeros(width)
    attacker = Critics([critic.Critic("all", zeros, ones, settings.hidden, settings.dropout, spectral=False)])
    critic.train(
        attacker, forget, batch, effort, learning_rate=settings.learning_rate, weight_decay=0.0, steps=settings.steps,
        loss=plain_bce,
    )  # fmt: skip
    found = [critic.mean_logit_auc(attacker, forget, others, effort.steps) for others in (aside, retain)]
    return sum(found) / 2


def extragradient_published(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: ExtragradientPublishedSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Alternate one step of the model with a few of the critics, until a shadow attacker's AUC rises repeatedly.

    Returns
    -------
    Trained
        The last weights, not the best. History: ``train_loss`` and ``payoff`` in [0, 1] before the epoch's step,
        ``shadow_auc`` after it.

    Raises
    ------
    NonFiniteError
        If a loss or a logit is NaN or infinite.

    Notes
    -----
    Model: Adam on max_j mean_F sigmoid(c_j(φ(x; θ))) + λ·(loss mean over genes + KL sum) on one retain batch, train
    mode. Critics: SGD on the cross-entropy of forgotten (1) against retained cells (0). Alternating gradient descent
    and ascent, with critics that hardly move; the shadow values are mostly noise, so stopping is near random.
    """
    if not settings.epochs:
        return Trained(model.eval())
    before = Effort()
    critics = published_critics(model, task, sets, settings.critics, before, seed=seed)
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    if not loop.history:  # what was saved counts it already
        loop.effort.restore(before.to_dict())
    optimiser, effort = adam(model, settings.learning_rate), loop.effort
    descent = optimisers.SGD(critics.parameters(), settings.critic_learning_rate)

    def epoch(_number: int, noise: torch.Generator) -> Epoch:
        model.train()
        critics.eval().requires_grad_(False)
        forget, retain = (draw(some, settings.batch_size, noise) for some in (sets.forget, sets.retain))
        payoff = critics(task.features(model, task.batch(forget), noise)).sigmoid().mean(1).max()
        kept = published.loss(task, model, task.batch(retain), noise, "mean_genes").mean()
        loss = payoff + settings.lam * kept
        descend(optimiser, loss, effort)
        effort.count("forget", len(forget))
        effort.count("retain", len(retain))
        critics.train().requires_grad_(True)
        for _ in range(settings.critic_updates):
            forget, retain = (draw(some, settings.batch_size, noise) for some in (sets.forget, sets.retain))
            members, others = (features_of(task, model, some, noise) for some in (forget, retain))
            effort.count("forget", len(forget), backward=0)
            effort.count("retain", len(retain), backward=0)
            logits = critics(torch.cat([members, others]))
            descend(descent, plain_bce(logits[:, : len(forget)], logits[:, len(forget) :]).sum(), effort)
        value = shadow_auc(model, task, sets, settings.shadow, noise=noise, effort=effort)
        return {"train_loss": float(loss.detach()), "payoff": float(payoff.detach()), "shadow_auc": value}

    for number in range(1, settings.epochs + 1):
        # a phase each, since only between phases can a run be ended
        loop.run(f"epoch {number}", epoch, 1, parts={"adam": optimiser, "critics": critics})
        if rising([row["shadow_auc"] for row in loop.history], settings.abort_after):
            break
    return Trained(model, loop.history, effort)

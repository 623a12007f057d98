"""Frozen critics as published: trained against retained cells, on raw features at a random draw of z."""

from __future__ import annotations

import copy
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from scforget import published
from scforget.critics import PublishedCriticSettings, draw, follow, published_critics, refusal, worst_refusal
from scforget.data.splits import ForgetSets
from scforget.models.vae import VAE
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Effort, Epoch, Loop, Trained, adam, batches, descend


class FrozenCriticsPublishedSettings(Settings):
    """Settings of the release.

    Attributes
    ----------
    lam
        λ, the weight of what is **kept**, on the scale of means over genes and dimensions.
    repeats
        K draws of z a step, over which the pay-off is averaged.
    clip
        Largest L2 norm of the gradient.
    epochs
        Passes over the retained cells; 0 returns the original bit for bit.
    save
        ``raw`` returns the weights reached (the release's results); ``ema`` their moving average over epochs, which
        hardly leaves the original (what its command line saved).
    ema_decay
        Of that average, once an epoch.
    """

    variant: Literal["published"]
    critics: PublishedCriticSettings
    lam: Annotated[float, Field(gt=0)]
    repeats: Annotated[int, Field(gt=0)]
    learning_rate: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(gt=0)]
    clip: Annotated[float, Field(gt=0)]
    epochs: Annotated[int, Field(ge=0)]
    save: Literal["raw", "ema"]
    ema_decay: Annotated[float, Field(gt=0, lt=1)]


def frozen_critics_published(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: FrozenCriticsPublishedSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Minimise the mean over K draws of the worst critic's cross-entropy, plus λ times the loss on R.

    Returns
    -------
    Trained
        History: ``train_loss``, ``payoff`` (nats), both before each step; ``forget_bce``, the worst critic's
        cross-entropy over all forgotten cells at z = μ after the epoch.

    Raises
    ------
    NonFiniteError
        If a loss is NaN or infinite.

    Notes
    -----
    (1/K) Σ_k max_j mean_F BCE(c_j(φ(x, z_k; θ)), 0) + λ·(MSE or NB loss mean over genes + KL mean over dimensions).
    The critics separate forgotten from retained cells, all of them members: what they know is biology.
    """
    if not settings.epochs:
        return Trained(model.eval())
    before = Effort()
    critics = published_critics(model, task, sets, settings.critics, before, seed=seed).requires_grad_(False)
    averaged = copy.deepcopy(model)
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    if not loop.history:  # what was saved counts it already
        loop.effort.restore(before.to_dict())
    optimiser, effort = adam(model, settings.learning_rate), loop.effort

    def epoch(_number: int, noise: torch.Generator) -> Epoch:
        model.train()
        sums = np.zeros(2)
        for part in batches(sets.retain, settings.batch_size, noise):
            forget = draw(sets.forget, settings.batch_size, noise)
            batch = task.batch(forget)
            draws = [refusal(critics(task.features(model, batch, noise))).max() for _ in range(settings.repeats)]
            payoff = torch.stack(draws).mean()
            kept = published.loss(task, model, task.batch(part), noise, "mean").mean()
            loss = payoff + settings.lam * kept
            descend(optimiser, loss, effort, clip=settings.clip)
            effort.count("retain", len(part))
            effort.count("forget", len(forget), forward=settings.repeats, backward=settings.repeats)
            sums += [len(part) * float(value.detach()) for value in (loss, payoff)]
        follow(averaged, model, settings.ema_decay)
        after = worst_refusal(task, model, critics, sets.forget, effort)
        train_loss, payoff_mean = sums / len(sets.retain)
        return {"train_loss": train_loss, "payoff": payoff_mean, "forget_bce": after}

    loop.run("unlearn", epoch, settings.epochs, parts={"adam": optimiser, "ema": averaged})
    if settings.save == "ema":
        model.load_state_dict(averaged.state_dict())
    return Trained(model, loop.history, effort)

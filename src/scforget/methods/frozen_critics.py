"""Frozen critics: change the model until critics of the original no longer recognise the forgotten cells."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from scforget.critics import CriticSettings, draw, kept_loss, refusal, trained_critics, worst_refusal
from scforget.data.splits import ForgetSets
from scforget.models.vae import VAE
from scforget.search import Range
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Effort, Epoch, Loop, Trained, adam, batches, descend


class FrozenCriticsSettings(Settings):
    """Settings of unlearning against frozen critics.

    Attributes
    ----------
    critics
        See :class:`~scforget.critics.CriticSettings`.
    lam
        λ, the weight of what is **kept**: the larger, the less is unlearned.
    learning_rate
        Of Adam.
    batch_size
        Retained cells a step, and at most so many forgotten ones.
    epochs
        Passes over the retained cells; 0 returns the original bit for bit.

    Ranges: λ well beyond the 5 to 20 that the single-cell paper compared, the rate a decade to either side of its 1e-4,
    both as scales; the epochs to past its 30.
    """

    critics: CriticSettings
    lam: Annotated[float, Field(gt=0), Range(0.1, 100.0, log=True)]
    learning_rate: Annotated[float, Field(gt=0), Range(1e-5, 1e-3, log=True)]
    batch_size: Annotated[int, Field(gt=0)]
    epochs: Annotated[int, Field(ge=0), Range(3, 40)]


def frozen_critics(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: FrozenCriticsSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Train critics on the original's features, freeze them, and make the worst of them say "not a member".

    Returns
    -------
    Trained
        History: ``train_loss``, ``payoff`` (the worst critic's cross-entropy over forget batches, nats),
        ``train_elbo`` (nats per retained cell), all before each step; ``forget_bce``, the pay-off over all forgotten
        cells after the epoch. Facts: ``critic_auc``, in sample, of the critics before unlearning.

    Raises
    ------
    NonFiniteError
        If a loss is NaN or infinite.

    Notes
    -----
    min over θ of max_j mean_F BCE(c_j(φ(x; θ)), 0) + λ·L_R(θ)/L_R(θ0). φ at z = μ in eval mode, as an attacker sees
    it; L_R in train mode. The critics stand still, so θ may leave the region where they are right.
    """
    if not settings.epochs:
        return Trained(model.eval())
    before = Effort()
    unit = kept_loss(task, model, sets.retain, before)
    critics, critic_auc = trained_critics(model, task, sets, settings.critics, before, seed=seed)
    critics.requires_grad_(False)
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    if not loop.history:  # what was saved counts it already
        loop.effort.restore(before.to_dict())
    optimiser, effort = adam(model, settings.learning_rate), loop.effort

    def epoch(_number: int, noise: torch.Generator) -> Epoch:
        sums = np.zeros(3)
        for part in batches(sets.retain, settings.batch_size, noise):
            forget = draw(sets.forget, settings.batch_size, noise)
            kept = task.loss(model.train(), task.batch(part), noise).total.mean()
            payoff = refusal(critics(task.features(model.eval(), task.batch(forget)))).max()
            loss = payoff + settings.lam * kept / unit
            descend(optimiser, loss, effort)
            effort.count("retain", len(part))
            effort.count("forget", len(forget))
            sums += [len(part) * float(value.detach()) for value in (loss, payoff, -kept)]
        after = worst_refusal(task, model, critics, sets.forget, effort)
        train_loss, payoff_mean, elbo = sums / len(sets.retain)
        return {"train_loss": train_loss, "payoff": payoff_mean, "train_elbo": elbo, "forget_bce": after}

    loop.run("unlearn", epoch, settings.epochs, parts={"adam": optimiser})
    return Trained(model, loop.history, effort, {"critic_auc": critic_auc})

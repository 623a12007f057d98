"""Contrastive latent unlearning: the encoder forgets where the forgotten cells lie and holds all others in place."""

from __future__ import annotations

import copy
from itertools import chain, count
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from scforget import optimisers
from scforget.data.splits import ForgetSets
from scforget.models.vae import VAE, block_of, gaussian_kl
from scforget.search import Range
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Epoch, Loop, Trained, TrainingSettings, batches, descend, fit

_LOG_VAR_WEIGHT = 0.1


class ContrastiveLatentSettings(Settings):
    """Settings of contrastive latent unlearning.

    Attributes
    ----------
    gamma
        γ, weight of the KL that draws the forgotten cells to the prior.
    lam
        λ, weight of what holds the retained cells where the original puts them; larger keeps more.
    learning_rate, batch_size, epochs
        Of the first phase: passes over the retained cells, by Adam, the encoder alone.
    finetune
        Recipe of the training that follows. With 0 epochs of either the original comes back bit for bit.

    Ranges: the weights and the rate, as scales, a decade to either side of the single-cell paper's 1, 1 and 1e-4; up to
    twice its 20 epochs.
    """

    gamma: Annotated[float, Field(gt=0), Range(0.1, 10.0, log=True)]
    lam: Annotated[float, Field(gt=0), Range(0.1, 10.0, log=True)]
    learning_rate: Annotated[float, Field(gt=0), Range(1e-5, 1e-3, log=True)]
    batch_size: Annotated[int, Field(gt=0)]
    epochs: Annotated[int, Field(ge=0), Range(3, 40)]
    finetune: TrainingSettings


def drift(mu: Tensor, log_var: Tensor, other_mu: Tensor, other_log_var: Tensor) -> Tensor:
    """How far posteriors ``[B, Z]`` have moved: ‖Δμ‖² + 0.1‖Δ log σ²‖², ``[B]``, >= 0."""
    return (mu - other_mu).square().sum(-1) + _LOG_VAR_WEIGHT * (log_var - other_log_var).square().sum(-1)


def contrast(
    model: VAE, teacher: VAE, task: VaeTask, sets: ForgetSets, loop: Loop, *,
    gamma: float, lam: float, learning_rate: float, batch_size: int, epochs: int,
) -> None:  # fmt: skip
    """Run the first phase: train the blocks ``encoder`` and ``bottleneck`` in place; the decoder takes no part.

    Each step takes the next batch of both sets; the forgotten cells start over until the retained ones are through.

    Parameters
    ----------
    teacher
        The original, frozen, in eval mode.
    """
    own = [p for name, p in model.named_parameters() if block_of(name) in {"encoder", "bottleneck"}]
    optimiser, effort = optimisers.Adam(own, learning_rate), loop.effort

    def epoch(_number: int, noise: torch.Generator) -> Epoch:
        model.train()
        sums = torch.zeros(2, dtype=torch.float64)
        forgotten = chain.from_iterable(batches(sets.forget, batch_size, noise) for _ in count())
        for part in batches(sets.retain, batch_size, noise):
            forget, retain = next(forgotten), task.batch(part).inputs
            with torch.no_grad():
                wanted = teacher.encode(retain)
            kl = gaussian_kl(*model.encode(task.batch(forget).inputs)).sum(-1).mean()
            moved = drift(*model.encode(retain), *wanted).mean()
            descend(optimiser, gamma * kl + lam * moved, effort)
            effort.count("forget", len(forget))
            effort.count("retain", len(part), forward=2)  # the original's pass and the model's
            sums += torch.stack([kl, moved]).detach().double().cpu() * len(part)
        forget_kl, moved_far = (sums / len(sets.retain)).tolist()
        return {"forget_kl": forget_kl, "drift": moved_far}

    loop.run("contrast", epoch, epochs, parts={"adam": optimiser})


def contrastive_latent(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: ContrastiveLatentSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Draw the posteriors of the forgotten cells to the prior, hold the others, then minimise the loss on R.

    Notes
    -----
    Encoder φ only: min γ·mean over F of KL(q_φ(z|x) ‖ N(0, I)) + λ·mean over R of (‖Δμ‖² + 0.1‖Δ log σ²‖²) against
    θ0, norms over latent dimensions; then argmin L_R over all parameters. What the decoder remembers stays.
    """
    teacher = copy.deepcopy(model).eval()
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    contrast(
        model, teacher, task, sets, loop, gamma=settings.gamma, lam=settings.lam,
        learning_rate=settings.learning_rate, batch_size=settings.batch_size, epochs=settings.epochs,
    )  # fmt: skip
    return fit(model, task, sets.retain, sets.stop, settings.finetune, seed=seed, loop=loop)

"""DP-SGD: train from scratch so privately that no single cell can matter much."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field, model_validator

from scforget import private, seeding
from scforget.data.splits import ForgetSets
from scforget.models.vae import VAE
from scforget.search import Range
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Epoch, Loop, Trained, adam


class DPSGDSettings(Settings):
    """Settings of DP-SGD.

    Attributes
    ----------
    epsilon, delta
        Privacy budget per cell; with ``.inf`` no noise is added.
    clip
        C, the largest L2 norm of a cell's gradient; ``.inf``, allowed only without noise, clips nothing.
    batch_size
        Expected cells per Poisson batch.
    secure_mode
        Draw noise and batches from a cryptographically secure source instead of from the seed. Nobody can repeat or
        take away the noise then, whoever knows the seed; the model cannot be made again either.

    Ranges: ε from half the least to twice the largest of the single-cell paper's 1, 10 and 50; clip and rate a
    decade to either side of its 1 and 1e-3, all as scales; the epochs to past its 50.
    """

    epsilon: Annotated[float, Field(gt=0), Range(0.5, 100.0, log=True)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    clip: Annotated[float, Field(gt=0), Range(0.1, 10.0, log=True)]
    learning_rate: Annotated[float, Field(gt=0), Range(1e-4, 1e-2, log=True)]
    batch_size: Annotated[int, Field(gt=0)]
    epochs: Annotated[int, Field(gt=0), Range(10, 60)]
    secure_mode: bool

    @model_validator(mode="after")
    def _noise_needs_a_clip(self) -> DPSGDSettings:
        if math.isinf(self.clip) and not math.isinf(self.epsilon):
            raise ValueError("clip must be finite where epsilon is: the noise is proportional to it")
        return self


def privacy_facts(noise_multiplier: float, epsilon: float, delta: float, size: int) -> dict[str, float | str]:
    """The numbers of a guarantee, for one cell and for a group of ``size``, and what they amount to in a word."""
    if math.isinf(epsilon):
        return {"noise_multiplier": noise_multiplier, "guarantee": "none: no noise"}
    group_epsilon, group_delta = private.group_guarantee(epsilon, delta, size)
    group = "as a group" if group_delta < 1 else "not as a group (delta 1)"
    return {
        "noise_multiplier": noise_multiplier, "epsilon": epsilon, "delta": delta,
        "group_epsilon": group_epsilon, "group_delta": group_delta,
        "guarantee": f"per cell; for {size} cells {group}",
    }  # fmt: skip


def dp_sgd(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: DPSGDSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Train a new model on the retained cells by Adam on privatised gradients; the last epoch's weights are kept.

    Notes
    -----
    Abadi et al. 2016: clip each cell's gradient to C, add N(0, (σC)²) to the sum, draw every cell into every batch
    with probability q = batch/N; σ is the smallest with which the Rényi accountant stays within ε. No weights are
    chosen by anything un-noised: there is no early stopping. The guarantee is that of the weights, given the genes,
    the number of cells and the settings, which were chosen without privacy. Forgotten cells are never read, so they
    need none: the group guarantee says what would have bounded the influence of as many cells among those trained on.

    In secure mode latent draws and dropout come from streams with secret seeds: which draw a cell gets depends on the
    cells before it in the batch, so that known draws would let a cell reach further than its own gradient. The key is
    not in the checkpoint; a resumed run has another.
    """
    from scforget import gaussian

    model.load_state_dict(task.new_model(seed).state_dict())
    cells = len(sets.retain)
    expected = min(settings.batch_size, cells)
    rate, steps = expected / cells, math.ceil(cells / expected)
    sigma = private.noise_multiplier(settings.epsilon, settings.delta, rate, steps * settings.epochs)
    mechanism = private.Mechanism(settings.clip, sigma, rate, expected, steps)
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    optimiser, parameters = adam(model, settings.learning_rate), dict(model.named_parameters())
    secure = gaussian.Secure() if settings.secure_mode else None

    def epoch_from(noise: torch.Generator, source: gaussian.Source) -> Epoch:
        return private.train_epoch(
            model, task, sets.retain, mechanism, optimiser, parameters, noise, source, loop.effort
        )  # fmt: skip

    def epoch(number: int, noise: torch.Generator) -> Epoch:
        if secure is None:
            return epoch_from(noise, seeding.torch_generator(seed, "privacy", number))
        with seeding.scope(secure.seed(), "private") as hidden:
            return epoch_from(hidden, secure)

    loop.run("private", epoch, settings.epochs, parts={"adam": optimiser})
    epsilon = private.epsilon_spent(sigma, rate, steps * settings.epochs, settings.delta)
    facts = privacy_facts(sigma, epsilon, settings.delta, len(sets.forget))
    return Trained(model, loop.history, loop.effort, facts)

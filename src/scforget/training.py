"""The one training loop: originals, retrains and every method that ends in fine-tuning go through it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from scforget import seeding
from scforget.arrays import IntArray
from scforget.errors import NonFiniteError
from scforget.models.vae import VAE
from scforget.settings import Settings
from scforget.tasks import VaeTask

State = dict[str, Any]
Epoch = dict[str, float]


class TrainingSettings(Settings):
    """Recipe of a training run.

    Attributes
    ----------
    max_epochs
        Upper limit; 0 returns the model as it came.
    patience
        Stop after this many epochs without a better ELBO on the ``stop`` cells, counted from the end of KL warm-up
        at the earliest; the best epoch's weights are kept.
    kl_warmup_epochs
        The KL weight rises linearly from 1/n to 1 over the first n epochs; 0 starts at 1.
    free_bits
        Nats per latent dimension that the KL may use freely.
    """

    learning_rate: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(gt=0)]
    max_epochs: Annotated[int, Field(ge=0)]
    patience: Annotated[int, Field(gt=0)]
    kl_warmup_epochs: Annotated[int, Field(ge=0)]
    free_bits: Annotated[float, Field(ge=0)]


class Checkpoint(Protocol):
    """Where a run keeps its state between epochs; supplied by the stage."""

    def load(self) -> tuple[dict[str, Tensor], State] | None:
        """Return the last saved tensors and state, or ``None``."""

    def save(self, tensors: dict[str, Tensor], state: State) -> None:
        """Replace what is saved, atomically."""


@dataclass
class Effort:
    """Work done, counted and so reproducible: optimiser steps, and passes over cells by cell set."""

    steps: int = 0
    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)

    @property
    def passes(self) -> int:
        """Forward plus backward passes of single cells, over all sets."""
        return self.forward.total() + self.backward.total()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "steps": self.steps,
            "forward": dict(sorted(self.forward.items())),
            "backward": dict(sorted(self.backward.items())),
            "passes": self.passes,
        }


@dataclass
class Trained:
    """A trained or unlearned model, how it came about epoch by epoch, and what that took."""

    model: VAE
    history: list[Epoch] = field(default_factory=list)
    effort: Effort = field(default_factory=Effort)


def mean_elbo(task: VaeTask, model: VAE, cells: IntArray) -> float:
    """Mean ELBO of cells at z = μ, nats per cell."""
    return float(task.signals(model, cells).elbo.mean())


def _copy(model: VAE) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _pack(model: VAE, optimiser: torch.optim.Adam, best: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"best/{name}": value for name, value in best.items()}
    for index, slots in optimiser.state_dict()["state"].items():
        tensors |= {f"adam/{index}/{slot}": value for slot, value in slots.items()}
    return tensors


def _unpack(tensors: dict[str, Tensor], model: VAE, optimiser: torch.optim.Adam) -> dict[str, Tensor]:
    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    model.load_state_dict(part("model/"))
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in part("adam/").items():
        index, slot = name.split("/")
        slots.setdefault(int(index), {})[slot] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": slots})
    return part("best/")


def _train_epoch(  # noqa: PLR0917
    model: VAE, task: VaeTask, cells: IntArray, settings: TrainingSettings, optimiser: torch.optim.Adam,
    noise: torch.Generator, beta: float, first_step: int,
) -> Epoch:  # fmt: skip
    """Make one pass over the cells in random order; return the mean loss and its parts."""
    model.train()
    sums = np.zeros(3)
    order = cells[torch.randperm(len(cells), generator=noise).numpy()]
    for step, start in enumerate(range(0, len(order), settings.batch_size), first_step):
        batch = task.batch(order[start : start + settings.batch_size])
        loss = task.loss(model, batch, noise, beta=beta, free_bits=settings.free_bits)
        optimiser.zero_grad(set_to_none=True)
        mean = loss.total.mean()
        if not torch.isfinite(mean):
            raise NonFiniteError(step, "the loss")
        mean.backward()
        optimiser.step()
        sums += [float(part.detach().double().sum()) for part in loss]
    total, reconstruction, kl = sums / len(order)
    return {"train_loss": total, "train_elbo": reconstruction - kl, "kl": kl}


def _goes_on(epochs: int, best_epoch: int, settings: TrainingSettings) -> bool:
    """Say whether another epoch is due. Patience starts where warm-up ends: before, the objective is another one."""
    waited = epochs - max(best_epoch, settings.kl_warmup_epochs)
    return epochs < settings.max_epochs and waited < settings.patience


def fit(
    model: VAE, task: VaeTask, cells: IntArray, stop: IntArray, settings: TrainingSettings, *,
    seed: int, checkpoint: Checkpoint | None = None, cell_set: str = "retain",
    on_epoch: Callable[[Epoch], None] | None = None,
) -> Trained:  # fmt: skip
    """Train a model in place by Adam on the negative ELBO, with early stopping.

    Parameters
    ----------
    cells, stop : ``[N]``, ``[N']``
        Cells to train on, and cells whose ELBO decides when to stop.
    seed
        Names every random stream of the run, epoch by epoch: a resumed run draws what it would have drawn.
    checkpoint
        Saved after each epoch; a saved state is taken up.
    cell_set
        Under which name the passes are counted.
    on_epoch
        Called with each finished epoch's row (for progress).

    Returns
    -------
    Trained
        ``model`` holds the weights of the epoch with the best ELBO on ``stop``, in eval mode.

    Raises
    ------
    NonFiniteError
        If a loss or the ELBO on ``stop`` is NaN or infinite.
    """
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=True)
    best, state = _copy(model), State(history=[], best_elbo=None, best_epoch=0)
    if checkpoint is not None and (saved := checkpoint.load()) is not None:
        tensors, state = saved
        best = _unpack(tensors, model, optimiser)
    history: list[Epoch] = state["history"]
    steps_per_epoch = -(-len(cells) // settings.batch_size)
    while _goes_on(len(history), state["best_epoch"], settings):
        epoch = len(history) + 1
        beta = min(1.0, epoch / settings.kl_warmup_epochs) if settings.kl_warmup_epochs else 1.0
        with seeding.scope(seed, "epoch", epoch) as noise:
            row = _train_epoch(model, task, cells, settings, optimiser, noise, beta, (epoch - 1) * steps_per_epoch)
        elbo = mean_elbo(task, model, stop)
        if not np.isfinite(elbo):
            raise NonFiniteError(epoch * steps_per_epoch, "the ELBO of the stop cells")
        history.append({"epoch": epoch, "kl_weight": beta, **row, "stop_elbo": elbo})
        if state["best_elbo"] is None or elbo > state["best_elbo"]:
            state |= {"best_elbo": elbo, "best_epoch": epoch}
            best = _copy(model)
        if checkpoint is not None:
            checkpoint.save(_pack(model, optimiser, best), state)
        if on_epoch is not None:
            on_epoch(history[-1])
    model.load_state_dict(best)
    model.eval()
    done = len(history)
    forward, backward = {cell_set: done * len(cells), "stop": done * len(stop)}, {cell_set: done * len(cells)}
    return Trained(model, history, Effort(done * steps_per_epoch, Counter(forward), Counter(backward)))

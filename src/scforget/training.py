"""The training loop: resumable epochs, and on top of them the recipe of originals, retrains and fine-tuning."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from scforget import engine, optimisers, seeding
from scforget.arrays import IntArray
from scforget.errors import NonFiniteError
from scforget.models.mixture import Model
from scforget.models.vae import VAE
from scforget.settings import Settings
from scforget.tasks import VaeTask

State = dict[str, Any]
Epoch = dict[str, float]
_WARM_UP = 0.15  # of a one-cycle run
_LOWEST = 1e-3
#: Something that changes from epoch to epoch and must survive a kill.
Part = nn.Module | Optimizer


class TrainingSettings(Settings):
    """Recipe of a training run.

    Attributes
    ----------
    learning_rate
        Adam's; the highest one under ``one_cycle``.
    schedule
        ``constant``, or ``one_cycle`` (:func:`one_cycle`) over ``max_epochs``: what a short run of known length
        wants.
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
    schedule: Literal["constant", "one_cycle"]
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

    def restart_clock(self) -> None:
        """Count seconds from here: what went before was preparation, not the method's cost."""


@dataclass
class Effort:
    """Work done, counted and so reproducible: optimiser steps, and passes over cells by cell set."""

    steps: int = 0
    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)

    def count(self, cell_set: str, cells: int, *, forward: int = 1, backward: int = 1) -> None:
        """Add passes over some cells of a set."""
        self.forward[cell_set] += forward * cells
        if backward:
            self.backward[cell_set] += backward * cells

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

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take up what :meth:`to_dict` gave."""
        self.steps = saved["steps"]
        self.forward, self.backward = Counter(saved["forward"]), Counter(saved["backward"])


@dataclass
class Trained:
    """A trained or unlearned model, how it came about epoch by epoch, and what that took.

    ``facts`` are a method's own deterministic numbers (an ε spent, a residual) and words (a guarantee, or none).
    """

    model: Any  # of the task's own kind
    history: list[Epoch] = field(default_factory=list)
    effort: Effort = field(default_factory=Effort)
    facts: dict[str, float | str] = field(default_factory=dict)


def mean_elbo(task: VaeTask, model: Model, cells: IntArray) -> float:
    """Mean ELBO of cells at z = μ, nats per cell."""
    return float(task.signals(model, cells).elbo.mean())


def batches(cells: IntArray, size: int, noise: torch.Generator) -> Iterator[IntArray]:
    """One pass over the cells in random order, ``size`` at a time; the last batch holds what is left."""
    order = cells[torch.randperm(len(cells), generator=noise).numpy()]
    for start in range(0, len(order), size):
        yield order[start : start + size]


def descend(optimiser: Optimizer, loss: Tensor, effort: Effort, *, clip: float | None = None) -> None:
    """Take one step down a scalar loss.

    Parameters
    ----------
    clip
        Largest L2 norm of the whole gradient; ``None`` leaves it.

    Raises
    ------
    NonFiniteError
        If the loss is NaN or infinite.
    """
    if not torch.isfinite(loss):
        raise NonFiniteError(effort.steps, "the loss")
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], clip)
    optimiser.step()
    effort.steps += 1


def _tensors(part: Part, prefix: str) -> dict[str, Tensor]:
    if isinstance(part, nn.Module):
        return {f"{prefix}/{name}": value for name, value in part.state_dict().items()}
    slots = part.state_dict()["state"]
    return {f"{prefix}/{i}/{slot}": value for i, values in slots.items() for slot, value in values.items()
            if isinstance(value, Tensor)}  # fmt: skip


def _restore(part: Part, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    own = {name.removeprefix(f"{prefix}/"): v for name, v in tensors.items() if name.startswith(f"{prefix}/")}
    if isinstance(part, nn.Module):
        part.load_state_dict(own)
        return
    slots: dict[int, dict[str, Tensor]] = {}
    for name, value in own.items():
        index, slot = name.split("/")
        slots.setdefault(int(index), {})[slot] = value
    part.load_state_dict({**part.state_dict(), "state": slots})
    for parameter, state in part.state.items():
        for slot, value in state.items():
            if value.shape == parameter.shape:
                # laid out in memory as the parameter is: fused steps go by place, and a file knows but one layout
                state[slot] = torch.empty_like(parameter).copy_(value)


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Loop:
    """Epochs of one run, in one or more named phases, that a killed process takes up where it was.

    Parameters
    ----------
    model
        Changed in place; holds the saved weights after construction if there are any.
    seed
        Names every random stream, phase by phase and epoch by epoch: a resumed run draws what it would have drawn.
    checkpoint
        Saved after each epoch.

    Attributes
    ----------
    history
        One row for each epoch so far, over all phases.
    effort
        Work so far; epochs add to it.
    """

    def __init__(self, model: nn.Module, *, seed: int, checkpoint: Checkpoint | None = None) -> None:
        self.model, self.effort = model, Effort()
        self._seed, self._checkpoint = seed, checkpoint
        self._tensors: dict[str, Tensor] = {}
        self._state: State = {"history": [], "phases": [], "start": 0, "best_score": None, "best_epoch": 0}
        if checkpoint is not None and (saved := checkpoint.load()) is not None:
            self._tensors, self._state = saved
            self.effort.restore(self._state["effort"])
            _restore(model, "model", self._tensors)
        self.history: list[Epoch] = self._state["history"]

    def _enter(self, phase: str, parts: Mapping[str, Part]) -> None:
        if phase in self._state["phases"]:
            for name, part in parts.items():
                _restore(part, f"part/{name}", self._tensors)
        else:
            self._state |= {"start": len(self.history), "best_score": None, "best_epoch": 0}
            self._state["phases"].append(phase)
            self._tensors = {}

    def _save(self, parts: Mapping[str, Part], best: dict[str, Tensor]) -> None:
        if self._checkpoint is None:
            return
        tensors = _tensors(self.model, "model") | {f"best/{name}": value for name, value in best.items()}
        for name, part in parts.items():
            tensors |= _tensors(part, f"part/{name}")
        self._checkpoint.save(tensors, {**self._state, "effort": self.effort.to_dict()})

    def _score(self, score: Callable[[], float], best: dict[str, Tensor], epoch: int) -> dict[str, Tensor]:
        value = score()
        if not math.isfinite(value):
            raise NonFiniteError(self.effort.steps, "the ELBO of the stop cells")
        self.history[-1]["stop_elbo"] = value
        if self._state["best_score"] is None or value > self._state["best_score"]:
            self._state |= {"best_score": value, "best_epoch": epoch}
            return _copy(self.model)
        return best

    def run(
        self, phase: str, epoch: Callable[[int, torch.Generator], Epoch], epochs: int, *,
        parts: Mapping[str, Part], score: Callable[[], float] | None = None, patience: int | None = None,
        patient_from: int = 0, on_epoch: Callable[[Epoch], None] | None = None,
    ) -> None:  # fmt: skip
        """Run a phase, or what is left of it; a phase that was left before is not entered again.

        Parameters
        ----------
        phase
            Its name, once in a run.
        epoch
            ``epoch(number, noise)`` trains for one epoch, numbered from 1 in this phase, and returns its row.
        epochs
            How many at most.
        parts
            What else changes: optimisers, critics.
        score
            The higher the better; the weights of the epoch where it is highest are the ones the phase ends with.
        patience
            Stop after this many epochs without a better score, counted from epoch ``patient_from`` at the earliest.
        on_epoch
            Called with each finished epoch's row (for progress).
        """
        if phase in self._state["phases"][:-1]:
            return
        self._enter(phase, parts)
        best = {name.removeprefix("best/"): v for name, v in self._tensors.items() if name.startswith("best/")}
        done = len(self.history) - self._state["start"]
        while done < epochs:
            if patience is not None and done - max(self._state["best_epoch"], patient_from) >= patience:
                break
            done += 1
            with seeding.scope(self._seed, phase, "epoch", done) as noise:
                row = epoch(done, noise)
            self.history.append({"epoch": len(self.history) + 1, **row})
            if score is not None:
                best = self._score(score, best, done)
            self._save(parts, best)
            if on_epoch is not None:
                on_epoch(self.history[-1])
        if best:
            self.model.load_state_dict(best)
        self.model.eval()


def train_epoch(  # noqa: PLR0917
    model: VAE, task: VaeTask, cells: IntArray, settings: TrainingSettings, optimiser: Optimizer,
    noise: torch.Generator, effort: Effort, *, rates: Sequence[float] | None = None, beta: float = 1.0,
    cell_set: str = "retain",
) -> Epoch:  # fmt: skip
    """Make one pass over the cells in random order, minimising the mean loss; return the mean loss and its parts.

    ``rates`` gives the learning rate of each step; without it the optimiser's own stays.
    """
    model.train()
    sums = np.zeros(3)
    for step, part in enumerate(batches(cells, settings.batch_size, noise)):
        if rates is not None:
            optimiser.param_groups[0]["lr"] = rates[step]
        with engine.autocast():
            loss = task.loss(model, task.batch(part), noise, beta=beta, free_bits=settings.free_bits)
        descend(optimiser, loss.total.mean(), effort)
        effort.count(cell_set, len(part))
        sums += [float(piece.detach().double().sum()) for piece in loss]
    total, reconstruction, kl = sums / len(cells)
    return {"train_loss": total, "train_elbo": reconstruction - kl, "kl": kl}


def one_cycle(progress: float) -> float:
    """Learning rate at a point of a run, as a fraction of the highest one.

    Parameters
    ----------
    progress : in (0, 1]
        Steps done, this one included, over all steps.

    Notes
    -----
    Linear warm-up over the first 15 %, then half a cosine to 0.1 % (after Smith and Topin 2017, whose super-convergence
    it serves: a high rate for most of a short run, a vanishing one at its end).
    """
    if progress < _WARM_UP:
        return progress / _WARM_UP
    fall = 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))
    return _LOWEST + (1 - _LOWEST) * fall


def rates(settings: TrainingSettings, cells: int, epoch: int) -> list[float]:
    """Learning rate of each step of an epoch, numbered from 1, over so many cells."""
    steps = -(-cells // settings.batch_size)
    if settings.schedule == "constant":
        return [settings.learning_rate] * steps
    total = settings.max_epochs * steps
    return [settings.learning_rate * one_cycle(((epoch - 1) * steps + k) / total) for k in range(1, steps + 1)]


def adam(model: nn.Module, learning_rate: float) -> torch.optim.Adam:
    """The optimiser of every recipe."""
    return optimisers.Adam(model.parameters(), learning_rate)


def fit(
    model: VAE, task: VaeTask, cells: IntArray, stop: IntArray, settings: TrainingSettings, *,
    seed: int, checkpoint: Checkpoint | None = None, cell_set: str = "retain", loop: Loop | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> Trained:  # fmt: skip
    """Train a model in place by Adam on the negative ELBO, with early stopping.

    Parameters
    ----------
    cells, stop : ``[N]``, ``[N']``
        Cells to train on, and cells whose ELBO decides when to stop.
    seed
        Names every random stream of the run.
    checkpoint
        Saved after each epoch; a saved state is taken up.
    cell_set
        Under which name the passes are counted.
    loop
        A run of which this is a further phase (fine-tuning after unlearning); ``seed`` and ``checkpoint`` are its own.
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
    loop = loop or Loop(model, seed=seed, checkpoint=checkpoint)
    optimiser, effort = adam(model, settings.learning_rate), loop.effort

    def epoch(number: int, noise: torch.Generator) -> Epoch:
        beta = min(1.0, number / settings.kl_warmup_epochs) if settings.kl_warmup_epochs else 1.0
        row = train_epoch(
            model, task, cells, settings, optimiser, noise, effort,
            rates=rates(settings, len(cells), number), beta=beta, cell_set=cell_set,
        )  # fmt: skip
        return {"kl_weight": beta, **row}

    def score() -> float:
        effort.count("stop", len(stop), backward=0)
        return mean_elbo(task, model, stop)

    loop.run(
        "fit", epoch, settings.max_epochs, parts={"adam": optimiser}, score=score, patience=settings.patience,
        patient_from=settings.kl_warmup_epochs, on_epoch=on_epoch,
    )  # fmt: skip
    return Trained(model, loop.history, effort)

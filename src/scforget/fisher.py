"""The exact diagonal Fisher information: the mean of squared per-cell gradients, without per-cell gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from scforget import percell, seeding
from scforget.arrays import IntArray
from scforget.errors import EmptyGroupError
from scforget.tasks import Task

BatchT = TypeVar("BatchT")
#: One tensor of squared gradients per parameter name.
Diagonal = dict[str, Tensor]
_BATCH = 512


def mean_squares(model: nn.Module, losses: Callable[[BatchT], Tensor], batches: Iterable[BatchT]) -> Diagonal:
    """Mean over examples of each parameter's squared gradient, of one example at a time.

    Parameters
    ----------
    model
        In eval mode, of layers that :data:`scforget.percell.RULES` knows.
    losses
        Runs the model and returns every example's loss, ``[B]``; see :func:`scforget.percell.trace`.
    batches
        What ``losses`` is asked about, one after the other.

    Returns
    -------
    dict
        For every parameter name a tensor of its shape, >= 0; zero where no gradient arrives, and for frozen ones.

    Raises
    ------
    EmptyGroupError
        If there is no example.
    """
    total = {name: torch.zeros_like(parameter, requires_grad=False) for name, parameter in model.named_parameters()}
    examples = 0
    for batch in batches:
        traces, each = percell.trace(model, partial(losses, batch))
        for one in traces:
            for name, value in one.squares().items():
                total[name] += value
        examples += len(each)
    if not examples:
        raise EmptyGroupError("Fisher information", "0 cells", "at least one")
    return {name: value / examples for name, value in total.items()}


def diagonal(model: nn.Module, task: Task, cells: IntArray, *, draws: int, seed: int) -> Diagonal:
    """Exact diagonal of the empirical Fisher information of some cells.

    Parameters
    ----------
    cells : ``[N]``, N > 0
        Set S.
    draws : >= 1
        Fixed latent draws per cell; each draw's gradient is squared before averaging. 1 where the loss draws nothing.
    seed
        Names the stream of the draws.

    Returns
    -------
    dict
        For every parameter name a tensor of its shape, >= 0; zero where no gradient arrives (the dispersion head
        under ``log_mse``).

    Raises
    ------
    EmptyGroupError
        If ``cells`` is empty.

    Notes
    -----
    I_S[k] = mean over x in S and draws of (∂ℓ(θ; x)/∂θ_k)², eval mode. It is not the square of a batch gradient, whose
    cross terms between cells dominate.
    """
    model.eval()
    noise = seeding.torch_generator(seed, "fisher")

    def batches() -> Iterator[Any]:
        for start in range(0, len(cells), _BATCH):
            batch = task.batch(cells[start : start + _BATCH])
            for _ in range(draws):
                yield batch

    return mean_squares(model, lambda batch: task.loss(model, batch, noise).total, batches())

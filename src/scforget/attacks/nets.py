"""Small attacker networks, several trained side by side: ReLU layers with spectral norm and dropout, to one logit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from scforget.arrays import FloatArray, IntArray
from scforget.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

_FIRST_ITERATIONS = 15  # of the power method, before training; then one in each step
_SCORING_BATCH = 1024

Count = Annotated[int, Field(gt=0)]
Batch = tuple[IntArray, FloatArray]


class NetSettings(Settings):
    """How attacker networks look and how they are trained.

    Attributes
    ----------
    hidden
        Widths of the hidden layers.
    dropout
        Probability after every hidden layer.
    learning_rate
        Of Adam.
    batch_size
        Cells in a batch, at most.
    epochs
        Passes over the attacker's training cells.
    """

    hidden: Annotated[list[Count], Field(min_length=1)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    learning_rate: Annotated[float, Field(gt=0)]
    batch_size: Count
    epochs: Count


class Nets:
    """E networks of one shape side by side: each tensor has a leading axis of networks.

    Parameters
    ----------
    parameters
        Alternating weights ``[E, out, in]`` and biases ``[E, out]``.
    left : ``[E, out]``, right : ``[E, in]``, of each layer
        Estimates of the first singular vectors of its weights.
    """

    def __init__(self, parameters: list[Tensor], left: list[Tensor], right: list[Tensor]) -> None:
        self.weights, self.biases = parameters[::2], parameters[1::2]
        self.left, self.right = left, right

    def iterate(self) -> None:
        """One step of the power method in every layer (Miyato et al. 2018, algorithm 1)."""
        from torch.nn.functional import normalize

        for layer, weight in enumerate(self.weights):
            matrix = weight.detach()
            # as a row from the left: a batched product with a single column takes nine times as long
            self.left[layer] = normalize((self.right[layer][:, None, :] @ matrix.mT).squeeze(1), dim=1)
            self.right[layer] = normalize((self.left[layer][:, None, :] @ matrix).squeeze(1), dim=1)

    def norms(self, layer: int) -> Tensor:
        """``[E]``: estimates uᵀ W v of a layer's largest singular values; differentiable in W, not in u and v."""
        product = (self.left[layer][:, None, :] @ self.weights[layer]).squeeze(1)
        return (product * self.right[layer]).sum(1)

    def __call__(self, inputs: Tensor, keep: Sequence[Tensor] = ()) -> Tensor:
        """``[E, D, B]`` → logits ``[E, B]``; ``keep``, ``[E, width, B]`` each, multiplies what a hidden layer gives."""
        values = inputs
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            values = weight @ values / self.norms(layer)[:, None, None] + bias[:, :, None]
            if layer < len(self.weights) - 1:
                values = values.relu()
                values = values * keep[layer] if keep else values
        return values.squeeze(1)


def new_nets(number: int, inputs: int, hidden: Sequence[int], generator: np.random.Generator) -> Nets:
    """Networks as ``torch.nn.Linear`` begins them: weights and biases uniform in ±1/√inputs of the layer."""
    import torch

    parameters, left, right = [], [], []
    for columns, rows in pairwise([inputs, *hidden, 1]):
        limit = 1 / np.sqrt(columns)
        for shape in ((number, rows, columns), (number, rows)):
            values = generator.uniform(-limit, limit, shape).astype(np.float32)
            parameters.append(torch.from_numpy(values).requires_grad_())
        left.append(torch.zeros(number, rows))
        right.append(torch.from_numpy(generator.standard_normal((number, columns), dtype=np.float32)))
    nets = Nets(parameters, left, right)
    for _ in range(_FIRST_ITERATIONS):
        nets.iterate()
    return nets


def batches(trained_on: Sequence[IntArray], cuts: int | list[int], generator: np.random.Generator) -> Iterator[Batch]:
    """One epoch: every network's own cells in its own random order.

    Parameters
    ----------
    trained_on : E arrays of indices
    cuts
        Number of batches (as even as can be), or where one ends and the next begins.

    Yields
    ------
    cells : ``[E, B]``
        Padded with cell 0.
    shares : ``[E, B]``
        1 / cells in the network's batch; 0 for padding.
    """
    parts = [np.array_split(generator.permutation(cells), cuts) for cells in trained_on]
    for chosen in zip(*parts, strict=True):
        cells = np.zeros((len(chosen), max(map(len, chosen))), dtype=np.int64)
        shares = np.zeros(cells.shape)
        for row, own in enumerate(chosen):
            cells[row, : len(own)] = own
            shares[row, : len(own)] = 1 / max(len(own), 1)
        yield cells, shares


def train(
    nets: Nets, features: Tensor, labels: Tensor, weights: Tensor, *, trained_on: Sequence[IntArray],
    cuts: int | list[int], settings: NetSettings, generator: np.random.Generator,
) -> None:  # fmt: skip
    """Train networks in place by Adam on weighted cross-entropy.

    Parameters
    ----------
    features : ``[E, n, D]``
    labels : ``[n]``
        1 for members, 0 for controls.
    weights : ``[E, n]``
        Of each cell's loss.
    trained_on, cuts
        See ``batches``.
    settings
        Of the networks; ``batch_size`` is in ``cuts``.
    generator
        Of the batches and of dropout.

    Notes
    -----
    The losses are summed over networks and Adam treats every number by itself, so each is trained as if alone.
    """
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    from scforget import optimisers

    optimiser = optimisers.Adam([*nets.weights, *nets.biases], settings.learning_rate)
    rows = torch.arange(len(trained_on))[:, None]
    for _ in range(settings.epochs):
        for cells, shares in batches(trained_on, cuts, generator):
            index = torch.from_numpy(cells)
            keep = []
            if settings.dropout:
                for width in settings.hidden:
                    draws = generator.random((len(cells), width, cells.shape[1]), dtype=np.float32)
                    keep.append(torch.from_numpy((draws >= settings.dropout) / np.float32(1 - settings.dropout)))
            nets.iterate()
            logits = nets(features[rows, index].mT, keep)
            weight = weights[rows, index] * torch.from_numpy(shares)
            optimiser.zero_grad()
            binary_cross_entropy_with_logits(
                logits, labels[index], weight=weight.to(logits.dtype), reduction="sum"
            ).backward()
            optimiser.step()


def logits_of(nets: Nets, features: Tensor) -> FloatArray:
    """Logits ``[E, n]`` of trained networks for ``[E, n, D]``."""
    import torch

    with torch.no_grad():
        parts = [nets(part.mT) for part in features.split(_SCORING_BATCH, dim=1)]
    return torch.cat(parts, 1).double().numpy()

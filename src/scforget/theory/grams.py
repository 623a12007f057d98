"""Inner products of single cells' squared gradients, in closed form: what a bootstrap over cells needs of the Fisher.

A diagonal Fisher information is a mean over cells of squared gradients q_i, so its norms and inner products under any
reweighting of the cells are quadratic forms in K_ij = ⟨q_i, q_j⟩. K is found without any q_i: a layer's q_i is an outer
product of squared factors, and the inner product of outer products is a product of inner products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from scforget import percell
from scforget.arrays import FloatArray, IntArray
from scforget.models.vae import PerGene

BatchT = TypeVar("BatchT")
#: Of a layer's name, and the number of its input columns to begin with: the parts that its inputs' columns belong to.
Parts = Callable[[str], Mapping[str, slice]]
ALL = slice(None)


class Factors(NamedTuple):
    """Squared gradients of a layer's parameters for n cells: outer products of ``left [n, a]`` and ``right [n, b]``.

    Without ``right`` the rows of ``left`` are the squared gradients themselves.
    """

    left: Tensor
    right: Tensor | None

    def inner(self, other: Factors) -> Tensor:
        """Inner products of every cell here with every cell there, ``[n, n']``."""
        found = self.left @ other.left.T
        if self.right is not None and other.right is not None:
            found *= self.right @ other.right.T
        return found


def _factors(trace: percell.Trace, columns: slice) -> Factors:
    squared, inputs = trace.gradient.square(), trace.inputs
    if isinstance(trace.module, nn.Linear):
        first = columns.start in {None, 0}  # the bias, an input of 1, goes with the first columns
        return Factors(squared, torch.cat([inputs[:, columns].square(), torch.ones(len(inputs), int(first))], 1))
    if isinstance(trace.module, nn.LayerNorm):
        normalised = layer_norm(inputs, trace.module.normalized_shape, None, None, trace.module.eps)
        return Factors(torch.cat([(trace.gradient * normalised).square(), squared], 1), None)
    if isinstance(trace.module, PerGene):
        return Factors(squared, None)
    raise TypeError(f"{trace.name}: no factors are known for {type(trace.module).__name__}")


def _collect(
    model: nn.Module, losses: Callable[[BatchT], Tensor], batches: Iterable[BatchT], parts: Parts
) -> dict[tuple[str, str], Factors]:
    """One pass: the factors of all cells, by part and layer."""
    found: dict[tuple[str, str], list[Factors]] = {}
    for batch in batches:
        traces, _ = percell.trace(model, partial(losses, batch))
        for trace in traces:
            for part, columns in parts(trace.name).items():
                found.setdefault((part, trace.name), []).append(_factors(trace, columns))
    return {
        key: Factors(
            torch.cat([one.left for one in several]),
            None if several[0].right is None else torch.cat([one.right for one in several if one.right is not None]),
        )
        for key, several in found.items()
    }


@torch.no_grad()
def _sum_inner(drawn: list[Factors]) -> Tensor:
    """Σ over pairs of draws of the inner products, ``[n, n]``, each unordered pair taken once."""
    total = torch.zeros(len(drawn[0].left), len(drawn[0].left), dtype=torch.float64)
    for s, one in enumerate(drawn):
        total += one.inner(one)
        for other in drawn[s + 1 :]:
            crossed = one.inner(other).double()
            total += crossed + crossed.T
    return total


def grams(
    model: nn.Module, losses: Callable[[BatchT], Tensor], batches: Callable[[], Iterable[BatchT]], *,
    draws: int, parts: Parts,
) -> dict[str, FloatArray]:  # fmt: skip
    """Inner products of cells' squared gradients, by part of the network.

    Parameters
    ----------
    model
        In eval mode, of Linear, LayerNorm and PerGene layers.
    losses
        Runs the model on a batch and returns every cell's loss, ``[B]``; may draw noise.
    batches
        Gives the same cells in the same order each time.
    draws
        How often the cells are gone through; a cell's squared gradient is the mean over draws.
    parts
        Which part, or parts by columns of its input, a layer belongs to; the bias goes with the first column.

    Returns
    -------
    dict
        ``[n, n]`` by part: K_ij = ⟨q_i, q_j⟩ with q_i = mean over draws of (∂ℓ_i/∂θ)².

    Notes
    -----
    For a Linear layer q_i = g_i² (a_i², 1)ᵀ, so ⟨q_i, q_j⟩ = ⟨g_i², g_j²⟩·(⟨a_i², a_j²⟩ + 1).
    """
    drawn = [_collect(model, losses, batches(), parts) for _ in range(draws)]
    found: dict[str, FloatArray] = {}
    for part, layer in drawn[0]:
        own = _sum_inner([one[part, layer] for one in drawn]).numpy() / draws**2
        found[part] = found[part] + own if part in found else own
    return found


class Moments(NamedTuple):
    """Of two reweighted Fisher diagonals, ``[B]`` each: inner product, squared norms, the latter without self-pairs."""

    cross: FloatArray
    first: FloatArray
    second: FloatArray
    first_unbiased: FloatArray
    second_unbiased: FloatArray

    def plus(self, other: Moments) -> Moments:
        """Of the parameters of both together."""
        return Moments(*(one + two for one, two in zip(self, other, strict=True)))

    @property
    def cosine(self) -> FloatArray:
        """``[B]``: of the two diagonals as estimated; too small where cells are few, as noise lengthens both."""
        return np.asarray(self.cross / np.sqrt(self.first * self.second))

    @property
    def unbiased_cosine(self) -> FloatArray:
        """``[B]``: with unbiased squared norms, so that it estimates the cosine of the populations' diagonals.

        At most 1, where noise would take it further.
        """
        return np.minimum(self.cross / np.sqrt(self.first_unbiased * self.second_unbiased), 1.0)


def moments(gram: FloatArray, first: FloatArray, second: FloatArray) -> Moments:
    """Quadratic forms of B reweightings.

    Parameters
    ----------
    gram : ``[n, n]``
        From :func:`grams`.
    first, second : ``[B, n]``
        Weights that sum to 1 in each row; no cell has weight in both.

    Notes
    -----
    The squared norm of a mean over cells, Σ_ij w_i w_j K_ij, expects ‖F‖² + (variance of q)/n. Leaving out the pairs of
    a cell with itself, Σ_{i≠j} w_i w_j K_ij / (1 − Σ w_i²), expects ‖F‖² for any number of cells. In a bootstrap
    resample the copies of one cell are such pairs too.
    """
    own = np.diagonal(gram)
    left, right = first @ gram, second @ gram

    def norms(weights: FloatArray, weighed: FloatArray) -> tuple[FloatArray, FloatArray]:
        whole, selves = (weighed * weights).sum(1), weights**2
        return whole, (whole - selves @ own) / np.maximum(1 - selves.sum(1), 1e-12)

    (one, one_unbiased), (two, two_unbiased) = norms(first, left), norms(second, right)
    return Moments((left * second).sum(1), one, two, one_unbiased, two_unbiased)


def equal_weights(members: IntArray, n: int) -> FloatArray:
    """``[1, n]``: the same weight for each member."""
    weights = np.zeros((1, n))
    weights[0, members] = 1 / len(members)
    return weights


def resampled_weights(members: IntArray, n: int, draws: int, generator: np.random.Generator) -> FloatArray:
    """``[draws, n]``: weights of bootstrap resamples of the members; at least two of them differ in each."""
    weights = np.zeros((draws, n))
    for row in weights:
        counts = generator.multinomial(len(members), np.full(len(members), 1 / len(members)))
        while len(members) > 1 and counts.max() == len(members):
            counts = generator.multinomial(len(members), np.full(len(members), 1 / len(members)))
        row[members] = counts / len(members)
    return weights

"""Proposition 1 on a trained decoder: how far the Fisher of its last layer is from an outer product, and why."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import numpy as np
import scipy.linalg
import torch
from pydantic import Field
from torch import Tensor

from scforget import percell, seeding
from scforget.arrays import FloatArray, IntArray
from scforget.errors import EmptyGroupError
from scforget.models.likelihoods import nb_log_prob, zinb_log_prob
from scforget.models.vae import VAE, Batch, Decoded
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.theory.corollary import cosine
from scforget.theory.grams import equal_weights, moments, resampled_weights

# As in fisher.diagonal, so that one seed means the same latent draws there and here.
_BATCH = 512
# Entries of a block of inner products between rows: 64 MiB of float32.
_ENTRIES = 2**24


class FactorisationSettings(Settings):
    """How the factorisation is measured.

    Attributes
    ----------
    draws
        Latent draws per cell.
    cells
        Most cells taken of a set.
    resamples
        Of the bootstrap over cells.
    level
        Of its intervals.
    shuffles
        Of the labels, to see what as many groups of the same sizes explain by chance.
    """

    draws: Annotated[int, Field(gt=0)]
    cells: Annotated[int, Field(ge=2)]
    resamples: Annotated[int, Field(gt=0)]
    level: Annotated[float, Field(gt=0, lt=1)]
    shuffles: Annotated[int, Field(gt=0)]


class Head(NamedTuple):
    """What meets at ``VAE.scale``; rows are cells with their draws side by side, R = N·``draws`` of them.

    Attributes
    ----------
    gradient : ``[R, G]``
        Of each row's loss in the layer's output a: what the Fisher is made of.
    inputs : ``[R, H]``
        What the layer is applied to.
    uncoupled : ``[R, G]``
        The gradient in log p, were the shares p = softmax(a) not bound to sum to 1.
    residual : ``[R, G]``
        Observed minus decoded: log1p values under ``log_mse``, else counts.
    draws
        Rows of each cell.
    """

    gradient: Tensor
    inputs: Tensor
    uncoupled: Tensor
    residual: Tensor
    draws: int


def _uncoupled(model: VAE, batch: Batch, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of the loss in log p with every share free, and the residual; see :class:`Head`."""
    with torch.no_grad():
        zero_logits = None if model.zero is None else model.zero(inputs)
        decoded = Decoded(model.scale(inputs), model.dispersion(inputs), zero_logits)
    log_shares = decoded.logits.log_softmax(-1).requires_grad_()
    if model.settings.likelihood == "log_mse":
        residual = batch.inputs - log_shares.exp() * batch.inputs.sum(-1, keepdim=True)
        loss = residual.square()
    else:
        log_mean = log_shares + batch.library.log()
        residual = batch.counts - log_mean.exp()
        if decoded.zero_logits is None:
            loss = -nb_log_prob(batch.counts, log_mean, decoded.log_inverse_dispersion)
        else:
            loss = -zinb_log_prob(batch.counts, log_mean, decoded.log_inverse_dispersion, decoded.zero_logits)
    return torch.autograd.grad(loss.sum(), log_shares)[0], residual.detach()


def _pass(model: VAE, task: VaeTask, batch: Batch, noise: torch.Generator) -> list[Tensor]:
    traces, _ = percell.trace(model, lambda: task.loss(model, batch, noise).total, ["scale.weight", "scale.bias"])
    gradient, inputs = traces[0].gradient, traces[0].inputs
    return [one.cpu() for one in (gradient, inputs, *_uncoupled(model, batch, inputs))]


def head(model: VAE, task: VaeTask, cells: IntArray, *, draws: int, seed: int) -> Head:
    """Per-cell gradients and inputs of the layer that decodes expression shares, in eval mode.

    Parameters
    ----------
    cells : ``[N]``, N > 0
        A set of cells.
    draws, seed
        As of :func:`scforget.fisher.diagonal`, whose ``scale.weight`` is the mean over rows of gradient² ⊗ inputs².

    Returns
    -------
    Head

    Raises
    ------
    EmptyGroupError
        If ``cells`` is empty.

    Notes
    -----
    With p = softmax(a), ∂p_g/∂a_d = p_g (δ_gd − p_d). For ``log_mse``, L = Σ_g (x_g − l p_g)² with l = Σ x and residual
    e: ∂L/∂log p_d = −2 l p_d e_d, and ∂L/∂a_d = −2 l p_d (e_d − Σ_g p_g e_g). For ``nb`` with μ = s p the first is
    −m_d, m = r(x − μ)/(μ + r), and the second −(m_d − p_d Σ_g m_g). So the mean of e² is not the σ of this Fisher:
    squared shares and sizes weigh it, and the softmax couples genes.
    """
    if not len(cells):
        raise EmptyGroupError("cells at the decoder's head", "0 cells", "at least one")
    model.eval()
    noise = seeding.torch_generator(seed, "fisher")
    parts = []
    for start in range(0, len(cells), _BATCH):
        batch = task.batch(cells[start : start + _BATCH])
        passes = [_pass(model, task, batch, noise) for _ in range(draws)]
        parts.append([torch.stack(column, 1).flatten(0, 1) for column in zip(*passes, strict=True)])
    gradient, inputs, uncoupled, residual = (torch.cat(column) for column in zip(*parts, strict=True))
    return Head(gradient, inputs, uncoupled, residual, draws)


class Squares(NamedTuple):
    """Squared factors of a layer's per-row gradients: ``outer [R, G]``, ``inner [R, H]``, and rows of each cell.

    Both are scaled to mean 1, which no cosine sees and which keeps products of them within float32.
    """

    outer: Tensor
    inner: Tensor
    draws: int

    @classmethod
    def of(cls, gradient: Tensor, inputs: Tensor, draws: int) -> Squares:
        """Square and scale."""
        outer, inner = gradient.square(), inputs.square()
        return cls(outer / outer.mean(), inner / inner.mean(), draws)

    def fisher(self) -> FloatArray:
        """``[G, H]``, the mean of outer ⊗ inner."""
        return np.asarray((self.outer.T @ self.inner / len(self.outer)).double().numpy())

    def cells(self) -> tuple[FloatArray, FloatArray]:
        """Each cell's mean over draws of the outer and of the inner factor, ``[N, G]`` and ``[N, H]``."""
        outer, inner = (one.unflatten(0, (-1, self.draws)).mean(1).double() for one in (self.outer, self.inner))
        return outer.numpy(), inner.numpy()


def profiles(one: Head) -> dict[str, FloatArray]:
    """Mean squares over rows: ``sigma``, ``uncoupled`` and ``residual`` ``[G]``, and ``nu`` ``[H]`` of the inputs."""
    named = {"sigma": one.gradient, "uncoupled": one.uncoupled, "residual": one.residual, "nu": one.inputs}
    return {name: np.asarray(value.double().square().mean(0).numpy()) for name, value in named.items()}


def inner_products(one: Squares) -> FloatArray:
    """Inner products of cells' squared gradients, ``[N, N]``, without any of the G·H entries.

    Notes
    -----
    ⟨u ⊗ v, u' ⊗ v'⟩ = ⟨u, u'⟩⟨v, v'⟩: the Gram matrices of the factors, multiplied by entry, then averaged over draws.
    """
    cells = len(one.outer) // one.draws
    rows = one.draws * max(1, _ENTRIES // (one.draws * len(one.outer)))
    found = one.outer.new_zeros(cells, cells)
    for start in range(0, len(one.outer), rows):
        block, first = slice(start, start + rows), start // one.draws
        products = (one.outer[block] @ one.outer[start:].T) * (one.inner[block] @ one.inner[start:].T)
        means = products.view(-1, one.draws, cells - first, one.draws).mean((1, 3))
        found[first : first + len(means), first:] = means
        found[first:, first : first + len(means)] = means.T
    return np.asarray(found.double().numpy())


#: Weights of all cells of both sets in the forget and in the retain set's mean, ``[1 + B, N]``; the first row is flat.
Weights = tuple[FloatArray, FloatArray]
#: Values of one statistic as it is and unbiased, ``[1 + B]`` each; the first is that of the cells themselves.
Resampled = tuple[FloatArray, FloatArray]


def _weights(forget: int, retain: int, resamples: int, seed: int) -> Weights:
    rng = seeding.numpy_generator(seed, "cells of the factorisation")
    n = forget + retain
    first, second = np.split(np.arange(n, dtype=np.int64), [forget])
    return (
        np.vstack([equal_weights(first, n), resampled_weights(first, n, resamples, rng)]),
        np.vstack([equal_weights(second, n), resampled_weights(second, n, resamples, rng)]),
    )


def _cosines(gram: FloatArray, weights: Weights) -> Resampled:
    found = moments(gram, *weights)
    # not cut off at 1: a ratio of values that were would be 1 without any evidence
    return found.cosine, found.cross / np.sqrt(found.first_unbiased * found.second_unbiased)


def _estimate(values: Resampled, level: float) -> dict[str, float]:
    """Value, unbiased value, and the percentile interval of the latter."""
    plain, unbiased = values
    low, high = np.quantile(unbiased[1:], [(1 - level) / 2, (1 + level) / 2])
    return {"value": float(plain[0]), "unbiased": float(unbiased[0]), "low": float(low), "high": float(high)}


def _product(first: Resampled, second: Resampled) -> Resampled:
    return first[0] * second[0], first[1] * second[1]


def _ratio(first: Resampled, second: Resampled) -> Resampled:
    return first[0] / second[0], first[1] / second[1]


def _gap(forget: Squares, retain: Squares) -> dict[str, float]:
    """What the gap between product and cosine is made of; see :func:`factorise`."""
    found: dict[str, float] = {}
    fishers, outers = [], []
    for name, one in (("forget", forget), ("retain", retain)):
        fishers.append(one.fisher())
        outers.append(np.outer(*(part.mean(0) for part in one.cells())))
        norm = np.linalg.norm(fishers[-1])
        found[f"covariance_share_{name}"] = float(np.linalg.norm(fishers[-1] - outers[-1]) / norm)
        found[f"norm_ratio_{name}"] = float(np.linalg.norm(outers[-1]) / norm)
    return {**found, "inner_ratio": float(np.vdot(*fishers) / np.vdot(*outers))}


def _variant(forget: Squares, retain: Squares, weights: Weights) -> dict[str, Resampled]:
    both = Squares(torch.cat([forget.outer, retain.outer]), torch.cat([forget.inner, retain.inner]), forget.draws)
    outer, inner = both.cells()
    measured, sigma, nu = (_cosines(g, weights) for g in (inner_products(both), outer @ outer.T, inner @ inner.T))
    predicted = _product(sigma, nu)
    ratio = _ratio(predicted, measured)
    return {"measured": measured, "cos_sigma": sigma, "cos_nu": nu, "product": predicted, "ratio": ratio}


def _permuted(one: Head, rng: np.random.Generator) -> Tensor:
    """Each cell's inputs, all draws, given to another cell."""
    order = torch.from_numpy(rng.permutation(len(one.inputs) // one.draws))
    return one.inputs.unflatten(0, (-1, one.draws))[order].flatten(0, 1)


def _leading(fisher: FloatArray) -> tuple[FloatArray, FloatArray, float]:
    """First singular vectors ``[G]``, ``[H]``, >= 0, and the share of the squared Frobenius norm that they hold."""
    width = fisher.shape[1]
    value, vector = scipy.linalg.eigh(fisher.T @ fisher, subset_by_index=[width - 1, width - 1])
    nu = np.abs(vector[:, 0])  # F >= 0, so they have no change of sign (Perron)
    sigma = fisher @ nu
    return sigma / np.linalg.norm(sigma), nu, float(value[0] / (fisher**2).sum())


def singular(forget: Squares, retain: Squares) -> dict[str, float]:
    """The factorisation by singular vectors, as it was published, and how near they are to the data's σ and ν."""
    found: dict[str, float] = {}
    fishers = forget.fisher(), retain.fisher()
    vectors = _leading(fishers[0]), _leading(fishers[1])
    for (sigma, nu, share), one, name in zip(vectors, (forget, retain), ("forget", "retain"), strict=True):
        data = [part.mean(0) for part in one.cells()]
        found |= {f"rank_one_{name}": share}
        found |= {f"sigma_to_data_{name}": cosine(sigma, data[0]), f"nu_to_data_{name}": cosine(nu, data[1])}
    cosines = cosine(vectors[0][0], vectors[1][0]), cosine(vectors[0][1], vectors[1][1])
    predicted = cosines[0] * cosines[1]
    found |= {"cos_sigma": cosines[0], "cos_nu": cosines[1], "product": predicted}
    return {**found, "ratio": predicted / cosine(*fishers)}


def factorise(forget: Head, retain: Head, settings: FactorisationSettings, seed: int) -> dict[str, Any]:
    """Whether the cosine of two sets' Fishers at the decoder's head is the product of its factors' cosines.

    Parameters
    ----------
    forget, retain
        At least two cells each; see :func:`head`.
    settings
        ``draws`` and ``cells`` are not used here.

    Returns
    -------
    dict
        ``forget_cells``, ``retain_cells``, ``draws``; ``variants``: a list of dicts, each with its ``variant``;
        ``published``: like ``product`` and ``ratio`` with the plain residual's σ against the real Fisher; ``svd``: see
        :func:`singular`.

        Variants change one thing after the other: ``likelihood`` is the Fisher itself; ``permuted`` the same with
        inputs dealt to other cells of the set, so that they are independent of the gradients: a control, its ratio is
        1 up to sampling; ``uncoupled`` leaves out the softmax's coupling; ``residual`` leaves out the weights too.

        Of a variant: ``measured`` (cosine of the Fishers), ``cos_sigma``, ``cos_nu``, ``product``, ``ratio`` (product /
        measured), each a dict of ``value``; ``unbiased``, without the cells' sampling noise in the norms (see
        :func:`~scforget.theory.grams.moments`; noise may take it beyond 1); and ``low``, ``high``: percentiles of the
        latter in a bootstrap over cells, all draws of a cell together. And where the gap comes from:
        ``covariance_share_*``, ‖F − σνᵀ‖/‖F‖ of each set, and measured / product =
        ``inner_ratio`` · ``norm_ratio_forget`` · ``norm_ratio_retain``, ⟨F^F, F^R⟩/⟨σν^F, σν^R⟩ and ‖σνᵀ‖/‖F‖.

    Raises
    ------
    EmptyGroupError
        With fewer than two cells in a set.
    """
    sizes = len(forget.inputs) // forget.draws, len(retain.inputs) // retain.draws
    if min(sizes) < 2:
        raise EmptyGroupError("cells at the decoder's head", min(sizes), "at least 2 of each set")
    weights = _weights(*sizes, settings.resamples, seed)
    rng = seeding.numpy_generator(seed, "permuted inputs")
    variants = {
        "likelihood": [(one.gradient, one.inputs) for one in (forget, retain)],
        "permuted": [(one.gradient, _permuted(one, rng)) for one in (forget, retain)],
        "uncoupled": [(one.uncoupled, one.inputs) for one in (forget, retain)],
        "residual": [(one.residual, one.inputs) for one in (forget, retain)],
    }
    rows: list[dict[str, Any]] = []
    resampled: dict[str, dict[str, Resampled]] = {}
    for name, (first, second) in variants.items():
        sets = Squares.of(*first, forget.draws), Squares.of(*second, retain.draws)
        resampled[name] = _variant(*sets, weights)
        estimates = {key: _estimate(values, settings.level) for key, values in resampled[name].items()}
        rows.append({"variant": name, **estimates, **_gap(*sets)})
    published = resampled["residual"]["product"]
    ratio = _ratio(published, resampled["likelihood"]["measured"])
    return {
        "forget_cells": sizes[0], "retain_cells": sizes[1], "draws": forget.draws, "variants": rows,
        "svd": singular(*(Squares.of(one.gradient, one.inputs, one.draws) for one in (forget, retain))),
        "published": {
            "product": _estimate(published, settings.level), "ratio": _estimate(ratio, settings.level),
        },
    }  # fmt: skip


def _mixture(factors: tuple[FloatArray, FloatArray], types: IntArray) -> FloatArray:
    """Σ_t π_t σ_t ν_tᵀ, ``[G, H]``: the Fisher were factors independent within each type, ``types [N]``."""
    member = (types == np.unique(types)[:, None]).astype(np.float64)
    sigma, nu = ((member @ one) / member.sum(1, keepdims=True) for one in factors)
    return np.asarray((sigma * member.sum(1, keepdims=True)).T @ nu / len(types))


def by_type(
    forget: Head, retain: Head, types: tuple[IntArray, IntArray], settings: FactorisationSettings, seed: int
) -> dict[str, Any]:  # fmt: skip
    """How much of the gap is there because a set is a mixture of cell types.

    Parameters
    ----------
    types : ``[F]``, ``[R]``
        A number for the cell type of each cell of the two sets.

    Returns
    -------
    dict
        ``measured`` cosine of the Fishers, ``product`` of the factors' cosines, ``mixture``, the cosine were factors
        independent within types only, with ``shuffled``: the mean and range of ``mixture`` where labels are dealt anew
        within each set. For each set ``covariance_share_*`` (‖F − σνᵀ‖/‖F‖), ``within_share_*`` (‖F − Σ_t π_t σ_t
        ν_tᵀ‖/‖F‖), and the mean of the latter over shuffled labels, ``shuffled_within_share_*``.

    Notes
    -----
    Cov(g_d², a_h²) is the mean of the covariances within types plus the covariance of the types' means σ_t and ν_t
    (law of total covariance). Groups of few cells follow any Fisher by chance, hence the shuffled labels.
    """
    rng = seeding.numpy_generator(seed, "shuffled types")
    found: dict[str, Any] = {}
    whole, outers, mixtures, shuffled = [], [], [], []
    for name, one, labels in (("forget", forget, types[0]), ("retain", retain, types[1])):
        squares = Squares.of(one.gradient, one.inputs, one.draws)
        factors, fisher = squares.cells(), squares.fisher()
        norm = np.linalg.norm(fisher)
        dealt = [_mixture(factors, rng.permutation(labels)) for _ in range(settings.shuffles)]
        whole.append(fisher)
        outers.append(np.outer(factors[0].mean(0), factors[1].mean(0)))
        mixtures.append(_mixture(factors, labels))
        shuffled.append(dealt)
        found[f"covariance_share_{name}"] = float(np.linalg.norm(fisher - outers[-1]) / norm)
        found[f"within_share_{name}"] = float(np.linalg.norm(fisher - mixtures[-1]) / norm)
        within = [float(np.linalg.norm(fisher - mixture) / norm) for mixture in dealt]
        found[f"shuffled_within_share_{name}"] = float(np.mean(within))
    chance = [cosine(*pair) for pair in zip(*shuffled, strict=True)]
    return {
        "measured": cosine(*whole), "product": cosine(*outers), "mixture": cosine(*mixtures),
        "shuffled": {"value": float(np.mean(chance)), "low": min(chance), "high": max(chance)}, **found,
    }  # fmt: skip

"""Observation models: log-likelihoods per cell and gene, stable in float32, differentiable by autograd."""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid, softplus

try:
    from scforget.models import kernels as _kernels
except ImportError:  # no numba for this machine: torch gives the same values, more slowly
    _kernels = None  # type: ignore[assignment]
#: The compiled loops, :mod:`scforget.models.kernels`, or ``None`` without numba.
COMPILED: ModuleType | None = _kernels

# Below this inverse dispersion lgamma differences are accurate; above it they cancel and Stirling's series is used.
_STIRLING_FROM = 16.0
# exp of more than this overflows downstream products in float32, and no count set can tell it from a Poisson.
LOG_INVERSE_DISPERSION_LIMIT = 15.0


def _stirling_remainder(z: Tensor) -> Tensor:
    """Return lgamma(z) - ((z - 1/2) log z - z + log(2π)/2), to 1e-14 for z >= 16."""
    inverse = 1 / z
    square = inverse * inverse
    return inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680)))


def _log_rising_over_power(counts: Tensor, r: Tensor) -> Tensor:
    """Return log Γ(x + r) - log Γ(r) - x log r, which tends to 0 as r grows (the Poisson limit)."""
    small = r.clamp(max=_STIRLING_FROM)
    direct = torch.lgamma(counts + small) - torch.lgamma(small) - counts * small.log()
    large = r.clamp(min=_STIRLING_FROM)
    shifted = counts + large
    series = (shifted - 0.5) * torch.log1p(counts / large) - counts
    series = series + _stirling_remainder(shifted) - _stirling_remainder(large)
    return torch.where(r > _STIRLING_FROM, series, direct)


def nb_log_prob(counts: Tensor, log_mean: Tensor, log_inverse_dispersion: Tensor) -> Tensor:
    """Negative-binomial log-probability with variance μ + μ²/r.

    Parameters
    ----------
    counts : ``[B, G]``
        Integer counts >= 0, in a floating dtype.
    log_mean : ``[B, G]``
        log μ; taking the logarithm keeps genes with tiny expected counts exact.
    log_inverse_dispersion : broadcastable to ``[B, G]``
        log r, clamped to ±15.

    Returns
    -------
    ``[B, G]``
        Nats, <= 0.

    Notes
    -----
    log p = log Γ(x+r) − log Γ(r) − log x! + x log(μ/r) − (x+r) log(1 + μ/r), the mean–dispersion form of
    Lopez et al. (2018), arranged so that nothing cancels as r → ∞.
    """
    log_r = log_inverse_dispersion.clamp(-LOG_INVERSE_DISPERSION_LIMIT, LOG_INVERSE_DISPERSION_LIMIT)
    r = log_r.exp()
    return (
        _log_rising_over_power(counts, r)
        - torch.lgamma(counts + 1)
        + counts * log_mean
        - (counts + r) * softplus(log_mean - log_r)
    )


class _NegativeBinomial(torch.autograd.Function):
    """:func:`nb_log_likelihood` in torch: in dense passes what entries have in common, at nonzero counts the rest."""

    @staticmethod
    def forward(
        ctx: Any, counts: Tensor, logits: Tensor, log_library: Tensor, log_inverse_dispersion: Tensor
    ) -> Tensor:
        log_r = log_inverse_dispersion.clamp(-LOG_INVERSE_DISPERSION_LIMIT, LOG_INVERSE_DISPERSION_LIMIT)
        log_shares, dense_r = logits.log_softmax(-1), log_r.exp()
        log_odds = log_shares + log_library - log_r  # log(μ/r)
        empty = dense_r * softplus(log_odds)  # minus the log-probability of a zero
        entries = counts.reshape(-1).nonzero().squeeze(1)
        cells = entries.div(counts.shape[1], rounding_mode="floor")
        x = counts.reshape(-1)[entries].double()
        at = log_r.reshape(-1)[entries].double()
        r = at.exp()
        odds = log_shares.view(-1)[entries].double() + log_library.reshape(-1)[cells].double() - at
        found = torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1) + x * (odds - softplus(odds))
        ctx.save_for_backward(log_shares, log_odds, dense_r, empty, entries, x, r, odds, log_inverse_dispersion)
        return (-empty.sum(-1)).double().index_add_(0, cells, found).to(logits.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        log_shares, log_odds, dense_r, empty, entries, x, r, odds, log_inverse_dispersion = ctx.saved_tensors
        mean = -dense_r * log_odds.sigmoid()  # σ = μ/(μ + r) is the sigmoid
        dispersion = -mean - empty
        there = x - (x + r) * odds.sigmoid()
        rise = r * (torch.digamma(x + r) - torch.digamma(r) - softplus(odds))
        mean.view(-1)[entries] = there.to(mean.dtype)
        dispersion.view(-1)[entries] = (rise - there).to(mean.dtype)
        mean *= upstream[:, None]
        logits = mean - log_shares.exp() * mean.sum(-1, keepdim=True)
        dispersion *= upstream[:, None]
        dispersion *= log_inverse_dispersion.abs() <= LOG_INVERSE_DISPERSION_LIMIT
        return None, logits, None, dispersion


class _Compiled(torch.autograd.Function):
    """The likelihood of whole cells and its gradients in one pass of :mod:`scforget.models.kernels`."""

    @staticmethod
    def forward(ctx: Any, kernel: Any, counts: Tensor, log_library: Tensor, *parameters: Tensor) -> Tensor:
        value = np.empty(len(counts))
        gradients = [torch.empty_like(parameter, memory_format=torch.contiguous_format) for parameter in parameters]
        given = [one.detach().contiguous().numpy() for one in (counts, *parameters)]
        library = log_library.reshape(-1).expand(len(counts)).contiguous().numpy()
        limit = np.float32(LOG_INVERSE_DISPERSION_LIMIT)
        kernel(given[0], given[1], library, *given[2:], limit, value, *(one.numpy() for one in gradients))
        ctx.save_for_backward(*gradients)
        return torch.from_numpy(value).to(counts.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(upstream[:, None] * gradient for gradient in ctx.saved_tensors)


def _compiles(*tensors: Tensor) -> bool:
    """Whether these are what the compiled loops take; anything else goes through torch."""
    return all(one.dtype == torch.float32 and one.device.type == "cpu" for one in tensors)


def nb_log_likelihood(counts: Tensor, logits: Tensor, log_library: Tensor, log_inverse_dispersion: Tensor) -> Tensor:
    """Negative-binomial log-likelihood of whole cells whose expected counts are shares of a library.

    Parameters
    ----------
    counts : ``[B, G]``
        Integer counts >= 0, in a floating dtype.
    logits : ``[B, G]``
        The expected count is softmax(logits)·library.
    log_library : ``[B, 1]``
        No gradient arrives here.
    log_inverse_dispersion : ``[B, G]``
        log r, clamped to ±15.

    Returns
    -------
    ``[B]``
        The sum of :func:`nb_log_prob` over genes, nats; differentiable once.

    Notes
    -----
    Most counts are 0, where log p = −r log(1 + μ/r) and no Γ is left; the others' Γ terms are taken in float64 at their
    own entries. With σ = μ/(μ + r) the gradient is x − (x + r)σ in log μ, and
    r(ψ(x + r) − ψ(r)) − x − r log(1 + μ/r) + (x + r)σ in log r, written out rather than recorded.
    """
    parameters = logits, log_inverse_dispersion.expand_as(logits)
    if COMPILED is not None and _compiles(counts, log_library, *parameters):
        return cast("Tensor", _Compiled.apply(COMPILED.negative_binomial, counts, log_library, *parameters))
    return cast("Tensor", _NegativeBinomial.apply(counts, logits, log_library, log_inverse_dispersion))


def zinb_log_likelihood(
    counts: Tensor, logits: Tensor, log_library: Tensor, log_inverse_dispersion: Tensor, zero_logits: Tensor
) -> Tensor:
    """:func:`nb_log_likelihood` of the zero-inflated distribution, ``[B]`` nats; see :func:`zinb_log_prob`."""
    parameters = logits, log_inverse_dispersion.expand_as(logits), zero_logits
    if COMPILED is not None and _compiles(counts, log_library, *parameters):
        return cast("Tensor", _Compiled.apply(COMPILED.zero_inflated, counts, log_library, *parameters))
    log_mean = logits.log_softmax(-1) + log_library
    return zinb_log_prob(counts, log_mean, log_inverse_dispersion, zero_logits).sum(-1)


def zinb_log_prob(counts: Tensor, log_mean: Tensor, log_inverse_dispersion: Tensor, zero_logits: Tensor) -> Tensor:
    """Zero-inflated negative binomial: a zero with probability π = sigmoid(``zero_logits``), else :func:`nb_log_prob`.

    All shapes as there; returns ``[B, G]`` nats.

    Notes
    -----
    log p(0) = log(π + (1−π)·NB(0)), log p(x > 0) = log(1−π) + log NB(x), both through log-sigmoids.
    """
    nb = nb_log_prob(counts, log_mean, log_inverse_dispersion)
    inflated = torch.logaddexp(logsigmoid(zero_logits), logsigmoid(-zero_logits) + nb)
    return torch.where(counts == 0, inflated, logsigmoid(-zero_logits) + nb)


def squared_error(log_expression: Tensor, logits: Tensor) -> Tensor:
    """Squared error between log1p(CP10k) and softmax(a) · (sum of the cell's log1p values), ``[B, G]``.

    Notes
    -----
    What the published single-cell results were trained with although they are described as negative binomial
    (``log_mse``): the library is the sum of log1p values, and the dispersion never enters.
    """
    return (log_expression - logits.softmax(-1) * log_expression.sum(-1, keepdim=True)).square()

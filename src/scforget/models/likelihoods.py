"""Observation models: log-likelihoods per cell and gene, stable in float32, differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

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

"""Compiled loops over a batch: the count likelihoods with their gradients, and dropout masks.

Written so that LLVM turns them into vector instructions: exponentials and logarithms are polynomials without a branch.
What is the same for every entry is done in float32 for zeros; the Γ terms of the few other counts in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from scforget.arrays import FloatArray

# Sums may be taken in another order and x·a + b may be one instruction; infinities and NaN keep their meaning.
_FAST = {"contract", "reassoc", "nsz", "arcp"}
# An exponential takes n·log(2) away in two parts, which another order would join again: 3e-7 instead of 1.2e-7.
_ORDERED = _FAST - {"reassoc"}
_SHIFT = 16.0  # Stirling's series is used from here on
_LOG_FACTORIAL: FloatArray = np.array([math.lgamma(x + 1.0) for x in range(256)])
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_F = np.float32


def _compiled(**options: Any) -> Callable[..., Any]:
    found: Callable[..., Any] = numba.njit(cache=True, nogil=True, error_model="numpy", **options)
    return found


@_compiled(fastmath=_ORDERED)
def _exp(x: Any) -> Any:
    """e^x in float32 for x in [−87, 88], to 1.2e-7: 2^n times a polynomial on ±log(2)/2 (minimax of Cephes' degree)."""
    n = np.floor(x * _F(1.44269504) + _F(0.5))
    f = x - n * _LN2_HIGH - n * _LN2_LOW
    p = _F(1.9875691500e-4)
    p = p * f + _F(1.3981999507e-3)
    p = p * f + _F(8.3334519073e-3)
    p = p * f + _F(4.1665795894e-2)
    p = p * f + _F(1.6666665459e-1)
    p = p * f + _F(5.0000001201e-1)
    p = p * f * f + f + _F(1)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@_compiled(fastmath=_FAST)
def _log1p_parts(u: Any) -> tuple[Any, Any]:
    """log(1 + u) and log(1 + u) − u/(1 + u) for u in [0, 1], to 2e-7 and 5e-7 of themselves.

    With s = u/(2 + u) they are 2 artanh s = 2s(1 + s²/3 + s⁴/5 + …) and, as u/(1 + u) = 2s/(1 + s), what is left is
    2s(s/(1 + s) + s²/3 + …), in which nothing cancels.
    """
    s = u / (_F(2) + u)
    q = s * s
    p = _F(1 / 13)
    p = p * q + _F(1 / 11)
    p = p * q + _F(1 / 9)
    p = p * q + _F(1 / 7)
    p = p * q + _F(1 / 5)
    p = p * q + _F(1 / 3)
    twice = s + s
    return twice + twice * q * p, twice * (s / (_F(1) + s) + q * p)


@_compiled(fastmath=_FAST)
def _remainder(z: float) -> float:
    """Log Γ(z) − ((z − 1/2) log z − z + log(2π)/2) for z >= 16, to 1e-14."""
    v = 1 / z
    q = v * v
    return v * (1 / 12 - q * (1 / 360 - q * (1 / 1260 - q / 1680)))


@_compiled(fastmath=_FAST)
def _psi_remainder(z: float) -> float:
    """ψ(z) − log z for z >= 16, to 1e-14."""
    v = 1 / z
    q = v * v
    return -v / 2 - q * (1 / 12 - q * (1 / 120 - q * (1 / 252 - q * (1 / 240 - q / 132))))


@_compiled(fastmath=_FAST)
def _rising(r: float, terms: int) -> tuple[float, float]:
    """Log of r(r + 1)…(r + terms − 1) and Σ 1/(r + k)."""
    product, inverse = 1.0, 0.0
    for k in range(terms):
        product *= r + k
        inverse += 1 / (r + k)
    return math.log(product), inverse


@_compiled(fastmath=_FAST)
def _gamma_terms(x: float, r: float) -> tuple[float, float]:
    """Log Γ(x + r) − log Γ(r) and ψ(x + r) − ψ(r), in float64."""
    if x <= _SHIFT and x == math.floor(x):
        return _rising(r, int(x))
    log_r, psi_r = _rising(r, int(_SHIFT))
    log_z, psi_z = 0.0, 0.0
    low, high = r + _SHIFT, x + r
    if high < _SHIFT:  # a fraction of a count
        log_z, psi_z = _rising(high, int(_SHIFT))
        high += _SHIFT
    growth = math.log1p((high - low) / low)
    logs = (high - 0.5) * growth + (high - low) * (math.log(low) - 1) + _remainder(high) - _remainder(low)
    return logs + log_r - log_z, growth + _psi_remainder(high) - _psi_remainder(low) + psi_r - psi_z


@_compiled(fastmath=_ORDERED)
def _exp64(x: Any) -> Any:
    """e^x in float64 for x in [−700, 700], to 1e-14 and without a branch: Taylor's series on ±log(2)/2."""
    n = np.floor(x * 1.4426950408889634 + 0.5)
    f = x - n * 0.693145751953125 - n * 1.4286068203094172e-06
    p = 1 / 39916800
    p = p * f + 1 / 3628800
    p = p * f + 1 / 362880
    p = p * f + 1 / 40320
    p = p * f + 1 / 5040
    p = p * f + 1 / 720
    p = p * f + 1 / 120
    p = p * f + 1 / 24
    p = p * f + 1 / 6
    p = p * f + 1 / 2
    p = p * f * f + f + 1.0
    return p * np.int64((np.int64(n) + np.int64(1023)) << np.int64(52)).view(np.float64)


@_compiled(fastmath=_FAST)
def _log1p64(u: Any) -> Any:
    """log(1 + u) for u in [0, 1] in float64, to 1e-12: 2 artanh(u/(2 + u))."""
    s = u / (2.0 + u)
    q = s * s
    p = 1 / 23
    p = p * q + 1 / 21
    p = p * q + 1 / 19
    p = p * q + 1 / 17
    p = p * q + 1 / 15
    p = p * q + 1 / 13
    p = p * q + 1 / 11
    p = p * q + 1 / 9
    p = p * q + 1 / 7
    p = p * q + 1 / 5
    p = p * q + 1 / 3
    return 2 * s + 2 * s * q * p


@_compiled(fastmath=_FAST)
def _counts_above_zero(  # noqa: PLR0917
    counts: Any, logits: Any, shift: float, log_inverse_dispersion: Any, limit: Any, in_mean: Any, in_dispersion: Any,
    work: Any,
) -> float:  # fmt: skip
    """Log-probability of one cell's counts above 0, in float64; write its derivatives in log μ and log r.

    ``work [5, G]`` is scratch. What all counts need is computed for all at once, in vector instructions; the Γ terms
    of a count of 1, of which there are most, are log r and 1/r.
    """
    found = 0
    where, log_r, odds, soft, sigma = work[0], work[1], work[2], work[3], work[4]
    for g in range(counts.size):
        if counts[g] != _F(0):
            where[found] = g
            log_r[found] = min(max(log_inverse_dispersion[g], -limit), limit)
            odds[found] = np.float64(logits[g]) + shift - log_r[found]
            found += 1
    for k in range(found):
        u = _exp64(max(-abs(odds[k]), -700.0))
        soft[k] = max(odds[k], 0.0) + _log1p64(u)
        sigma[k] = (1.0 if odds[k] >= 0.0 else u) / (1.0 + u)
    total = 0.0
    for k in range(found):
        g = int(where[k])
        x, r = np.float64(counts[g]), math.exp(log_r[k])
        if x == 1.0:
            log_rise, psi_rise, factorial = log_r[k], 1 / r, 0.0
        else:
            log_rise, psi_rise = _gamma_terms(x, r)
            factorial = _LOG_FACTORIAL[int(x)] if x < 256 and x == math.floor(x) else math.lgamma(x + 1)
        in_count = x - (x + r) * sigma[k]
        total += log_rise - factorial + x * (odds[k] - soft[k]) - r * soft[k]
        in_mean[g], in_dispersion[g] = in_count, r * (psi_rise - soft[k]) - in_count
    return total


@_compiled(fastmath=_FAST)
def _shares(logits: Any, shares: Any) -> float:
    """Write softmax(logits) of one cell, and return log Σ e^logit."""
    top = logits[0]
    for g in range(logits.size):
        top = max(top, logits[g])
    total = 0.0
    for g in range(logits.size):
        e = _exp(max(logits[g] - top, _F(-87)))
        shares[g] = e
        total += e
    inverse = _F(1 / total)
    for g in range(logits.size):
        shares[g] *= inverse
    return top + math.log(total)


@_compiled(fastmath=_FAST)
def _through_softmax(in_mean: Any, shares: Any) -> None:
    """Turn derivatives in log μ into derivatives in the logits, in place."""
    total = 0.0
    for g in range(in_mean.size):
        total += in_mean[g]
    total32 = _F(total)
    for g in range(in_mean.size):
        in_mean[g] -= shares[g] * total32


@_compiled(fastmath=_FAST)
def negative_binomial(  # noqa: PLR0917
    counts: Any, logits: Any, log_library: Any, log_inverse_dispersion: Any, limit: Any,
    value: Any, in_logits: Any, in_dispersion: Any,
) -> None:  # fmt: skip
    """Write each cell's log-likelihood ``value [B]`` (float64) and its gradients ``[B, G]`` (float32).

    Inputs as :func:`scforget.models.likelihoods.nb_log_likelihood`, C-ordered float32; ``log_library`` is ``[B]``.
    """
    cells, genes = counts.shape
    shares, work = np.empty(genes, np.float32), np.empty((5, genes))
    for i in range(cells):
        shift = log_library[i] - _shares(logits[i], shares)
        shift32, total = _F(shift), np.float64(0)
        for g in range(genes):
            log_r = min(max(log_inverse_dispersion[i, g], -limit), limit)
            odds = logits[i, g] + shift32 - log_r
            r, u = _exp(log_r), _exp(max(-abs(odds), _F(-87)))
            log1p, excess = _log1p_parts(u)
            positive = odds >= _F(0)
            soft = r * (max(odds, _F(0)) + log1p)
            mean = r * ((_F(1) if positive else u) / (_F(1) + u))
            in_logits[i, g] = -mean
            in_dispersion[i, g] = mean - soft if positive else -r * excess
            total += soft if counts[i, g] == _F(0) else _F(0)
        value[i] = -total
        value[i] += _counts_above_zero(
            counts[i], logits[i], shift, log_inverse_dispersion[i], limit, in_logits[i], in_dispersion[i], work
        )
        for g in range(genes):
            in_dispersion[i, g] = in_dispersion[i, g] if abs(log_inverse_dispersion[i, g]) <= limit else _F(0)
        _through_softmax(in_logits[i], shares)


@_compiled(fastmath=_FAST)
def zero_inflated(  # noqa: PLR0917
    counts: Any, logits: Any, log_library: Any, log_inverse_dispersion: Any, zero_logits: Any, limit: Any,
    value: Any, in_logits: Any, in_dispersion: Any, in_zero: Any,
) -> None:  # fmt: skip
    """Write the same with ``zero_logits`` a: log p(0) = log(π + (1 − π)·NB(0)), π = sigmoid(a).

    Of a zero, w = (1 − π)·NB(0)/p(0) is the share that the counts explain; its derivatives are w times the negative
    binomial's, and 1 − w − π in a. Of another count it is −π in a.
    """
    cells, genes = counts.shape
    shares, work = np.empty(genes, np.float32), np.empty((5, genes))
    for i in range(cells):
        shift = log_library[i] - _shares(logits[i], shares)
        shift32, total = _F(shift), np.float64(0)
        for g in range(genes):
            log_r = min(max(log_inverse_dispersion[i, g], -limit), limit)
            odds, a = logits[i, g] + shift32 - log_r, zero_logits[i, g]
            r, u = _exp(log_r), _exp(max(-abs(odds), _F(-87)))
            log1p, excess = _log1p_parts(u)
            positive = odds >= _F(0)
            soft = r * (max(odds, _F(0)) + log1p)
            mean = r * ((_F(1) if positive else u) / (_F(1) + u))
            v = _exp(max(-abs(a), _F(-87)))
            inflated = (_F(1) if a >= _F(0) else v) / (_F(1) + v)
            log_rest = _log1p_parts(v)[0]  # of 1 − π: −max(a, 0) − this
            c = -soft - a  # log of what counts explain over what inflation does
            w = _exp(max(-abs(c), _F(-87)))
            counted = (_F(1) if c >= _F(0) else w) / (_F(1) + w)
            other = (w if c >= _F(0) else _F(1)) / (_F(1) + w)
            nothing = counts[i, g] == _F(0)
            in_logits[i, g] = -counted * mean
            in_dispersion[i, g] = counted * (mean - soft if positive else -r * excess)
            in_zero[i, g] = other - inflated if nothing else -inflated
            zero = min(a, _F(0)) + max(c, _F(0)) + _log1p_parts(w)[0]
            total += (zero if nothing else -max(a, _F(0))) - log_rest
        value[i] = total
        value[i] += _counts_above_zero(
            counts[i], logits[i], shift, log_inverse_dispersion[i], limit, in_logits[i], in_dispersion[i], work
        )
        for g in range(genes):
            in_dispersion[i, g] = in_dispersion[i, g] if abs(log_inverse_dispersion[i, g]) <= limit else _F(0)
        _through_softmax(in_logits[i], shares)


@_compiled(fastmath=_FAST)
def dropout_mask(seed: int, keep: float, mask: Any) -> None:
    """Write 1/keep with probability ``keep``, else 0, into ``mask [n]`` (float32), from a counter and a seed.

    Each entry is a hash of its number (Steele et al. 2014, splitmix64 with 32-bit multipliers): good enough to drop
    units, and not to protect anything.
    """
    bound, value = np.uint32(min(keep * 2.0**32, 2.0**32 - 1)), _F(1 / keep)
    low, high = np.uint32(seed & 0xFFFFFFFF), np.uint32((seed >> 32) & 0xFFFFFFFF)
    for i in range(mask.size):
        h = np.uint32(np.uint32(i) * np.uint32(0x9E3779B9)) ^ low
        h = np.uint32((h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D))
        h = np.uint32((h ^ (h >> np.uint32(15)) ^ high) * np.uint32(0x846CA68B))
        h = np.uint32((h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D))
        h = np.uint32((h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B))
        h = h ^ (h >> np.uint32(16))
        mask[i] = value if h < bound else _F(0)

"""Gaussian noise for privacy: fast and reproducible from a seed, or slow and from a cryptographically secure source.

The fast one is a counter-based generator (Philox4x32-10, Salmon et al. 2011) and Box-Muller in float32, written so that
LLVM turns it into vector instructions. Value k depends on the key and on k alone, whatever the number of threads.
Values end at 6.76 standard deviations, where one in 7·10¹⁰ would lie beyond.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numba
import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from scforget.arrays import FloatArray

# Sums may be taken in another order and x·a + b may be one instruction; infinities and NaN keep their meaning.
_FAST = {"contract", "reassoc", "nsz", "arcp"}
_F, _I, _U, _L = np.float32, np.int32, np.uint32, np.uint64
_D, _J = np.float64, np.int64
_LOW, _HALF = _L(0xFFFFFFFF), _L(32)
# Philox4x32: multipliers of the rounds, and what the key grows by (Salmon et al. 2011).
_M0, _M1, _W0, _W1 = _L(0xD2511F53), _L(0xCD9E8D57), _L(0x9E3779B9), _L(0xBB67AE85)
_LN2 = _F(0.6931471805599453)
# A turn in units of the last bit of an angle's word.
_TURN, _EXACT_TURN = _F(2 * np.pi / 2**32), 2 * np.pi / 2**64
# One chunk is 256 counters of four values each. Of a pair from Box-Muller both values are in one chunk.
_COUNTERS = 256
_CHUNK = 4 * _COUNTERS
# Below this many chunks a second thread costs more than it saves.
_CHUNKS_FOR_THREADS = 64
# Values from a secure source at a time: what they need stays in the cache.
_SECURE = 2**14


def _compiled(**options: Any) -> Callable[..., Any]:
    found: Callable[..., Any] = numba.njit(cache=True, nogil=True, error_model="numpy", **options)
    return found


@_compiled(inline="always")
def _philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:  # noqa: PLR0917
    """Ten rounds on a counter of four words and a key of two; a word is the lower half of a 64-bit number."""
    for _ in range(10):
        p0 = _M0 * (c0 & _LOW)
        p1 = _M1 * (c2 & _LOW)
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1, (p0 >> _HALF) ^ c3 ^ k1, p0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return _U(c0 & _LOW), _U(c1 & _LOW), _U(c2 & _LOW), _U(c3 & _LOW)


@_compiled(inline="always")
def _radius(word: Any) -> Any:
    """√(−2 log u) at u = (word + ½)/2³², to 2e-7 of itself but where u is nearly 1; at most 6.76.

    With word + ½ = 2^e (1 + f), |f| < ½, log u = (e − 32) log 2 + f − f²/2 + f³ P(f), P fitted at Chebyshev nodes to
    2.4e-8.
    """
    value = _F(_F(word) + _F(0.5))
    bits = _F(value).view(np.int32)
    e = _I(_I(bits - _I(0x3F3504F3)) >> _I(23))  # the bits of √½
    f = _I(bits - _I(e << _I(23))).view(np.float32) - _F(1)
    p = _F(-0.0810155833)
    p = p * f + _F(0.127123077)
    p = p * f + _F(-0.12972239)
    p = p * f + _F(0.142021738)
    p = p * f + _F(-0.166422476)
    p = p * f + _F(0.200014686)
    p = p * f + _F(-0.250002965)
    p = p * f + _F(0.333333286)
    log = _F(e - _I(32)) * _LN2 + (f - _F(0.5) * f * f + f * f * f * p)
    return np.sqrt(max(_F(-2) * log, _F(0)))


@_compiled(inline="always")
def _turned(quadrant: Any, cosine: Any, sine: Any) -> Any:
    """Cosine and sine of an angle to which so many quarter turns are added."""
    odd = (quadrant & _U(1)) != _U(0)
    across, along = (sine, cosine) if odd else (cosine, sine)
    return (
        -across if (_U(quadrant + _U(1)) & _U(2)) != _U(0) else across,
        -along if (quadrant & _U(2)) != _U(0) else along,
    )


@_compiled(inline="always")
def _direction(word: Any) -> Any:
    """Cosine and sine of 2π·word/2³², to 1e-7.

    The nearest multiple of π/2 is taken out in integers; what is left, within π/4, goes into polynomials fitted at
    Chebyshev nodes to 1.3e-8.
    """
    quadrant = _U(_U(word + _U(0x20000000)) >> _U(30))
    t = _F(_I(_U(word - _U(quadrant << _U(30))))) * _TURN
    y = t * t
    sine = t + t * y * ((_F(-0.000195879499) * y + _F(0.00833274863)) * y + _F(-0.166666647))
    cosine = _F(1) - _F(0.5) * y + y * y * ((_F(2.45479913e-05) * y + _F(-0.00138883033)) * y + _F(0.0416666647))
    return _turned(quadrant, cosine, sine)


@_compiled()
def _draw_words(words: Any, first: Any, k0: Any, k1: Any) -> None:
    """Fill ``[4, 256]`` from 256 counters in a row."""
    one, two, three, four = words[0], words[1], words[2], words[3]
    for i in range(one.shape[0]):
        counter = first + _L(i)
        one[i], two[i], three[i], four[i] = _philox(counter & _LOW, counter >> _HALF, _L(0), _L(0), k0, k1)


@_compiled(fastmath=_FAST)
def _add(radii: Any, angles: Any, cosines: Any, sines: Any, std: Any, factor: Any) -> None:  # noqa: PLR0917
    """(value + std·z)·factor in place, where one value takes a pair's cosine and one its sine."""
    for i in range(radii.shape[0]):
        radius = std * _radius(radii[i])
        cosine, sine = _direction(angles[i])
        cosines[i] = (cosines[i] + radius * cosine) * factor
        sines[i] = (sines[i] + radius * sine) * factor


@_compiled()
def _privatise(values: Any, first: Any, last: Any, offset: Any, key: Any, std: Any, factor: Any) -> None:  # noqa: PLR0917
    """Do as :func:`_add` says to chunks ``first`` to ``last`` of a tensor whose chunk 0 has the number ``offset``."""
    words = np.empty((4, _COUNTERS), np.uint32)
    spare = np.zeros(_CHUNK, np.float32)
    n = _COUNTERS
    for chunk in range(first, last):
        start = chunk * _CHUNK
        left = min(_CHUNK, values.shape[0] - start)
        part = values[start : start + left]
        whole = left == _CHUNK
        room = part if whole else spare  # always a whole chunk, so that every value is computed alike
        if not whole:
            room[:left] = part
        _draw_words(words, (offset + _L(chunk)) * _L(n), key & _LOW, key >> _HALF)
        _add(words[0], words[1], room[:n], room[n : 2 * n], std, factor)
        _add(words[2], words[3], room[2 * n : 3 * n], room[3 * n :], std, factor)
        if not whole:
            part[:] = room[:left]


@_compiled(inline="always")
def _exact_radius(word: Any) -> Any:
    """√(−2 log u) in float64 at u = (⌊word/2¹¹⌋ + ½)/2⁵³; at most 8.65.

    With u = 2^e m and s = (m − 1)/(m + 1), log m = 2(s + s³/3 + s⁵/5 + …), where s² < 0.0295.
    """
    bits = _D((_D(word >> _L(11)) + 0.5) * 2.0**-53).view(np.int64)
    e = _J(bits - _J(0x3FE6A09E667F3BCD)) >> _J(52)  # the bits of √½
    m = _J(bits - (e << _J(52))).view(np.float64)
    s = (m - 1.0) / (m + 1.0)
    q = s * s
    p = 1 / 23
    for k in (21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1):
        p = p * q + 1.0 / k
    return np.sqrt(max(-2 * (_D(e) * 0.6931471805599453 + 2 * s * p), 0.0))


@_compiled(inline="always")
def _exact_direction(word: Any) -> Any:
    """Cosine and sine of 2π·word/2⁶⁴ in float64, by their Taylor series within π/4 of a multiple of π/2."""
    quadrant = (word + _L(1 << 61)) >> _L(62)
    t = _D(_J(word - (quadrant << _L(62)))) * _EXACT_TURN
    y = t * t
    sine, cosine = 1.0, 1.0
    for k in (18, 16, 14, 12, 10, 8, 6, 4, 2):
        sine = 1.0 - y * (1.0 / (k * (k + 1.0))) * sine
        cosine = 1.0 - y * (1.0 / (k * (k - 1.0))) * cosine
    return _turned(_U(quadrant), cosine, t * sine)


@_compiled(fastmath=_FAST)
def _sum_of_four(words: Any, cosines: Any, sines: Any) -> None:
    """Half the sum of four values, twice ``[n]``, from ``words [8, n]``: of four pairs the cosines, and the sines."""
    radii, angles = words[:4], words[4:]
    cosines[:] = 0
    sines[:] = 0
    for k in range(4):
        radius_words, angle_words = radii[k], angles[k]
        for i in range(cosines.shape[0]):
            radius = 0.5 * _exact_radius(radius_words[i])
            cosine, sine = _exact_direction(angle_words[i])
            cosines[i] += radius * cosine
            sines[i] += radius * sine


class Secure:
    """Randomness that nobody can repeat: the keystream of AES-256 in counter mode under a key from the system.

    The key is drawn at construction and is nowhere but in the cipher's own state, which cannot be copied or saved.
    """

    def __init__(self) -> None:
        key, start = secrets.token_bytes(32), secrets.token_bytes(16)
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(start)).encryptor()

    def _words(self, count: int) -> Any:
        return np.frombuffer(self._cipher.update(bytes(8 * count)), dtype=np.uint64)

    def seed(self) -> int:
        """Draw a seed in [0, 2**63) for what only has to be hidden (latent draws, dropout), not to be exact."""
        return int(self._words(1)[0] >> np.uint64(1))

    def uniform(self, count: int) -> FloatArray:
        """Multiples of 2⁻⁵³ in [0, 1), ``[count]``."""
        return (self._words(count) >> np.uint64(11)) * 2.0**-53

    def normal(self, count: int) -> FloatArray:
        """Standard Gaussian values in float64, ``[count]``.

        Notes
        -----
        Each is half the sum of four by Box-Muller, from four pairs. Which floating-point numbers a single one can be
        at all, and so which secret a noisy sum can have come from (Mironov 2012), is found by a search; with four it
        is out of reach (Holohan and Braghin 2021).
        """
        half = -(-count // 2)
        values = np.empty((2, half))
        _sum_of_four(self._words(8 * half).reshape(8, half), values[0], values[1])
        return values.reshape(-1)[:count]


#: Where random numbers come from.
Source = torch.Generator | Secure


def uniform(count: int, source: Source) -> FloatArray:
    """Multiples of 2⁻⁵³ in [0, 1), ``[count]``."""
    if isinstance(source, Secure):
        return source.uniform(count)
    return torch.rand(count, generator=source, dtype=torch.float64).numpy()


def _privatise_some(  # noqa: PLR0917
    arrays: Sequence[FloatArray], begins: Sequence[int], first: int, last: int, key: Any, std: Any, factor: Any
) -> None:  # fmt: skip
    """Do the chunks ``first`` to ``last`` of all arrays, whose own first chunks have the numbers ``begins``."""
    for array, begin in zip(arrays, begins, strict=True):
        own = -(-len(array) // _CHUNK)
        low, high = max(first - begin, 0), min(last - begin, own)
        if low < high:
            _privatise(array, low, high, _L(begin), key, std, factor)


def _privatise_seeded(arrays: Sequence[FloatArray], source: torch.Generator, std: float, expected: float) -> None:
    high, low = torch.randint(0, 2**32, (2,), generator=source).tolist()
    *begins, chunks = accumulate((-(-len(array) // _CHUNK) for array in arrays), initial=0)
    threads = torch.get_num_threads() if chunks >= _CHUNKS_FOR_THREADS else 1
    bounds = [chunks * k // threads for k in range(threads + 1)]
    numbers = _L(high << 32 | low), _F(std), _F(1 / expected)
    others = [
        threading.Thread(target=_privatise_some, args=(arrays, begins, bounds[k], bounds[k + 1], *numbers))
        for k in range(1, threads)
    ]
    for thread in others:
        thread.start()
    _privatise_some(arrays, begins, bounds[0], bounds[1], *numbers)
    for thread in others:
        thread.join()


def _is_plain(value: Tensor) -> bool:
    return value.dtype == torch.float32 and value.device.type == "cpu" and value.is_contiguous()


@torch.no_grad()
def privatise(sums: Sequence[Tensor], source: Source, std: float, expected: float) -> None:
    """Turn sums into noisy means in place: (sum + N(0, std²))/expected, one draw for each entry.

    Parameters
    ----------
    sums
        Tensors of any shapes; float32 on the CPU without gaps takes one pass over memory.
    source
        A generator gives the same noise for the same state and shapes. :class:`Secure` adds in float64, before the one
        rounding to the tensor's own precision.
    std : >= 0
        Of the noise on the sum; 0 draws nothing.
    expected : > 0
        What the noisy sum is divided by.
    """
    if std == 0:
        for value in sums:
            value.div_(expected)
    elif isinstance(source, Secure):
        for value in sums:
            noise = torch.empty(value.shape, dtype=torch.float64)
            for part in noise.view(-1).split(_SECURE):
                part.copy_(torch.from_numpy(source.normal(len(part))))
            value.copy_(noise.mul_(std).add_(value.cpu()).div_(expected))
    else:
        plain = [value if _is_plain(value) else torch.zeros(value.shape) for value in sums]
        _privatise_seeded([value.view(-1).numpy() for value in plain], source, std, expected)
        for value, noise in zip(sums, plain, strict=True):
            if noise is not value:
                value.div_(expected).add_(noise.to(value))


def normal(shape: Sequence[int], source: Source, std: float = 1.0) -> Tensor:
    """Gaussian noise of mean 0 in float32, of a shape."""
    noise = torch.zeros(tuple(shape))
    privatise([noise], source, std, 1.0)
    return noise

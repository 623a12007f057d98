"""Noise against published vectors, against exact functions, and against the distribution that it claims to have."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import secrets
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from scforget import gaussian

Values = npt.NDArray[np.float64]
N = 1_000_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def known_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Secure sources whose keys are known, so that a test is right or wrong for good."""
    numbers = itertools.count(1)
    monkeypatch.setattr(secrets, "token_bytes", lambda size: bytes([next(numbers)]) * size)


def fast(count: int, seed: int = 0) -> Values:
    return gaussian.normal((count,), seeded(seed)).double().numpy()


def secure(count: int) -> Values:
    return gaussian.Secure().normal(count)


SOURCES = pytest.mark.parametrize("draw", [fast, secure])

# Counter, key and output of philox4x32-10 in the known-answer file of Random123, the code of Salmon et al. (2011).
VECTORS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "wanted"), VECTORS)
def test_philox_gives_the_known_answers(counter: list[int], key: list[int], wanted: list[int]) -> None:
    assert list(gaussian._philox(*map(np.uint64, counter + key))) == wanted


def test_draw_words_counts_beyond_32_bits_and_takes_the_whole_key() -> None:
    words = np.empty((4, 256), np.uint32)
    gaussian._draw_words(words, np.uint64(2**32 - 1), np.uint64(7), np.uint64(9))
    for index, counter in enumerate([2**32 - 1, 2**32]):
        low, high = counter % 2**32, counter >> 32
        wanted = gaussian._philox(*map(np.uint64, [low, high, 0, 0, 7, 9]))
        assert tuple(words[:, index]) == wanted


def some_words(bits: int) -> list[int]:
    top = 2**bits
    edges = [0, 1, 2, 5, top // 8, top // 4, top // 2, top - 2, top - 1]
    edges += [k * top // 8 + d for k in range(1, 8) for d in (-1, 0, 1)]
    return edges + [int(v) >> (64 - bits) for v in np.random.default_rng(0).integers(0, 2**64, 3000, dtype=np.uint64)]


def test_radius_and_direction_are_those_of_box_and_muller() -> None:
    """−2 log u is taken from a word of 32 bits that float32 rounds to 24, so that it is compared at the rounded one."""
    for word in some_words(32):
        rounded = float(np.float32(np.float32(word) + np.float32(0.5)))
        wanted = math.sqrt(-2 * math.log(rounded / 2**32)) if rounded < 2**32 else 0.0
        assert gaussian._radius(np.uint32(word)) == pytest.approx(wanted, rel=3e-7)
        angle = 2 * math.pi * word / 2**32
        assert gaussian._direction(np.uint32(word)) == pytest.approx((math.cos(angle), math.sin(angle)), abs=1.5e-7)
    assert gaussian._radius(np.uint32(0)) == pytest.approx(6.7637, abs=1e-3)


def test_exact_radius_and_direction_are_exact() -> None:
    for word in some_words(64):
        u = ((word >> 11) + 0.5) / 2**53
        assert gaussian._exact_radius(np.uint64(word)) == pytest.approx(math.sqrt(-2 * math.log(u)), rel=1e-15)
        turn = math.fmod(word / 2**64 * 2, 2)
        angle = math.pi * turn
        found = gaussian._exact_direction(np.uint64(word))
        assert found == pytest.approx((math.cos(angle), math.sin(angle)), abs=2e-15)


@SOURCES
@pytest.mark.usefixtures("known_keys")
def test_normal_has_the_moments_of_the_normal_distribution(draw: Callable[[int], Values]) -> None:
    values = draw(N)
    # the variance of the k-th power of a standard normal value is E z^2k − (E z^k)²
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((values**power).mean() - mean) < 4 * math.sqrt(variance / N), power


@SOURCES
@pytest.mark.usefixtures("known_keys")
def test_normal_passes_kolmogorov_and_smirnov(draw: Callable[[int], Values]) -> None:
    values = draw(N)
    assert stats.kstest(values, "norm").pvalue > 1e-3
    neighbours = (values[::2] + values[1::2]) / math.sqrt(2)
    assert stats.kstest(neighbours, "norm").pvalue > 1e-3


@SOURCES
@pytest.mark.usefixtures("known_keys")
def test_normal_has_the_tails_of_the_normal_distribution(draw: Callable[[int], Values]) -> None:
    count = 20 * N
    sizes = np.abs(draw(count))
    for sigma in (4, 5):
        expected = count * 2 * stats.norm.sf(sigma)
        low, high = stats.poisson.interval(1 - 1e-4, expected)
        assert low <= (sizes > sigma).sum() <= high


@SOURCES
@pytest.mark.usefixtures("known_keys")
def test_normal_is_not_correlated_with_itself(draw: Callable[[int], Values]) -> None:
    """256, 512 and 768 are how far apart two values of one counter are, N/2 those of the same secure pairs."""
    values = draw(N)
    for what in (values, values**2):
        for lag in (1, 2, 3, 4, 8, 255, 256, 257, 512, 768, 1024, 8192, N // 2):
            found = np.corrcoef(what[:-lag], what[lag:])[0, 1]
            assert abs(found) < 4.5 / math.sqrt(N - lag), lag


def streams() -> dict[str, tuple[Values, Values]]:
    generator, flipped = seeded(), np.zeros((2, N // 1024 * 1024), np.float32)
    after = [gaussian.normal((N,), generator).double().numpy() for _ in range(2)]
    for row, key in zip(flipped, (5, 5 | 1 << 63), strict=True):
        gaussian._privatise(row, 0, N // 1024, np.uint64(0), np.uint64(key), np.float32(1), np.float32(1))
    return {
        "of neighbouring seeds": (fast(N, 0), fast(N, 1)),
        "one after the other": (after[0], after[1]),
        "of keys that differ in one bit": (flipped[0].astype(float), flipped[1].astype(float)),
        "of two secure sources": (secure(N), secure(N)),
    }


@pytest.mark.usefixtures("known_keys")
def test_normal_streams_are_independent() -> None:
    for what, (one, other) in streams().items():
        for power in (1, 2):
            found = np.corrcoef(one**power, other**power)[0, 1]
            assert abs(found) < 4.5 / math.sqrt(len(one)), what
        assert not np.isin(one[:1000], other[:1000]).any()


def test_normal_is_reproducible_and_resumable() -> None:
    generator = seeded(3)
    first = gaussian.normal((5, 7), generator)
    state = generator.get_state()
    second = gaussian.normal((5, 7), generator, 2.0)
    assert first.shape == (5, 7)
    assert first.dtype == torch.float32
    assert torch.equal(gaussian.normal((5, 7), seeded(3)), first)
    generator.set_state(state)
    assert torch.equal(gaussian.normal((5, 7), generator, 2.0), second)
    assert not torch.equal(second, 2 * first)
    torch.testing.assert_close(gaussian.normal((5, 7), seeded(3), 2.0), 2 * first)
    assert gaussian.normal((), seeded(3)) == first[0, 0]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(0, 5000), st.integers(0, 5000))
def test_normal_begins_alike_whatever_its_size(one: int, other: int) -> None:
    short, long = sorted([one, other])
    assert torch.equal(gaussian.normal((long,), seeded(1))[:short], gaussian.normal((short,), seeded(1)))


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_privatise_does_not_depend_on_threads(with_threads: Callable[[int], None]) -> None:
    shapes = [(300, 401), (7,), (), (0,), (1024,), (50_000,)]
    torch.manual_seed(0)
    sums, found = [torch.randn(shape) for shape in shapes], []
    for threads in (1, 2, 3, 8):
        with_threads(threads)
        found.append([value.clone() for value in sums])
        gaussian.privatise(found[-1], seeded(4), 1.5, 10)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))
    noise = torch.cat([(10 * got - value).ravel() / 1.5 for got, value in zip(found[0], sums, strict=True)])
    assert len(noise.unique()) > 0.99 * len(noise)  # no two tensors share a stream
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-3


def test_privatise_adds_the_noise_and_divides() -> None:
    value = torch.linspace(-3, 3, 3000).view(30, 100)
    noisy = value.clone()
    gaussian.privatise([noisy], seeded(4), 1.5, 10)
    torch.testing.assert_close(noisy, (value + gaussian.normal((30, 100), seeded(4), 1.5)) / 10)


def test_privatise_treats_any_tensor_alike() -> None:
    value = torch.linspace(-3, 3, 3000).view(30, 100)
    wanted = value.clone()
    gaussian.privatise([wanted], seeded(4), 1.5, 10)
    for other in (value.double(), value.T.contiguous().T, torch.zeros(30, 200)[:, ::2].copy_(value)):
        gaussian.privatise([other], seeded(4), 1.5, 10)
        torch.testing.assert_close(other.float(), wanted)
    parameter = torch.nn.Parameter(value.clone())
    gaussian.privatise([parameter], seeded(4), 1.5, 10)
    assert torch.equal(parameter, wanted)


@pytest.mark.parametrize("make", [seeded, gaussian.Secure])
def test_privatise_without_noise_divides_and_draws_nothing(make: Callable[[], gaussian.Source]) -> None:
    source, value = make(), torch.arange(5.0)
    before = source.get_state() if isinstance(source, torch.Generator) else None
    gaussian.privatise([value], source, 0.0, 4)
    assert torch.equal(value, torch.arange(5.0) / 4)
    assert before is None or torch.equal(source.get_state(), before)


@pytest.mark.usefixtures("known_keys")
def test_privatise_adds_secure_noise_before_it_rounds() -> None:
    for shape in ((200, 301), (3,), (), (0,)):
        value = torch.full(shape, 5.0)
        gaussian.privatise([value], gaussian.Secure(), 2.0, 10)
        assert value.shape == shape
        assert value.dtype == torch.float32
        noise = (10 * value - 5).ravel() / 2
        if len(noise) > 1000:
            assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-3
            assert len(noise.unique()) > 0.99 * len(noise)


def test_secure_sources_never_repeat_and_ignore_every_seed() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        source = gaussian.Secure()
        drawn += [source.normal(100), source.normal(100), source.uniform(100), source.uniform(100)]
    assert len(np.unique(np.concatenate(drawn))) == 800


def test_secure_sources_cannot_be_copied_or_saved() -> None:
    source = gaussian.Secure()
    for attempt in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError):
            attempt(source)


@pytest.mark.usefixtures("known_keys")
def test_secure_values_are_halves_of_sums_of_four() -> None:
    """Of four pairs one value takes the cosines and one the sines."""
    source, again = gaussian.Secure(), gaussian.Secure()
    words = source._words(80).reshape(8, 10)
    cosines, sines = np.empty(10), np.empty(10)
    gaussian._sum_of_four(words, cosines, sines)
    u = ((words >> np.uint64(11)) + 0.5) / 2.0**53
    radius, angle = np.sqrt(-2 * np.log(u[:4])), 2 * np.pi * (words[4:] / 2.0**64)
    np.testing.assert_allclose(cosines, (radius * np.cos(angle)).sum(0) / 2, rtol=0, atol=1e-14)
    np.testing.assert_allclose(sines, (radius * np.sin(angle)).sum(0) / 2, rtol=0, atol=1e-14)
    assert again.normal(7).shape == (7,)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_secure_draws_any_number(count: int) -> None:
    source = gaussian.Secure()
    assert source.normal(count).shape == source.uniform(count).shape == (count,)
    assert 0 <= source.seed() < 2**63


@pytest.mark.usefixtures("known_keys")
@pytest.mark.parametrize("make", [seeded, gaussian.Secure])
def test_uniform_is_uniform_in_multiples_of_a_bit(make: Callable[[], gaussian.Source]) -> None:
    values = gaussian.uniform(N, make())
    assert values.min() >= 0
    assert values.max() < 1
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert np.array_equal(np.floor(values * 2.0**53), values * 2.0**53)
    assert (np.floor(values * 2.0**53) % 2).mean() == pytest.approx(0.5, abs=0.002)

"""Observation models against scipy, exact products, their limits, and automatic differentiation."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from torch import Tensor

from scforget.arrays import FloatArray
from scforget.models.likelihoods import nb_log_likelihood, nb_log_prob, squared_error, zinb_log_prob

COUNTS = (0, 1, 2, 5, 20, 100, 1000, 5000)
SWITCH = 16.0  # from here on Stirling's series replaces differences of lgamma
DISPERSIONS = (1e-3, 0.03, 1.0, 10.0, 15.999, SWITCH, 16.001, 100.0, 500.0, 1e4, 1e6)
MEANS = tuple(np.logspace(-6, 4, 11))
LIMIT = 15.0  # of log r


@cache
def log_rising_over_factorial(count: int, r: float) -> float:
    """Return log of r(r+1)...(r+x−1) / (x! r^x), as a product: no lgamma, nothing cancels."""
    steps = np.arange(count)
    return math.fsum(np.log1p(steps / r)) - math.fsum(np.log1p(steps))


def by_product(counts: FloatArray, log_mean: FloatArray, log_r: FloatArray) -> FloatArray:
    """NB log-probability in float64 from the product form of the binomial coefficient, elementwise."""
    r = np.exp(log_r)
    coefficient = [log_rising_over_factorial(int(x), float(one)) for x, one in zip(counts, r, strict=True)]
    return np.array(coefficient) + counts * log_mean - (counts + r) * np.log1p(np.exp(log_mean) / r)


def grid(counts: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Every combination of counts, log means and log inverse dispersions."""
    values = torch.tensor(list(product(counts, np.log(MEANS), np.log(DISPERSIONS))), dtype=torch.float64)
    x, log_mean, log_r = values.to(dtype).unbind(1)
    return x, log_mean, log_r


def relative_error(x: Tensor, log_mean: Tensor, log_r: Tensor) -> FloatArray:
    """Of :func:`nb_log_prob`, at the very numbers it is given (rounded to float32 or not)."""
    wanted = by_product(x.double().numpy(), log_mean.double().numpy(), log_r.double().numpy())
    return np.asarray(np.abs(nb_log_prob(x, log_mean, log_r).double().numpy() / wanted - 1))


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_nb_log_prob_equals_scipy_in_float64() -> None:
    """Where scipy is itself that exact: 1 − p loses digits at tiny μ/r, its gammaln differences at large r."""
    x, log_mean, log_r = grid(COUNTS, torch.float64)
    r, mean = log_r.exp(), log_mean.exp()
    exact = (r <= 1e3) & (mean / r >= 1e-5)
    wanted = stats.nbinom.logpmf(x, r, r / (r + mean))
    assert exact.sum() > len(x) / 2
    np.testing.assert_allclose(nb_log_prob(x, log_mean, log_r)[exact], wanted[exact], rtol=1e-10)


def test_nb_log_prob_is_exact_in_float64_over_the_whole_range() -> None:
    assert relative_error(*grid(COUNTS, torch.float64)).max() < 1e-10


def test_nb_log_prob_is_exact_in_float32_for_counts_up_to_20() -> None:
    """Elementwise 1e-5 holds up to counts of 20 at any r and μ; beyond, large terms cancel (see the next test)."""
    assert relative_error(*grid((0, 1, 2, 3, 5, 10, 20), torch.float32)).max() < 1e-5


def test_nb_log_prob_in_float32_loses_digits_only_to_cancellation() -> None:
    """x log μ − log x! is a difference of numbers near x log x: a few of their roundings remain, 0.01 nats at 5,000."""
    x, log_mean, log_r = grid(COUNTS, torch.float32)
    wanted = by_product(x.double().numpy(), log_mean.double().numpy(), log_r.double().numpy())
    got = nb_log_prob(x, log_mean, log_r).double().numpy()
    rounding = np.finfo(np.float32).eps
    terms = x.numpy() * np.maximum(1, np.log(np.maximum(x.numpy(), 1)))
    assert (np.abs(got - wanted) <= 4 * rounding * terms + 1e-5 * np.abs(wanted)).all()


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.integers(0, 20), st.floats(math.log(1e-3), math.log(1e6)), st.floats(math.log(1e-6), math.log(1e4)))
def test_nb_log_prob_is_exact_anywhere_in_float32(count: int, log_r: float, log_mean: float) -> None:
    error = relative_error(*(torch.tensor([value], dtype=torch.float32) for value in (count, log_mean, log_r)))
    assert error.max() < 1e-5


@pytest.mark.parametrize("largest", [0, 5000])
def test_nb_log_prob_summed_over_genes_is_exact_in_float32(largest: int) -> None:
    """Per-cell sums over 500 genes as single cells have them, most counts small, one of them up to 5,000.

    A cell in which most counts are in the thousands would lose a third digit of the 1e-5 (2.5e-5 at 500 genes whose
    means are log-uniform up to 5,000).
    """
    rng = np.random.default_rng(0)
    log_mean = rng.uniform(math.log(1e-3), math.log(50), (32, 500)).astype(np.float32)
    log_r = rng.uniform(math.log(1e-3), math.log(1e6), (32, 500)).astype(np.float32)
    r, mean = np.exp(log_r, dtype=np.float64), np.exp(log_mean, dtype=np.float64)
    counts = np.minimum(rng.poisson(rng.gamma(r, mean / r)), 200).astype(np.float32)
    counts[:, 0] = np.maximum(counts[:, 0], largest * rng.uniform(size=32)).round()
    wanted = nb_log_prob(*(torch.from_numpy(a.astype(np.float64)) for a in (counts, log_mean, log_r))).sum(1)
    got = nb_log_prob(*map(torch.from_numpy, (counts, log_mean, log_r))).sum(1)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_nb_log_prob_is_continuous_where_stirling_takes_over(count: int, dtype: torch.dtype) -> None:
    """Value and gradient on both sides of r = 16 are those of the exact form, so neither jumps."""
    eps = torch.finfo(dtype).eps
    log_r = torch.log(SWITCH * (1 + torch.tensor([-4, -2, -1, 0, 1, 2, 4], dtype=dtype) * 4 * eps)).requires_grad_()
    x, log_mean = torch.full_like(log_r, count), torch.full_like(log_r, math.log(7))
    value = nb_log_prob(x, log_mean, log_r)
    (gradient,) = torch.autograd.grad(value.sum(), log_r)
    jump = value.detach().max() - value.detach().min()
    assert float(jump) <= 64 * eps * max(1, float(value.detach().abs().max()))
    # d/d log r = r (ψ(x+r) − ψ(r) − log(1 + μ/r) + (μ − x)/(μ + r))
    r, mean = SWITCH, 7.0
    slope = special.digamma(count + r) - special.digamma(r) - math.log1p(mean / r) + (mean - count) / (mean + r)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    np.testing.assert_allclose(gradient, r * slope, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("log_r", [-6.0, 0.5, math.log(15.9), math.log(16.1), 9.0])
def test_nb_log_prob_has_the_gradients_of_its_values(log_r: float) -> None:
    x = double(0, 1, 4, 30, 700)
    log_mean = double(-5, 0.3, 1, 3.2, 6.5).requires_grad_()
    dispersions = torch.full((5,), log_r, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: nb_log_prob(x, a, b), (log_mean, dispersions))


def whole_cells(
    cells: int, genes: int, seed: int, *, largest: int = 30, spread: float = 3.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mostly empty float64 counts, logits, log library and log r of some cells."""
    rng = np.random.default_rng(seed)
    counts = torch.from_numpy(rng.integers(1, largest + 1, (cells, genes)) * (rng.uniform(size=(cells, genes)) < 0.2))
    logits, log_r = (torch.from_numpy(rng.normal(0, spread, (cells, genes))) for _ in range(2))
    library = counts.sum(1, keepdim=True).clamp(min=1)
    return counts.double(), logits, library.double().log(), log_r


def summed(counts: Tensor, logits: Tensor, log_library: Tensor, log_r: Tensor) -> Tensor:
    """What :func:`nb_log_likelihood` is: the elementwise form, summed."""
    return nb_log_prob(counts, logits.log_softmax(-1) + log_library, log_r).sum(-1)


def value_and_gradients(function: Callable[..., Tensor], values: tuple[Tensor, ...], weights: Tensor) -> list[Tensor]:
    """Value of each cell, and the gradients of their weighted sum in logits and log r."""
    counts, logits, log_library, log_r = (value.clone() for value in values)
    value = function(counts, logits.requires_grad_(), log_library, log_r.requires_grad_())
    return [value.detach(), *torch.autograd.grad((value * weights.to(value.dtype)).sum(), (logits, log_r))]


@settings(deadline=None, max_examples=60)
@given(
    cells=st.integers(0, 5), genes=st.integers(1, 40), seed=st.integers(0, 10**6),
    largest=st.sampled_from([1, 30, 5000]), spread=st.sampled_from([0.3, 3.0, 6.0]),
)  # fmt: skip
def test_nb_log_likelihood_is_the_elementwise_form_summed(
    cells: int, genes: int, seed: int, largest: int, spread: float
) -> None:
    """Value and gradients to 1e-8 in float64, and in float32 to 1e-6 of what they are sums of.

    A zero's gradient in log r is a difference of two numbers near r log(1 + μ/r). No cell and one cell are included.
    """
    values = whole_cells(cells, genes, seed, largest=largest, spread=spread)
    weights = torch.linspace(-1, 2, cells, dtype=torch.float64)
    wanted = value_and_gradients(summed, values, weights)
    terms = weights[:, None] * nb_log_prob(
        torch.zeros_like(values[0]), values[1].log_softmax(-1) + values[2], values[3]
    )
    for got, exact in zip(value_and_gradients(nb_log_likelihood, values, weights), wanted, strict=True):
        assert float((got - exact).norm()) <= 1e-8 * float(exact.norm() + terms.norm())
    single = tuple(value.float() for value in values)
    counts, logits, log_library, log_r = (value.double() for value in single)
    at_single = value_and_gradients(summed, (counts, logits, log_library, log_r), weights)
    terms = weights[:, None] * nb_log_prob(torch.zeros_like(counts), logits.log_softmax(-1) + log_library, log_r)
    for got, exact in zip(value_and_gradients(nb_log_likelihood, single, weights), at_single, strict=True):
        assert got.dtype == torch.float32
        assert float((got.double() - exact).norm()) <= 1e-6 * float(exact.norm() + terms.norm())


def test_nb_log_likelihood_has_the_gradients_of_its_values() -> None:
    counts, logits, log_library, log_r = whole_cells(3, 7, seed=1)
    inputs = logits.requires_grad_(), log_r.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, d: nb_log_likelihood(counts, a, log_library, d), inputs)


def test_nb_log_likelihood_takes_one_dispersion_for_all_cells() -> None:
    """As :class:`~scforget.models.vae.PerGene` gives it: expanded, so that its gradient is summed over cells."""
    counts, logits, log_library, log_r = whole_cells(4, 6, seed=2)
    rows = []
    for function in (nb_log_likelihood, summed):
        each_gene = log_r[0].clone().requires_grad_()
        rows.append(
            torch.autograd.grad(function(counts, logits, log_library, each_gene.expand(4, -1)).sum(), each_gene)
        )
    torch.testing.assert_close(*rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nb_log_likelihood_stays_finite_at_extreme_logits_and_clamps_the_dispersion(dtype: torch.dtype) -> None:
    values = torch.tensor(list(product([0, 1, 5000], [-1e4, -90, 0, 90, 1e4], [-1e4, -16, 0, 16, 1e4])), dtype=dtype)
    counts, logits, log_r = (column.clone()[None] for column in values.unbind(1))
    found = value_and_gradients(
        nb_log_likelihood, (counts, logits, counts.sum()[None, None].log(), log_r), torch.ones(1)
    )
    assert all(torch.isfinite(one).all() for one in found)
    assert not found[2][log_r.abs() > LIMIT].any()
    assert found[2][log_r.abs() <= LIMIT].any()


def test_nb_log_likelihood_refuses_a_second_derivative() -> None:
    """It writes its gradient out, and would otherwise pass off a constant as differentiable."""
    counts, logits, log_library, log_r = whole_cells(2, 5, seed=3)
    value = nb_log_likelihood(counts, logits.requires_grad_(), log_library, log_r).square().sum()
    (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_zinb_log_prob_has_the_gradients_of_its_values() -> None:
    x = double(0, 0, 1, 4, 30)
    parameters = [double(-5, 0.3, 1, 3.2, 4), double(-2, 0.5, 2, 3, 6), double(-3, 2, 0.1, -1, 4)]
    inputs = [parameter.requires_grad_() for parameter in parameters]
    assert torch.autograd.gradcheck(lambda a, b, c: zinb_log_prob(x, a, b, c), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probs_stay_finite_with_their_gradients_at_extreme_logits(dtype: torch.dtype) -> None:
    values = torch.tensor(
        list(product([0, 1, 5000], [-80, 0, 12], [-1e4, -20, 0, 20, 1e4], [-1e4, -90, 0, 90, 1e4])), dtype=dtype
    )
    x, *parameters = (column.clone() for column in values.unbind(1))
    inputs = [parameter.requires_grad_() for parameter in parameters]
    for value, used in ((nb_log_prob(x, *inputs[:2]), inputs[:2]), (zinb_log_prob(x, *inputs), inputs)):
        assert torch.isfinite(value).all()
        assert (value <= 0).all()
        assert all(torch.isfinite(gradient).all() for gradient in torch.autograd.grad(value.sum(), used))


@pytest.mark.parametrize("sign", [-1, 1])
def test_nb_log_prob_clamps_the_dispersion(sign: int) -> None:
    x, log_mean = double(0, 3, 50), double(0.1, 1, 4)
    beyond = torch.full((3,), sign * (LIMIT + 7), dtype=torch.float64, requires_grad=True)
    value = nb_log_prob(x, log_mean, beyond)
    torch.testing.assert_close(value, nb_log_prob(x, log_mean, double(sign * LIMIT)), rtol=0, atol=0)
    assert torch.autograd.grad(value.sum(), beyond)[0].abs().max() == 0


def test_nb_log_prob_tends_to_poisson_as_the_inverse_dispersion_grows() -> None:
    """The difference is ((x − μ)² − x) / 2r to first order, so it falls as 1/r."""
    x, mean = (torch.from_numpy(a.ravel()) for a in np.meshgrid(np.arange(40.0), [0.01, 1.0, 30.0]))
    poisson = torch.from_numpy(stats.poisson.logpmf(x.numpy(), mean.numpy()))
    for r in (1e4, 1e5, 1e6):
        difference = r * (nb_log_prob(x, mean.log(), double(math.log(r))) - poisson)
        torch.testing.assert_close(difference, ((x - mean) ** 2 - x) / 2, rtol=0, atol=40**3 / r)


@pytest.mark.parametrize(("mean", "r"), [(0.3, 0.4), (3.0, 0.5), (3.0, 16.0), (20.0, 1e5)])
def test_nb_log_prob_is_a_distribution_with_the_mean_and_variance_it_names(mean: float, r: float) -> None:
    x = torch.arange(2000, dtype=torch.float64)
    p = nb_log_prob(x, double(math.log(mean)), double(math.log(r))).exp()
    first, second = float((p * x).sum()), float((p * x * x).sum())
    assert float(p.sum()) == pytest.approx(1, abs=1e-10)
    assert first == pytest.approx(mean, rel=1e-9)
    assert second - first**2 == pytest.approx(mean + mean**2 / r, rel=1e-9)


@pytest.mark.parametrize("zero_logit", [-40.0, -3.0, 0.0, 3.0])
def test_zinb_log_prob_equals_the_mixture(zero_logit: float) -> None:
    x = torch.arange(200, dtype=torch.float64)
    mean, r, share = 4.0, 2.5, special.expit(zero_logit)
    nb = stats.nbinom.pmf(x.numpy(), r, r / (r + mean))
    wanted = np.log(share * (x.numpy() == 0) + (1 - share) * nb)
    got = zinb_log_prob(x, double(math.log(mean)), double(math.log(r)), double(zero_logit))
    np.testing.assert_allclose(got, wanted, rtol=1e-10)
    assert float(got.exp().sum()) == pytest.approx(1, abs=1e-10)


def test_zinb_log_prob_without_inflation_is_nb() -> None:
    x, log_mean, log_r = grid(COUNTS, torch.float64)
    torch.testing.assert_close(
        zinb_log_prob(x, log_mean, log_r, double(-1e5)), nb_log_prob(x, log_mean, log_r), rtol=1e-12, atol=1e-14
    )


def test_squared_error_equals_a_direct_computation() -> None:
    rng = np.random.default_rng(0)
    expression, logits = rng.gamma(1, size=(5, 7)), rng.normal(0, 3, (5, 7))
    wanted = np.empty((5, 7))
    for cell in range(5):
        shares = np.exp(logits[cell]) / np.exp(logits[cell]).sum()
        wanted[cell] = (expression[cell] - shares * expression[cell].sum()) ** 2
    np.testing.assert_allclose(squared_error(torch.tensor(expression), torch.tensor(logits)), wanted, rtol=1e-12)


def test_squared_error_is_nothing_at_the_true_shares() -> None:
    expression = torch.tensor([[1.0, 2.0, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(squared_error(expression, expression.log() + 3), torch.zeros_like(expression))

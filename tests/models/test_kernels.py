"""Compiled likelihoods against float64 and against torch; their exponentials, logarithms and Γ terms against NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import special
from torch import Tensor
from torch.nn.functional import softplus

from scforget.arrays import FloatArray
from scforget.errors import NonFiniteError
from scforget.models import likelihoods
from scforget.models.likelihoods import nb_log_likelihood, nb_log_prob, zinb_log_likelihood, zinb_log_prob
from scforget.tasks import VaeTask
from scforget.training import TrainingSettings, fit

kernels = pytest.importorskip("scforget.models.kernels")
LIMIT = 15.0  # of log r
Likelihood = Callable[..., Tensor]
LIKELIHOODS = {"nb": nb_log_likelihood, "zinb": zinb_log_likelihood}


class Cells(NamedTuple):
    """Some cells in float32 or float64, ``zero_logits`` for the zero-inflated likelihood alone."""

    counts: Tensor
    logits: Tensor
    log_library: Tensor
    log_r: Tensor
    zero_logits: Tensor | None

    def double(self) -> Cells:
        return Cells(*(None if one is None else one.double() for one in self))

    @property
    def given(self) -> list[Tensor]:
        return [one for one in self if one is not None]

    @property
    def parameters(self) -> list[Tensor]:
        return [one for one in (self.logits, self.log_r, self.zero_logits) if one is not None]


def cells_of(
    name: str, cells: int, genes: int, seed: int, *, largest: int = 30, spread: float = 2.0, whole: bool = True
) -> Cells:
    """Mostly empty counts, whole or not, and parameters, at numbers that float32 holds."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, largest + 1, (cells, genes)) - (0 if whole else rng.uniform(0.01, 0.99, (cells, genes)))
    counts = counts * (rng.uniform(size=(cells, genes)) < 0.2)
    logits, log_r, zero_logits = rng.normal(0, spread, (3, cells, genes))
    arrays = (counts, logits, np.log(np.maximum(counts.sum(1, keepdims=True), 1)), log_r, zero_logits)
    tensors = [torch.from_numpy(one.astype(np.float32)) for one in arrays]
    return Cells(*tensors[:4], tensors[4] if name == "zinb" else None)


def elementwise(values: Cells) -> Tensor:
    """What the likelihoods are: the elementwise forms, summed."""
    log_mean = values.logits.log_softmax(-1) + values.log_library
    if values.zero_logits is None:
        return nb_log_prob(values.counts, log_mean, values.log_r).sum(-1)
    return zinb_log_prob(values.counts, log_mean, values.log_r, values.zero_logits).sum(-1)


def value_and_gradients(function: Callable[[Cells], Tensor], values: Cells, weights: Tensor) -> list[Tensor]:
    """Value of each cell, and the gradients of their weighted sum in every parameter."""
    values = Cells(*(None if one is None else one.clone() for one in values))
    parameters = [parameter.requires_grad_() for parameter in values.parameters]
    value = function(values)
    return [value.detach(), *torch.autograd.grad((value * weights.to(value.dtype)).sum(), parameters)]


def likelihood(name: str) -> Callable[[Cells], Tensor]:
    return lambda values: LIKELIHOODS[name](*values.given)


def sizes_of_terms(values: Cells) -> list[Tensor]:
    """What each cell's value ``[B]`` and its gradients ``[B]`` are sums of, as norms; in float64.

    Value: x log(μ/r), r log(1 + μ/r), which is μ where few are expected and as sure as log μ is small, and the
    logarithms of both parts of the mixture. In log μ: x and (x + r)σ, and from there to the logits shares of their sum.
    In log r: these, and r log(1 + μ/r).
    """
    shares = values.logits.softmax(-1)
    log_r = values.log_r.clamp(-LIMIT, LIMIT)
    odds = values.logits.log_softmax(-1) + values.log_library - log_r
    soft, pulls = log_r.exp() * softplus(odds), values.counts + (values.counts + log_r.exp()) * odds.sigmoid()
    inflation = 0 if values.zero_logits is None else 1 + values.zero_logits.abs()
    value = values.counts * (1 + odds.abs() + log_r.abs()) + soft * (1 + odds.abs()) + inflation
    in_logits = pulls.norm(dim=1) + shares.norm(dim=1) * pulls.sum(1)
    found = [value.sum(1), in_logits, (pulls + soft + values.counts * log_r.abs()).norm(dim=1)]
    return found if values.zero_logits is None else [*found, torch.ones_like(shares).norm(dim=1)]


def assert_close(got: list[Tensor], wanted: list[Tensor], values: Cells, weights: Tensor, tolerance: float) -> None:
    """Cell by cell, by norm, relative to :func:`sizes_of_terms`."""
    weight = weights.abs().double()
    for index, (one, other, size) in enumerate(zip(got, wanted, sizes_of_terms(values.double()), strict=True)):
        apart = (one.double() - other.double()).unsqueeze(-1).flatten(1).norm(dim=1)
        allowed = tolerance * size * (weight if index else 1)
        assert (apart <= allowed + 1e-37).all(), (index, float((apart / allowed).max()))


@pytest.mark.parametrize("name", LIKELIHOODS)
@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    cells=st.integers(0, 4), genes=st.integers(1, 60), seed=st.integers(0, 10**6),
    largest=st.sampled_from([1, 30, 5000]), spread=st.sampled_from([0.3, 3.0, 6.0]), whole=st.booleans(),
)  # fmt: skip
@example(cells=0, genes=5, seed=0, largest=30, spread=3.0, whole=True)
@example(cells=1, genes=1, seed=3, largest=5000, spread=6.0, whole=True)
@example(cells=3, genes=1, seed=1, largest=30, spread=3.0, whole=False)
def test_compiled_likelihoods_equal_float64(
    name: str, cells: int, genes: int, seed: int, largest: int, spread: float, whole: bool
) -> None:
    """Value and gradients to 1e-6 of what they are sums of."""
    values = cells_of(name, cells, genes, seed, largest=largest, spread=spread, whole=whole)
    weights = torch.linspace(-1, 2, cells)
    got = value_and_gradients(likelihood(name), values, weights)
    assert all(one.dtype == torch.float32 for one in got)
    wanted = value_and_gradients(elementwise, values.double(), weights)
    assert_close(got, wanted, values, weights, 1e-6)


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("whole", [True, False])
def test_compiled_likelihoods_equal_those_of_torch(name: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    values, weights = cells_of(name, 16, 300, 4, whole=whole), torch.linspace(-1, 2, 16)
    got = value_and_gradients(likelihood(name), values, weights)
    monkeypatch.setattr(likelihoods, "COMPILED", None)
    assert_close(got, value_and_gradients(likelihood(name), values, weights), values, weights, 1e-6)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_likelihoods_are_compiled_for_float32_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    loops = {"negative_binomial": "nb", "zero_inflated": "zinb"}
    fakes = {loop: lambda *_, which=which: called.append(which) for loop, which in loops.items()}
    monkeypatch.setattr(likelihoods, "COMPILED", SimpleNamespace(**fakes))
    values = cells_of(name, 2, 5, 0)
    likelihood(name)(values.double())
    likelihood(name)(values._replace(log_library=values.log_library.double()))
    assert called == []
    likelihood(name)(values)
    assert called == [name]


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_compiled_likelihoods_keep_the_small_gradients_of_zeros(name: str) -> None:
    """In log r a zero's is r(log(1 + u) − u/(1 + u)), u = μ/r: near −u²r/2, entry by entry to 1e-5 down to u = 1e-5."""
    values = cells_of(name, 4, 200, 6)
    odds = torch.linspace(-11.5, 2, 200).expand(4, -1)
    log_r = values.logits.log_softmax(-1) - odds
    inside = log_r.abs() < LIMIT
    values = values._replace(counts=torch.zeros(4, 200), log_library=torch.zeros(4, 1), log_r=log_r)
    if values.zero_logits is not None:
        values.zero_logits.fill_(-30)
    got, wanted = (value_and_gradients(f, v, torch.ones(4))[2] for f, v in
                   ((likelihood(name), values), (elementwise, values.double())))  # fmt: skip
    assert inside.sum() > 700
    torch.testing.assert_close(got[inside].double(), wanted[inside], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_compiled_likelihoods_sum_the_gradient_of_one_dispersion_for_all_cells(name: str) -> None:
    """As an expanded tensor, which has a stride of 0."""
    values = cells_of(name, 5, 40, 2)
    rows = []
    for function, given_values in ((likelihood(name), values), (elementwise, values.double())):
        each_gene = given_values.log_r[0].clone().requires_grad_()
        value = function(given_values._replace(log_r=each_gene.expand(5, -1)))
        rows.append(torch.autograd.grad(value.sum(), each_gene)[0].double())
    shared = values._replace(log_r=values.log_r[0].expand(5, -1))
    assert float((rows[0] - rows[1]).norm()) <= 1e-6 * float(sizes_of_terms(shared.double())[2].sum())


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_compiled_likelihoods_take_any_memory_layout_and_change_nothing(name: str) -> None:
    values, weights = cells_of(name, 6, 20, 3), torch.linspace(-1, 2, 6)
    wanted = value_and_gradients(likelihood(name), values, weights)
    fortran = Cells(*(None if one is None else one.T.contiguous().T for one in values))
    sliced = Cells(*(None if one is None else torch.stack([one, -one], -1)[..., 0] for one in values))
    for other in (fortran, sliced):
        assert not other.logits.is_contiguous()
        before = [one.clone() for one in other.given]
        parameters = [one.requires_grad_() for one in other.parameters]
        value = likelihood(name)(other)
        gradients = torch.autograd.grad((value * weights).sum(), parameters)
        assert all(torch.equal(one, same) for one, same in zip([value, *gradients], wanted, strict=True))
        assert all(torch.equal(one, same) for one, same in zip(other.given, before, strict=True))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_compiled_likelihoods_hold_at_extreme_logits_and_clamp_the_dispersion(name: str) -> None:
    grid = product([0, 1, 0.5, 5000], [-1e4, -90, 0, 90, 1e4], [-1e4, -16, 0, 16, 1e4], [-1e4, -90, 0, 90, 1e4])
    counts, logits, log_r, zero_logits = (column[None] for column in torch.tensor(list(grid)).unbind(1))
    log_library = counts.sum()[None, None].log()
    values = Cells(counts, logits, log_library, log_r, zero_logits if name == "zinb" else None)
    got = value_and_gradients(likelihood(name), values, torch.ones(1))
    assert all(torch.isfinite(one).all() for one in got)
    assert not got[2][log_r.abs() > LIMIT].any()
    assert got[2][log_r.abs() <= LIMIT].any()
    assert float(got[0]) == pytest.approx(float(elementwise(values.double())), rel=1e-6)


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize(
    ("which", "bad", "count"),
    [(key, math.nan, x) for key in ("logits", "log_r", "log_library", "counts") for x in (0, 3)]
    + [("logits", math.inf, 0), ("logits", math.inf, 3), ("logits", -math.inf, 3), ("counts", math.inf, 3)],
)
def test_compiled_likelihoods_pass_on_what_is_not_finite(name: str, which: str, bad: float, count: int) -> None:
    """A diverged model must be noticed: its value is NaN or infinite, in its cell alone."""
    values = cells_of(name, 3, 12, 5)
    values.counts[1, 0] = count
    getattr(values, which)[1, 0] = bad
    finite = torch.isfinite(value_and_gradients(likelihood(name), values, torch.ones(3))[0])
    assert finite.tolist() == [True, False, True]


@pytest.mark.parametrize("count", [0, 3])
def test_zinb_log_likelihood_passes_on_nan_zero_logits(count: int) -> None:
    values = cells_of("zinb", 3, 12, 5)
    assert values.zero_logits is not None
    values.counts[1, 0], values.zero_logits[1, 0] = count, math.nan
    assert torch.isfinite(likelihood("zinb")(values)).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("name", "head", "bad"),
    [(name, "scale", bad) for name in LIKELIHOODS for bad in (math.nan, math.inf)]
    + [("nb", "dispersion", math.nan), ("zinb", "dispersion", math.nan), ("zinb", "zero", math.nan)],
)
def test_training_ends_where_a_head_has_diverged(
    make_task: Callable[..., VaeTask], recipe: Callable[..., dict[str, Any]], name: str, head: str, bad: float
) -> None:
    task = make_task(likelihood=name)
    model, cells = task.new_model(0), np.arange(40)
    with torch.no_grad():
        getattr(model, head).bias[3] = bad
    with pytest.raises(NonFiniteError):
        fit(model, task, cells, cells, TrainingSettings(**recipe(max_epochs=1)), seed=0)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_compiled_likelihoods_refuse_a_second_derivative(name: str) -> None:
    values = cells_of(name, 2, 5, 3)
    logits = values.logits.requires_grad_()
    (gradient,) = torch.autograd.grad(likelihood(name)(values).square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def over(function: Any, values: FloatArray, dtype: type = np.float64) -> FloatArray:
    """A compiled function of one number, over many of them: ``[n]``, or ``[k, n]`` of k results."""
    return np.array([function(value) for value in values.astype(dtype)], np.float64).T


def relative(got: FloatArray, wanted: FloatArray) -> float:
    return float(np.abs(got / wanted - 1).max())


def test_exp_is_right_to_a_rounding() -> None:
    x = np.r_[np.random.default_rng(0).uniform(-87, 88, 50_000), -87, 0, 88].astype(np.float32)
    assert relative(over(kernels._exp, x, np.float32), np.exp(x.astype(np.float64))) < 1.2e-7
    assert kernels._exp(np.float32(0)) == 1


def test_exp64_is_right_to_1e_14() -> None:
    x = np.r_[np.random.default_rng(0).uniform(-700, 700, 50_000), -700, 0, 700]
    assert relative(over(kernels._exp64, x), np.exp(x)) < 1e-14
    assert kernels._exp64(0.0) == 1


def test_log1p_parts_do_not_cancel() -> None:
    """log(1 + u) − u/(1 + u) is u²/2 − 2u³/3 + 3u⁴/4 …; below u = 1e-18 the square leaves float32."""
    u = np.r_[np.linspace(0, 1, 20_001)[1:], np.logspace(-18, 0, 20_000)].astype(np.float32)
    exact = u.astype(np.float64)
    series = sum((-1) ** k * (k - 1) / k * exact**k for k in range(2, 12))
    excess = np.where(exact < 0.01, series, np.log1p(exact) - exact / (1 + exact))
    log1p, rest = over(kernels._log1p_parts, u, np.float32)
    assert relative(log1p, np.log1p(exact)) < 2e-7
    assert relative(rest, excess) < 5e-7
    assert kernels._log1p_parts(np.float32(0)) == (0, 0)


def test_log1p64_is_right_to_1e_12() -> None:
    u = np.r_[np.linspace(0, 1, 20_001)[1:], np.logspace(-300, 0, 20_000)]
    assert relative(over(kernels._log1p64, u), np.log1p(u)) < 1e-12
    assert kernels._log1p64(0.0) == 0


@pytest.mark.parametrize("x", [1, 2, 15, 16, 17, 100, 5000])
def test_gamma_terms_of_counts_are_sums(x: int) -> None:
    """Γ(x + r)/Γ(r) = r(r + 1)…(r + x − 1), so neither value cancels."""
    for r in np.exp(np.linspace(-LIMIT, LIMIT, 61)):
        steps = r + np.arange(x)
        logs, inverses = kernels._gamma_terms(float(x), float(r))
        assert logs == pytest.approx(math.fsum(np.log(steps)), rel=1e-12, abs=1e-12 * x)
        assert inverses == pytest.approx(math.fsum(1 / steps), rel=1e-10)


@pytest.mark.parametrize("x", [1e-3, 0.25, 0.5, 3.5, 15.99, 16.01, 200.3, 4999.5])
def test_gamma_terms_of_other_numbers_are_differences(x: float) -> None:
    for r in np.exp(np.linspace(-LIMIT, 5, 41)):
        logs, psis = kernels._gamma_terms(float(x), float(r))
        terms = abs(special.gammaln(x + r)), abs(special.gammaln(r)), abs(special.psi(r)), 1
        assert logs == pytest.approx(special.gammaln(x + r) - special.gammaln(r), abs=1e-13 * (sum(terms[:2]) + 30))
        assert psis == pytest.approx(special.psi(x + r) - special.psi(r), abs=1e-13 * sum(terms[2:]) + 1e-12)


def test_compiled_likelihoods_give_every_parameter_torchs_gradient(
    make_task: Callable[..., VaeTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    for changes in ({"likelihood": "nb"}, {"likelihood": "zinb", "dispersion": "gene"}):
        task = make_task(**changes)
        model, gradients = task.new_model(0).eval(), []
        for compiled in (kernels, None):
            monkeypatch.setattr(likelihoods, "COMPILED", compiled)
            model.zero_grad()
            task.loss(model, task.batch(np.arange(60)), None).total.mean().backward()
            gradients.append(torch.cat([p.grad.ravel() for p in model.parameters() if p.grad is not None]))
        assert float((gradients[0] - gradients[1]).norm()) < 1e-6 * float(gradients[1].norm())

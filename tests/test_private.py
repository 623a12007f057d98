"""Private training against Opacus, against a loop over cells, and against Google's accountant."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant
from opacus import GradSampleModule
from torch import Tensor, nn

from scforget import gaussian, private
from scforget.arrays import IntArray
from scforget.errors import DataError, NonFiniteError
from scforget.models.vae import VAE
from scforget.private import Mechanism
from scforget.tasks import VaeTask
from scforget.training import Effort

MakeTask = Callable[..., VaeTask]
KINDS = list(product(["nb", "zinb", "log_mse"], ["gene-cell", "gene"]))
CELLS: IntArray = np.array([5, 230, 71, 8, 9, 10, 150], dtype=np.int64)


def losses(task: VaeTask, model: VAE, cells: IntArray = CELLS, seed: int = 3) -> Callable[[], Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return lambda: task.loss(model, task.batch(cells), noise).total


def per_cell(task: VaeTask, model: VAE, cells: IntArray = CELLS) -> dict[str, Tensor]:
    """``[N, …]`` by parameter: each cell's gradient by a backward pass of its own."""
    total = losses(task, model, cells)()
    rows = [
        torch.autograd.grad(
            loss, list(model.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for loss in total
    ]
    names = [name for name, _ in model.named_parameters()]
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def clipped(each: dict[str, Tensor], clip: float) -> tuple[dict[str, Tensor], Tensor]:
    """Algorithm 1 of Abadi et al. (2016) on stored per-cell gradients, in double precision."""
    flat = torch.cat([value.double().flatten(1) for value in each.values()], 1)
    norms = flat.norm(dim=1)
    factors = [min(1.0, clip / norm) for norm in norms.tolist()]
    sums = {
        name: torch.stack([f * row for f, row in zip(factors, v.double(), strict=True)]).sum(0)
        for name, v in each.items()
    }
    return sums, norms


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """1e-5 of the whole sum's norm, tensor by tensor."""
    scale = float(torch.cat([value.double().ravel() for value in wanted.values()]).norm())
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        assert float((found[name].double() - value.double()).norm()) < 1e-5 * scale, name


@pytest.mark.parametrize(("likelihood", "dispersion"), KINDS)
def test_clipped_sums_equal_a_loop_over_cells(make_task: MakeTask, likelihood: str, dispersion: str) -> None:
    task = make_task(likelihood=likelihood, dispersion=dispersion)
    model = task.new_model(3).eval()
    each = per_cell(task, model)
    _, norms = clipped(each, 1.0)
    for clip in (1.0, float(norms.median()), math.inf):
        parameters = dict(model.named_parameters())
        found, total, found_norms = private.clipped_sums(model, parameters, losses(task, model), clip)
        assert_equal(found, clipped(each, clip)[0])
        torch.testing.assert_close(found_norms.double(), norms, rtol=1e-5, atol=0)
        assert torch.equal(total, losses(task, model)().detach())
        assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_clipped_sums_equal_those_of_opacus(make_task: MakeTask, likelihood: str) -> None:
    task = make_task(likelihood=likelihood, dropout=0.0)
    model = task.new_model(3).train()
    wrapped = GradSampleModule(task.new_model(3).train(), loss_reduction="sum")
    losses(task, wrapped._module)().sum().backward()
    each = {name.removeprefix("_module."): p.grad_sample for name, p in wrapped.named_parameters()}
    wanted, norms = clipped(each, float(clipped(each, 1.0)[1].median()))
    found, _, _ = private.clipped_sums(
        model, dict(model.named_parameters()), losses(task, model), float(norms.median())
    )  # fmt: skip
    assert_equal(found, wanted)
    assert not torch.allclose(found["scale.bias"].double(), each["scale.bias"].double().sum(0), rtol=1e-2)


def test_clipped_sums_bound_the_influence_of_a_cell(task: VaeTask) -> None:
    model = task.new_model(3).eval()
    parameters, clip = dict(model.named_parameters()), 0.5
    with torch.no_grad():  # without noise in z the other cells' gradients stay the same
        model.log_var.weight.zero_()
        model.log_var.bias.fill_(-60)
    with_it, without = (
        private.clipped_sums(model, parameters, losses(task, model, cells), clip)[0] for cells in (CELLS, CELLS[1:])
    )
    difference = torch.cat([(with_it[name] - without[name]).ravel() for name in with_it]).norm()
    assert float(difference) == pytest.approx(clip, rel=1e-4)


def test_clipped_sums_ignore_frozen_parameters(task: VaeTask) -> None:
    model = task.new_model(3).eval()
    some = {n: p for n, p in model.named_parameters() if not n.startswith("dispersion.")}
    found, _, _ = private.clipped_sums(model, some, losses(task, model), 1.0)
    each = {name: value for name, value in per_cell(task, model).items() if name in some}
    assert_equal(found, clipped(each, 1.0)[0])


def test_clipped_sums_refuse_a_parameter_that_they_would_miss(task: VaeTask) -> None:
    model = task.new_model(3)
    model.register_parameter("extra", nn.Parameter(torch.ones(2)))
    with pytest.raises(TypeError, match="extra"):
        private.clipped_sums(model, dict(model.named_parameters()), losses(task, model), 1.0)


def mechanism(**changes: float) -> Mechanism:
    return Mechanism(**{"clip": math.inf, "noise_multiplier": 0.0, "rate": 1.0, "expected": 7, "steps": 1, **changes})


def private_steps(task: VaeTask, model: VAE, optimiser: torch.optim.Optimizer, **changes: float) -> None:
    source, effort = torch.Generator().manual_seed(8), Effort()
    for seed in range(3):
        private.step(
            model, optimiser, dict(model.named_parameters()), losses(task, model, seed=seed),
            mechanism=mechanism(**changes), source=source, effort=effort,
        )  # fmt: skip
    assert effort.steps == 3


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_step_without_noise_and_clipping_is_the_optimisers_own(
    task: VaeTask, kind: type[torch.optim.Optimizer]
) -> None:
    model, plain = task.new_model(3).eval(), task.new_model(3).eval()
    private_steps(task, model, kind(model.parameters(), lr=1e-3))
    optimiser = kind(plain.parameters(), lr=1e-3)
    for seed in range(3):
        optimiser.zero_grad()
        losses(task, plain, seed=seed)().mean().backward()
        optimiser.step()
    for name, value in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-4, atol=2e-6)
        assert not torch.equal(value, task.new_model(3).get_parameter(name))


def test_step_adds_noise_of_the_right_size_to_the_sum(task: VaeTask) -> None:
    """SGD at rate 1 from one start: what differs is the noise over the expected batch size."""
    quiet, noisy = task.new_model(3).eval(), task.new_model(3).eval()
    for model, sigma in ((quiet, 0.0), (noisy, 3.0)):
        private.step(
            model, torch.optim.SGD(model.parameters(), lr=1.0), dict(model.named_parameters()), losses(task, model),
            mechanism=mechanism(clip=0.5, noise_multiplier=sigma, expected=10), effort=Effort(),
            source=torch.Generator().manual_seed(8),
        )  # fmt: skip
    pairs = zip(quiet.parameters(), noisy.parameters(), strict=True)
    noise = torch.cat([(other - one).detach().ravel() for one, other in pairs]).double()
    assert float(noise.std()) == pytest.approx(3.0 * 0.5 / 10, rel=4 / math.sqrt(2 * len(noise)))
    assert abs(float(noise.mean())) < 4 * 0.15 / math.sqrt(len(noise))


def test_step_of_an_empty_batch_is_pure_noise(task: VaeTask) -> None:
    model, noise = task.new_model(3), torch.Generator().manual_seed(8)
    private.step(
        model, torch.optim.SGD(model.parameters(), lr=1.0), dict(model.named_parameters()), None,
        mechanism=mechanism(clip=2.0, noise_multiplier=0.5), source=torch.Generator().manual_seed(8), effort=Effort(),
    )  # fmt: skip
    before = task.new_model(3)
    wanted = [torch.zeros_like(value, requires_grad=False) for value in before.parameters()]
    gaussian.privatise(wanted, noise, 2.0 * 0.5, 7)
    for (name, value), step in zip(before.named_parameters(), wanted, strict=True):
        torch.testing.assert_close(model.get_parameter(name), value - step)


def test_step_names_what_became_nan(task: VaeTask) -> None:
    model = task.new_model(3)
    run = losses(task, model)

    def steep() -> Tensor:
        """A loss of 0 with an infinite gradient."""
        each = run()
        return (each - each.detach()).sqrt()

    for found, wanted in (
        (lambda: run() * math.nan, r"the loss .* at step 0"),
        (steep, r"a cell's gradient .* at step 0"),
    ):
        with pytest.raises(NonFiniteError, match=wanted):
            private.step(
                model, torch.optim.SGD(model.parameters(), lr=1.0), dict(model.named_parameters()), found,
                mechanism=mechanism(), source=torch.Generator(), effort=Effort(),
            )  # fmt: skip


def test_train_epoch_leaves_no_weight_nan_unseen(task: VaeTask) -> None:
    model = task.new_model(3)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e38)
    generators = (torch.Generator(), torch.Generator())
    loud = mechanism(clip=1e3, noise_multiplier=1.0)
    with pytest.raises(NonFiniteError, match="the weights"):
        private.train_epoch(
            model, task, CELLS, loud, optimiser, dict(model.named_parameters()), *generators, Effort()
        )  # fmt: skip


@pytest.mark.parametrize("make", [lambda: torch.Generator().manual_seed(0), gaussian.Secure])
def test_poisson_draws_each_cell_on_its_own(make: Callable[[], gaussian.Source]) -> None:
    cells, noise = np.arange(100, 120), make()
    drawn = [private.poisson(cells, 0.1, noise) for _ in range(4000)]
    counts = np.array([np.isin(cells, part) for part in drawn])
    np.testing.assert_allclose(counts.mean(0), 0.1, atol=4 * math.sqrt(0.09 / 4000))
    assert counts.sum(1).var() == pytest.approx(20 * 0.09, rel=0.15)
    assert min(map(len, drawn)) == 0
    correlation = np.corrcoef(counts.T) - np.eye(20)
    assert np.abs(correlation).max() < 4.5 / math.sqrt(4000)
    assert np.array_equal(private.poisson(cells, 1.0, noise), cells)


ACCOUNTS = [(0.7102, 1 / 106, 5300, 1e-5), (1.3, 0.1, 500, 1e-5), (5.0, 0.02, 3000, 1e-6), (0.8, 1.0, 3, 1e-3)]


@pytest.mark.parametrize(("sigma", "rate", "steps", "delta"), ACCOUNTS)
def test_epsilon_spent_equals_googles_accountant(sigma: float, rate: float, steps: int, delta: float) -> None:
    event = GaussianDpEvent(sigma) if rate == 1 else PoissonSampledDpEvent(rate, GaussianDpEvent(sigma))
    accountant = RdpAccountant(private.ORDERS)
    accountant.compose(SelfComposedDpEvent(event, steps))
    wanted = accountant.get_epsilon(delta)
    assert private.epsilon_spent(sigma, rate, steps, delta) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(("sigma", "epsilon"), [(2.8840, 1.0035), (0.7102, 10.03), (0.4374, 50.20)])
def test_epsilon_spent_equals_the_published_figures(sigma: float, epsilon: float) -> None:
    assert private.epsilon_spent(sigma, 1 / 106, 5300, 1e-5) == pytest.approx(epsilon, rel=5e-4)


def test_epsilon_spent_at_its_ends() -> None:
    assert private.epsilon_spent(1.0, 0.1, 0, 1e-5) == 0
    assert private.epsilon_spent(0.0, 0.1, 1, 1e-5) == math.inf
    # one release with all cells: the exact ε of the Gaussian mechanism at σ = 2 and δ = 1e-5 is 2.06, Rényi's a bound
    assert 2.0 < private.epsilon_spent(2.0, 1.0, 1, 1e-5) < 2.5


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 10.0, 50.0])
def test_noise_multiplier_spends_the_budget_and_no_more(epsilon: float) -> None:
    sigma = private.noise_multiplier(epsilon, 1e-5, 0.1, 500)
    assert 0.998 * epsilon <= private.epsilon_spent(sigma, 0.1, 500, 1e-5) <= epsilon


def test_noise_multiplier_at_its_ends() -> None:
    assert private.noise_multiplier(math.inf, 1e-5, 0.1, 500) == 0
    with pytest.raises(DataError, match=r"privacy budget: found epsilon 1e-12 .* a larger epsilon"):
        private.noise_multiplier(1e-12, 1e-5, 0.1, 500)


@pytest.mark.parametrize("epsilon", [0.0, 1e-9, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 2, 7, 20])
def test_group_guarantee_equals_the_sum(epsilon: float, size: int) -> None:
    delta = 1e-12
    found = private.group_guarantee(epsilon, delta, size)
    wanted = size * epsilon, math.fsum(math.exp(i * epsilon) * delta for i in range(size))
    assert found == pytest.approx(wanted, rel=1e-12)


def test_group_guarantee_of_one_cell_is_the_cells_own() -> None:
    assert private.group_guarantee(3.7, 1e-5, 1) == pytest.approx((3.7, 1e-5), rel=1e-12)


@pytest.mark.parametrize(("epsilon", "size"), [(10.0, 30), (10.0, 100_000), (0.01, 10_000), (700.0, 3)])
def test_group_guarantee_ends_at_delta_1_without_overflow(epsilon: float, size: int) -> None:
    assert private.group_guarantee(epsilon, 1e-5, size) == (size * epsilon, 1.0)


def test_group_guarantee_at_its_ends() -> None:
    assert private.group_guarantee(1.0, 1e-5, 0) == (0.0, 0.0)
    assert private.group_guarantee(1.0, 0.0, 5) == (5.0, 0.0)
    assert private.group_guarantee(math.inf, 1e-5, 5) == (math.inf, 1.0)

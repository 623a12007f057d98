"""Gauss-Newton products against the matrix itself; the Newton step against problems whose answer is known."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product as pairs
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import spearmanr
from torch import Tensor, nn

from scforget import curvature, seeding
from scforget.arrays import FloatArray, IntArray
from scforget.curvature import (
    ConjugateGradients,
    GaussNewton,
    conjugate_gradients,
    flatten,
    newton_step,
    require_finite,
    unflatten,
    weigh,
)
from scforget.errors import EmptyGroupError, NonFiniteError
from scforget.models.likelihoods import nb_log_prob, zinb_log_prob
from scforget.models.vae import VAE, Batch
from scforget.tasks import VaeTask
from scforget.training import Effort, Loop

MakeTask = Callable[..., VaeTask]
CELLS: IntArray = np.array([5, 230, 71], dtype=np.int64)
KINDS = list(pairs(["nb", "zinb", "log_mse"], ["gene-cell", "gene"]))


def positive_definite(size: int, seed: int) -> Tensor:
    root = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / size


def eigenvalues(values: list[float], seed: int = 0) -> Tensor:
    """A symmetric matrix with given eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    found: Tensor = turn @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ turn.T
    return found


def test_conjugate_gradients_equal_a_direct_solution() -> None:
    a = positive_definite(30, 0)
    b = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solver = conjugate_gradients(lambda v: a @ v, b, 100, 1e-12)
    torch.testing.assert_close(solver.x, torch.linalg.solve(a, b), rtol=1e-10, atol=1e-10)
    assert solver.residual <= 1e-12
    assert solver.residual == pytest.approx(float((b - a @ solver.x).norm() / b.norm()), abs=1e-13)
    assert int(solver.taken) <= 32


def test_conjugate_gradients_need_as_many_steps_as_there_are_distinct_eigenvalues() -> None:
    a, b = eigenvalues([1.0] * 10 + [5.0] * 10 + [40.0] * 5), torch.ones(25, dtype=torch.float64)
    solver = conjugate_gradients(lambda v: a @ v, b, 25, 1e-10)
    assert int(solver.taken) == 3
    torch.testing.assert_close(a @ solver.x, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_conjugate_gradients_stop_at_their_limit(iterations: int) -> None:
    a, b, seen = positive_definite(30, 0), torch.ones(30, dtype=torch.float64), []

    def product(v: Tensor) -> Tensor:
        seen.append(v)
        return a @ v

    solver = conjugate_gradients(product, b, iterations, 1e-12)
    assert len(seen) == int(solver.taken) == iterations
    assert bool(solver.x.any()) == bool(iterations)
    assert (solver.residual == 1) == (not iterations)


def test_conjugate_gradients_stop_at_their_tolerance() -> None:
    a, b = positive_definite(30, 0), torch.ones(30, dtype=torch.float64)
    rough, fine = (conjugate_gradients(lambda v: a @ v, b, 30, tolerance) for tolerance in (0.1, 1e-6))
    assert 1e-6 < rough.residual <= 0.1
    assert fine.residual <= 1e-6
    assert int(rough.taken) < int(fine.taken)


def test_conjugate_gradients_of_nothing_are_nothing() -> None:
    solver = conjugate_gradients(lambda v: v, torch.zeros(4), 5, 1e-6)
    assert not solver.x.any()
    assert (solver.residual, int(solver.taken)) == (0.0, 0)


def test_conjugate_gradients_end_where_no_curvature_is_left() -> None:
    """A singular matrix: what the first step can reach is kept, and the second does not divide by 0."""
    a, b = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)), torch.tensor([0.0, 1.0])
    solver = conjugate_gradients(lambda v: a @ v, b, 50, 1e-6)
    assert int(solver.taken) == 0
    assert not solver.x.any()
    assert solver.residual == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_conjugate_gradients_refuse_a_product_that_is_not_finite(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="curvature"):
        ConjugateGradients(torch.ones(3)).step(lambda v: v * bad)


def test_require_finite_names_what_is_not() -> None:
    require_finite([torch.ones(2), torch.zeros(0)], 3, "it")
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(NonFiniteError, match="it became NaN or infinite at step 3"):
            require_finite([torch.ones(2), torch.tensor([0.0, bad])], 3, "it")


def test_unflatten_undoes_flatten(task: VaeTask) -> None:
    model = task.new_model(0)
    vector = flatten(model.parameters())
    assert vector.dtype == torch.float64
    for piece, parameter in zip(unflatten(vector, model), model.parameters(), strict=True):
        assert torch.equal(piece, parameter)
        assert piece.dtype == parameter.dtype


def ridge(seed: int, cells: int = 80, features: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(cells, features, generator=generator, dtype=torch.float64)
    noise = torch.randn(cells, generator=generator, dtype=torch.float64)
    return x, x @ torch.arange(1.0, features + 1, dtype=torch.float64) + noise


def ridge_solution(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    found: Tensor = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1], dtype=torch.float64), x.T @ y)
    return found


@pytest.mark.parametrize("forgotten", [1, 7, 40])
@pytest.mark.parametrize("with_loop", [False, True])
def test_newton_step_on_ridge_regression_is_the_solution_without_the_cells_left_out(
    forgotten: int, with_loop: bool
) -> None:
    (x, y), penalty = ridge(0), 2.5
    model = nn.Linear(6, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(ridge_solution(x, y, penalty)[None])
    kept, targets = x[forgotten:], y[forgotten:]
    theta = model.weight.detach()[0].clone()
    gradient = (kept.T @ (kept @ theta - targets) + penalty * theta) / len(kept)
    loop = Loop(model, seed=0) if with_loop else None
    newton_step(
        model, lambda v: kept.T @ (kept @ v) / len(kept), gradient,
        damping=penalty / len(kept), iterations=50, tolerance=1e-14, loop=loop,
    )  # fmt: skip
    wanted = ridge_solution(kept, targets, penalty)
    assert float((model.weight.detach()[0] - wanted).abs().max()) < 1e-8
    assert float((theta - wanted).abs().max()) > 1e-3
    assert loop is None or 0 < len(loop.history) <= 7


def logistic(x: FloatArray, y: FloatArray, penalty: float) -> FloatArray:
    """Minimise Σ log-loss + penalty/2 ‖w‖² by Newton's method."""
    w = np.zeros(x.shape[1])
    for _ in range(30):
        p = expit(x @ w)
        hessian = (x * (p * (1 - p))[:, None]).T @ x + penalty * np.eye(len(w))
        w -= np.linalg.solve(hessian, x.T @ (p - y) + penalty * w)
    assert np.abs(x.T @ (expit(x @ w) - y) + penalty * w).max() < 1e-10
    return w


def test_newton_step_ranks_deletions_as_retraining_without_each_cell_does() -> None:
    """Logistic regression, where one step is not the answer: the change of a test loss, for each of 120 cells."""
    rng = np.random.default_rng(0)
    x, other = rng.normal(size=(120, 5)), rng.normal(size=(40, 5))
    truth = np.array([1.0, -1, 0.5, 0, 2])
    y, targets = ((rng.random(len(a)) < expit(a @ truth)).astype(float) for a in (x, other))
    penalty, predicted, actual = 1.0, [], []
    whole = logistic(x, y, penalty)

    def held_out_loss(w: FloatArray) -> float:
        return float(np.logaddexp(0, -(2 * targets - 1) * (other @ w)).mean())

    for out in range(len(x)):
        kept, labels = np.delete(x, out, 0), np.delete(y, out)
        p = expit(kept @ whole)
        matrix = torch.from_numpy((kept * (p * (1 - p))[:, None]).T @ kept)
        gradient = torch.from_numpy(kept.T @ (p - labels) + penalty * whole)
        model = nn.Linear(5, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            model.weight.copy_(torch.from_numpy(whole)[None])
        newton_step(model, matrix.matmul, gradient, damping=penalty, iterations=20, tolerance=1e-12)
        predicted.append(held_out_loss(model.weight.detach().numpy()[0]) - held_out_loss(whole))
        actual.append(held_out_loss(logistic(kept, labels, penalty)) - held_out_loss(whole))
    assert spearmanr(predicted, actual).statistic > 0.99
    assert np.std(actual) > 1e-3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_newton_step_refuses_a_gradient_that_is_not_finite(bad: float) -> None:
    model = nn.Linear(2, 1, bias=False)
    with pytest.raises(NonFiniteError, match="the gradient on the retained cells"):
        newton_step(model, lambda v: v, torch.tensor([1.0, bad]), damping=1.0, iterations=5, tolerance=1e-6)


def test_newton_step_refuses_parameters_that_overflow() -> None:
    model = nn.Linear(2, 1, bias=False)
    with pytest.raises(NonFiniteError, match="the parameters after the Newton step"):
        newton_step(model, lambda v: 0 * v, torch.ones(2), damping=1e-60, iterations=5, tolerance=1e-6)


def answers(task: VaeTask, model: VAE, batch: Batch, noise: Tensor) -> dict[str, Tensor]:
    mu, log_var = model.encode(batch.inputs)
    decoded = model.decode(mu + (log_var / 2).exp() * noise)
    found = {"mu": mu, "log_var": log_var, "logits": decoded.logits}
    if task.settings.likelihood != "log_mse":
        found["log_r"] = decoded.log_inverse_dispersion
    if decoded.zero_logits is not None:
        found["zero"] = decoded.zero_logits
    return found


def weights(likelihood: str, batch: Batch, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """H of one cell as matrices ``[K, K]``, written out entry by entry, in float64."""
    batch = Batch(*(value.double() for value in batch))
    found = {name: value.detach().double()[0] for name, value in found.items()}
    shares = found["logits"].softmax(0)
    eye = torch.eye(len(shares), dtype=torch.float64)
    matrices = {"mu": torch.eye(len(found["mu"])).double(), "log_var": torch.diag(found["log_var"].exp() / 2)}
    if likelihood == "log_mse":
        jacobian = batch.inputs.sum() * (torch.diag(shares) - torch.outer(shares, shares))
        return matrices | {"logits": 2 * jacobian.T @ jacobian}
    mean, r = batch.library[0] * shares, found["log_r"].exp()
    expressed = 1 - found["zero"].sigmoid() if "zero" in found else torch.ones_like(r)
    jacobian = eye - torch.outer(torch.ones_like(shares), shares)
    matrices["logits"] = jacobian.T @ torch.diag(expressed * mean * r / (mean + r)) @ jacobian
    log_r = found["log_r"].clone().requires_grad_()
    log_prob = nb_log_prob(batch.counts[0], mean.log(), log_r)
    if "zero" in found:
        log_prob = zinb_log_prob(batch.counts[0], mean.log(), log_r, found["zero"])
        matrices["zero"] = torch.diag(expressed * (1 - expressed))
    scores = [torch.autograd.grad(each, log_r, retain_graph=True)[0][gene] for gene, each in enumerate(log_prob)]
    return matrices | {"log_r": torch.diag(torch.stack(scores) ** 2)}


def explicit(task: VaeTask, model: VAE, draws: int, seed: int) -> Tensor:
    """The matrix ``[P, P]``: a Jacobian row by row for each cell and draw."""
    noise, parameters = seeding.torch_generator(seed, "gauss-newton"), list(model.parameters())
    size = sum(parameter.numel() for parameter in parameters)
    total, batch = torch.zeros(size, size, dtype=torch.float64), task.batch(CELLS)
    for eps in [torch.randn(len(CELLS), task.settings.latent, generator=noise) for _ in range(draws)]:
        for index in range(len(CELLS)):
            cell = Batch(*(value[index : index + 1] for value in batch))
            found = answers(task, model, cell, eps[index : index + 1])
            for name, weight in weights(task.settings.likelihood, cell, found).items():
                rows = []
                for output in found[name][0]:
                    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
                    rows.append(flatten(torch.autograd.grad(output, parameters, **options)))
                total += torch.stack(rows).T @ weight @ torch.stack(rows)
    return total / (draws * len(CELLS))


@pytest.mark.parametrize(("likelihood", "dispersion"), KINDS)
def test_product_equals_the_explicit_matrix(make_task: MakeTask, likelihood: str, dispersion: str) -> None:
    task = make_task(likelihood=likelihood, dispersion=dispersion, hidden=[4], latent=2)
    model = task.new_model(3)
    matrix = explicit(task, model.eval(), 2, 7)
    newton = GaussNewton(model, task, CELLS, draws=2, seed=7, effort=Effort())
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.randn(len(matrix), generator=generator, dtype=torch.float64) for _ in range(3)]
    for vector in vectors:
        wanted, found = matrix @ vector, newton.product(vector)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        assert float(vector @ found) > 0
    left, right = (float(vectors[i] @ newton.product(vectors[1 - i])) for i in (0, 1))
    assert left == pytest.approx(right, rel=1e-4, abs=1e-4 * float(vectors[0] @ newton.product(vectors[0])))
    lowest = float(torch.linalg.eigvalsh(matrix)[0])
    assert lowest > -1e-9 * float(torch.trace(matrix))


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "log_mse"])
def test_gradient_is_that_of_the_mean_loss(make_task: MakeTask, likelihood: str) -> None:
    task = make_task(likelihood=likelihood)
    model = task.new_model(3)
    found = GaussNewton(model, task, CELLS, draws=2, seed=7, effort=Effort()).gradient()
    noise, total = seeding.torch_generator(7, "gauss-newton"), torch.zeros(())
    for eps in [torch.randn(3, 4, generator=noise) for _ in range(2)]:
        said, batch = answers(task, model, task.batch(CELLS), eps), task.batch(CELLS)
        loss = 0.5 * (said["mu"] ** 2 + said["log_var"].exp() - 1 - said["log_var"]).sum()
        total = (
            total
            + loss
            - model.reconstruction(batch, model.decode(said["mu"] + (said["log_var"] / 2).exp() * eps)).sum()
        )
    each = torch.autograd.grad(total / 6, list(model.parameters()), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(found, flatten(each), rtol=1e-4, atol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def expected_hessian(batch: Batch, logits: Tensor, log_r: Tensor, name: str) -> Tensor:
    """Expectation over counts of the Hessian of −log NB in the logits or in log r, gene by gene up to 1500 counts."""
    support = torch.arange(1500.0, dtype=torch.float64)

    def loss(values: dict[str, Tensor]) -> Tensor:
        log_mean = values["logits"].log_softmax(0) + batch.library[0].log()
        log_prob = nb_log_prob(support[:, None], log_mean, values["log_r"])
        return -(chances * log_prob).sum()

    def vary(value: Tensor) -> Tensor:
        return loss({"logits": logits, "log_r": log_r, name: value})

    chances = nb_log_prob(support[:, None], logits.log_softmax(0) + batch.library[0].log(), log_r).exp()
    torch.testing.assert_close(chances.sum(0), torch.ones_like(logits))
    found: Tensor = torch.func.hessian(vary)({"logits": logits, "log_r": log_r}[name])
    return found


def test_weigh_is_the_expected_hessian_in_the_logits() -> None:
    """Five genes in float64, against a sum over counts; the KL's part against its Hessian."""
    generator = torch.Generator().manual_seed(0)
    logits, log_r, mu, log_var, *change = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(7))
    counts = torch.tensor([[0.0, 3, 1, 10, 2]], dtype=torch.float64)
    batch = Batch(counts, counts.log1p(), torch.tensor([[16.0]], dtype=torch.float64))
    said = {"logits": logits[None], "log_r": log_r[None], "mu": mu[None], "log_var": log_var[None]}
    v = change[0]
    found = weigh("nb", batch, said, dict.fromkeys(said, v[None]))
    wanted = expected_hessian(batch, logits, log_r, "logits") @ v
    torch.testing.assert_close(found["logits"][0], wanted, rtol=1e-8, atol=1e-10)
    assert float(found["logits"].sum().abs()) < 1e-12  # a shift of all logits changes nothing
    kl = torch.func.hessian(lambda p: 0.5 * (p[0] ** 2 + p[1].exp() - 1 - p[1]).sum())(torch.stack([mu, log_var]))
    for index, name in enumerate(("mu", "log_var")):
        torch.testing.assert_close(found[name][0], kl[index, :, index] @ v)


def test_weigh_has_the_expected_information_of_the_dispersion_on_average() -> None:
    """The squared score, averaged over counts drawn from the model, is the expected Hessian in log r."""
    logits, log_r = torch.tensor([0.5, -1, 0.2]).double(), torch.tensor([0.3, 1.0, -0.5]).double()
    support = torch.arange(1500.0, dtype=torch.float64)[:, None].expand(-1, 3)
    library = torch.full((1500, 1), 20.0, dtype=torch.float64)
    chances = nb_log_prob(support, logits.log_softmax(0) + library.log(), log_r).exp()
    said = {"logits": logits.expand(1500, -1), "log_r": log_r.expand(1500, -1)}
    said |= {"mu": torch.zeros(1500, 1).double(), "log_var": torch.zeros(1500, 1).double()}
    batch = Batch(support, support.log1p(), library)
    found = weigh("nb", batch, said, {name: torch.ones_like(value) for name, value in said.items()})["log_r"]
    wanted = expected_hessian(Batch(support, support, library), logits, log_r, "log_r").diagonal()
    torch.testing.assert_close((chances * found).sum(0), wanted, rtol=1e-6, atol=1e-9)


def test_gauss_newton_does_not_depend_on_the_batch_boundary(task: VaeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 4 latent dimensions 16 cells take 64 numbers: torch's stream is then the same in one piece or in several."""
    model, cells = task.new_model(0), np.arange(40)
    vector = torch.ones(sum(parameter.numel() for parameter in model.parameters()), dtype=torch.float64)

    def both() -> Tensor:
        newton = GaussNewton(model, task, cells, draws=1, seed=0, effort=Effort())
        return torch.stack([newton.gradient(), newton.product(vector)])

    whole = both()
    monkeypatch.setattr(curvature, "_BATCH", 16)
    torch.testing.assert_close(both(), whole, rtol=1e-4, atol=1e-4)


def test_gauss_newton_counts_its_passes(task: VaeTask) -> None:
    effort = Effort()
    newton = GaussNewton(task.new_model(0), task, CELLS, draws=4, seed=0, effort=effort)
    gradient = newton.gradient()
    assert (effort.forward, effort.backward) == ({"retain": 12}, {"retain": 12})
    newton.product(gradient)
    assert (effort.forward, effort.backward) == ({"retain": 36}, {"retain": 24})
    assert effort.steps == 0


def test_gauss_newton_refuses_no_cells(task: VaeTask) -> None:
    with pytest.raises(EmptyGroupError, match="0 cells"):
        GaussNewton(task.new_model(0), task, CELLS[:0], draws=1, seed=0, effort=Effort())

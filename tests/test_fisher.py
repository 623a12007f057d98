"""The exact diagonal Fisher information against a loop over cells, one backward pass each."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from scforget import fisher, seeding
from scforget.arrays import IntArray
from scforget.errors import EmptyGroupError
from scforget.models.vae import VAE, block_of, gaussian_kl
from scforget.tasks import VaeTask

MakeTask = Callable[..., VaeTask]
KINDS = list(product(["nb", "zinb", "log_mse"], ["gene-cell", "gene"]))
CELLS: IntArray = np.array([5, 230, 71, 8, 9, 10, 150], dtype=np.int64)


def gradients(model: VAE, task: VaeTask, cells: IntArray, draws: int, seed: int) -> dict[str, Tensor]:
    """``[draws, N, ...]`` by parameter: the gradient of each cell's loss at each draw, by autograd, cell by cell."""
    model.eval()
    noise = seeding.torch_generator(seed, "fisher")
    found: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for _ in range(draws):
        eps = torch.randn(len(cells), task.settings.latent, generator=noise)
        for index in range(len(cells)):
            batch = task.batch(cells[index : index + 1])
            mu, log_var = model.encode(batch.inputs)
            z = mu + (log_var / 2).exp() * eps[index]
            loss = gaussian_kl(mu, log_var).sum() - model.reconstruction(batch, model.decode(z)).sum()
            each = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
            for name, gradient in zip(found, each, strict=True):
                found[name].append(gradient)
    return {name: torch.stack(values).unflatten(0, (draws, -1)).double() for name, values in found.items()}


def assert_equal(found: fisher.Diagonal, wanted: fisher.Diagonal) -> None:
    """1e-5 relative; entries 1e-6 of their tensor's largest and below are rounding of sums that cancel."""
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6 * float(value.max()), msg=name)


@pytest.mark.parametrize(("likelihood", "dispersion"), KINDS)
def test_diagonal_equals_a_loop_over_cells(make_task: MakeTask, likelihood: str, dispersion: str) -> None:
    task = make_task(likelihood=likelihood, dispersion=dispersion)
    model = task.new_model(3)
    found = fisher.diagonal(model, task, CELLS, draws=1, seed=11)
    each = gradients(model, task, CELLS, 1, 11)
    assert_equal(found, {name: value.square().mean((0, 1)) for name, value in each.items()})
    assert {name: tensor.shape for name, tensor in found.items()} == {n: p.shape for n, p in model.named_parameters()}
    assert all((tensor >= 0).all() for tensor in found.values())


def test_diagonal_is_the_mean_of_squares_over_cells_and_draws(task: VaeTask) -> None:
    model = task.new_model(3)
    found = fisher.diagonal(model, task, CELLS, draws=3, seed=11)
    each = gradients(model, task, CELLS, 3, 11)
    assert_equal(found, {name: value.square().mean((0, 1)) for name, value in each.items()})
    for wrong in (
        {n: v.mean(0).square().mean(0) for n, v in each.items()},
        {n: v.mean((0, 1)).square() for n, v in each.items()},
    ):
        assert not torch.allclose(found["mu.weight"].double(), wrong["mu.weight"], rtol=1e-3)


@pytest.mark.parametrize("dispersion", ["gene-cell", "gene"])
def test_diagonal_of_the_dead_dispersion_of_log_mse_is_exactly_0(make_task: MakeTask, dispersion: str) -> None:
    task = make_task(likelihood="log_mse", dispersion=dispersion)
    found = fisher.diagonal(task.new_model(0), task, CELLS, draws=2, seed=0)
    dead = {name for name, value in found.items() if not value.any()}
    assert dead == {name for name in found if name.startswith("dispersion.")}
    assert all(block_of(name) == "heads" for name in dead)


def test_diagonal_does_not_depend_on_the_batch_boundary(task: VaeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 4 latent dimensions 16 cells take 64 numbers: torch's stream is then the same in one piece or in several."""
    model, cells = task.new_model(0), np.arange(40)
    whole = fisher.diagonal(model, task, cells, draws=1, seed=0)
    monkeypatch.setattr(fisher, "_BATCH", 16)
    assert_equal(fisher.diagonal(model, task, cells, draws=1, seed=0), {n: v.double() for n, v in whole.items()})


def test_diagonal_of_a_union_is_the_mean_of_its_parts(task: VaeTask) -> None:
    """What SSD's I_D rests on; without noise in z, as the parts would draw other noise."""
    model = task.new_model(0)
    with torch.no_grad():
        model.log_var.weight.zero_()
        model.log_var.bias.fill_(-60)
    first, second = np.arange(30), np.arange(100, 110)
    parts = [fisher.diagonal(model, task, cells, draws=1, seed=0) for cells in (first, second)]
    wanted = {name: (0.75 * parts[0][name] + 0.25 * parts[1][name]).double() for name in parts[0]}
    assert_equal(fisher.diagonal(model, task, np.concatenate([first, second]), draws=1, seed=0), wanted)


def test_diagonal_leaves_the_model_as_it_was(task: VaeTask) -> None:
    model = task.new_model(0).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fisher.diagonal(model, task, CELLS, draws=1, seed=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_diagonal_draws_from_its_seed_alone(task: VaeTask) -> None:
    model = task.new_model(0)
    first = fisher.diagonal(model, task, CELLS, draws=2, seed=0)
    torch.rand(1)
    again, other = (fisher.diagonal(model, task, CELLS, draws=2, seed=seed) for seed in (0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["scale.weight"], other["scale.weight"])


def test_diagonal_refuses_no_cells(task: VaeTask) -> None:
    with pytest.raises(EmptyGroupError, match="0 cells"):
        fisher.diagonal(task.new_model(0), task, CELLS[:0], draws=1, seed=0)


class Labelled(NamedTuple):
    images: Tensor
    labels: Tensor


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(),
        nn.Linear(36, 5),
    )  # fmt: skip
    model[1].running_mean.normal_()
    return model.eval()


def test_mean_squares_of_a_classifier_equal_a_loop_over_images() -> None:
    model = classifier()
    images, labels = torch.randn(9, 3, 6, 6), torch.arange(9) % 5

    def losses(batch: Labelled) -> Tensor:
        return nn.functional.cross_entropy(model(batch.images), batch.labels, reduction="none")

    batches = [Labelled(images[part], labels[part]) for part in (slice(0, 4), slice(4, 4), slice(4, 9))]
    found = fisher.mean_squares(model, losses, batches)
    rows = [
        torch.autograd.grad(losses(Labelled(images[i : i + 1], labels[i : i + 1])).sum(), list(model.parameters()))
        for i in range(9)
    ]
    names = [name for name, _ in model.named_parameters()]
    columns = (torch.stack(column) for column in zip(*rows, strict=True))
    assert_equal(found, {name: c.double().square().mean(0) for name, c in zip(names, columns, strict=True)})


def test_mean_squares_of_a_frozen_parameter_are_0() -> None:
    model = classifier()
    model[0].weight.requires_grad_(False)
    found = fisher.mean_squares(model, lambda images: model(images).sum(1), [torch.randn(4, 3, 6, 6)])
    assert {name for name, value in found.items() if not value.any()} == {"0.weight"}
    assert not any(value.requires_grad for value in found.values())


def test_mean_squares_refuse_no_example() -> None:
    model = classifier()
    for batches in ([], [torch.zeros(0, 3, 6, 6)]):
        with pytest.raises(EmptyGroupError, match="Fisher information: found 0 cells"):
            fisher.mean_squares(model, lambda images: model(images).sum(1), batches)

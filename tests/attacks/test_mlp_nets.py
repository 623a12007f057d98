from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.utils.parametrizations import spectral_norm

from scforget.arrays import FloatArray, IntArray
from scforget.attacks.nets import Nets, NetSettings, batches, logits_of, new_nets, train

SETTINGS: dict[str, Any] = {
    "hidden": [7, 6], "dropout": 0.0, "learning_rate": 1e-2, "batch_size": 8, "epochs": 12,
}  # fmt: skip


def settings(**changes: Any) -> NetSettings:
    return NetSettings(**{**SETTINGS, **changes})


def in_double(nets: Nets) -> Nets:
    parameters = [
        tensor.detach().double().requires_grad_()
        for pair in zip(nets.weights, nets.biases, strict=True)
        for tensor in pair
    ]
    return Nets(parameters, [u.double() for u in nets.left], [v.double() for v in nets.right])


def as_module(nets: Nets, row: int) -> nn.Sequential:
    """Network ``row`` as torch itself would build it, in the state that it is in now."""
    layers: list[nn.Module] = []
    for weight, bias, left, right in zip(nets.weights, nets.biases, nets.left, nets.right, strict=True):
        linear = nn.Linear(weight.shape[2], weight.shape[1]).double()
        with torch.no_grad():
            linear.weight.copy_(weight[row])
            linear.bias.copy_(bias[row])
        spectral_norm(linear)
        norm: Any = linear.parametrizations.weight[0]  # type: ignore[index, union-attr]
        norm._u.copy_(left[row])
        norm._v.copy_(right[row])
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train_alone(
    module: nn.Sequential, features: Tensor, labels: Tensor, weights: Tensor, row: int,
    schedule: list[tuple[IntArray, FloatArray]], learning_rate: float,
) -> None:  # fmt: skip
    optimiser = torch.optim.Adam(module.parameters(), lr=learning_rate)
    module.train()
    for cells, shares in schedule:
        own = cells[row][shares[row] > 0]
        losses = binary_cross_entropy_with_logits(module(features[own]).squeeze(1), labels[own], reduction="none")
        optimiser.zero_grad()
        (losses * weights[own]).mean().backward()
        optimiser.step()
    module.eval()


@pytest.mark.parametrize("cuts", [3, [8, 16]])
def test_train_equals_a_loop_over_torchs_own_networks(cuts: int | list[int]) -> None:
    rng = np.random.default_rng(0)
    E, n, D = 4, 30, 5
    features = torch.from_numpy(rng.normal(size=(E, n, D)))
    labels = torch.from_numpy((np.arange(n) < 12).astype(float))
    weights = torch.from_numpy(rng.uniform(0.5, 2, (E, n)))
    # unequal folds, so that some networks' batches are padded
    trained_on = [rng.permutation(n)[:size] for size in (24, 23, 22, 24)]
    nets = in_double(new_nets(E, D, SETTINGS["hidden"], rng))
    alone = [as_module(nets, row) for row in range(E)]
    before = logits_of(nets, features)

    stream = np.random.default_rng(1)
    schedule = [batch for _ in range(SETTINGS["epochs"]) for batch in batches(trained_on, cuts, stream)]
    assert any((shares == 0).any() for _, shares in schedule)
    train(
        nets, features, labels, weights, trained_on=trained_on, cuts=cuts, settings=settings(),
        generator=np.random.default_rng(1),
    )  # fmt: skip
    found = logits_of(nets, features)
    assert np.abs(found - before).mean() > 0.1
    for row, module in enumerate(alone):
        train_alone(module, features[row], labels, weights[row], row, schedule, SETTINGS["learning_rate"])
        np.testing.assert_allclose(found[row], module(features[row]).detach().squeeze(1), rtol=1e-8, atol=1e-10)


def test_train_gives_layers_of_norm_one_so_that_a_network_is_1_lipschitz() -> None:
    rng = np.random.default_rng(0)
    features = torch.randn(2, 40, 5, generator=torch.Generator().manual_seed(0))
    labels, weights = (torch.arange(40) < 20).float(), torch.ones(2, 40)
    nets = new_nets(2, 5, [16, 16], rng)
    train(
        nets, features, labels, weights, trained_on=[np.arange(40)] * 2, cuts=1, generator=rng,
        settings=settings(hidden=[16, 16], dropout=0.3, epochs=100, learning_rate=1e-3),
    )  # fmt: skip
    for layer, weight in enumerate(nets.weights):
        norms = torch.linalg.matrix_norm(weight.detach(), ord=2)
        # one step of the power method a batch: behind where the two largest singular values are close
        torch.testing.assert_close(nets.norms(layer).detach(), norms, rtol=0.1, atol=0)
        assert (nets.norms(layer) <= norms + 1e-6).all()
    logits, distance = logits_of(nets, features), torch.cdist(features, features).numpy()
    assert (np.abs(logits[:, :, None] - logits[:, None, :]) <= 1.2 * distance + 1e-5).all()


def test_train_drops_the_wanted_share_and_keeps_the_mean() -> None:
    seen: list[Tensor] = []

    class Spy(Nets):
        def __call__(self, inputs: Tensor, keep: Any = ()) -> Tensor:
            seen.extend(keep)
            return super().__call__(inputs, keep)

    rng = np.random.default_rng(0)
    plain = new_nets(1, 3, [50, 40], rng)
    spy = Spy([t for pair in zip(plain.weights, plain.biases, strict=True) for t in pair], plain.left, plain.right)
    train(
        spy, torch.randn(1, 60, 3, generator=torch.Generator().manual_seed(0)), torch.ones(60), torch.ones(1, 60),
        trained_on=[np.arange(60)], cuts=1, settings=settings(hidden=[50, 40], dropout=0.3, epochs=3), generator=rng,
    )  # fmt: skip
    assert [tuple(mask.shape) for mask in seen] == [(1, 50, 60), (1, 40, 60)] * 3
    for mask in seen:
        assert (mask == 0).float().mean() == pytest.approx(0.3, abs=0.04)  # 4 standard errors of 2,400 draws
        assert mask.max() == pytest.approx(1 / 0.7)
    assert not torch.equal(seen[0], seen[2])


def test_new_nets_begin_in_torchs_range_and_differ() -> None:
    nets = new_nets(3, 20, [64, 32], np.random.default_rng(0))
    for weight, bias, inputs in zip(nets.weights, nets.biases, (20, 64, 32), strict=True):
        limit = 1 / np.sqrt(inputs)
        assert weight.shape[2] == inputs
        assert weight.abs().max() <= limit
        assert float(weight.detach().std()) == pytest.approx(limit / np.sqrt(3), rel=0.2)
        assert bias.abs().max() <= limit
        assert not torch.equal(weight[0], weight[1])


@pytest.mark.parametrize(("cuts", "sizes"), [(3, [4, 4, 3]), ([8], [8, 3]), ([], [11])])
def test_batches_show_every_own_cell_once_an_epoch(cuts: int | list[int], sizes: list[int]) -> None:
    trained_on = [np.arange(11), np.arange(20, 30)]
    found = list(batches(trained_on, cuts, np.random.default_rng(0)))
    for row, cells in enumerate(trained_on):
        own = [index[row][shares[row] > 0] for index, shares in found]
        np.testing.assert_array_equal(np.sort(np.concatenate(own)), cells)
        assert not np.array_equal(np.concatenate(own), cells)
    assert [len(index[0]) for index, _ in found] == sizes
    for _, shares in found:
        np.testing.assert_allclose(shares.sum(axis=1), 1)


def test_batches_with_nothing_left_for_a_network_weigh_nothing() -> None:
    found = list(batches([np.arange(3), np.arange(2)], 3, np.random.default_rng(0)))
    np.testing.assert_array_equal(found[2][1], [[1], [0]])


@pytest.mark.parametrize(
    "change", [{"hidden": []}, {"hidden": [0]}, {"dropout": 1.0}, {"learning_rate": 0.0}, {"epochs": 0}]
)
def test_net_settings_refuse_what_cannot_be_trained(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        settings(**change)

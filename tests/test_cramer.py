"""The distances against scipy, all pairs and closed forms; the slopes against linear maps and finite differences."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import energy_distance, wasserstein_distance
from torch import Tensor, nn

from scforget.cramer import (
    EmbeddingSettings,
    Sample,
    critic,
    embedding_loss,
    energy,
    generator_loss,
    new_embedding,
    norm,
    slope,
)

SOFT = 1e-6  # what norms may be off where two items are one
SETTINGS: dict[str, Any] = {
    "surrogate": "cramer", "widths": [7, 6, 5], "penalty": "squared", "penalised": "critic", "lam": 10.0,
    "learning_rate": 1e-2, "weight_decay": 0.0,
}  # fmt: skip


def settings(**changes: Any) -> EmbeddingSettings:
    return EmbeddingSettings(**{**SETTINGS, **changes})


def points(seed: int, rows: int = 6, columns: int = 3) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, columns)))


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    layer.weight.data = weight.clone()
    return layer


def triples(unseen: Tensor, forget: Tensor) -> Sample:
    """Every choice of an unseen item and of two of the others, the same one twice included."""
    rows = product(range(len(unseen)), range(len(forget)), range(len(forget)))
    u, f, other = (list(column) for column in zip(*rows, strict=True))
    return Sample(unseen[u], forget[f], forget[other])


def mean_distance(one: Tensor, other: Tensor) -> float:
    return float(np.mean([np.sqrt(((a - b) ** 2).sum()) for a in one.numpy() for b in other.numpy()]))


def test_energy_of_all_pairs_is_the_energy_distance_and_the_spread_of_the_unseen() -> None:
    """In three dimensions, by slow loops; no model changes the spread of what it is compared with."""
    unseen, forget = points(0), points(1, rows=5) + 0.7
    distance = (
        2 * mean_distance(unseen, forget) - mean_distance(unseen, unseen) - mean_distance(forget, forget)
    )  # fmt: skip
    found = float(energy(*triples(unseen, forget)).mean())
    assert found == pytest.approx(distance + mean_distance(unseen, unseen), abs=SOFT)
    assert float(generator_loss(nn.Identity(), triples(unseen, forget), "cramer")) == pytest.approx(found, rel=1e-12)


def test_energy_in_one_dimension_is_scipys_squared_and_twice_the_squared_cramer_distance() -> None:
    """scipy returns the root of it, √(2∫(F − G)²)."""
    unseen, forget = points(2, columns=1), points(3, rows=4, columns=1) - 0.4
    found = float(energy(*triples(unseen, forget)).mean()) - mean_distance(unseen, unseen)
    one, other = unseen.numpy().ravel(), forget.numpy().ravel()
    assert found == pytest.approx(energy_distance(one, other) ** 2, abs=SOFT)
    ends = np.sort(np.concatenate([one, other]))
    heights = [(one <= x).mean() - (other <= x).mean() for x in ends[:-1]]
    assert found == pytest.approx(2 * float(np.sum(np.square(heights) * np.diff(ends))), abs=SOFT)


def test_generator_loss_of_random_draws_has_the_mean_of_all_pairs() -> None:
    unseen, forget = points(4, rows=8), points(5, rows=8)
    rng, losses = np.random.default_rng(0), []
    for _ in range(4000):
        drawn = [part[rng.permutation(8)[:5]] for part in (unseen, forget, forget)]
        losses.append(float(generator_loss(nn.Identity(), Sample(*drawn), "cramer")))
    exact = float(energy(*triples(unseen, forget)).mean())
    error = np.std(losses) / np.sqrt(len(losses))
    assert abs(np.mean(losses) - exact) < 4 * error
    assert error < 0.01 * exact


def test_generator_loss_wasserstein_is_the_mean_shift() -> None:
    """D(z) = z is a best critic of a shifted sample."""
    unseen = points(6, columns=1)
    z = Sample(unseen, unseen - 0.3, unseen)
    found = float(generator_loss(nn.Identity(), z, "wasserstein"))
    assert found == pytest.approx(wasserstein_distance(z.unseen.numpy().ravel(), z.forget.numpy().ravel()))
    assert found == pytest.approx(0.3)


def test_critic_difference_is_the_printed_surrogate() -> None:
    embed, z = new_embedding(3, settings(), seed=0).double(), triples(points(7), points(8, rows=4))
    with torch.no_grad():
        u, f, other = (embed(part).numpy() for part in z)
        found = [critic(embed, part, z.other, "cramer") for part in (z.unseen, z.forget)]
    length = np.linalg.norm
    wanted = [length(a - c) + length(b) - length(b - c) - length(a) for a, b, c in zip(u, f, other, strict=True)]
    np.testing.assert_allclose((found[0] - found[1]).numpy(), wanted, rtol=1e-5, atol=3e-6)


def test_critic_wasserstein_is_the_embedding_itself() -> None:
    embed, z = linear(torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64)), points(9)
    found = critic(embed, z, points(10), "wasserstein").detach()
    np.testing.assert_allclose(found.numpy(), z.numpy() @ [2.0, -1.0, 0.5])


def test_slope_of_a_linear_map_is_the_norm_of_its_matrix() -> None:
    weight = points(11, rows=4)
    found = slope(linear(weight), points(12)).detach().numpy()
    np.testing.assert_allclose(found, np.sqrt((weight.numpy() ** 2).sum()), rtol=1e-9)


def test_slope_of_the_cramer_critic_over_a_linear_map_is_the_closed_form() -> None:
    """∇f = Wᵀ(W(z − z')/‖W(z − z')‖ − Wz/‖Wz‖)."""
    weight, z, other = points(13, rows=4), points(14), points(15)
    embed = linear(weight)
    found = slope(lambda at: critic(embed, at, other, "cramer"), z).detach().numpy()
    W = weight.numpy()
    for k, (a, b) in enumerate(zip(z.numpy(), other.numpy(), strict=True)):
        apart, own = W @ (a - b), W @ a
        wanted = W.T @ (apart / np.linalg.norm(apart) - own / np.linalg.norm(own))
        assert found[k] == pytest.approx(np.linalg.norm(wanted), rel=1e-8)


@pytest.mark.parametrize("penalised", ["critic", "embedding"])
def test_slope_is_that_of_finite_differences(penalised: str) -> None:
    embed, z, other = new_embedding(3, settings(), seed=1).double(), points(16), points(17)

    def function(at: Tensor) -> Tensor:
        return critic(embed, at, other, "cramer") if penalised == "critic" else embed(at)

    squares = np.zeros(len(z))
    with torch.no_grad():
        for k in range(3):
            step = torch.zeros(3, dtype=torch.float64)
            step[k] = 1e-6
            change = (function(z + step) - function(z - step)).reshape(len(z), -1) / 2e-6
            squares += change.square().sum(-1).numpy()
    np.testing.assert_allclose(slope(function, z).detach().numpy(), np.sqrt(squares), rtol=1e-5)


@pytest.mark.parametrize(("penalty", "wanted"), [("squared", 16.0), ("printed", 4.0)])
def test_embedding_loss_of_a_linear_critic_is_the_closed_form(penalty: str, wanted: float) -> None:
    """‖w‖ = 5 everywhere: the penalty is 4² or 4, and its gradient 2·4·w/5 or w/5."""
    w, z = torch.tensor([[3.0, 0.0, -4.0]], dtype=torch.float64), Sample(points(18), points(19), points(20))
    embed, mixture = linear(w), torch.rand(6, 1, dtype=torch.float64)
    chosen = settings(surrogate="wasserstein", penalty=penalty, lam=0.5)
    loss = embedding_loss(embed, z, mixture, chosen)
    shift = (z.unseen.mean(0) - z.forget.mean(0)).numpy()
    distance = float(shift @ [3.0, 0.0, -4.0])
    assert float(loss.distance.detach()) == pytest.approx(distance)
    assert float(loss.slope.detach()) == pytest.approx(5.0)
    assert float(loss.total.detach()) == pytest.approx(0.5 * wanted - distance)
    loss.total.backward()
    pull = 0.5 * (2 * 4 if penalty == "squared" else 1) * np.array([3.0, 0.0, -4.0]) / 5
    assert embed.weight.grad is not None
    np.testing.assert_allclose(embed.weight.grad.numpy()[0], pull - shift, rtol=1e-8)


def test_embedding_loss_takes_the_slope_between_the_two_samples() -> None:
    """A slope that depends on the place: D(z) = z²/2 has the slope |z|."""

    class Half(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z.square() / 2

    z = Sample(*(torch.full((2, 1), value) for value in (4.0, 2.0, 9.0)))
    loss = embedding_loss(Half(), z, torch.tensor([[0.25], [1.0]]), settings(surrogate="wasserstein", lam=1.0))
    assert float(loss.slope.detach()) == pytest.approx((2.5 + 4.0) / 2)
    assert float(loss.total.detach()) == pytest.approx((1.5**2 + 3.0**2) / 2 - (8.0 - 2.0))


def test_embedding_loss_differs_between_the_critic_and_the_embedding() -> None:
    embed, z = new_embedding(3, settings(), seed=2).double(), Sample(points(21), points(22), points(23))
    mixture = torch.full((6, 1), 0.5, dtype=torch.float64)
    found = {name: embedding_loss(embed, z, mixture, settings(penalised=name)) for name in ("critic", "embedding")}
    between = (z.unseen + z.forget) / 2
    wanted = {"embedding": slope(embed, between)}
    wanted["critic"] = slope(lambda at: critic(embed, at, z.other, "cramer"), between)
    for name, loss in found.items():
        assert float(loss.slope.detach()) == pytest.approx(float(wanted[name].mean().detach()))
        assert float(loss.total.detach()) == pytest.approx(
            10 * float((wanted[name] - 1).square().mean().detach()) - float(loss.distance.detach())
        )
    assert float(found["critic"].slope.detach()) != pytest.approx(float(found["embedding"].slope.detach()), rel=0.05)


@pytest.mark.parametrize("surrogate", ["cramer", "wasserstein"])
def test_embedding_learns_to_see_the_distance(surrogate: str) -> None:
    chosen = settings(surrogate=surrogate, learning_rate=0.02)
    embed = new_embedding(3, chosen, seed=3)
    forget = points(25, rows=64).float()
    z = Sample(points(24, rows=64).float() + 1.0, forget, forget.flip(0))
    optimiser, mixture = torch.optim.SGD(embed.parameters(), lr=0.02), torch.linspace(0, 1, 64)[:, None]
    distances = []
    for _ in range(60):
        loss = embedding_loss(embed, z, mixture, chosen)
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
        distances.append(float(loss.distance.detach()))
    assert distances[-1] > 0.3 > distances[0]


def test_embedding_loss_has_gradients_where_all_outputs_fall_together() -> None:
    """Two draws of one item, and an embedding that maps everything to 0: the norms have no derivative there."""
    embed = linear(torch.zeros(4, 3, dtype=torch.float64))
    z = Sample(points(26), points(27), points(27))
    embedding_loss(embed, z, torch.full((6, 1), 0.5, dtype=torch.float64), settings()).total.backward()
    assert embed.weight.grad is not None
    assert torch.isfinite(embed.weight.grad).all()


def test_norm_is_that_of_each_row_and_flat_at_zero() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    found = norm(rows)
    np.testing.assert_allclose(found.detach().numpy(), [5.0, 0.0], atol=2e-6)
    found.sum().backward()
    assert rows.grad is not None
    np.testing.assert_allclose(rows.grad.numpy(), [[0.6, 0.8], [0.0, 0.0]], atol=1e-9)


def test_new_embedding_has_the_widths_asked_for_and_one_number_for_wasserstein() -> None:
    def shapes(**changes: Any) -> list[tuple[int, ...]]:
        layers = new_embedding(9, settings(**changes), seed=0)
        return [tuple(layer.weight.shape) for layer in layers if isinstance(layer, nn.Linear)]

    assert shapes(widths=[128, 128, 64]) == [(128, 9), (128, 128), (64, 128)]
    assert shapes(widths=[128, 128, 64], surrogate="wasserstein") == [(128, 9), (128, 128), (1, 128)]
    kinds = [type(layer).__name__ for layer in new_embedding(9, settings(), seed=0)]
    assert kinds == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]


def test_new_embedding_depends_on_its_seed_alone() -> None:
    first = new_embedding(3, settings(), seed=5)
    torch.rand(3)
    again, other = new_embedding(3, settings(), seed=5), new_embedding(3, settings(), seed=6)
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


@pytest.mark.parametrize(
    ("key", "value"),
    [("surrogate", "energy"), ("widths", []), ("widths", [0]), ("penalty", "none"), ("penalised", "model"),
     ("lam", -1.0), ("learning_rate", 0.0), ("weight_decay", -1.0)],
)  # fmt: skip
def test_embedding_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        settings(**{key: value})

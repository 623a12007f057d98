from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from killing import KilledError, MemoryCheckpoint
from scforget import seeding
from scforget.data.splits import ForgetSets
from scforget.errors import DataError, NonFiniteError
from scforget.methods.noisy_finetune import (
    NoisyFinetuneSettings,
    langevin_renyi,
    noisy_finetune,
    norm_of,
    perturb,
)
from scforget.models.vae import VAE
from scforget.tasks import VaeTask

Original = Callable[[], VAE]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3, "sigma": 1e-2, "clip": 10.0, "radius": 1.5, "batch_size": 32, "epochs": 3,
}  # fmt: skip


def settings(**changes: Any) -> NoisyFinetuneSettings:
    return NoisyFinetuneSettings(**{**SETTINGS, **changes})


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("order", [1.5, 2.0, 30.0])
def test_langevin_renyi_is_exact_for_a_quadratic(order: float, rate: float, steps: int) -> None:
    """The iterates of θ − ηmθ + √(2η)σξ are Gaussian: follow mean and variance, then α(μ − μ')²/(2v)."""
    curvature, sigma, starts = 1.7, 0.3, [2.0, -1.0]
    variance = 0.0
    for _ in range(steps):
        starts = [start - rate * curvature * start for start in starts]
        variance = (1 - rate * curvature) ** 2 * variance + 2 * rate * sigma**2
    wanted = order * (starts[0] - starts[1]) ** 2 / (2 * variance)
    found = langevin_renyi(
        order, 3.0, learning_rate=rate, sigma=sigma, strong_convexity=curvature, smoothness=curvature, steps=steps
    )  # fmt: skip
    assert found == pytest.approx(wanted, rel=1e-9)


def bound(**changes: float) -> float:
    usual: dict[str, Any] = {
        "order": 2.0, "start_distance": 1.0, "learning_rate": 0.1, "sigma": 0.5, "strong_convexity": 0.5,
        "smoothness": 2.0, "steps": 5,
    }  # fmt: skip
    return langevin_renyi(**{**usual, **changes})


def test_langevin_renyi_shrinks_with_every_step_and_with_the_noise() -> None:
    by_steps = [bound(steps=steps) for steps in range(1, 200)]
    assert all(later < earlier for earlier, later in pairwise(by_steps))
    assert by_steps[-1] < 1e-6 * by_steps[0]
    assert bound(sigma=1.0) == pytest.approx(bound() / 4)
    # two curvatures: the flatter contracts less, and the bound is its
    assert bound() == bound(smoothness=0.5) > bound(strong_convexity=2.0)


def test_langevin_renyi_holds_for_two_dimensions_of_different_curvature() -> None:
    """The divergences of independent coordinates add; the bound covers any direction between the starts."""
    for share in np.linspace(0, 1, 11):
        parts = [
            bound(start_distance=math.sqrt(weight), strong_convexity=m, smoothness=m)
            for weight, m in ((share, 0.5), (1 - share, 2.0))
        ]
        assert sum(parts) <= bound() * (1 + 1e-12)


def test_langevin_renyi_at_its_ends() -> None:
    assert bound(start_distance=0.0, sigma=0.0) == 0
    assert bound(steps=0) == bound(sigma=0.0) == math.inf
    assert bound(learning_rate=1.0, strong_convexity=1.0, smoothness=1.0) == 0  # a step forgets all
    for wrong in ({"strong_convexity": 0.0}, {"learning_rate": 1.0}, {"strong_convexity": -0.1}):
        with pytest.raises(DataError, match="Langevin bound"):
            bound(**wrong)


def test_perturb_adds_noise_of_a_scale_and_projects_onto_the_ball() -> None:
    start = [torch.ones(300, 100), torch.ones(10_000)]
    moved = [part.clone() for part in start]
    perturb(moved, 0.3, math.inf, torch.Generator().manual_seed(0))
    noise = torch.cat([(after - before).ravel() for after, before in zip(moved, start, strict=True)])
    assert float(noise.std()) == pytest.approx(0.3, rel=0.015)
    assert abs(float(noise.mean())) < 4 * 0.3 / 200
    again = [part.clone() for part in start]
    perturb(again, 0.3, 50.0, torch.Generator().manual_seed(0))
    assert norm_of(again) == pytest.approx(50.0, rel=1e-6)
    for part, free in zip(again, moved, strict=True):
        torch.testing.assert_close(part, free * (50.0 / norm_of(moved)))
    perturb(again, 0.0, 51.0, torch.Generator())
    assert norm_of(again) == pytest.approx(50.0, rel=1e-6)


@pytest.mark.parametrize("changes", [{}, {"sigma": 0.0}, {"clip": math.inf}, {"clip": 0.5}, {"radius": 0.9}])
def test_noisy_finetune_equals_its_rule_step_by_step(
    task: VaeTask, forget_sets: ForgetSets, original: Original, changes: dict[str, float]
) -> None:
    chosen = settings(epochs=2, **changes)
    found = noisy_finetune(original(), task, forget_sets, chosen, seed=4).model
    wanted = original().train()
    names = list(wanted.state_dict())
    theta = torch.nn.utils.parameters_to_vector(wanted.parameters()).detach()
    radius = chosen.radius * float(theta.norm())
    for epoch in (1, 2):
        with seeding.scope(4, "langevin", "epoch", epoch) as noise:
            order = forget_sets.retain[torch.randperm(100, generator=noise).numpy()]
            for cells in np.split(order, [32, 64, 96]):
                loss = task.loss(wanted, task.batch(cells), noise).total.mean()
                each = torch.autograd.grad(loss, list(wanted.parameters()))
                gradient = torch.cat([part.ravel() for part in each])
                gradient = gradient * min(1.0, chosen.clip / float(gradient.norm()))
                theta = theta - 1e-3 * gradient
                if chosen.sigma:
                    drawn = [torch.randn(p.shape, generator=noise).ravel() for p in wanted.parameters()]
                    theta = theta + math.sqrt(2e-3) * chosen.sigma * torch.cat(drawn)
                theta = theta * min(1.0, radius / float(theta.norm()))
                torch.nn.utils.vector_to_parameters(theta, wanted.parameters())
    for name in names:
        torch.testing.assert_close(found.state_dict()[name], wanted.state_dict()[name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(found.state_dict()[name], original().state_dict()[name])


def test_noisy_finetune_of_no_epoch_is_the_original_bit_for_bit(
    task: VaeTask, forget_sets: ForgetSets, original: Original, same_bytes: Same
) -> None:
    unlearned = noisy_finetune(original(), task, forget_sets, settings(epochs=0, radius=0.1), seed=0)
    assert same_bytes(unlearned.model.state_dict(), original().state_dict())
    assert unlearned.effort.passes == 0


def test_noisy_finetune_gives_the_same_bytes_for_the_same_seed_only(
    task: VaeTask, forget_sets: ForgetSets, original: Original, same_bytes: Same
) -> None:
    first, again, other = (
        noisy_finetune(original(), task, forget_sets, settings(), seed=seed).model.state_dict() for seed in (5, 5, 6)
    )
    assert same_bytes(first, again)
    assert not same_bytes(first, other)


@pytest.mark.parametrize("epoch", [1, 2])
def test_noisy_finetune_resumes_bit_for_bit(
    task: VaeTask, forget_sets: ForgetSets, original: Original, same_bytes: Same, epoch: int
) -> None:
    """The ball is so small that it binds: its radius has to be that of the original, not of the resumed model."""
    small = settings(radius=0.9)
    whole = noisy_finetune(original(), task, forget_sets, small, seed=5)
    dying, survivor = MemoryCheckpoint(dies_at=epoch), MemoryCheckpoint()
    with pytest.raises(KilledError):
        noisy_finetune(original(), task, forget_sets, small, seed=5, checkpoint=dying)
    survivor.kept = dying.kept
    resumed = noisy_finetune(original(), task, forget_sets, small, seed=5, checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)
    assert survivor.saves == 3 - epoch


def test_noisy_finetune_counts_its_effort_and_promises_nothing(
    task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    trained = noisy_finetune(original(), task, forget_sets, settings(), seed=5)
    assert trained.effort.forward == trained.effort.backward == {"retain": 300}
    assert trained.effort.steps == 12
    assert trained.facts == {"guarantee": "none: the loss is not strongly convex"}


def test_noisy_finetune_never_reads_the_forgotten_cells(
    task: VaeTask, poisoned: VaeTask, forget_sets: ForgetSets, original: Original, same_bytes: Same
) -> None:
    clean, other = (noisy_finetune(original(), t, forget_sets, settings(), seed=3) for t in (task, poisoned))
    assert same_bytes(clean.model.state_dict(), other.model.state_dict())
    assert clean.history == other.history


@pytest.mark.parametrize(("batch_size", "name"), [(32, "the loss"), (100, "the weights")])
def test_noisy_finetune_stops_where_it_diverges(
    task: VaeTask, forget_sets: ForgetSets, original: Original, batch_size: int, name: str
) -> None:
    wild = settings(learning_rate=0.5, sigma=3e38, clip=math.inf, radius=math.inf, batch_size=batch_size, epochs=1)
    with pytest.raises(NonFiniteError, match=name):
        noisy_finetune(original(), task, forget_sets, wild, seed=5)


@pytest.mark.parametrize(
    ("key", "value"),
    [("learning_rate", 0.0), ("sigma", -0.1), ("clip", 0.0), ("radius", 0.0), ("batch_size", 0), ("epochs", -1)],
)
def test_noisy_finetune_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        settings(**{key: value})

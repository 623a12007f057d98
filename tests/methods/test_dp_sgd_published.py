from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from killing import KilledError, MemoryCheckpoint
from scforget import private, published
from scforget.data.splits import ForgetSets
from scforget.methods.dp_sgd_published import (
    DPSGDPublishedSettings,
    dp_sgd_published,
    mechanism_as_published,
    split,
)
from scforget.models.vae import VAE
from scforget.tasks import VaeTask

Original = Callable[[], VAE]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
SETTINGS: dict[str, Any] = {
    "variant": "published", "epsilon": 10.0, "delta": 1e-5, "clip": 1.0, "learning_rate": 1e-2, "batch_size": 32,
    "max_epochs": 4, "patience": 15, "validation_cells": 1000,
}  # fmt: skip


def settings(**changes: Any) -> DPSGDPublishedSettings:
    return DPSGDPublishedSettings(**{**SETTINGS, **changes})


@pytest.mark.parametrize(
    ("epsilon", "sigma", "spent"), [(1.0, 2.8840, 1.0035), (10.0, 0.7102, 10.03), (50.0, 0.4374, 50.20)]
)
def test_mechanism_as_published_has_the_published_noise_and_overspends_as_published(
    epsilon: float, sigma: float, spent: float
) -> None:
    found = mechanism_as_published(settings(epsilon=epsilon, batch_size=256, max_epochs=50), 27_094)
    assert found.noise_multiplier == pytest.approx(sigma, rel=1e-3)
    assert (found.steps, found.rate, found.expected) == (106, 1 / 106, 255)
    assert private.epsilon_spent(found.noise_multiplier, found.rate, 5300, 1e-5) == pytest.approx(spent, rel=2e-3)


@pytest.mark.parametrize(("wanted", "found"), [(1000, 25), (10, 10), (25, 25)])
def test_split_sets_aside_at_most_a_quarter(forget_sets: ForgetSets, wanted: int, found: int) -> None:
    train, validation = split(forget_sets.retain, wanted, 5)
    assert len(validation) == found
    assert np.array_equal(np.sort(np.concatenate([train, validation])), forget_sets.retain)
    assert not np.array_equal(validation, split(forget_sets.retain, wanted, 6)[1])


def test_dp_sgd_published_keeps_the_best_epoch_and_stops_by_patience(
    task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    wild = settings(learning_rate=0.3, max_epochs=40, patience=2)
    trained = dp_sgd_published(original(), task, forget_sets, wild, seed=5)
    scores = [row["stop_elbo"] for row in trained.history]
    best = int(np.argmax(scores)) + 1
    assert len(scores) == best + 2 < 40
    _, validation = split(forget_sets.retain, 1000, 5)
    assert -published.mean_loss(task, trained.model, validation, "sum") == scores[best - 1]
    steps = 3 * len(scores)
    assert trained.effort.steps == steps
    assert trained.facts["epsilon"] == private.epsilon_spent(trained.facts["noise_multiplier"], 1 / 3, steps, 1e-5)
    assert float(trained.facts["epsilon"]) < 10
    assert trained.facts["group_epsilon"] == 20 * float(trained.facts["epsilon"])
    assert str(trained.facts["guarantee"]).startswith("none for the validation cells")


def test_dp_sgd_published_leaves_the_dispersion_head_as_initialised(
    task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    found = dp_sgd_published(original(), task, forget_sets, settings(), seed=5).model.state_dict()
    for name, fresh in task.new_model(5).state_dict().items():
        assert torch.equal(found[name], fresh) == name.startswith("dispersion.")


def test_dp_sgd_published_gives_the_same_bytes_for_the_same_seed_only(
    task: VaeTask, forget_sets: ForgetSets, original: Original, same_bytes: Same
) -> None:
    first, again, other = (
        dp_sgd_published(original(), task, forget_sets, settings(), seed=seed).model.state_dict() for seed in (5, 5, 6)
    )
    assert same_bytes(first, again)
    assert not same_bytes(first, other)


@pytest.mark.parametrize("epoch", [1, 3])
def test_dp_sgd_published_resumes_bit_for_bit(
    task: VaeTask, forget_sets: ForgetSets, original: Original, same_bytes: Same, epoch: int
) -> None:
    whole = dp_sgd_published(original(), task, forget_sets, settings(), seed=5)
    dying, survivor = MemoryCheckpoint(dies_at=epoch), MemoryCheckpoint()
    with pytest.raises(KilledError):
        dp_sgd_published(original(), task, forget_sets, settings(), seed=5, checkpoint=dying)
    survivor.kept = dying.kept
    resumed = dp_sgd_published(original(), task, forget_sets, settings(), seed=5, checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort, resumed.facts) == (whole.history, whole.effort, whole.facts)


def test_dp_sgd_published_counts_its_effort(task: VaeTask, forget_sets: ForgetSets, original: Original) -> None:
    trained = dp_sgd_published(original(), task, forget_sets, settings(), seed=5)
    drawn = int(sum(row["drawn"] for row in trained.history))
    assert trained.effort.forward == {"retain": drawn + 4 * 25}
    assert trained.effort.backward == {"retain": drawn}
    assert trained.effort.steps == 4 * 3
    assert abs(drawn - 4 * 75) < 5 * math.sqrt(12 * 75 * 2 / 9)


def test_dp_sgd_published_never_reads_the_forgotten_cells(
    task: VaeTask, poisoned: VaeTask, forget_sets: ForgetSets, original: Original, same_bytes: Same
) -> None:
    clean, other = (dp_sgd_published(original(), t, forget_sets, settings(), seed=3) for t in (task, poisoned))
    assert same_bytes(clean.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize(
    ("key", "value"), [("epsilon", math.inf), ("clip", math.inf), ("delta", 1.0), ("max_epochs", 0), ("variant", "own")]
)
def test_dp_sgd_published_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        settings(**{key: value})

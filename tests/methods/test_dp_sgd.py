from __future__ import annotations

import math
import os
import pickle
import secrets
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from killing import KilledError, MemoryCheckpoint
from scforget import private, seeding
from scforget.data.splits import ForgetSets
from scforget.errors import NonFiniteError
from scforget.methods.dp_sgd import DPSGDSettings, dp_sgd, privacy_facts
from scforget.models.vae import VAE
from scforget.tasks import VaeTask

Original = Callable[[], VAE]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
SETTINGS: dict[str, Any] = {
    "epsilon": 10.0, "delta": 1e-5, "clip": 1.0, "learning_rate": 1e-2, "batch_size": 32, "epochs": 3,
    "secure_mode": False,
}  # fmt: skip


def settings(**changes: Any) -> DPSGDSettings:
    return DPSGDSettings(**{**SETTINGS, **changes})


def test_dp_sgd_without_noise_clipping_and_sampling_is_full_batch_adam(
    task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    free = settings(epsilon=math.inf, clip=math.inf, batch_size=1000, epochs=4)
    trained = dp_sgd(original(), task, forget_sets, free, seed=5)
    wanted = task.new_model(5).train()
    optimiser = torch.optim.Adam(wanted.parameters(), lr=1e-2)
    for epoch in range(1, 5):
        with seeding.scope(5, "private", "epoch", epoch) as noise:
            torch.rand(100, generator=noise, dtype=torch.float64)  # the draw that every cell wins
            loss = task.loss(wanted, task.batch(forget_sets.retain), noise).total
            optimiser.zero_grad()
            loss.mean().backward()
        optimiser.step()
    far, start = [], task.new_model(5).state_dict()
    for name, value in wanted.state_dict().items():
        far.append(float((trained.model.state_dict()[name] - value).norm() / (value - start[name]).norm()))
    assert max(far) < 1e-3
    assert trained.history[-1]["train_loss"] == pytest.approx(float(loss.detach().mean()), rel=1e-5)
    assert trained.facts == {"noise_multiplier": 0.0, "guarantee": "none: no noise"}


def test_dp_sgd_learns_under_a_weak_guarantee(task: VaeTask, forget_sets: ForgetSets, original: Original) -> None:
    trained = dp_sgd(original(), task, forget_sets, settings(epochs=30, epsilon=50.0), seed=5)
    before = task.signals(task.new_model(5), forget_sets.stop).elbo.mean()
    assert task.signals(trained.model, forget_sets.stop).elbo.mean() > before + 5
    assert not trained.model.training


def test_dp_sgd_keeps_nothing_of_the_original_and_the_last_epoch(
    task: VaeTask, forget_sets: ForgetSets, original: Original, same_bytes: Same
) -> None:
    one, other = (dp_sgd(model, task, forget_sets, settings(), seed=5) for model in (original(), task.new_model(9)))
    assert same_bytes(one.model.state_dict(), other.model.state_dict())
    checkpoint = MemoryCheckpoint()
    dp_sgd(original(), task, forget_sets, settings(), seed=5, checkpoint=checkpoint)
    assert checkpoint.kept is not None
    last = {name.removeprefix("model/"): v for name, v in checkpoint.kept[0].items() if name.startswith("model/")}
    assert same_bytes(one.model.state_dict(), last)


def test_dp_sgd_gives_the_same_bytes_for_the_same_seed_only(
    task: VaeTask, forget_sets: ForgetSets, original: Original, same_bytes: Same
) -> None:
    first, again, other = (dp_sgd(original(), task, forget_sets, settings(), seed=seed) for seed in (5, 5, 6))
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert first.history == again.history
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())


def test_dp_sgd_facts_are_the_accountants(task: VaeTask, forget_sets: ForgetSets, original: Original) -> None:
    facts = dp_sgd(original(), task, forget_sets, settings(), seed=5).facts
    sigma = private.noise_multiplier(10.0, 1e-5, 0.32, 12)
    epsilon = private.epsilon_spent(sigma, 0.32, 12, 1e-5)
    assert 9.98 < epsilon <= 10
    assert facts == {
        "noise_multiplier": sigma, "epsilon": epsilon, "delta": 1e-5, "group_epsilon": 20 * epsilon,
        "group_delta": 1.0, "guarantee": "per cell; for 20 cells not as a group (delta 1)",
    }  # fmt: skip


def test_privacy_facts_of_a_small_group_are_a_guarantee() -> None:
    facts = privacy_facts(2.0, 0.5, 1e-6, 3)
    assert facts["group_epsilon"] == 1.5
    assert facts["group_delta"] == pytest.approx(1e-6 * (1 + math.exp(0.5) + math.e))
    assert facts["guarantee"] == "per cell; for 3 cells as a group"


@pytest.mark.parametrize("epoch", [1, 2])
def test_dp_sgd_resumes_bit_for_bit(
    task: VaeTask, forget_sets: ForgetSets, original: Original, same_bytes: Same, epoch: int
) -> None:
    whole = dp_sgd(original(), task, forget_sets, settings(), seed=5)
    dying, survivor = MemoryCheckpoint(dies_at=epoch), MemoryCheckpoint()
    with pytest.raises(KilledError):
        dp_sgd(original(), task, forget_sets, settings(), seed=5, checkpoint=dying)
    survivor.kept = dying.kept
    resumed = dp_sgd(original(), task, forget_sets, settings(), seed=5, checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort, resumed.facts) == (whole.history, whole.effort, whole.facts)
    assert survivor.saves == 3 - epoch


def test_dp_sgd_counts_the_cells_that_were_drawn(task: VaeTask, forget_sets: ForgetSets, original: Original) -> None:
    trained = dp_sgd(original(), task, forget_sets, settings(), seed=5)
    drawn = 0
    for epoch in range(1, 4):
        noise = seeding.torch_generator(5, "private", "epoch", epoch)
        for _ in range(4):
            part = private.poisson(forget_sets.retain, 0.32, noise)
            torch.randn(len(part), 4, generator=noise)
            drawn += len(part)
    assert trained.effort.forward == trained.effort.backward == {"retain": drawn}
    assert trained.effort.steps == 12
    assert sum(row["drawn"] for row in trained.history) == drawn


def test_dp_sgd_accepts_empty_batches(task: VaeTask, forget_sets: ForgetSets, original: Original) -> None:
    trained = dp_sgd(original(), task, forget_sets, settings(batch_size=1, epochs=1), seed=5)
    assert trained.effort.steps == 100
    assert 60 < trained.effort.forward["retain"] < 140


def test_dp_sgd_in_secure_mode_cannot_be_repeated(
    task: VaeTask, forget_sets: ForgetSets, original: Original, same_bytes: Same
) -> None:
    first, again = (dp_sgd(original(), task, forget_sets, settings(secure_mode=True), seed=5) for _ in range(2))
    assert not same_bytes(first.model.state_dict(), again.model.state_dict())
    assert first.history != again.history
    seeded = dp_sgd(original(), task, forget_sets, settings(), seed=5)
    assert first.facts == again.facts == seeded.facts
    assert first.effort.steps == seeded.effort.steps == 12


def test_dp_sgd_in_secure_mode_draws_noise_and_batches_from_the_secure_source(
    task: VaeTask, forget_sets: ForgetSets, original: Original, same_bytes: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the key known, and only then, all is known: nothing comes from the seed but the first weights."""
    monkeypatch.setattr(secrets, "token_bytes", bytes)  # so many zeros
    first, again = (dp_sgd(original(), task, forget_sets, settings(secure_mode=True), seed=5) for _ in range(2))
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    other = dp_sgd(original(), task, forget_sets, settings(secure_mode=True), seed=6)
    seeded = dp_sgd(original(), task, forget_sets, settings(), seed=5)
    drawn = [[row["drawn"] for row in run.history] for run in (first, other, seeded)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_dp_sgd_in_secure_mode_resumes_and_keeps_no_key(
    task: VaeTask, forget_sets: ForgetSets, original: Original, same_bytes: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[bytes] = []

    def token_bytes(size: int) -> bytes:
        keys.append(os.urandom(size))
        return keys[-1]

    monkeypatch.setattr(secrets, "token_bytes", token_bytes)
    dying, survivor = MemoryCheckpoint(dies_at=2), MemoryCheckpoint()
    with pytest.raises(KilledError):
        dp_sgd(original(), task, forget_sets, settings(secure_mode=True), seed=5, checkpoint=dying)
    survivor.kept = dying.kept
    resumed = dp_sgd(original(), task, forget_sets, settings(secure_mode=True), seed=5, checkpoint=survivor)
    assert len(resumed.history) == 3
    assert resumed.effort.steps == 12
    assert len(set(keys)) == len(keys) == 4  # a key and a start, of each run
    saved = pickle.dumps([dying.kept, survivor.kept])
    assert not any(key in saved for key in keys)


def test_dp_sgd_never_reads_the_forgotten_cells(
    task: VaeTask, poisoned: VaeTask, forget_sets: ForgetSets, original: Original, same_bytes: Same
) -> None:
    clean, other = (dp_sgd(original(), t, forget_sets, settings(), seed=3) for t in (task, poisoned))
    assert same_bytes(clean.model.state_dict(), other.model.state_dict())
    assert clean.history == other.history


def test_dp_sgd_stops_where_it_diverges(task: VaeTask, forget_sets: ForgetSets, original: Original) -> None:
    with pytest.raises(NonFiniteError):
        dp_sgd(original(), task, forget_sets, settings(learning_rate=1e30), seed=5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epsilon", 0.0), ("delta", 0.0), ("delta", 1.0), ("clip", 0.0), ("clip", math.inf), ("learning_rate", 0.0),
        ("batch_size", 0), ("epochs", 0), ("patience", 3),
    ],
)  # fmt: skip
def test_dp_sgd_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        settings(**{key: value})

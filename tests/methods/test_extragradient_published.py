from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import sparse
from torch import Tensor

from killing import KilledError, MemoryCheckpoint
from scforget import seeding
from scforget.critics import features_of, published_critics
from scforget.data.splits import ForgetSets
from scforget.errors import NonFiniteError
from scforget.methods import extragradient_published as module
from scforget.methods.extragradient_published import (
    ExtragradientPublishedSettings,
    ShadowSettings,
    extragradient_published,
    rising,
    shadow_auc,
)
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.training import Effort, Trained

Original = Callable[[], VAE]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
CRITICS: dict[str, Any] = {
    "number": 3, "hidden": [16, 16], "dropout": 0.3, "learning_rate": 1e-2, "weight_decay": 1e-4, "steps": 20,
    "retain_cells": 64,
}  # fmt: skip
SHADOW: dict[str, Any] = {
    "hidden": [16, 16], "dropout": 0.3, "learning_rate": 1e-3, "steps": 20, "retain_cells": 64, "scored_cells": 50,
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "variant": "published", "critics": CRITICS, "lam": 10.0, "learning_rate": 1e-3, "critic_learning_rate": 1e-3,
    "critic_updates": 2, "batch_size": 32, "epochs": 4, "shadow": SHADOW, "abort_after": 5,
}  # fmt: skip


def settings(**changes: Any) -> ExtragradientPublishedSettings:
    return ExtragradientPublishedSettings(**{**SETTINGS, **changes})


@pytest.fixture
def unlearn(task: VaeTask, forget_sets: ForgetSets, original: Original) -> Callable[..., Trained]:
    def run(*, seed: int = 0, checkpoint: Any = None, **changes: Any) -> Trained:
        own = settings(**changes)
        return extragradient_published(original(), task, forget_sets, own, seed=seed, checkpoint=checkpoint)

    return run


@pytest.mark.parametrize(
    ("values", "count", "wanted"),
    [
        ([], 3, False), ([0.1, 0.2], 3, False), ([0.1, 0.2, 0.3], 3, True), ([0.1, 0.3, 0.3], 3, False),
        ([0.9, 0.1, 0.2, 0.3], 3, True), ([0.9, 0.1, 0.2, 0.3], 4, False), ([0.1, 0.2, 0.3, 0.2], 3, False),
    ],
)  # fmt: skip
def test_rising_wants_the_last_values_to_increase_strictly(values: list[float], count: int, wanted: bool) -> None:
    assert rising(values, count) == wanted


def test_published_extragradient_of_no_epoch_is_the_original_bit_for_bit(
    unlearn: Callable[..., Trained], original: Original, same_bytes: Same
) -> None:
    unlearned = unlearn(epochs=0)
    assert same_bytes(unlearned.model.state_dict(), original().state_dict())
    assert (unlearned.effort.passes, unlearned.effort.steps) == (0, 0)


def test_published_extragradient_follows_its_seed_alone(unlearn: Callable[..., Trained], same_bytes: Same) -> None:
    first = unlearn()
    torch.manual_seed(99)
    again, other = unlearn(), unlearn(seed=1)
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert first.history == again.history
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())
    assert not first.model.training
    assert [row["epoch"] for row in first.history] == [1, 2, 3, 4]


@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_published_extragradient_resumes_bit_for_bit(
    unlearn: Callable[..., Trained], same_bytes: Same, epoch: int
) -> None:
    whole, last = unlearn(checkpoint=(kept := MemoryCheckpoint())), MemoryCheckpoint()
    dying = MemoryCheckpoint(dies_at=epoch)
    with pytest.raises(KilledError):
        unlearn(checkpoint=dying)
    last.kept = dying.kept
    resumed = unlearn(checkpoint=last)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)
    assert kept.kept is not None
    assert last.kept is not None
    assert same_bytes(last.kept[0], kept.kept[0])
    assert last.saves == 4 - epoch


def test_published_extragradient_stops_when_the_shadow_rises_and_stays_stopped(
    unlearn: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch, same_bytes: Same
) -> None:
    def say(*values: float) -> None:
        said = iter(values)
        monkeypatch.setattr(module, "shadow_auc", lambda *_, **__: next(said))

    say(0.9, 0.5, 0.6, 0.7, 0.8)
    checkpoint = MemoryCheckpoint()
    stopped = unlearn(epochs=5, abort_after=3, checkpoint=checkpoint)
    assert [row["shadow_auc"] for row in stopped.history] == [0.9, 0.5, 0.6, 0.7]
    say()
    again = unlearn(epochs=5, abort_after=3, checkpoint=checkpoint)
    assert same_bytes(again.model.state_dict(), stopped.model.state_dict())
    assert again.history == stopped.history
    say(0.9, 0.5, 0.6, 0.7)
    last = unlearn(epochs=4, abort_after=4)  # the last weights come back, whatever the shadow said
    assert same_bytes(last.model.state_dict(), stopped.model.state_dict())


def test_published_extragradient_takes_one_adam_step_an_epoch(
    unlearn: Callable[..., Trained], task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    """Mean over genes beside a KL summed over dimensions, and the largest mean sigmoid of any critic."""
    model, sets = original(), forget_sets
    critics = published_critics(model, task, sets, settings().critics, Effort(), seed=0)
    with seeding.scope(0, "epoch 1", "epoch", 1) as noise:
        retain = sets.retain[torch.randperm(100, generator=noise)[:32].numpy()]
        features = task.features(model.train(), task.batch(sets.forget), noise)
        payoff = torch.stack([torch.sigmoid(member(features)).mean() for member in critics.members]).max()
        batch = task.batch(retain)
        parts = task.loss(model, batch, noise)
        loss = payoff + 10.0 * (parts.kl - parts.reconstruction / batch.counts.shape[1]).mean()
        loss.backward()
    torch.optim.Adam(model.parameters(), lr=1e-3).step()
    unlearned = unlearn(epochs=1)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(unlearned.model.state_dict()[name], value, rtol=1e-4, atol=2e-5)
    (row,) = unlearned.history
    assert row["payoff"] == pytest.approx(float(payoff.detach()), rel=1e-5)
    assert row["train_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)


def test_published_extragradient_moves_its_critics_by_plain_gradient_steps(unlearn: Callable[..., Trained]) -> None:
    """Twice the rate, twice as far, to first order; in no step only the power iterations would differ."""

    def biases(**changes: Any) -> Tensor:
        checkpoint = MemoryCheckpoint()
        unlearn(epochs=1, critic_updates=1, checkpoint=checkpoint, **changes)
        assert checkpoint.kept is not None
        return checkpoint.kept[0]["part/critics/members.0.layers.0.bias"].double()

    still, slow, fast = (biases(critic_learning_rate=rate) for rate in (1e-12, 1e-1, 2e-1))
    assert float((slow - still).abs().max()) > 1e-3
    torch.testing.assert_close(fast - still, 2 * (slow - still), rtol=1e-3, atol=1e-7)


def test_shadow_auc_is_one_for_cells_that_stand_apart(
    make_task: Callable[..., VaeTask], tiny_counts: sparse.csr_matrix, forget_sets: ForgetSets
) -> None:
    counts = tiny_counts.toarray()
    counts[forget_sets.forget] *= 20
    apart = make_task(counts=sparse.csr_matrix(counts))
    own = ShadowSettings(**{**SHADOW, "learning_rate": 1e-2, "dropout": 0.0, "steps": 200})
    with seeding.scope(0, "test") as noise:
        found = shadow_auc(apart.new_model(0), apart, forget_sets, own, noise=noise, effort=Effort())
    assert found > 0.99


def test_shadow_auc_is_the_mean_of_two(
    task: VaeTask, forget_sets: ForgetSets, original: Original, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def say(_critics: Any, members: Tensor, others: Tensor, _step: int) -> float:
        seen.extend([len(members), len(others)])
        return 0.2 if len(seen) == 2 else 0.6

    monkeypatch.setattr(module.critic, "mean_logit_auc", say)
    effort = Effort()
    with seeding.scope(0, "test") as noise:
        found = shadow_auc(original(), task, forget_sets, ShadowSettings(**SHADOW), noise=noise, effort=effort)
    assert found == pytest.approx(0.4)
    assert seen == [20, 20, 20, 50]
    assert effort.to_dict() == {
        "steps": 20, "forward": {"aside": 20, "forget": 20, "retain": 114}, "backward": {}, "passes": 154,
    }  # fmt: skip


def test_published_extragradient_counts_its_effort(unlearn: Callable[..., Trained]) -> None:
    effort = unlearn(epochs=3).effort
    assert effort.steps == 20 + 3 * (1 + 2 + 20)
    assert effort.forward == {
        "forget": 20 + 3 * (20 + 2 * 20 + 20), "aside": 3 * 20, "retain": 64 + 3 * (32 + 2 * 32 + 64 + 50),
    }  # fmt: skip
    assert effort.backward == {"forget": 60, "retain": 96}


@pytest.mark.parametrize("which", ["forget", "retain", "aside"])
def test_published_extragradient_ends_on_a_nan(
    make_task: Callable[..., VaeTask], tiny_counts: sparse.csr_matrix, forget_sets: ForgetSets, original: Original,
    which: str,
) -> None:  # fmt: skip
    counts = tiny_counts.toarray()
    counts[getattr(forget_sets, which), 0] = np.nan
    task = make_task(counts=sparse.csr_matrix(counts))
    assert features_of(task, original(), getattr(forget_sets, which)).isnan().any()
    with pytest.raises(NonFiniteError):
        extragradient_published(original(), task, forget_sets, settings(), seed=0)


def test_published_extragradient_ends_at_a_huge_learning_rate(unlearn: Callable[..., Trained]) -> None:
    with pytest.raises(NonFiniteError):
        unlearn(learning_rate=1e30, epochs=1)


@pytest.mark.parametrize(
    ("key", "value"), [("variant", "canonical"), ("abort_after", 1), ("critic_updates", -1), ("epochs", -1)]
)
def test_published_extragradient_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        settings(**{key: value})

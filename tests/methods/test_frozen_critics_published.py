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
from scforget.critics import published_critics, refusal
from scforget.data.splits import ForgetSets
from scforget.errors import NonFiniteError
from scforget.methods.frozen_critics_published import FrozenCriticsPublishedSettings, frozen_critics_published
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.training import Effort, Trained

Original = Callable[[], VAE]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
CRITICS: dict[str, Any] = {
    "number": 3, "hidden": [16, 16], "dropout": 0.3, "learning_rate": 1e-2, "weight_decay": 1e-4, "steps": 20,
    "retain_cells": 64,
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "variant": "published", "critics": CRITICS, "lam": 5.0, "repeats": 4, "learning_rate": 1e-3, "batch_size": 32,
    "clip": 1.0, "epochs": 3, "save": "raw", "ema_decay": 0.9,
}  # fmt: skip


def settings(**changes: Any) -> FrozenCriticsPublishedSettings:
    return FrozenCriticsPublishedSettings(**{**SETTINGS, **changes})


@pytest.fixture
def unlearn(task: VaeTask, forget_sets: ForgetSets, original: Original) -> Callable[..., Trained]:
    def run(*, seed: int = 0, checkpoint: Any = None, **changes: Any) -> Trained:
        own = settings(**changes)
        return frozen_critics_published(original(), task, forget_sets, own, seed=seed, checkpoint=checkpoint)

    return run


@pytest.mark.parametrize("save", ["raw", "ema"])
def test_published_frozen_critics_of_no_epoch_is_the_original_bit_for_bit(
    unlearn: Callable[..., Trained], original: Original, same_bytes: Same, save: str
) -> None:
    unlearned = unlearn(epochs=0, save=save)
    assert same_bytes(unlearned.model.state_dict(), original().state_dict())
    assert (unlearned.effort.passes, unlearned.effort.steps) == (0, 0)


def test_published_frozen_critics_follow_their_seed_alone(unlearn: Callable[..., Trained], same_bytes: Same) -> None:
    first = unlearn()
    torch.manual_seed(99)
    again, other = unlearn(), unlearn(seed=1)
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert first.history == again.history
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())
    assert not first.model.training


@pytest.mark.parametrize(("epoch", "save"), [(1, "raw"), (2, "ema"), (3, "ema")])
def test_published_frozen_critics_resume_bit_for_bit(
    unlearn: Callable[..., Trained], same_bytes: Same, epoch: int, save: str
) -> None:
    whole = unlearn(save=save)
    dying, survivor = MemoryCheckpoint(dies_at=epoch), MemoryCheckpoint()
    with pytest.raises(KilledError):
        unlearn(save=save, checkpoint=dying)
    survivor.kept = dying.kept
    resumed = unlearn(save=save, checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)


def test_published_frozen_critics_of_one_batch_is_one_clipped_adam_step(
    unlearn: Callable[..., Trained], task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    """Mean loss over genes plus mean KL over dimensions, and K draws of z in train mode."""
    own = {"batch_size": 100, "epochs": 1, "lam": 7.0, "repeats": 2, "clip": 1e-3}
    model, sets = original(), forget_sets
    critics = published_critics(model, task, sets, settings().critics, Effort(), seed=0)
    with seeding.scope(0, "unlearn", "epoch", 1) as noise:
        order = sets.retain[torch.randperm(100, generator=noise).numpy()]
        model.train()
        worst = [refusal(critics(task.features(model, task.batch(sets.forget), noise))).max() for _ in range(2)]
        batch = task.batch(order)
        parts = task.loss(model, batch, noise)
        kept = (parts.kl / task.settings.latent - parts.reconstruction / batch.counts.shape[1]).mean()
        loss = (worst[0] + worst[1]) / 2 + 7.0 * kept
        loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad *= 1e-3 / float(norm)
    torch.optim.Adam(model.parameters(), lr=1e-3).step()
    unlearned = unlearn(**own)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(unlearned.model.state_dict()[name], value, rtol=1e-4, atol=2e-5)
    (row,) = unlearned.history
    assert row["train_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert row["payoff"] == pytest.approx((float(worst[0].detach()) + float(worst[1].detach())) / 2, rel=1e-5)


def test_published_frozen_critics_save_an_average_that_hardly_left_the_original(
    unlearn: Callable[..., Trained], original: Original
) -> None:
    raw, average, start = unlearn(epochs=1), unlearn(epochs=1, save="ema"), original().state_dict()
    for name, value in average.model.state_dict().items():
        wanted = 0.9 * start[name] + 0.1 * raw.model.state_dict()[name]
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    assert raw.history == average.history


def test_published_frozen_critics_are_convinced(unlearn: Callable[..., Trained]) -> None:
    before = unlearn(epochs=1, learning_rate=1e-9).history[-1]["forget_bce"]
    assert unlearn(epochs=20, lam=0.01).history[-1]["forget_bce"] < 0.8 * before


def test_published_frozen_critics_count_their_effort(unlearn: Callable[..., Trained]) -> None:
    effort = unlearn().effort
    assert effort.steps == 20 + 3 * 4
    assert effort.forward == {"forget": 20 + 3 * (4 * 4 * 20 + 20), "retain": 64 + 300}
    assert effort.backward == {"forget": 3 * 4 * 4 * 20, "retain": 300}


@pytest.mark.parametrize("which", ["forget", "retain"])
def test_published_frozen_critics_end_on_a_nan(
    make_task: Callable[..., VaeTask], tiny_counts: sparse.csr_matrix, forget_sets: ForgetSets, original: Original,
    which: str,
) -> None:  # fmt: skip
    counts = tiny_counts.toarray()
    counts[getattr(forget_sets, which)[3], 0] = np.nan
    task = make_task(counts=sparse.csr_matrix(counts))
    with pytest.raises(NonFiniteError):
        frozen_critics_published(original(), task, forget_sets, settings(), seed=0)


@pytest.mark.parametrize("batch_size", [32, 100])
def test_published_frozen_critics_end_at_a_huge_learning_rate(
    unlearn: Callable[..., Trained], batch_size: int
) -> None:  # fmt: skip
    with pytest.raises(NonFiniteError):
        unlearn(learning_rate=1e30, batch_size=batch_size, epochs=1)


@pytest.mark.parametrize(("key", "value"), [("variant", "canonical"), ("repeats", 0), ("clip", 0.0), ("save", "best")])
def test_published_frozen_critics_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        settings(**{key: value})

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import sparse
from torch import Tensor

from killing import KilledError, MemoryCheckpoint
from scforget import seeding
from scforget.critics import refusal, trained_critics
from scforget.data.splits import ForgetSets
from scforget.errors import EmptyGroupError, NonFiniteError
from scforget.methods.frozen_critics import FrozenCriticsSettings, frozen_critics
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.training import Effort, Trained, mean_elbo

Original = Callable[[], VAE]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
CRITICS: dict[str, Any] = {
    "number": 3, "hidden": [16, 16], "dropout": 0.3, "learning_rate": 1e-2, "weight_decay": 1e-4, "steps": 40,
}  # fmt: skip
SETTINGS: dict[str, Any] = {"critics": CRITICS, "lam": 1.0, "learning_rate": 1e-3, "batch_size": 32, "epochs": 3}


def settings(**changes: Any) -> FrozenCriticsSettings:
    return FrozenCriticsSettings(**{**SETTINGS, **changes})


@pytest.fixture
def unlearn(task: VaeTask, forget_sets: ForgetSets, original: Original) -> Callable[..., Trained]:
    def run(*, seed: int = 0, checkpoint: MemoryCheckpoint | None = None, **changes: Any) -> Trained:
        return frozen_critics(original(), task, forget_sets, settings(**changes), seed=seed, checkpoint=checkpoint)

    return run


def test_frozen_critics_of_no_epoch_is_the_original_bit_for_bit(
    unlearn: Callable[..., Trained], original: Original, same_bytes: Same
) -> None:
    unlearned = unlearn(epochs=0)
    assert same_bytes(unlearned.model.state_dict(), original().state_dict())
    assert (unlearned.effort.passes, unlearned.effort.steps, unlearned.history) == (0, 0, [])


def test_frozen_critics_follow_their_seed_alone(unlearn: Callable[..., Trained], same_bytes: Same) -> None:
    first = unlearn()
    torch.manual_seed(99)
    again, other = unlearn(), unlearn(seed=1)
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert (first.history, first.facts) == (again.history, again.facts)
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())
    assert not first.model.training


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_frozen_critics_resume_bit_for_bit(unlearn: Callable[..., Trained], same_bytes: Same, epoch: int) -> None:
    whole = unlearn()
    dying, survivor = MemoryCheckpoint(dies_at=epoch), MemoryCheckpoint()
    with pytest.raises(KilledError):
        unlearn(checkpoint=dying)
    survivor.kept = dying.kept
    resumed = unlearn(checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort, resumed.facts) == (whole.history, whole.effort, whole.facts)
    assert survivor.saves == 3 - epoch


@pytest.mark.parametrize("number", [1, 3])
def test_frozen_critics_of_one_batch_is_a_plain_adam_step(
    unlearn: Callable[..., Trained], task: VaeTask, forget_sets: ForgetSets, original: Original, number: int
) -> None:
    own = {"critics": {**CRITICS, "number": number}, "batch_size": 100, "epochs": 1, "lam": 7.0}
    model, sets = original(), forget_sets
    unit = -mean_elbo(task, model, sets.retain)
    critics, auc = trained_critics(model, task, sets, settings(**own).critics, Effort(), seed=0)
    with seeding.scope(0, "unlearn", "epoch", 1) as noise:
        order = sets.retain[torch.randperm(100, generator=noise).numpy()]
        kept = task.loss(model.train(), task.batch(order), noise).total.mean()
        features = task.features(model.eval(), task.batch(sets.forget))
        each = torch.stack([refusal(member(features)[None])[0] for member in critics.members])
        (each.max() + 7.0 * kept / unit).backward()
    torch.optim.Adam(model.parameters(), lr=1e-3).step()
    unlearned = unlearn(**own)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(unlearned.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    (row,) = unlearned.history
    assert row["payoff"] == pytest.approx(float(each.detach().max()), rel=1e-5)
    assert row["train_elbo"] == pytest.approx(-float(kept.detach()), rel=1e-5)
    assert row["train_loss"] == pytest.approx(row["payoff"] - 7.0 * row["train_elbo"] / unit, rel=1e-5)
    after = refusal(critics(task.features(model, task.batch(sets.forget)))).max()
    assert row["forget_bce"] == pytest.approx(float(after.detach()), rel=1e-4)
    assert unlearned.facts == {"critic_auc": auc}


def test_frozen_critics_are_convinced_the_less_the_more_is_kept(
    unlearn: Callable[..., Trained], task: VaeTask, forget_sets: ForgetSets
) -> None:
    """At every seed against the original; as a mean over seeds against each other: 40 cells are few."""
    losses, elbos = [], []
    for seed in range(4):
        before = unlearn(epochs=1, learning_rate=1e-9, seed=seed).history[-1]["forget_bce"]
        both = [unlearn(lam=lam, epochs=20, seed=seed) for lam in (0.1, 10_000.0)]
        losses.append([trained.history[-1]["forget_bce"] for trained in both])
        elbos.append([mean_elbo(task, trained.model, forget_sets.retain) for trained in both])
        assert losses[-1][0] < before - 0.2
    eager, careful = np.mean(losses, axis=0)
    assert careful > eager + 0.1
    assert np.mean(elbos, axis=0)[1] > np.mean(elbos, axis=0)[0] + 0.5


def test_frozen_critics_count_their_effort(unlearn: Callable[..., Trained]) -> None:
    effort = unlearn().effort
    # once over each set for critics and unit; then four steps an epoch on all 20 cells, and once more to look
    assert effort.steps == 40 + 3 * 4
    assert effort.forward == {"forget": 20 + 3 * (4 * 20 + 20), "aside": 20, "retain": 100 + 3 * 100}
    assert effort.backward == {"forget": 3 * 4 * 20, "retain": 3 * 100}
    fewer = unlearn(batch_size=8, epochs=1).effort
    assert fewer.forward == {"forget": 20 + 13 * 8 + 20, "aside": 20, "retain": 200}
    assert fewer.steps == 40 + 13


@pytest.mark.parametrize("which", ["forget", "retain", "aside"])
def test_frozen_critics_end_on_a_nan_in_any_set(
    make_task: Callable[..., VaeTask], tiny_counts: sparse.csr_matrix, forget_sets: ForgetSets, original: Original,
    which: str,
) -> None:  # fmt: skip
    counts = tiny_counts.toarray()
    counts[getattr(forget_sets, which)[3], 0] = np.nan
    with pytest.raises(NonFiniteError):
        frozen_critics(original(), make_task(counts=sparse.csr_matrix(counts)), forget_sets, settings(), seed=0)


@pytest.mark.parametrize("batch_size", [32, 100])
def test_frozen_critics_end_at_a_huge_learning_rate(unlearn: Callable[..., Trained], batch_size: int) -> None:
    with pytest.raises(NonFiniteError):
        unlearn(learning_rate=1e30, batch_size=batch_size, epochs=1)


def test_frozen_critics_need_cells_aside(task: VaeTask, forget_sets: ForgetSets, original: Original) -> None:
    with pytest.raises(EmptyGroupError):
        frozen_critics(original(), task, replace(forget_sets, aside=forget_sets.aside[:0]), settings(), seed=0)


@pytest.mark.parametrize(("key", "value"), [("lam", 0.0), ("learning_rate", 0.0), ("batch_size", 0), ("epochs", -1)])
def test_frozen_critics_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        settings(**{key: value})

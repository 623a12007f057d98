from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from killing import KilledError, MemoryCheckpoint
from scforget import seeding
from scforget.data.splits import ForgetSets
from scforget.methods.contrastive_latent_published import (
    ContrastiveLatentPublishedSettings,
    contrastive_latent_published,
)
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.training import Trained

Original = Callable[[], VAE]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
Run = Callable[..., Trained]


@pytest.fixture
def run(task: VaeTask, forget_sets: ForgetSets, original: Original) -> Run:
    """Unlearn; ``finetune`` is the number of its epochs, other keywords are settings."""

    def unlearn(
        seed: int = 0, checkpoint: MemoryCheckpoint | None = None, finetune: int = 0, **changes: Any
    ) -> Trained:
        values = {"gamma": 1.0, "lam": 1.0, "learning_rate": 1e-3, "batch_size": 32, "epochs": 2, **changes}
        repair = {
            "learning_rate": 1e-3, "batch_size": 32, "max_epochs": finetune, "patience": 5, "validation_cells": 30,
        }  # fmt: skip
        settings = ContrastiveLatentPublishedSettings(**{"variant": "published", **values}, finetune=repair)
        return contrastive_latent_published(original(), task, forget_sets, settings, seed=seed, checkpoint=checkpoint)

    return unlearn


def test_contrastive_latent_published_of_no_epoch_is_the_original_bit_for_bit(
    run: Run, original: Original, same_bytes: Same
) -> None:
    unlearned = run(epochs=0)
    assert same_bytes(unlearned.model.state_dict(), original().state_dict())
    assert unlearned.effort.passes == 0


def test_contrastive_latent_published_averages_the_drift_over_dimensions(
    run: Run, task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    model, teacher, sets = original().train(), original(), forget_sets
    with seeding.scope(7, "contrast", "epoch", 1) as noise:
        retain = task.batch(sets.retain[torch.randperm(100, generator=noise).numpy()]).inputs
        forget = task.batch(sets.forget[torch.randperm(20, generator=noise).numpy()]).inputs
        mu, log_var = model.encode(forget)
        kl = 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum(1).mean()
        (mu, log_var), (other_mu, other_log_var) = model.encode(retain), teacher.encode(retain)
        moved = (mu - other_mu).square().mean() + 0.1 * (log_var - other_log_var).square().mean()
        (0.7 * kl + 2.5 * moved).backward()
    torch.optim.Adam([p for p in model.parameters() if p.grad is not None], lr=0.003).step()
    unlearned = run(seed=7, gamma=0.7, lam=2.5, learning_rate=0.003, batch_size=100, epochs=1)
    for name, value in unlearned.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-7)


def test_contrastive_latent_published_gives_the_same_bytes_for_the_same_seed_only(run: Run, same_bytes: Same) -> None:
    first, again, other = (run(seed=seed, finetune=1) for seed in (0, 0, 1))
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert first.history == again.history
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("save", [1, 2, 3])
def test_contrastive_latent_published_resumes_bit_for_bit(run: Run, save: int, same_bytes: Same) -> None:
    whole, dying, survivor = run(finetune=2), MemoryCheckpoint(dies_at=save), MemoryCheckpoint()
    with pytest.raises(KilledError):
        run(finetune=2, checkpoint=dying)
    survivor.kept = dying.kept
    resumed = run(finetune=2, checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)


def test_contrastive_latent_published_counts_its_effort(run: Run) -> None:
    effort = run(epochs=3, finetune=2).effort
    assert effort.steps == 3 * 4 + 2 * 4
    assert effort.forward == {"forget": 3 * 4 * 20, "retain": 3 * 200 + 2 * (100 + 10)}
    assert effort.backward == {"forget": 3 * 4 * 20, "retain": 3 * 100 + 2 * 100}


@pytest.mark.parametrize(("key", "value"), [("variant", "canonical"), ("gamma", 0.0), ("epochs", -1)])
def test_contrastive_latent_published_settings_refuse_what_is_out_of_range(run: Run, key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        run(**{key: value})

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError
from torch import Tensor

from killing import KilledError, MemoryCheckpoint
from scforget.data.splits import ForgetSets
from scforget.methods.retain_finetune_published import RetainFinetunePublishedSettings, retain_finetune_published
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.training import Trained, mean_elbo

Original = Callable[[], VAE]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
Run = Callable[..., Trained]
FINETUNE: dict[str, Any] = {
    "learning_rate": 1e-3, "batch_size": 32, "max_epochs": 4, "patience": 5, "validation_cells": 30,
}  # fmt: skip


@pytest.fixture
def run(task: VaeTask, forget_sets: ForgetSets, original: Original) -> Run:
    def unlearn(
        seed: int = 0, checkpoint: MemoryCheckpoint | None = None, on: VaeTask = task, **changes: Any
    ) -> Trained:
        settings = RetainFinetunePublishedSettings(variant="published", finetune={**FINETUNE, **changes})
        return retain_finetune_published(original(), on, forget_sets, settings, seed=seed, checkpoint=checkpoint)

    return unlearn


def test_retain_finetune_published_of_no_epoch_is_the_original_bit_for_bit(
    run: Run, original: Original, same_bytes: Same
) -> None:
    unlearned = run(max_epochs=0)
    assert same_bytes(unlearned.model.state_dict(), original().state_dict())
    assert (unlearned.effort.passes, unlearned.history) == (0, [])


def test_retain_finetune_published_learns_the_retained_cells(
    run: Run, task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    before, after = (mean_elbo(task, model, forget_sets.retain) for model in (original(), run(max_epochs=10).model))
    assert after > before + 0.5


def test_retain_finetune_published_never_reads_the_forgotten_cells(
    run: Run, poisoned: VaeTask, same_bytes: Same
) -> None:
    clean, other = run(seed=3), run(seed=3, on=poisoned)
    assert same_bytes(clean.model.state_dict(), other.model.state_dict())
    assert clean.history == other.history


def test_retain_finetune_published_gives_the_same_bytes_for_the_same_seed_only(run: Run, same_bytes: Same) -> None:
    first, again, other = (run(seed=seed) for seed in (0, 0, 1))
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("save", [1, 3])
def test_retain_finetune_published_resumes_bit_for_bit(run: Run, save: int, same_bytes: Same) -> None:
    whole, dying, survivor = run(), MemoryCheckpoint(dies_at=save), MemoryCheckpoint()
    with pytest.raises(KilledError):
        run(checkpoint=dying)
    survivor.kept = dying.kept
    resumed = run(checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)


def test_retain_finetune_published_counts_its_effort(run: Run) -> None:
    effort = run(max_epochs=2).effort
    assert effort.steps == 2 * 4
    assert effort.forward == {"retain": 2 * (100 + 10)}
    assert effort.backward == {"retain": 200}


def test_retain_finetune_published_settings_refuse_what_is_no_published_variant() -> None:
    with pytest.raises(ValidationError, match="variant"):
        RetainFinetunePublishedSettings.model_validate({"variant": "canonical", "finetune": FINETUNE})
    with pytest.raises(ValidationError, match="patience"):
        RetainFinetunePublishedSettings.model_validate(
            {"variant": "published", "finetune": {**FINETUNE, "patience": 0}}
        )

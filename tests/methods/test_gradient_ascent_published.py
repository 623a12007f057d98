from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from killing import KilledError, MemoryCheckpoint
from scforget.data.splits import ForgetSets
from scforget.methods.gradient_ascent import GradientAscentSettings, gradient_ascent
from scforget.methods.gradient_ascent_published import GradientAscentPublishedSettings, gradient_ascent_published
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.training import Trained

Original = Callable[[], VAE]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
Run = Callable[..., Trained]
ASCENT: dict[str, Any] = {"steps": 10, "learning_rate": 1e-5, "batch_size": 32, "clip": 1.0}


@pytest.fixture
def run(task: VaeTask, forget_sets: ForgetSets, original: Original) -> Run:
    """Unlearn; ``finetune`` is the number of its epochs, other keywords are settings."""

    def unlearn(
        seed: int = 0, checkpoint: MemoryCheckpoint | None = None, finetune: int = 0, **changes: Any
    ) -> Trained:
        repair = {
            "learning_rate": 1e-3, "batch_size": 32, "max_epochs": finetune, "patience": 5, "validation_cells": 30,
        }  # fmt: skip
        values = {"variant": "published", **ASCENT, **changes}
        settings = GradientAscentPublishedSettings(**values, finetune=repair)
        return gradient_ascent_published(original(), task, forget_sets, settings, seed=seed, checkpoint=checkpoint)

    return unlearn


def test_gradient_ascent_published_of_no_step_and_no_epoch_is_the_original_bit_for_bit(
    run: Run, original: Original, same_bytes: Same
) -> None:
    unlearned = run(steps=0)
    assert same_bytes(unlearned.model.state_dict(), original().state_dict())
    assert unlearned.effort.passes == 0


def test_gradient_ascent_published_ascends_as_the_canonical_method_but_hardly_moves(
    run: Run, task: VaeTask, forget_sets: ForgetSets, original: Original, recipe: Any, same_bytes: Same
) -> None:
    settings = GradientAscentSettings(**ASCENT, finetune=recipe(max_epochs=0))
    canonical = gradient_ascent(original(), task, forget_sets, settings, seed=3).model
    unlearned = run(seed=3).model
    assert same_bytes(unlearned.state_dict(), canonical.state_dict())
    pairs = zip(unlearned.parameters(), original().parameters(), strict=True)
    moved = torch.cat([(one - other).ravel() for one, other in pairs]).norm()
    assert 1e-5 < moved < 1.1e-4


def test_gradient_ascent_published_gives_the_same_bytes_for_the_same_seed_only(run: Run, same_bytes: Same) -> None:
    first, again, other = (run(seed=seed, finetune=1) for seed in (0, 0, 1))
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert first.history == again.history
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("save", [1, 2, 3])
def test_gradient_ascent_published_resumes_bit_for_bit(run: Run, save: int, same_bytes: Same) -> None:
    whole, dying, survivor = run(finetune=3), MemoryCheckpoint(dies_at=save), MemoryCheckpoint()
    with pytest.raises(KilledError):
        run(finetune=3, checkpoint=dying)
    survivor.kept = dying.kept
    resumed = run(finetune=3, checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)


def test_gradient_ascent_published_counts_its_effort(run: Run) -> None:
    effort = run(finetune=2).effort
    assert effort.steps == 10 + 2 * 4
    assert effort.forward == {"forget": 200, "retain": 2 * (100 + 10)}
    assert effort.backward == {"forget": 200, "retain": 200}


@pytest.mark.parametrize(("key", "value"), [("variant", "canonical"), ("steps", -1), ("clip", 0.0)])
def test_gradient_ascent_published_settings_refuse_what_is_out_of_range(run: Run, key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        run(**{key: value})

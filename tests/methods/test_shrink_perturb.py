from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from killing import KilledError, MemoryCheckpoint
from scforget.data.splits import ForgetSets
from scforget.methods.shrink_perturb import ShrinkPerturbSettings, shrink_and_perturb, shrink_perturb
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.training import Trained, TrainingSettings, fit

Original = Callable[[], VAE]
Recipe = Callable[..., dict[str, Any]]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
Unlearn = Callable[..., Trained]


@pytest.fixture
def unlearn(task: VaeTask, forget_sets: ForgetSets, original: Original, recipe: Recipe) -> Unlearn:
    """Four epochs from λ = 0.4, unless keywords say otherwise."""

    def run(seed: int = 5, on: VaeTask = task, checkpoint: MemoryCheckpoint | None = None, **changes: Any) -> Trained:
        settings = ShrinkPerturbSettings(**recipe(**{"lam": 0.4, **changes}))
        return shrink_perturb(original(), on, forget_sets, settings, seed=seed, checkpoint=checkpoint)

    return run


@pytest.mark.parametrize("lam", [0.0, 0.25, 0.9, 1.0])
def test_shrink_and_perturb_mixes_every_parameter(task: VaeTask, original: Original, lam: float) -> None:
    model, fresh = original(), task.new_model(9)
    shrink_and_perturb(model, fresh, lam)
    before, other = original().state_dict(), task.new_model(9).state_dict()
    for name, value in model.state_dict().items():
        wanted = lam * before[name].double() + (1 - lam) * other[name].double()
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-7)
        assert torch.equal(fresh.state_dict()[name], other[name])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_shrink_perturb_keeping_all_is_the_original_bit_for_bit(
    unlearn: Unlearn, original: Original, same_bytes: Same
) -> None:
    unlearned = unlearn(lam=1)
    assert same_bytes(unlearned.model.state_dict(), original().state_dict())
    assert (unlearned.history, unlearned.effort.passes, unlearned.effort.steps) == ([], 0, 0)
    assert not unlearned.model.training


def test_shrink_perturb_keeping_nothing_is_a_retrain_bit_for_bit(
    unlearn: Unlearn, task: VaeTask, forget_sets: ForgetSets, recipe: Recipe, same_bytes: Same
) -> None:
    unlearned = unlearn(seed=9, lam=0)
    sets = forget_sets
    wanted = fit(task.new_model(9), task, sets.retain, sets.stop, TrainingSettings(**recipe()), seed=9)
    assert same_bytes(unlearned.model.state_dict(), wanted.model.state_dict())
    assert (unlearned.history, unlearned.effort) == (wanted.history, wanted.effort)


def test_shrink_perturb_then_trains_on_the_retained_cells(
    unlearn: Unlearn, task: VaeTask, forget_sets: ForgetSets, original: Original, recipe: Recipe, same_bytes: Same
) -> None:
    start = original()
    shrink_and_perturb(start, task.new_model(5), 0.4)
    assert same_bytes(unlearn(max_epochs=0).model.state_dict(), start.state_dict())
    unlearned = unlearn()
    wanted = fit(start, task, forget_sets.retain, forget_sets.stop, TrainingSettings(**recipe()), seed=5)
    assert same_bytes(unlearned.model.state_dict(), wanted.model.state_dict())
    assert unlearned.history == wanted.history


def test_shrink_perturb_counts_its_effort(unlearn: Unlearn) -> None:
    effort = unlearn().effort
    assert effort.steps == 4 * 4
    assert effort.forward == {"retain": 400, "stop": 160}
    assert effort.backward == {"retain": 400}


def test_shrink_perturb_gives_the_same_bytes_for_the_same_seed_only(unlearn: Unlearn, same_bytes: Same) -> None:
    first, again, other = (unlearn(seed=seed).model.state_dict() for seed in (5, 5, 6))
    assert same_bytes(first, again)
    assert not same_bytes(first, other)


@pytest.mark.parametrize("epoch", [1, 3])
def test_shrink_perturb_resumes_bit_for_bit(unlearn: Unlearn, same_bytes: Same, epoch: int) -> None:
    whole = unlearn()
    dying, survivor = MemoryCheckpoint(dies_at=epoch), MemoryCheckpoint()
    with pytest.raises(KilledError):
        unlearn(checkpoint=dying)
    survivor.kept = dying.kept
    resumed = unlearn(checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)
    assert survivor.saves == 4 - epoch


def test_shrink_perturb_never_reads_the_forgotten_cells(unlearn: Unlearn, poisoned: VaeTask, same_bytes: Same) -> None:
    clean, other = unlearn(), unlearn(on=poisoned)
    assert same_bytes(clean.model.state_dict(), other.model.state_dict())
    assert clean.history == other.history


@pytest.mark.parametrize("lam", [-0.1, 1.1, float("nan")])
def test_shrink_perturb_settings_refuse_a_share_that_is_none(recipe: Recipe, lam: float) -> None:
    with pytest.raises(ValidationError, match="lam"):
        ShrinkPerturbSettings(**recipe(lam=lam))

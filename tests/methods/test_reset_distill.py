from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from killing import KilledError, MemoryCheckpoint
from scforget import seeding
from scforget.data.splits import ForgetSets
from scforget.errors import NonFiniteError
from scforget.methods.reset_distill import ResetDistillSettings, reset_distill
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.training import Trained, TrainingSettings, fit

Original = Callable[[], VAE]
Recipe = Callable[..., dict[str, Any]]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
Unlearn = Callable[..., Trained]


@pytest.fixture
def unlearn(task: VaeTask, forget_sets: ForgetSets, original: Original, recipe: Recipe) -> Unlearn:
    """Two epochs of distilling and four of training, unless keywords say otherwise."""

    def run(seed: int = 5, on: VaeTask = task, checkpoint: MemoryCheckpoint | None = None, **changes: Any) -> Trained:
        own = {"distil_epochs": 2, "distil_learning_rate": 5e-3, **changes}
        settings = ResetDistillSettings(**recipe(**own))
        return reset_distill(original(), on, forget_sets, settings, seed=seed, checkpoint=checkpoint)

    return run


def distance(task: VaeTask, student: VAE, teacher: VAE, sets: ForgetSets) -> float:
    """Mean divergence from the teacher over the retained cells, at z = μ."""
    with torch.no_grad():
        return float(task.divergence(student.eval(), teacher, task.batch(sets.retain)).total.mean())


def test_reset_distill_without_distilling_is_a_retrain_bit_for_bit(
    unlearn: Unlearn, task: VaeTask, forget_sets: ForgetSets, recipe: Recipe, same_bytes: Same
) -> None:
    unlearned = unlearn(seed=9, distil_epochs=0)
    sets = forget_sets
    wanted = fit(task.new_model(9), task, sets.retain, sets.stop, TrainingSettings(**recipe()), seed=9)
    assert same_bytes(unlearned.model.state_dict(), wanted.model.state_dict())
    assert (unlearned.history, unlearned.effort) == (wanted.history, wanted.effort)


def test_reset_distill_without_any_epoch_keeps_nothing_of_the_original(
    unlearn: Unlearn, task: VaeTask, same_bytes: Same
) -> None:
    unlearned = unlearn(seed=9, distil_epochs=0, max_epochs=0)
    assert same_bytes(unlearned.model.state_dict(), task.new_model(9).state_dict())
    assert unlearned.effort.passes == 0


def test_reset_distill_of_one_batch_is_an_adam_step_down_the_divergence(
    unlearn: Unlearn, task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    """The divergence written out: Gaussian posteriors by torch, the decoder's by the closed form of two NBs."""
    student, teacher = task.new_model(5).train(), original()
    optimiser = torch.optim.Adam(student.parameters(), lr=5e-3)
    with seeding.scope(5, "distil", "epoch", 1) as noise:
        batch = task.batch(forget_sets.retain[torch.randperm(100, generator=noise).numpy()])
        with torch.no_grad():
            mu, log_var = teacher.encode(batch.inputs)
            z = mu + (0.5 * log_var).exp() * torch.randn(mu.shape, generator=noise)
            decoded = teacher.decode(z)
        own_mu, own_log_var = student.encode(batch.inputs)
        own = student.decode(z)
        posterior = kl_divergence(Normal(mu, (0.5 * log_var).exp()), Normal(own_mu, (0.5 * own_log_var).exp()))
        mean, own_mean = (batch.library * heads.logits.softmax(-1) for heads in (decoded, own))
        r = decoded.log_inverse_dispersion.exp()
        decoder = mean * (mean / own_mean).log() - (mean + r) * ((mean + r) / (own_mean + r)).log()
        loss = (posterior.sum(-1) + decoder.sum(-1)).mean()
        loss.backward()
        gradients = {name: value.grad for name, value in student.named_parameters()}
        optimiser.step()
    trained = unlearn(distil_epochs=1, max_epochs=0, batch_size=100)
    assert trained.history == [{"epoch": 1, "divergence": pytest.approx(loss.item(), rel=1e-5)}]
    assert [name for name, value in gradients.items() if value is None] == ["dispersion.weight", "dispersion.bias"]
    for name, wanted in student.state_dict().items():
        found, slope = trained.model.state_dict()[name], gradients[name]
        if slope is None:  # both decoders are read at the teacher's dispersion
            assert torch.equal(found, wanted)
        else:  # where the slope is all rounding, so is the first step of Adam
            clear = slope.abs() > 1e-4
            assert clear.any()
            torch.testing.assert_close(found[clear], wanted[clear], rtol=1e-4, atol=1e-6)


def test_reset_distill_brings_a_fresh_model_nearer_to_the_original(
    unlearn: Unlearn, task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    distances = [
        distance(task, unlearn(distil_epochs=epochs, max_epochs=0).model, original(), forget_sets)
        for epochs in (0, 2, 10)
    ]
    assert distances[0] > 1.05 * distances[1] > 1.1 * distances[2]


def test_reset_distill_then_trains_on_the_retained_cells(
    unlearn: Unlearn, task: VaeTask, forget_sets: ForgetSets, recipe: Recipe, same_bytes: Same
) -> None:
    distilled, unlearned = unlearn(max_epochs=0), unlearn()
    sets = forget_sets
    wanted = fit(distilled.model, task, sets.retain, sets.stop, TrainingSettings(**recipe()), seed=5)
    assert same_bytes(unlearned.model.state_dict(), wanted.model.state_dict())
    assert unlearned.history[:2] == distilled.history
    assert unlearned.history[2:] == [{**row, "epoch": row["epoch"] + 2} for row in wanted.history]


def test_reset_distill_counts_the_teachers_passes_too(unlearn: Unlearn) -> None:
    effort = unlearn().effort
    assert effort.steps == (2 + 4) * 4
    assert effort.forward == {"retain": 2 * 2 * 100 + 4 * 100, "stop": 4 * 40}
    assert effort.backward == {"retain": (2 + 4) * 100}


def test_reset_distill_gives_the_same_bytes_for_the_same_seed_only(unlearn: Unlearn, same_bytes: Same) -> None:
    first, again, other = (unlearn(seed=seed).model.state_dict() for seed in (5, 5, 6))
    assert same_bytes(first, again)
    assert not same_bytes(first, other)


@pytest.mark.parametrize("save", [1, 2, 3, 5])
def test_reset_distill_resumes_bit_for_bit_in_both_phases(unlearn: Unlearn, same_bytes: Same, save: int) -> None:
    """Saves 1 and 2 are of distilling, the second its last; the others are of training."""
    whole = unlearn()
    dying, survivor = MemoryCheckpoint(dies_at=save), MemoryCheckpoint()
    with pytest.raises(KilledError):
        unlearn(checkpoint=dying)
    survivor.kept = dying.kept
    resumed = unlearn(checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)
    assert survivor.saves == 6 - save


def test_reset_distill_never_reads_the_forgotten_cells(unlearn: Unlearn, poisoned: VaeTask, same_bytes: Same) -> None:
    clean, other = unlearn(), unlearn(on=poisoned)
    assert same_bytes(clean.model.state_dict(), other.model.state_dict())
    assert clean.history == other.history


def test_reset_distill_stops_where_distilling_diverges(unlearn: Unlearn) -> None:
    with pytest.raises(NonFiniteError, match="the loss") as caught:
        unlearn(distil_learning_rate=1e30)
    assert caught.value.step == 1


@pytest.mark.parametrize(("key", "value"), [("distil_epochs", -1), ("distil_learning_rate", 0.0)])
def test_reset_distill_settings_refuse_what_is_out_of_range(recipe: Recipe, key: str, value: float) -> None:
    own = {"distil_epochs": 2, "distil_learning_rate": 5e-3, key: value}
    with pytest.raises(ValidationError, match=key):
        ResetDistillSettings(**recipe(**own))

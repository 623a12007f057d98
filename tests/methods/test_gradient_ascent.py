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
from scforget.errors import NonFiniteError
from scforget.methods.gradient_ascent import GradientAscentSettings, gradient_ascent
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.training import Trained, mean_elbo

Original = Callable[[], VAE]
Recipe = Callable[..., dict[str, Any]]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
Run = Callable[..., Trained]


@pytest.fixture
def run(task: VaeTask, forget_sets: ForgetSets, original: Original, recipe: Recipe) -> Run:
    """Unlearn; ``finetune`` is the number of its epochs, other keywords are settings."""

    def unlearn(
        seed: int = 0, checkpoint: MemoryCheckpoint | None = None, finetune: int = 0, **changes: Any
    ) -> Trained:
        values = {"steps": 7, "learning_rate": 1e-3, "batch_size": 8, "clip": 1.0, **changes}
        settings = GradientAscentSettings(**values, finetune=recipe(max_epochs=finetune, kl_warmup_epochs=0))
        return gradient_ascent(original(), task, forget_sets, settings, seed=seed, checkpoint=checkpoint)

    return unlearn


def distance(one: VAE, other: VAE) -> float:
    """L2, over all parameters."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return sum((a.double() - b.double()).square().sum().item() for a, b in pairs) ** 0.5


def test_gradient_ascent_of_no_step_and_no_epoch_is_the_original_bit_for_bit(
    run: Run, original: Original, same_bytes: Same
) -> None:
    unlearned = run(steps=0)
    assert same_bytes(unlearned.model.state_dict(), original().state_dict())
    assert (unlearned.effort.passes, unlearned.history) == (0, [])
    assert not unlearned.model.training


@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_gradient_ascent_steps_are_those_written_out(
    run: Run, task: VaeTask, forget_sets: ForgetSets, original: Original, clip: float
) -> None:
    model, cells, losses = original().train(), forget_sets.forget, []
    with seeding.scope(3, "ascent", "epoch", 1) as noise:
        for _ in range(2):
            loss = task.loss(model, task.batch(cells[torch.randperm(20, generator=noise).numpy()]), noise).total.mean()
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            norm = torch.cat([gradient.ravel() for gradient in gradients]).norm()
            assert norm > 0.5
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.add_(1e-3 * gradient * min(1.0, clip / float(norm)))
            losses.append(loss.item())
    unlearned = run(seed=3, steps=2, batch_size=20, clip=clip)
    for name, value in unlearned.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-6)
    assert unlearned.history == [{"epoch": 1, "forget_loss": pytest.approx(sum(losses) / 2, rel=1e-5)}]


def test_gradient_ascent_moves_no_further_than_its_clipped_steps(run: Run, original: Original) -> None:
    moved = distance(run(steps=10, learning_rate=1e-3).model, original())
    assert 1e-3 < moved <= 10 * 1e-3 * (1 + 1e-5)


def test_gradient_ascent_worsens_the_forgotten_cells_and_finetuning_repairs_the_others(
    run: Run, task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    before, climbed = original(), run(steps=50, learning_rate=1e-2).model
    assert mean_elbo(task, climbed, forget_sets.forget) < mean_elbo(task, before, forget_sets.forget) - 1
    repaired = run(steps=50, learning_rate=1e-2, finetune=4).model
    assert mean_elbo(task, repaired, forget_sets.stop) > mean_elbo(task, climbed, forget_sets.stop) + 1


def test_gradient_ascent_starts_over_when_the_forgotten_cells_are_through(
    run: Run, task: VaeTask, forget_sets: ForgetSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    batch = task.batch

    def watched(cells: Any) -> Any:
        seen.append(list(cells))
        return batch(cells)

    monkeypatch.setattr(task, "batch", watched)
    run(steps=7)
    assert [len(cells) for cells in seen] == [8, 8, 4, 8, 8, 4, 8]
    passes = [sum(seen[:3], []), sum(seen[3:6], [])]  # noqa: RUF017
    assert all(sorted(cells) == forget_sets.forget.tolist() for cells in passes)
    assert passes[0] != passes[1]


def test_gradient_ascent_gives_the_same_bytes_for_the_same_seed_only(run: Run, same_bytes: Same) -> None:
    first, again, other = (run(seed=seed, finetune=1) for seed in (0, 0, 1))
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert first.history == again.history
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("save", [1, 2, 3])
def test_gradient_ascent_resumes_bit_for_bit(run: Run, save: int, same_bytes: Same) -> None:
    whole, dying, survivor = run(finetune=2), MemoryCheckpoint(dies_at=save), MemoryCheckpoint()
    with pytest.raises(KilledError):
        run(finetune=2, checkpoint=dying)
    survivor.kept = dying.kept
    resumed = run(finetune=2, checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)
    assert survivor.saves == 3 - save


def test_gradient_ascent_counts_its_effort(run: Run) -> None:
    effort = run(steps=7, finetune=2).effort
    assert effort.steps == 7 + 2 * 4
    assert effort.forward == {"forget": 48, "retain": 200, "stop": 80}
    assert effort.backward == {"forget": 48, "retain": 200}


def test_gradient_ascent_stops_when_the_loss_runs_away(run: Run) -> None:
    with pytest.raises(NonFiniteError):
        run(learning_rate=1e30)


@pytest.mark.parametrize(("key", "value"), [("steps", -1), ("learning_rate", 0.0), ("batch_size", 0), ("clip", 0.0)])
def test_gradient_ascent_settings_refuse_what_is_out_of_range(run: Run, key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        run(**{key: value})

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from killing import KilledError, MemoryCheckpoint
from scforget import seeding
from scforget.data.splits import ForgetSets
from scforget.errors import NonFiniteError
from scforget.methods.scrub_published import ScrubPublishedSettings, nth_batch, reverse_kl, scrub_published
from scforget.models.vae import VAE, block_of
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
        repair = {
            "learning_rate": 1e-3, "batch_size": 32, "max_epochs": finetune, "patience": 5, "validation_cells": 30,
        }  # fmt: skip
        values = {
            "variant": "published", "alpha_f": 1.0, "alpha_r": 1.0, "learning_rate": 1e-3, "batch_size": 32,
            "clip": 1.0, "epochs": 2, "forget_steps": 3, "retain_steps": 5, **changes,
        }  # fmt: skip
        settings = ScrubPublishedSettings(**values, finetune=repair)
        return scrub_published(original(), task, forget_sets, settings, seed=seed, checkpoint=checkpoint)

    return unlearn


def test_nth_batch_goes_through_all_cells_again_and_again_in_new_orders() -> None:
    cells = 10 * np.arange(20)
    drawn = [nth_batch(cells, 8, step, 0, "x").tolist() for step in range(6)]
    assert [len(part) for part in drawn] == [8, 8, 4, 8, 8, 4]
    passes = sum(drawn[:3], []), sum(drawn[3:], [])  # noqa: RUF017
    assert all(sorted(one) == cells.tolist() for one in passes)
    assert passes[0] != passes[1]
    assert drawn[4] == nth_batch(cells, 8, 4, 0, "x").tolist() != nth_batch(cells, 8, 4, 0, "y").tolist()


def test_reverse_kl_is_that_of_the_model_to_its_teacher(task: VaeTask, original: Original) -> None:
    model, teacher, batch = task.new_model(3).eval(), original(), task.batch(np.arange(9))
    normals = [Normal(mu, (0.5 * log_var).exp()) for mu, log_var in (m.encode(batch.inputs) for m in (model, teacher))]
    found = reverse_kl(model, teacher, batch)
    torch.testing.assert_close(found, kl_divergence(*normals).sum(1), rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert model.mu.weight.grad is not None


def test_scrub_published_epoch_is_that_written_out(
    run: Run, task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    """Two optimisers, each step clipped, the teacher fixed; batches of whole sets."""
    model, teacher, sets = original().train(), original(), forget_sets
    away, back = (torch.optim.Adam(model.parameters(), lr=1e-3) for _ in range(2))
    with seeding.scope(5, "scrub", "epoch", 1) as noise:
        for optimiser, name, cells, steps in (
            (away, "forget batches", sets.forget, 2), (back, "retain batches", sets.retain, 2)
        ):  # fmt: skip
            for step in range(steps):
                order = torch.randperm(len(cells), generator=seeding.torch_generator(5, name, step)).numpy()
                batch = task.batch(cells[order])
                elbo_loss = task.loss(model, batch, noise).total if optimiser is back else None
                mu, log_var = teacher.encode(batch.inputs)
                kl = kl_divergence(
                    *(
                        Normal(m, (0.5 * v).exp())
                        for m, v in (model.encode(batch.inputs), (mu.detach(), log_var.detach()))
                    )
                ).sum(1)
                loss = -0.7 * kl.mean() if elbo_loss is None else (2.0 * kl + elbo_loss).mean()
                optimiser.zero_grad()
                loss.backward()
                assert nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.1
                optimiser.step()
    unlearned = run(
        seed=5, alpha_f=0.7, alpha_r=2.0, clip=0.1, batch_size=100, epochs=1, forget_steps=2, retain_steps=2
    )  # fmt: skip
    for name, value in unlearned.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert unlearned.history[0]["retain_loss"] > 0 > unlearned.history[0]["forget_loss"]


def test_scrub_published_of_no_epoch_is_the_original_bit_for_bit(
    run: Run, original: Original, same_bytes: Same
) -> None:
    unlearned = run(epochs=0)
    assert same_bytes(unlearned.model.state_dict(), original().state_dict())
    assert (unlearned.effort.passes, unlearned.history) == (0, [])


def test_scrub_published_gives_the_decoder_no_forget_signal(run: Run, original: Original) -> None:
    before = original().state_dict()
    for name, value in run(retain_steps=0).model.state_dict().items():
        assert torch.equal(value, before[name]) == (block_of(name) in {"decoder", "heads"})


def test_scrub_published_moves_the_posteriors_of_the_forgotten_cells_away(
    run: Run, task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    model, batch = run(epochs=5, learning_rate=1e-2, forget_steps=5).model, task.batch(forget_sets.forget)
    still = run(epochs=5, learning_rate=1e-2, forget_steps=0).model
    with torch.no_grad():
        moved, kept = (float(reverse_kl(m, original(), batch).mean()) for m in (model, still))
    assert moved > 2 * kept > 0


def test_scrub_published_gives_the_same_bytes_for_the_same_seed_only(run: Run, same_bytes: Same) -> None:
    first, again, other = (run(seed=seed, finetune=1) for seed in (0, 0, 1))
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert first.history == again.history
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("save", [1, 2, 3])
def test_scrub_published_resumes_bit_for_bit(run: Run, save: int, same_bytes: Same) -> None:
    whole, dying, survivor = run(finetune=2), MemoryCheckpoint(dies_at=save), MemoryCheckpoint()
    with pytest.raises(KilledError):
        run(finetune=2, checkpoint=dying)
    survivor.kept = dying.kept
    resumed = run(finetune=2, checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)
    assert survivor.saves == 4 - save


def test_scrub_published_counts_its_effort(run: Run) -> None:
    effort = run(finetune=1).effort
    # 2 epochs of 3 steps on all 20 cells, and of 5 steps of 32, 32, 32, 4, 32 and 32, 32, 4, 32, 32 cells
    assert effort.steps == 2 * (3 + 5) + 4
    assert effort.forward == {"forget": 2 * 2 * 60, "retain": 3 * 264 + 110}
    assert effort.backward == {"forget": 2 * 60, "retain": 2 * 264 + 100}


def test_scrub_published_stops_at_a_huge_learning_rate(run: Run) -> None:
    with pytest.raises(NonFiniteError):
        run(learning_rate=1e30)


@pytest.mark.parametrize(("key", "value"), [("variant", "x"), ("alpha_f", 0.0), ("epochs", -1), ("forget_steps", -1)])
def test_scrub_published_settings_refuse_what_is_out_of_range(run: Run, key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        run(**{key: value})

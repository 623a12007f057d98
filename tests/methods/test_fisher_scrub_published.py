from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import sparse
from torch import Tensor, nn

from killing import KilledError, MemoryCheckpoint
from scforget import published, seeding
from scforget.data.splits import ForgetSets
from scforget.errors import NonFiniteError
from scforget.methods.fisher_scrub_published import FisherScrubPublishedSettings, climb, fisher_scrub_published
from scforget.models.vae import VAE
from scforget.published import batch_fisher
from scforget.tasks import VaeTask
from scforget.training import Loop, Trained

Original = Callable[[], VAE]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
Run = Callable[..., Trained]
FINETUNE: dict[str, Any] = {
    "learning_rate": 1e-3, "batch_size": 32, "max_epochs": 0, "patience": 5, "validation_cells": 8,
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "variant": "published", "alpha": 1e-4, "damping": 0.1, "clamp": 1e-3, "steps": 3, "batch_size": 32,
    "finetune": FINETUNE,
}  # fmt: skip


@pytest.fixture
def run(task: VaeTask, forget_sets: ForgetSets, original: Original) -> Run:
    """Unlearn; ``finetune`` is the number of its epochs, other keywords are settings."""

    def unlearn(
        seed: int = 0, checkpoint: MemoryCheckpoint | None = None, finetune: int = 0, on: VaeTask = task, **changes: Any
    ) -> Trained:
        values = {**SETTINGS, **changes, "finetune": {**FINETUNE, "max_epochs": finetune}}
        settings = FisherScrubPublishedSettings.model_validate(values)
        return fisher_scrub_published(original(), on, forget_sets, settings, seed=seed, checkpoint=checkpoint)

    return unlearn


def test_climb_clamps_each_parameters_step() -> None:
    model = nn.Linear(3, 1, bias=False)
    before = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[2.0, -800.0, 0.0]])
    climb(model, {"weight": torch.tensor([[4.0, 2.0, 0.1]])}, 0.1, 0.3)
    torch.testing.assert_close(model.weight.detach() - before, torch.tensor([[0.05, -0.3, 0.0]]))


def test_fisher_scrub_published_is_the_published_rule_written_out(
    run: Run, task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    """Train mode, a fresh draw in every step, the sum over all forgotten cells, the estimate made once."""
    model, sets = original(), forget_sets
    estimate: dict[str, Any] = {"batch_size": 32, "reduction": "sum", "damping": 0.1}
    with seeding.scope(5, "scrub", "epoch", 1) as noise:
        information = batch_fisher(model, task, sets.retain, seed=5, **estimate)
        batch = task.batch(sets.forget)
        model.train()
        for _ in range(3):
            loss = task.loss(model, batch, noise).total.sum()
            steps = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for (name, value), step in zip(model.named_parameters(), steps, strict=True):
                    value.add_((1e-4 * step / information[name]).clip(-1e-3, 1e-3))
    found = run(seed=5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], value, rtol=1e-5, atol=1e-7)
        assert not torch.equal(value, original().state_dict()[name])
    assert found.history[0]["forget_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert not found.model.training


def test_fisher_scrub_published_then_fine_tunes_on_the_mean_over_genes(
    run: Run, task: VaeTask, forget_sets: ForgetSets, same_bytes: Same
) -> None:
    model = run(seed=9).model
    settings = published.FinetuneSettings(**{**FINETUNE, "max_epochs": 3})
    loop = Loop(model, seed=9)
    wanted = published.finetune(model, task, forget_sets, settings, seed=9, loop=loop, scale="mean_genes")
    assert same_bytes(run(seed=9, finetune=3).model.state_dict(), wanted.model.state_dict())


def test_fisher_scrub_published_of_no_step_is_the_original_bit_for_bit(
    run: Run, original: Original, same_bytes: Same
) -> None:
    unlearned = run(steps=0)
    assert same_bytes(unlearned.model.state_dict(), original().state_dict())
    assert (unlearned.effort.passes, unlearned.history) == (0, [])
    assert not unlearned.model.training


def test_fisher_scrub_published_gives_the_same_bytes_for_the_same_seed_only(run: Run, same_bytes: Same) -> None:
    first = run(finetune=1)
    torch.manual_seed(99)
    again, other = run(finetune=1), run(finetune=1, seed=1)
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("save", [1, 2, 3])
def test_fisher_scrub_published_resumes_bit_for_bit(run: Run, save: int, same_bytes: Same) -> None:
    whole, dying, survivor = run(finetune=3), MemoryCheckpoint(dies_at=save), MemoryCheckpoint()
    with pytest.raises(KilledError):
        run(finetune=3, checkpoint=dying)
    survivor.kept = dying.kept
    resumed = run(finetune=3, checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)
    assert survivor.saves == 4 - save


def test_fisher_scrub_published_counts_its_effort(run: Run) -> None:
    effort = run(finetune=2).effort
    assert effort.forward == {"retain": 100 + 2 * (100 + 8), "forget": 3 * 20}
    assert effort.backward == {"retain": 100 + 2 * 100, "forget": 3 * 20}
    assert effort.steps == 3 + 2 * 4


def test_fisher_scrub_published_steps_are_nearly_all_clamped(run: Run, original: Original) -> None:
    """The clamp acts as a sign step: at a rate a thousand times the published one next to nothing is below it."""
    moved = torch.cat([
        (value - original().state_dict()[name]).abs().ravel()
        for name, value in run(steps=1, alpha=0.1).model.state_dict().items()
    ])  # fmt: skip
    assert float(moved.max()) <= 1e-3 + 1e-6
    assert float((moved > 0.999e-3).float().mean()) > 0.5


@pytest.mark.parametrize("part", ["forget", "retain"])
def test_fisher_scrub_published_names_what_is_not_finite(
    run: Run, make_task: Callable[..., VaeTask], tiny_counts: sparse.csr_matrix, forget_sets: ForgetSets, part: str
) -> None:
    counts = tiny_counts.tolil()
    counts[getattr(forget_sets, part)[3], 0] = np.nan
    name = "the loss" if part == "forget" else "the Fisher information"
    with pytest.raises(NonFiniteError, match=f"{name} .* at step 0;"):
        run(on=make_task(counts=counts.tocsr()))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("variant", "noise"), ("alpha", 0.0), ("damping", 0.0), ("clamp", 0.0), ("steps", -1), ("batch_size", 0),
        ("finetune", None), ("finetune", {**FINETUNE, "patience": 0}),
    ],
)  # fmt: skip
def test_fisher_scrub_published_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        FisherScrubPublishedSettings.model_validate({**SETTINGS, key: value})

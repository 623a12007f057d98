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
from scforget.methods.ssd_published import SSDPublishedSettings, dampen_all, ssd_published
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
    "variant": "published", "alpha": 1.0, "damping": 1e-5, "batch_size": 32, "finetune": FINETUNE,
}  # fmt: skip


@pytest.fixture
def run(task: VaeTask, forget_sets: ForgetSets, original: Original) -> Run:
    """Unlearn; ``finetune`` is the number of its epochs, other keywords are settings."""

    def unlearn(
        seed: int = 0, checkpoint: MemoryCheckpoint | None = None, finetune: int = 0, on: VaeTask = task, **changes: Any
    ) -> Trained:
        values = {**SETTINGS, **changes, "finetune": {**FINETUNE, "max_epochs": finetune}}
        settings = SSDPublishedSettings.model_validate(values)
        return ssd_published(original(), on, forget_sets, settings, seed=seed, checkpoint=checkpoint)

    return unlearn


def test_dampen_all_is_the_rule_by_hand() -> None:
    """Ratios 2, 0.5 and 4 of a tensor: shares 1/2, 1/8 and 1; past α = 1 signs turn round."""
    for alpha, wanted in ((1.0, [0.5, 0.875, 0.0]), (2.0, [0.0, 0.75, -1.0]), (0.0, [1.0, 1.0, 1.0])):
        model = nn.Linear(3, 1, bias=False)
        nn.init.ones_(model.weight)
        dampen_all(model, {"weight": torch.tensor([[2.0, 1, 4]])}, {"weight": torch.tensor([[1.0, 2, 1]])}, alpha)
        torch.testing.assert_close(model.weight.detach(), torch.tensor([wanted]))


def test_ssd_published_is_the_published_rule_written_out(
    run: Run, task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    model, sets = original(), forget_sets
    options: dict[str, Any] = {"reduction": "mean", "damping": 1e-5}
    forget = batch_fisher(model, task, sets.forget, batch_size=20, seed=seeding.derive(5, "forget"), **options)
    retain = batch_fisher(model, task, sets.retain, batch_size=32, seed=seeding.derive(5, "retain"), **options)
    found = run(seed=5, alpha=0.7).model
    for name, value in model.state_dict().items():
        ratio = forget[name].double().numpy() / (retain[name].double().numpy() + 1e-10)
        wanted = value.double().numpy() * (1 - 0.7 * ratio / ratio.max())
        np.testing.assert_allclose(found.state_dict()[name], wanted, rtol=1e-4, atol=1e-7)
    assert not found.training


def test_ssd_published_takes_the_forgotten_cells_as_one_batch(
    run: Run, same_bytes: Same, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, dict[str, Any]]] = []

    def watched(model: VAE, task: VaeTask, cells: Any, **options: Any) -> Any:
        asked.append((len(cells), options))
        return batch_fisher(model, task, cells, **options)

    monkeypatch.setattr(published, "batch_fisher", watched)
    run(batch_size=7)
    assert [(cells, options["batch_size"], options["reduction"]) for cells, options in asked] == [
        (20, 20, "mean"), (100, 7, "mean"),
    ]  # fmt: skip


def test_ssd_published_zeroes_the_dead_dispersion_of_log_mse(
    make_task: Callable[..., VaeTask], forget_sets: ForgetSets
) -> None:
    task = make_task(likelihood="log_mse")
    settings = SSDPublishedSettings.model_validate(SETTINGS)
    model = ssd_published(task.new_model(0), task, forget_sets, settings, seed=0).model
    emptied = {name for name, value in model.state_dict().items() if not value.any()}
    assert {name for name in emptied if "bias" not in name} == {"dispersion.weight"}


def test_ssd_published_then_fine_tunes_on_the_sum(
    run: Run, task: VaeTask, forget_sets: ForgetSets, same_bytes: Same
) -> None:
    model = run(seed=9).model
    settings = published.FinetuneSettings(**{**FINETUNE, "max_epochs": 3})
    wanted = published.finetune(model, task, forget_sets, settings, seed=9, loop=Loop(model, seed=9), scale="sum")
    assert same_bytes(run(seed=9, finetune=3).model.state_dict(), wanted.model.state_dict())


def test_ssd_published_without_strength_is_the_original_bit_for_bit(
    run: Run, original: Original, same_bytes: Same
) -> None:
    unlearned = run(alpha=0.0)
    assert same_bytes(unlearned.model.state_dict(), original().state_dict())
    assert (unlearned.effort.passes, unlearned.history) == (0, [])


def test_ssd_published_gives_the_same_bytes_for_the_same_seed_only(run: Run, same_bytes: Same) -> None:
    first = run(finetune=1)
    torch.manual_seed(99)
    again, other = run(finetune=1), run(finetune=1, seed=1)
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("save", [1, 2, 3])
def test_ssd_published_resumes_bit_for_bit(run: Run, save: int, same_bytes: Same) -> None:
    whole, dying, survivor = run(finetune=3), MemoryCheckpoint(dies_at=save), MemoryCheckpoint()
    with pytest.raises(KilledError):
        run(finetune=3, checkpoint=dying)
    survivor.kept = dying.kept
    resumed = run(finetune=3, checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)
    assert survivor.saves == 4 - save


def test_ssd_published_counts_its_effort(run: Run) -> None:
    effort = run(finetune=2).effort
    assert effort.forward == {"retain": 100 + 2 * (100 + 8), "forget": 20}
    assert effort.backward == {"retain": 100 + 2 * 100, "forget": 20}
    assert effort.steps == 2 * 4


@pytest.mark.parametrize("part", ["forget", "retain"])
def test_ssd_published_names_what_is_not_finite(
    run: Run, make_task: Callable[..., VaeTask], tiny_counts: sparse.csr_matrix, forget_sets: ForgetSets, part: str
) -> None:
    counts = tiny_counts.tolil()
    counts[getattr(forget_sets, part)[3], 0] = np.nan
    with pytest.raises(NonFiniteError, match="the Fisher information"):
        run(on=make_task(counts=counts.tocsr()))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("variant", "selective"), ("alpha", -1.0), ("alpha", float("inf")), ("damping", 0.0), ("batch_size", 0),
        ("finetune", None), ("finetune", {**FINETUNE, "batch_size": 0}),
    ],
)  # fmt: skip
def test_ssd_published_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        SSDPublishedSettings.model_validate({**SETTINGS, key: value})

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from killing import KilledError, MemoryCheckpoint
from scforget import seeding
from scforget.data.splits import ForgetSets
from scforget.errors import EmptyGroupError, NonFiniteError
from scforget.methods.retrain_published import RetrainPublishedSettings, held_out, retrain_published
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.training import Trained, mean_elbo

Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
Run = Callable[..., Trained]
SETTINGS: dict[str, Any] = {
    "variant": "published", "learning_rate": 1e-2, "batch_size": 32, "max_epochs": 3, "patience": 5,
    "validation_fraction": 0.15,
}  # fmt: skip


@pytest.fixture
def run(task: VaeTask, forget_sets: ForgetSets, original: Callable[[], VAE]) -> Run:
    def retrain(
        seed: int = 0, checkpoint: MemoryCheckpoint | None = None, on: VaeTask = task, model: VAE | None = None,
        **changes: Any,
    ) -> Trained:  # fmt: skip
        settings = RetrainPublishedSettings(**{**SETTINGS, **changes})
        model = original() if model is None else model
        return retrain_published(model, on, forget_sets, settings, seed=seed, checkpoint=checkpoint)

    return retrain


@pytest.mark.parametrize(("cells", "fraction", "held"), [(100, 0.15, 15), (28_094, 0.15, 4214), (2, 0.5, 1)])
def test_held_out_deals_every_cell_once(cells: int, fraction: float, held: int) -> None:
    retain = 3 * np.arange(cells) + 1
    train, validation = held_out(retain, fraction, 0)
    assert len(validation) == held
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), retain)
    other = held_out(retain, fraction, 1)[1]
    assert cells == 2 or not np.array_equal(validation, other)


@pytest.mark.parametrize(("cells", "fraction"), [(3, 0.1), (3, 0.9), (1, 0.5)])
def test_held_out_refuses_an_empty_part(cells: int, fraction: float) -> None:
    with pytest.raises(EmptyGroupError, match=f"{cells} retained cells"):
        held_out(np.arange(cells), fraction, 0)


def test_retrain_published_uses_nothing_of_the_model_it_is_given(run: Run, task: VaeTask, same_bytes: Same) -> None:
    first, other = run(), run(model=task.new_model(77))
    assert same_bytes(first.model.state_dict(), other.model.state_dict())
    assert first.history == other.history


def test_retrain_published_step_has_the_full_kl_and_no_free_bits(
    run: Run, task: VaeTask, forget_sets: ForgetSets
) -> None:
    model, (train, validation) = task.new_model(4).train(), held_out(forget_sets.retain, 0.15, 4)
    with seeding.scope(4, "retrain", "epoch", 1) as noise:
        loss = task.loss(model, task.batch(train[torch.randperm(85, generator=noise).numpy()]), noise)
        (loss.kl - loss.reconstruction).mean().backward()
    torch.optim.Adam(model.parameters(), lr=0.01).step()
    trained = run(seed=4, batch_size=85, max_epochs=1)
    for name, value in trained.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-7)
    assert trained.history[0]["stop_elbo"] == pytest.approx(mean_elbo(task, model, validation), rel=1e-5)


def test_retrain_published_trains_on_the_cells_that_are_not_held_out(
    run: Run, task: VaeTask, forget_sets: ForgetSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    batch = task.batch

    def watched(cells: Any) -> Any:
        seen.append(list(cells))
        return batch(cells)

    monkeypatch.setattr(task, "batch", watched)
    run(max_epochs=2)
    train, validation = held_out(forget_sets.retain, 0.15, 0)
    assert [len(cells) for cells in seen] == 2 * [32, 32, 21, 15]
    assert sorted(sum(seen[4:7], [])) == train.tolist()  # noqa: RUF017
    assert seen[3] == seen[7] == validation.tolist()


def test_retrain_published_keeps_the_epoch_that_is_best_on_the_held_out_cells(
    run: Run, task: VaeTask, forget_sets: ForgetSets
) -> None:
    trained = run(learning_rate=0.3, max_epochs=60, patience=3)
    elbos = [row["stop_elbo"] for row in trained.history]
    best = int(np.argmax(elbos)) + 1
    assert len(elbos) == best + 3 < 60
    validation = held_out(forget_sets.retain, 0.15, 0)[1]
    assert mean_elbo(task, trained.model, validation) == pytest.approx(elbos[best - 1], rel=1e-6)


def test_retrain_published_never_reads_the_forgotten_cells(run: Run, poisoned: VaeTask, same_bytes: Same) -> None:
    clean, other = run(seed=3), run(seed=3, on=poisoned)
    assert same_bytes(clean.model.state_dict(), other.model.state_dict())
    assert clean.history == other.history


def test_retrain_published_gives_the_same_bytes_for_the_same_seed_only(run: Run, same_bytes: Same) -> None:
    first, again, other = (run(seed=seed) for seed in (0, 0, 1))
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("save", [1, 2])
def test_retrain_published_resumes_bit_for_bit(run: Run, save: int, same_bytes: Same) -> None:
    whole, dying, survivor = run(), MemoryCheckpoint(dies_at=save), MemoryCheckpoint()
    with pytest.raises(KilledError):
        run(checkpoint=dying)
    survivor.kept = dying.kept
    resumed = run(checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)
    assert survivor.saves == 3 - save


def test_retrain_published_counts_its_effort(run: Run) -> None:
    effort = run(max_epochs=2).effort
    assert effort.steps == 2 * 3
    assert effort.forward == {"retain": 2 * (85 + 15)}
    assert effort.backward == {"retain": 2 * 85}


def test_retrain_published_stops_at_a_huge_learning_rate(run: Run) -> None:
    with pytest.raises(NonFiniteError):
        run(learning_rate=1e30)


@pytest.mark.parametrize(
    ("key", "value"), [("variant", "canonical"), ("max_epochs", 0), ("validation_fraction", 1.0), ("patience", 0)]
)
def test_retrain_published_settings_refuse_what_is_out_of_range(run: Run, key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        run(**{key: value})

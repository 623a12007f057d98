"""The training loop: reproducible, resumable to the bit, early-stopped, honest about divergence and effort."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import sparse
from torch import Tensor

from killing import KilledError, MemoryCheckpoint
from scforget import seeding, training
from scforget.artifacts import FileCheckpoint
from scforget.data.splits import ForgetSets
from scforget.errors import NonFiniteError
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.training import Effort, Trained, TrainingSettings, fit, mean_elbo

MakeTask = Callable[..., VaeTask]
Recipe = Callable[..., dict[str, Any]]


@pytest.fixture
def train(task: VaeTask, forget_sets: ForgetSets, recipe: Recipe) -> Callable[..., Trained]:
    """Train a fresh model on the retained cells; keywords of the recipe and of ``fit``."""

    def run(model: VAE | None = None, seed: int = 0, own: dict[str, Any] | None = None, **changes: Any) -> Trained:
        settings = TrainingSettings(**recipe(**changes))
        model = task.new_model(1) if model is None else model
        return fit(model, task, forget_sets.retain, forget_sets.stop, settings, seed=seed, **(own or {}))

    return run


def same(one: VAE, other: VAE) -> bool:
    """Bit for bit, as −0 and 0 are told apart."""
    first, second = one.state_dict(), other.state_dict()
    equal = (first[name].numpy().tobytes() == second[name].numpy().tobytes() for name in first)
    return list(first) == list(second) and all(equal)


def test_fit_gives_the_same_bytes_for_the_same_seed_only(train: Callable[..., Trained]) -> None:
    first = train()
    torch.manual_seed(99)  # whoever drew from torch's stream before has no influence
    again = train()
    assert same(first.model, again.model)
    assert first.history == again.history
    other = train(seed=1)
    assert not same(first.model, other.model)
    assert first.history[0] != other.history[0]


def test_fit_leaves_the_global_stream_as_it_was(train: Callable[..., Trained]) -> None:
    before = torch.get_rng_state()
    train(max_epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_fit_learns(train: Callable[..., Trained], task: VaeTask, forget_sets: ForgetSets) -> None:
    before = mean_elbo(task, task.new_model(1), forget_sets.stop)
    trained = train(max_epochs=15, kl_warmup_epochs=0)
    losses = [row["train_loss"] for row in trained.history]
    assert losses[-1] < losses[0] - 10
    assert mean_elbo(task, trained.model, forget_sets.stop) > before + 10
    assert not trained.model.training


def test_fit_of_one_batch_is_a_plain_adam_step(
    train: Callable[..., Trained], task: VaeTask, forget_sets: ForgetSets
) -> None:
    model = task.new_model(1)
    with seeding.scope(0, "fit", "epoch", 1) as noise:
        cells = forget_sets.retain[torch.randperm(100, generator=noise).numpy()]
        loss = task.loss(model.train(), task.batch(cells), noise, beta=0.25, free_bits=0.1)
        loss.total.mean().backward()
    torch.optim.Adam(model.parameters(), lr=0.003).step()
    trained = train(learning_rate=0.003, batch_size=100, max_epochs=1, kl_warmup_epochs=4, free_bits=0.1)
    for name, wanted in model.state_dict().items():
        torch.testing.assert_close(trained.model.state_dict()[name], wanted, rtol=1e-5, atol=1e-7)
    (row,) = trained.history
    means = [float(part.detach().mean()) for part in loss]
    assert row["train_loss"] == pytest.approx(means[0], rel=1e-6)
    assert row["train_elbo"] == pytest.approx(means[1] - means[2], rel=1e-6)
    assert row["kl"] == pytest.approx(means[2], rel=1e-6)
    assert row["stop_elbo"] == pytest.approx(mean_elbo(task, model, forget_sets.stop), rel=1e-6)


def test_fit_visits_every_cell_once_an_epoch_in_a_new_order(
    task: VaeTask, forget_sets: ForgetSets, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    batch = task.batch

    def watched(cells: Any) -> Any:
        seen.append(list(cells))
        return batch(cells)

    monkeypatch.setattr(task, "batch", watched)
    fit(task.new_model(0), task, forget_sets.retain, forget_sets.stop, TrainingSettings(**recipe(max_epochs=2)), seed=0)
    assert [len(cells) for cells in seen] == 2 * [32, 32, 32, 4, 40]
    epochs = [sum(seen[:4], []), sum(seen[5:9], [])]  # noqa: RUF017
    assert all(sorted(epoch) == forget_sets.retain.tolist() for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert seen[4] == seen[9] == forget_sets.stop.tolist()


@pytest.mark.parametrize("epoch", [1, 3, 5])
def test_fit_resumes_bit_for_bit(train: Callable[..., Trained], epoch: int) -> None:
    recipe = {"max_epochs": 5, "patience": 3}
    whole = train(**recipe)
    dying = MemoryCheckpoint(dies_at=epoch)
    with pytest.raises(KilledError):
        train(own={"checkpoint": dying}, **recipe)
    survivor = MemoryCheckpoint()
    survivor.kept = dying.kept
    resumed = train(own={"checkpoint": survivor}, **recipe)
    assert same(resumed.model, whole.model)
    assert resumed.history == whole.history
    assert resumed.effort == whole.effort
    assert survivor.saves == 5 - epoch


def test_fit_resumes_bit_for_bit_from_a_file(train: Callable[..., Trained], tmp_path: Path) -> None:
    """Killed twice, once before and once after the best epoch: the rate is so high that the ELBO soon falls."""
    recipe = {"max_epochs": 14, "patience": 14, "learning_rate": 0.2, "kl_warmup_epochs": 0}
    whole = train(**recipe)
    best = int(np.argmax([row["stop_elbo"] for row in whole.history])) + 1
    assert 1 < best < 13

    def die_at(epoch: int) -> Callable[[dict[str, float]], None]:
        def on_epoch(row: dict[str, float]) -> None:
            if row["epoch"] == epoch:
                raise KilledError

        return on_epoch

    for epoch in (best - 1, best + 1):
        with pytest.raises(KilledError):
            train(own={"checkpoint": FileCheckpoint(tmp_path, every=0), "on_epoch": die_at(epoch)}, **recipe)
    resumed = train(own={"checkpoint": FileCheckpoint(tmp_path, every=0)}, **recipe)
    assert same(resumed.model, whole.model)
    assert resumed.history == whole.history


def test_fit_takes_up_a_finished_run_without_another_epoch(train: Callable[..., Trained]) -> None:
    checkpoint = MemoryCheckpoint()
    whole = train(own={"checkpoint": checkpoint})
    again = train(own={"checkpoint": checkpoint})
    assert same(whole.model, again.model)
    assert whole.history == again.history
    assert checkpoint.saves == 4


def test_fit_stops_early_and_keeps_the_best_epoch(
    train: Callable[..., Trained], task: VaeTask, forget_sets: ForgetSets
) -> None:
    recipe = {"learning_rate": 0.5, "kl_warmup_epochs": 0}
    trained = train(max_epochs=60, patience=3, **recipe)
    elbos = [row["stop_elbo"] for row in trained.history]
    best = int(np.argmax(elbos)) + 1
    assert best > 1
    assert len(elbos) == best + 3 < 60
    assert mean_elbo(task, trained.model, forget_sets.stop) == elbos[best - 1]
    shorter = train(max_epochs=best, patience=60, **recipe)
    assert same(trained.model, shorter.model)


@pytest.mark.parametrize(
    ("warmup", "patience", "elbos", "epochs", "best"),
    [
        (0, 2, [-1, -2, -3, -4, -5, -6], 3, 1),
        (0, 2, [-3, -4, -2, -2, -2, -2], 5, 3),  # as good is not better
        (0, 3, [-3, -4, -5, -2, -4, -4, -4, -1], 7, 4),
        (4, 2, [-1, -2, -3, -4, -5, -6, -7], 6, 1),  # waits from the end of warm-up, but takes the best of all epochs
        (4, 1, [-9, -8, -7, -6, -5, -6, -7], 6, 5),
        (20, 1, 8 * [-1], 8, 1),
    ],
)
def test_fit_waits_its_patience_from_the_best_epoch_or_the_end_of_warm_up(
    train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch,
    warmup: int, patience: int, elbos: list[float], epochs: int, best: int,
) -> None:  # fmt: skip
    said = iter(elbos)
    states: list[dict[str, Tensor]] = []

    def mean_elbo(_task: VaeTask, model: VAE, _cells: Any) -> float:
        states.append(copy.deepcopy(model.state_dict()))
        return next(said)

    monkeypatch.setattr(training, "mean_elbo", mean_elbo)
    trained = train(max_epochs=len(elbos), patience=patience, kl_warmup_epochs=warmup)
    assert [row["stop_elbo"] for row in trained.history] == elbos[:epochs]
    assert all(torch.equal(value, states[best - 1][name]) for name, value in trained.model.state_dict().items())
    assert not torch.equal(states[best - 1]["mu.weight"], states[best - 2]["mu.weight"])


def test_fit_of_no_epoch_returns_the_model_bit_for_bit(train: Callable[..., Trained], task: VaeTask) -> None:
    original = task.new_model(1)
    trained = train(max_epochs=0)
    assert same(trained.model, original)
    assert (trained.history, trained.effort.passes, trained.effort.steps) == ([], 0, 0)
    assert not trained.model.training


@pytest.mark.parametrize(
    ("warmup", "weights"), [(0, [1, 1, 1, 1]), (3, [1 / 3, 2 / 3, 1, 1]), (8, [1 / 8, 1 / 4, 3 / 8, 1 / 2])]
)
def test_fit_warms_the_kl_up_linearly(train: Callable[..., Trained], warmup: int, weights: list[float]) -> None:
    history = train(kl_warmup_epochs=warmup).history
    assert [row["kl_weight"] for row in history] == pytest.approx(weights)
    for row in history:  # and the loss is the ELBO but for the part of the KL that is not counted
        assert row["train_loss"] == pytest.approx(-row["train_elbo"] - (1 - row["kl_weight"]) * row["kl"], rel=1e-6)


def test_fit_names_the_step_at_which_the_loss_became_nan(
    make_task: MakeTask, tiny_counts: sparse.csr_matrix, forget_sets: ForgetSets, recipe: Recipe
) -> None:
    retain = forget_sets.retain
    with seeding.scope(0, "fit", "epoch", 1) as noise:
        order = retain[torch.randperm(100, generator=noise).numpy()]
    for place in (0, 40, 99):
        counts = tiny_counts.tolil()
        counts[order[place], 0] = np.nan
        task = make_task(counts=counts.tocsr())
        with pytest.raises(NonFiniteError, match=f"the loss .* at step {place // 32};") as caught:
            fit(task.new_model(1), task, retain, forget_sets.stop, TrainingSettings(**recipe()), seed=0)
        assert (caught.value.step, caught.value.name) == (place // 32, "the loss")


def test_fit_refuses_a_model_with_a_nan_weight(train: Callable[..., Trained], task: VaeTask) -> None:
    model = task.new_model(0)
    with torch.no_grad():
        model.mu.bias[0] = torch.nan
    with pytest.raises(NonFiniteError) as caught:
        train(model=model)
    assert caught.value.step == 0


@pytest.mark.parametrize(("batch_size", "step", "name"), [(50, 1, "the loss"), (100, 1, "the ELBO of the stop cells")])
def test_fit_stops_at_a_huge_learning_rate(
    train: Callable[..., Trained], batch_size: int, step: int, name: str
) -> None:
    with pytest.raises(NonFiniteError) as caught:
        train(learning_rate=1e30, batch_size=batch_size)
    assert (caught.value.step, caught.value.name) == (step, name)


def test_fit_counts_its_effort(train: Callable[..., Trained]) -> None:
    effort = train(max_epochs=3, own={"cell_set": "train"}).effort
    assert effort.steps == 3 * 4
    assert effort.forward == {"train": 300, "stop": 120}
    assert effort.backward == {"train": 300}
    assert effort.passes == 720
    assert effort.to_dict() == {
        "steps": 12, "forward": {"stop": 120, "train": 300}, "backward": {"train": 300}, "passes": 720,
    }  # fmt: skip
    assert Effort().to_dict() == {"steps": 0, "forward": {}, "backward": {}, "passes": 0}


def test_fit_reports_each_epoch_as_it_ends(train: Callable[..., Trained]) -> None:
    rows: list[dict[str, float]] = []
    trained = train(own={"on_epoch": rows.append})
    assert rows == trained.history
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    assert all(one["stop_elbo"] != two["stop_elbo"] for one, two in pairwise(rows))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 0.0), ("learning_rate", "1e-4"), ("batch_size", 0), ("batch_size", 32.0), ("max_epochs", -1),
        ("patience", 0), ("kl_warmup_epochs", -1), ("free_bits", -0.1), ("momentum", 0.9),
    ],
)  # fmt: skip
def test_training_settings_refuse_what_is_no_recipe(recipe: Recipe, key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        TrainingSettings.model_validate(recipe(**{key: value}))

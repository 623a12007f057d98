from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from methods import class_cases as cases
from scforget import seeding
from scforget.artifacts import FileCheckpoint
from scforget.class_tasks import ClassifierTask
from scforget.class_training import (
    AdamSettings,
    ClassTrainingSettings,
    SGDSettings,
    class_batches,
    class_epoch,
    class_rates,
    fit_classifier,
    new_optimiser,
)
from scforget.errors import NonFiniteError
from scforget.training import Effort, Loop, Trained, batches, one_cycle

MOMENTUM = cases.optimiser(kind="sgd", learning_rate=0.05, momentum=0.9, weight_decay=0.01)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and x.numpy().tobytes() == y.numpy().tobytes() for (a, x), (b, y) in pairs)


def train(
    kind: str = "images", seed: int = 0, checkpoint: Any = None, task: ClassifierTask | None = None, **changes: Any
) -> Trained:  # fmt: skip
    one = task or cases.task(kind)
    settings = ClassTrainingSettings(**cases.recipe(**changes))
    return fit_classifier(one.new_model(2), one, cases.sets().retain, settings, seed=seed, checkpoint=checkpoint)


# --- batches and rates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "size", "sizes"),
    [(10, 4, [4, 4, 2]), (9, 4, [4, 5]), (8, 4, [4, 4]), (5, 4, [5]), (4, 4, [4]), (3, 4, [3]), (1, 4, [1]), (0, 4, []),
     (3, 1, [1, 2]), (2, 1, [2]), (1, 1, [1])],
)  # fmt: skip
def test_class_batches_give_a_last_item_on_its_own_to_the_batch_before(items: int, size: int, sizes: list[int]) -> None:
    cells = np.arange(100, 100 + items, dtype=np.int64)
    parts = list(class_batches(cells, size, stream()))
    assert [len(part) for part in parts] == sizes
    order = [cell for part in batches(cells, size, stream()) for cell in part]
    assert [cell for part in parts for cell in part] == order
    assert sorted(order) == cells.tolist()


def test_class_batches_let_a_net_with_batchnorm_train_on_any_number_of_items() -> None:
    task, norm = cases.task("images"), nn.BatchNorm1d(64)
    model = nn.Sequential(nn.Flatten(), norm).train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(task.batch(np.arange(1, dtype=np.int64)).inputs)
    for items in range(2, 12):
        norm.reset_running_stats()
        parts = list(class_batches(np.arange(items, dtype=np.int64), 5, stream()))
        seen = [len(model(task.batch(part).inputs)) for part in parts]
        assert sum(seen) == items
        assert int(norm.num_batches_tracked) == len(parts)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
@pytest.mark.parametrize("size", range(1, 8))
def test_class_rates_are_as_many_as_batches(schedule: str, size: int) -> None:
    settings = ClassTrainingSettings(**cases.recipe(schedule=schedule, batch_size=size))
    for items in range(1, 20):
        found = class_rates(settings, items, 2)
        assert len(found) == len(list(class_batches(np.arange(items), size, stream())))


def rates_of(schedule: str) -> list[float]:
    """Three epochs of 40 items in batches of 16: nine steps."""
    optimiser = cases.optimiser(learning_rate=0.2)
    settings = ClassTrainingSettings(**cases.recipe(schedule=schedule, epochs=3, optimiser=optimiser))
    return [rate for epoch in (1, 2, 3) for rate in class_rates(settings, 40, epoch)]


def test_class_rates_fall_by_half_a_cosine_over_the_whole_run() -> None:
    found = rates_of("cosine")
    assert_allclose(found, [0.2 * (1 + math.cos(math.pi * k / 9)) / 2 for k in range(9)], rtol=1e-12)
    assert found[0] == 0.2
    # torch's own, a step a time
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    scheduler, torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 9), []
    for _ in range(9):
        torchs.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    assert_allclose(found, torchs, rtol=1e-6)


def test_class_rates_are_constant_or_one_cycle_over_the_whole_run() -> None:
    assert rates_of("constant") == [0.2] * 9
    assert_allclose(rates_of("one_cycle"), [0.2 * one_cycle(k / 9) for k in range(1, 10)], rtol=1e-12)


# --- optimisers ------------------------------------------------------------------------------------------------------


def steps(optimiser: torch.optim.Optimizer, parameter: Tensor) -> list[list[float]]:
    """Where three steps down a quadratic lead."""
    found = []
    for _ in range(3):
        optimiser.zero_grad()
        (torch.tensor([1.0, 3.0]) * parameter.square()).sum().backward()
        optimiser.step()
        found.append(parameter.detach().tolist())
    return found


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_new_optimiser_is_the_one_that_settings_name(decay: float) -> None:
    ours, torchs = (nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    settings = AdamSettings(kind="adam", learning_rate=0.1, weight_decay=decay)
    found = steps(new_optimiser([ours], settings), ours)
    assert_allclose(found, steps(torch.optim.Adam([torchs], lr=0.1, weight_decay=decay), torchs), rtol=1e-5)
    ours, torchs = (nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    heavy = SGDSettings(kind="sgd", learning_rate=0.05, momentum=0.8, weight_decay=decay)
    found = steps(new_optimiser([ours], heavy), ours)
    wanted, place, speed = [], [1.0, -2.0], [0.0, 0.0]
    for _ in range(3):
        speed = [0.8 * v + (2 * c + decay) * x for v, c, x in zip(speed, (1.0, 3.0), place, strict=True)]
        place = [x - 0.05 * v for x, v in zip(place, speed, strict=True)]
        wanted.append(place)
    assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    "values",
    [{"kind": "adam", "learning_rate": 0.0}, {"kind": "sgd", "momentum": 1.0}, {"kind": "adam", "weight_decay": -1.0},
     {"kind": "adam", "momentum": 0.9}, {"kind": "rmsprop"}],
)  # fmt: skip
def test_optimiser_settings_refuse_what_is_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        cases.optimiser(**values)


@pytest.mark.parametrize(("key", "value"), [("epochs", -1), ("batch_size", 0), ("schedule", "step")])
def test_class_training_settings_refuse_what_is_out_of_range(key: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=key):
        train(**{key: value})


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("weights", [None, np.array([0.3, 1.0, 2.0])])
def test_class_epoch_is_that_written_out(kind: str, weights: Any) -> None:
    task, cells, rates = cases.task(kind, weights=weights), cases.sets().retain, [0.1, 0.01, 0.05]
    model, other = (task.new_model(3).train() for _ in range(2))
    plain, loss_sum, right = torch.optim.SGD(other.parameters(), lr=1.0), 0.0, 0
    with seeding.scope(0, "x") as noise:
        order = cells[torch.randperm(40, generator=noise).numpy()]
        for rate, start in zip(rates, (0, 16, 32), strict=True):
            batch = task.batch(order[start : start + 16], noise)
            plain.param_groups[0]["lr"] = rate
            plain.zero_grad()
            logits = other(batch.inputs)
            losses = cross_entropy(logits, batch.labels, reduction="none")
            if weights is not None:
                losses = losses * torch.tensor([weights[label] for label in batch.labels.tolist()])
            losses.mean().backward()
            plain.step()
            loss_sum += losses.sum().item()
            right += int((logits.argmax(1) == batch.labels).sum())
    effort = Effort()
    optimiser = new_optimiser(model.parameters(), cases.optimiser(kind="sgd"))
    with seeding.scope(0, "x") as noise:
        row = class_epoch(model.eval(), task, cells, 16, optimiser, noise, effort, rates=rates, cell_set="train")
    assert row == {"train_loss": pytest.approx(loss_sum / 40, rel=1e-5), "train_accuracy": right / 40}
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert effort == Effort(3, {"train": 40}, {"train": 40})  # type: ignore[arg-type]


def test_class_epoch_without_rates_keeps_the_optimisers_own() -> None:
    task, model = cases.task("vectors"), cases.original("vectors")
    optimiser = new_optimiser(model.parameters(), cases.optimiser(learning_rate=0.125))
    class_epoch(model, task, cases.sets().retain, 16, optimiser, stream(), Effort())
    assert optimiser.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("kind", cases.KINDS)
def test_fit_classifier_learns(kind: str) -> None:
    task, trained, retain = cases.task(kind), train(kind, epochs=40), cases.sets().retain
    assert task.accuracy(trained.model, retain) > 0.9 > task.accuracy(task.new_model(2), retain)
    assert trained.history[-1]["train_loss"] < 0.5 * trained.history[0]["train_loss"]
    assert [row["epoch"] for row in trained.history] == list(range(1, 41))
    assert not trained.model.training


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one_cycle"])
def test_fit_classifier_is_its_epochs_at_their_rates(schedule: str) -> None:
    task, settings = cases.task("images"), ClassTrainingSettings(**cases.recipe(schedule=schedule, epochs=3))
    model = task.new_model(2)
    optimiser = torch.optim.Adam(model.parameters())
    for epoch in (1, 2, 3):
        with seeding.scope(5, "fit", "epoch", epoch) as noise:
            class_epoch(
                model, task, cases.sets().retain, 16, optimiser, noise, Effort(), rates=class_rates(settings, 40, epoch)
            )  # fmt: skip
    for name, value in train(seed=5, schedule=schedule, epochs=3).model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_fit_classifier_of_no_epoch_returns_the_model_as_it_came(kind: str) -> None:
    trained = train(kind, epochs=0)
    assert same(trained.model, cases.task(kind).new_model(2))
    assert (trained.history, trained.effort.passes, trained.effort.steps) == ([], 0, 0)
    assert not trained.model.training


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("optimiser", [cases.optimiser(), MOMENTUM, cases.optimiser(kind="sgd")])
def test_fit_classifier_resumes_bit_for_bit(kind: str, optimiser: Any) -> None:
    run = functools.partial(train, kind, schedule="one_cycle", epochs=4, optimiser=optimiser)
    whole = run()
    for save in (1, 3, 4):
        again = cases.resumed(run, save)
        assert same(again.model, whole.model)
        assert (again.history, again.effort) == (whole.history, whole.effort)


def test_fit_classifier_draws_from_its_seed_alone_and_leaves_torchs_stream_alone() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (train("vectors", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same(first.model, again.model)
    assert not same(first.model, other.model)


def test_fit_classifier_may_be_a_further_phase_of_a_loop() -> None:
    task, settings, seen = cases.task("images"), ClassTrainingSettings(**cases.recipe()), []

    def run(checkpoint: Any = None) -> Trained:
        model = task.new_model(2)
        loop = Loop(model, seed=0, checkpoint=checkpoint)
        fit_classifier(model, task, cases.sets().aside, settings, seed=0, loop=loop, phase="first", cell_set="aside")
        return fit_classifier(
            model, task, cases.sets().retain, settings, seed=0, loop=loop, phase="second", on_epoch=seen.append
        )  # fmt: skip

    whole = run()
    assert seen == whole.history[2:]
    assert [row["epoch"] for row in whole.history] == [1, 2, 3, 4]
    assert whole.effort.forward == {"aside": 24, "retain": 80}
    assert whole.effort.steps == 2 * 1 + 2 * 3
    for save in (1, 2, 3):
        again = cases.resumed(run, save)
        assert same(again.model, whole.model)
        assert (again.history, again.effort) == (whole.history, whole.effort)


def test_fit_classifier_reads_only_its_items() -> None:
    task, spoilt = cases.task("vectors"), cases.task("vectors")
    spoilt.inputs = spoilt.inputs.copy()
    spoilt.inputs[np.setdiff1d(np.arange(72), cases.sets().retain)] = np.nan
    assert same(train("vectors", task=task).model, train("vectors", task=spoilt).model)
    assert_array_equal(task.labels, spoilt.labels)


def test_fit_classifier_stops_when_the_loss_runs_away() -> None:
    with pytest.raises(NonFiniteError, match="the loss became NaN or infinite at step"):
        train("vectors", optimiser=cases.optimiser(kind="sgd", learning_rate=1e38))


@pytest.mark.parametrize(
    "optimiser",
    [
        {"kind": "adam", "learning_rate": 1e-2, "weight_decay": 0.0},
        {"kind": "sgd", "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 1e-4},
    ],
)
def test_fit_resumed_from_a_file_gives_the_same_bits_where_weights_lie_channels_last(
    optimiser: dict[str, Any], tmp_path: Path
) -> None:
    """A file holds moments in one layout; a fused step goes by their places in memory."""
    task, settings = cases.task("images"), ClassTrainingSettings(**cases.recipe(optimiser=optimiser, epochs=4))
    model = task.new_model(0)
    assert any(p.ndim == 4 and not p.is_contiguous() for p in model.parameters())
    whole = fit_classifier(model, task, cases.sets().retain, settings, seed=1).model.state_dict()

    def die(row: dict[str, float]) -> None:
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    checkpoint = FileCheckpoint(tmp_path, every=0.0)
    with pytest.raises(KeyboardInterrupt):
        fit_classifier(
            task.new_model(0), task, cases.sets().retain, settings, seed=1, checkpoint=checkpoint, on_epoch=die
        )
    again = fit_classifier(task.new_model(0), task, cases.sets().retain, settings, seed=1, checkpoint=checkpoint)
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in whole.items())

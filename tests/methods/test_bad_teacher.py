from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import kl_div, softmax

from killing import KilledError, MemoryCheckpoint
from methods import class_cases as cases
from scforget import seeding
from scforget.errors import EmptyGroupError, NonFiniteError
from scforget.methods.bad_teacher import BadTeacherSettings, bad_teacher, retained_sample, taught
from scforget.training import Trained

Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
SETTINGS: dict[str, Any] = {"optimiser": cases.optimiser(), "retain_scale": 2.0, "epochs": 3, "batch_size": 8}


def run(
    kind: str, seed: int = 0, checkpoint: MemoryCheckpoint | None = None, sets: Any = None, **changes: Any
) -> Trained:
    settings = BadTeacherSettings(**{**SETTINGS, **changes})
    one, sets = cases.original(kind), sets or cases.sets()
    return bad_teacher(one, cases.task(kind), sets, settings, seed=seed, checkpoint=checkpoint)


@pytest.fixture(params=cases.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_bad_teacher_of_no_epoch_is_the_original_bit_for_bit(kind: str, same_bytes: Same) -> None:
    unlearned = run(kind, epochs=0)
    assert same_bytes(unlearned.model.state_dict(), cases.original(kind).state_dict())
    assert (unlearned.effort.passes, unlearned.history) == (0, [])
    assert not unlearned.model.training


def test_taught_is_the_published_mixture_of_teachers() -> None:
    """KL from l·softmax(bad) + (1 − l)·softmax(good) to the student, item by item."""
    task, good = cases.task("vectors"), cases.original("vectors")
    bad, student = task.new_model(3).eval(), task.new_model(4).eval()
    batch = task.batch(np.arange(10))
    labels = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 0, 0])
    found = taught(student, good, bad, batch, labels.bool())
    for k in range(10):
        one = batch.inputs[k : k + 1]
        with torch.no_grad():
            wanted = labels[k] * softmax(bad(one), 1) + (1 - labels[k]) * softmax(good(one), 1)
            kl = kl_div(student(one).log_softmax(1), wanted, reduction="batchmean")
        assert found[k].item() == pytest.approx(kl.item(), rel=1e-4, abs=1e-6)
    found.mean().backward()
    assert all(value.grad is not None for value in student.parameters())
    assert all(value.grad is None for one in (good, bad) for value in one.parameters())


def test_taught_is_zero_where_the_student_is_the_teacher() -> None:
    good = cases.original("vectors")
    batch = cases.task("vectors").batch(np.arange(6))
    found = taught(good, good, cases.task("vectors").new_model(3).eval(), batch, torch.tensor([True, False] * 3))
    assert found[1::2].abs().max().item() < 1e-6 < found[::2].min().item()


@pytest.mark.parametrize(("scale", "size"), [(0.0, 0), (0.3, 2), (2.0, 16), (5.0, 40), (50.0, 40)])
def test_retained_sample_is_drawn_once_from_the_retained_items(scale: float, size: int) -> None:
    sets = cases.sets()
    found = retained_sample(sets, scale, 0)
    assert len(found) == len(set(found.tolist())) == size
    assert set(found.tolist()) <= set(sets.retain.tolist())
    assert np.array_equal(found, retained_sample(sets, scale, 0))
    assert 0 < size < 40 or np.array_equal(found, retained_sample(sets, scale, 1))


def test_bad_teacher_epoch_is_that_written_out() -> None:
    """All items in one batch; the bad teacher is a new net of its own seed."""
    task, sets, model, good = cases.task("images"), cases.sets(), cases.original("images"), cases.original("images")
    bad = task.new_model(seeding.derive(5, "bad teacher")).eval()
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    items = np.concatenate([sets.forget, retained_sample(sets, 2.0, 5)])
    with seeding.scope(5, "bad teacher", "epoch", 1) as noise:
        part = items[torch.randperm(24, generator=noise).numpy()]
        batch = task.batch(part, noise)
        label = torch.from_numpy(np.isin(part, sets.forget))
        with torch.no_grad():
            wanted = torch.where(label[:, None], softmax(bad(batch.inputs), 1), softmax(good(batch.inputs), 1))
        apart = kl_div(model.train()(batch.inputs).log_softmax(1), wanted, reduction="none").sum(1)
        apart.mean().backward()
        adam.step()
    unlearned = run("images", seed=5, epochs=1, batch_size=24)
    for name, value in unlearned.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=1e-5)
    (row,) = unlearned.history
    assert row["forget_divergence"] == pytest.approx(apart[label].mean().item(), rel=1e-4)
    assert row["retain_divergence"] == pytest.approx(apart[~label].mean().item(), rel=1e-4)
    assert unlearned.facts == {"retained_items": 16.0}


def test_bad_teacher_lowers_the_confidence_of_forgotten_items_more(kind: str) -> None:
    task, sets = cases.task(kind), cases.sets()
    model, original = run(kind, epochs=10).model, cases.original(kind)
    fall = {
        name: float((task.signals(original, items).score - task.signals(model, items).score).mean())
        for name, items in (("forget", sets.forget), ("retain", sets.retain))
    }
    assert fall["forget"] > 1.0
    assert fall["forget"] > 1.5 * fall["retain"]


def test_bad_teacher_without_retained_items_runs() -> None:
    found = run("vectors", retain_scale=0.0)
    assert set(found.history[0]) == {"epoch", "forget_divergence"}
    assert found.facts == {"retained_items": 0.0}


def test_bad_teacher_counts_its_effort(kind: str) -> None:
    effort = run(kind).effort
    assert effort.steps == 3 * 3
    assert effort.forward == {"forget": 3 * 3 * 8, "retain": 3 * 3 * 16}
    assert effort.backward == {"forget": 3 * 8, "retain": 3 * 16}


def test_bad_teacher_gives_the_same_bytes_for_the_same_seed_only(kind: str, same_bytes: Same) -> None:
    first, again, other = (run(kind, seed=seed) for seed in (0, 0, 1))
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert first.history == again.history
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())


def test_bad_teacher_resumes_bit_for_bit(kind: str, same_bytes: Same) -> None:
    whole, dying, survivor = run(kind), MemoryCheckpoint(dies_at=2), MemoryCheckpoint()
    with pytest.raises(KilledError):
        run(kind, checkpoint=dying)
    survivor.kept = dying.kept
    resumed = run(kind, checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)
    assert survivor.saves == 1


def test_bad_teacher_refuses_to_forget_nothing() -> None:
    with pytest.raises(EmptyGroupError, match="none to forget"):
        run("vectors", sets=replace(cases.sets(), forget=cases.sets().forget[:0]))


def test_bad_teacher_stops_when_the_divergence_runs_away() -> None:
    with pytest.raises(NonFiniteError):
        run("vectors", optimiser=cases.optimiser(learning_rate=1e30))


@pytest.mark.parametrize(("key", "value"), [("retain_scale", -1.0), ("epochs", -1), ("batch_size", 0)])
def test_bad_teacher_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        run("vectors", **{key: value})

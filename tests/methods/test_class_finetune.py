from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import cross_entropy

from methods import class_cases as cases
from scforget import seeding
from scforget.class_tasks import ClassifierTask
from scforget.errors import NonFiniteError
from scforget.methods.retain_finetune import ClassFinetuneSettings, class_finetune
from scforget.training import Trained

Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]


def unlearn(
    kind: str = "images", seed: int = 0, checkpoint: Any = None, task: ClassifierTask | None = None, **changes: Any
) -> Trained:  # fmt: skip
    settings = ClassFinetuneSettings(**cases.recipe(**changes))
    return class_finetune(
        cases.original(kind), task or cases.task(kind), cases.sets(), settings, seed=seed, checkpoint=checkpoint
    )  # fmt: skip


@pytest.mark.parametrize("kind", cases.KINDS)
def test_class_finetune_of_no_epoch_is_the_original_bit_for_bit(kind: str, same_bytes: Same) -> None:
    unlearned = unlearn(kind, epochs=0)
    assert same_bytes(unlearned.model.state_dict(), cases.original(kind).state_dict())
    assert (unlearned.effort.passes, unlearned.history) == (0, [])
    assert not unlearned.model.training


@pytest.mark.parametrize("kind", cases.KINDS)
def test_class_finetune_epoch_is_that_written_out(kind: str) -> None:
    model, task, retain = cases.original(kind).train(), cases.task(kind), cases.sets().retain
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    with seeding.scope(3, "fit", "epoch", 1) as noise:
        order = retain[torch.randperm(40, generator=noise).numpy()]
        for start in (0, 16, 32):
            batch = task.batch(order[start : start + 16], noise)
            optimiser.zero_grad()
            cross_entropy(model(batch.inputs), batch.labels).backward()
            optimiser.step()
    unlearned = unlearn(kind, seed=3, epochs=1, optimiser=cases.optimiser(kind="sgd"))
    for name, value in unlearned.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_class_finetune_learns_the_retained_items_and_never_reads_the_others(kind: str, same_bytes: Same) -> None:
    task, spoilt, retain = cases.task(kind), cases.task(kind), cases.sets().retain
    others = np.setdiff1d(np.arange(72), retain)
    spoilt.inputs = spoilt.inputs.copy()
    spoilt.inputs[others] = np.nan if kind == "vectors" else 255
    clean, other = (unlearn(kind, task=one, epochs=5) for one in (task, spoilt))
    assert same_bytes(clean.model.state_dict(), other.model.state_dict())
    assert clean.history == other.history
    assert task.error(clean.model, retain) < task.error(cases.original(kind), retain)


def test_class_finetune_gives_the_same_bytes_for_the_same_seed_only(same_bytes: Same) -> None:
    first, again, other = (unlearn(seed=seed).model.state_dict() for seed in (0, 0, 1))
    assert same_bytes(first, again)
    assert not same_bytes(first, other)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_class_finetune_resumes_bit_for_bit(kind: str, same_bytes: Same) -> None:
    run = functools.partial(unlearn, kind, epochs=3, schedule="cosine")
    whole, again = run(), cases.resumed(run, 2)
    assert same_bytes(again.model.state_dict(), whole.model.state_dict())
    assert (again.history, again.effort) == (whole.history, whole.effort)


def test_class_finetune_counts_its_effort() -> None:
    effort = unlearn(epochs=3).effort
    assert effort.steps == 3 * 3
    assert effort.forward == effort.backward == {"retain": 120}


def test_class_finetune_stops_when_the_loss_runs_away() -> None:
    with pytest.raises(NonFiniteError):
        unlearn("vectors", optimiser=cases.optimiser(kind="sgd", learning_rate=1e38))


@pytest.mark.parametrize(("key", "value"), [("epochs", -1), ("batch_size", 0), ("schedule", "none")])
def test_class_finetune_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        unlearn(**{key: value})

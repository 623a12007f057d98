from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import cross_entropy

from methods import class_cases as cases
from scforget import seeding
from scforget.class_training import ClassTrainingSettings, fit_classifier
from scforget.errors import NonFiniteError
from scforget.methods.neg_grad import NegGradSettings, neg_grad
from scforget.training import Trained

Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
SGD = cases.optimiser(kind="sgd", learning_rate=0.05)


def unlearn(kind: str = "images", seed: int = 0, checkpoint: Any = None, **changes: Any) -> Trained:
    values = {"optimiser": SGD, "batch_size": 8, "epochs": 2, "clip": None, "repair": 0, **changes}
    settings = NegGradSettings(**values)
    task = cases.task(kind)
    return neg_grad(cases.original(kind), task, cases.sets(), settings, seed=seed, checkpoint=checkpoint)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_neg_grad_of_no_epoch_and_no_repair_is_the_original_bit_for_bit(kind: str, same_bytes: Same) -> None:
    unlearned = unlearn(kind, epochs=0)
    assert same_bytes(unlearned.model.state_dict(), cases.original(kind).state_dict())
    assert (unlearned.effort.passes, unlearned.history) == (0, [])
    assert not unlearned.model.training


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_neg_grad_steps_are_those_written_out(kind: str, clip: float | None) -> None:
    model, task, cells = cases.original(kind).train(), cases.task(kind), cases.sets().forget
    rows = []
    for number in (1, 2):
        with seeding.scope(3, "ascent", "epoch", number) as noise:
            batch = task.batch(cells[torch.randperm(8, generator=noise).numpy()], noise)
            loss = cross_entropy(model(batch.inputs), batch.labels)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            norm = float(torch.cat([gradient.ravel() for gradient in gradients]).norm())
            assert norm > 1e-3
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter.add_(0.05 * gradient * (1.0 if clip is None else clip / norm))
        rows.append({"epoch": number, "forget_loss": pytest.approx(loss.item(), rel=1e-5)})
    unlearned = unlearn(kind, seed=3, clip=clip)
    for name, value in unlearned.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-6)
    assert unlearned.history == rows


def test_neg_grad_repairs_by_plain_training_on_the_retained_items(same_bytes: Same) -> None:
    climbed, repaired = unlearn(), unlearn(repair=2)
    settings = ClassTrainingSettings(optimiser=SGD, schedule="constant", batch_size=8, epochs=2)
    task, retain = cases.task("images"), cases.sets().retain
    wanted = fit_classifier(climbed.model, task, retain, settings, seed=0, phase="repair")  # type: ignore[arg-type]
    assert same_bytes(repaired.model.state_dict(), wanted.model.state_dict())


@pytest.mark.parametrize("kind", cases.KINDS)
def test_neg_grad_worsens_the_forgotten_items_and_the_repair_mends_the_others(kind: str) -> None:
    task, sets = cases.task(kind), cases.sets()
    values = {"epochs": 15, "optimiser": cases.optimiser(kind="sgd", learning_rate=0.2), "clip": 1.0}
    climbed, repaired = (unlearn(kind, repair=n, **values).model for n in (0, 10))
    assert task.error(climbed, sets.forget) > task.error(cases.original(kind), sets.forget) + 1
    assert task.error(repaired, sets.retain) < task.error(climbed, sets.retain) - 0.1


@pytest.mark.parametrize("save", [1, 2, 3])
def test_neg_grad_resumes_bit_for_bit(save: int, same_bytes: Same) -> None:
    run = functools.partial(unlearn, repair=2, optimiser=cases.optimiser())
    whole, again = run(), cases.resumed(run, save)
    assert same_bytes(again.model.state_dict(), whole.model.state_dict())
    assert (again.history, again.effort) == (whole.history, whole.effort)


def test_neg_grad_counts_its_effort() -> None:
    effort = unlearn(batch_size=4, epochs=3, repair=2).effort
    assert effort.steps == 3 * 2 + 2 * 10
    assert effort.forward == effort.backward == {"forget": 24, "retain": 80}


@pytest.mark.parametrize(("epochs", "what"), [(1, "a parameter"), (3, "the loss")])
def test_neg_grad_says_so_when_it_runs_away(epochs: int, what: str) -> None:
    # a decay that is subtracted from an ascent's step as from any other multiplies the weights
    optimiser = cases.optimiser(kind="sgd", learning_rate=1e20, weight_decay=1e20)
    with pytest.raises(NonFiniteError, match=what):
        unlearn("vectors", epochs=epochs, optimiser=optimiser)


@pytest.mark.parametrize(
    ("key", "value"),
    [("epochs", -1), ("repair", -1), ("clip", 0.0), ("batch_size", 0), ("optimiser", {"kind": "lbfgs"})],
)
def test_neg_grad_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        unlearn(**{key: value})

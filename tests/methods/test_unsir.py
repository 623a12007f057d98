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

from killing import KilledError, MemoryCheckpoint
from methods import class_cases as cases
from scforget import seeding
from scforget.class_training import ClassTrainingSettings, fit_classifier
from scforget.data.splits import ForgetSets
from scforget.errors import NonFiniteError
from scforget.methods.unsir import Noise, UnsirSettings, noise_loss, unsir
from scforget.training import Trained

Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
#: Noise for all three classes.
SETTINGS: dict[str, Any] = {
    "noise_items": 4, "noise_steps": 20, "noise_learning_rate": 0.1, "penalty": 0.01, "copies": 2,
    "impair": cases.recipe(epochs=1), "repair": cases.recipe(epochs=1),
}  # fmt: skip


def unlearn(
    kind: str = "images", seed: int = 0, checkpoint: Any = None, sets: ForgetSets | None = None, **changes: Any
) -> Trained:  # fmt: skip
    settings = UnsirSettings(**{**SETTINGS, **changes})
    task = cases.task(kind)
    return unsir(cases.original(kind), task, sets or cases.sets(), settings, seed=seed, checkpoint=checkpoint)


def learnt(kind: str, sets: ForgetSets | None = None, **changes: Any) -> dict[str, Tensor]:
    """The noise that a run has learnt, and the model at that point."""
    dying = MemoryCheckpoint(dies_at=1)
    with pytest.raises(KilledError):
        unlearn(kind, checkpoint=dying, sets=sets, **changes)
    assert dying.kept is not None
    return dying.kept[0]


def of_noise(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([value for name, value in tensors.items() if name.startswith("part/noise/")])


@pytest.mark.parametrize("kind", cases.KINDS)
def test_noise_loss_is_the_error_turned_round_and_the_mean_squared_norm(kind: str) -> None:
    model, task, labels = cases.original(kind), cases.task(kind), torch.tensor([0, 2, 1, 1, 0])
    inputs = torch.randn(5, *task.inputs.shape[1:], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(inputs)
        found = noise_loss(model, task, inputs, labels, 0.3)
    total = 0.0
    for row, label, one in zip(logits.double().tolist(), labels.tolist(), inputs.double(), strict=True):
        probability = np.exp(row[label]) / sum(np.exp(value) for value in row)
        total += np.log(probability) + 0.3 * sum(value**2 for value in one.ravel().tolist())
    assert float(found) == pytest.approx(total / 5, rel=1e-5)


def test_noise_starts_as_standard_normal_draws_for_each_class() -> None:
    noise = Noise(np.array([1, 4], dtype=np.int64), 3, (2, 5), torch.Generator().manual_seed(3))
    assert noise.labels.tolist() == [1, 1, 1, 4, 4, 4]
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(noise.inputs(), torch.cat([torch.randn(3, 2, 5, generator=generator) for _ in range(2)]))
    assert not noise.inputs().requires_grad
    assert all(part.requires_grad for part in noise.parameters())


@pytest.mark.parametrize("kind", cases.KINDS)
def test_unsir_learns_noise_that_the_unchanged_model_errs_on(kind: str, same_bytes: Same) -> None:
    found, model, task = learnt(kind), cases.original(kind), cases.task(kind)
    saved = {name.removeprefix("model/"): value for name, value in found.items() if name.startswith("model/")}
    assert same_bytes(saved, model.state_dict())
    start = Noise(np.arange(3), 4, task.inputs.shape[1:], seeding.torch_generator(0, "unsir noise"))
    learned = of_noise(found)
    with torch.no_grad():
        before, after = (cross_entropy(model(x), start.labels) for x in (start.inputs(), learned))
    assert after > 2 * before
    assert (learned != start.inputs()).flatten(1).any(1).all()


def test_unsir_noise_of_a_class_is_that_of_adam_written_out() -> None:
    model, task = cases.original("images"), cases.task("images")
    start = Noise(np.arange(3), 4, task.inputs.shape[1:], seeding.torch_generator(0, "unsir noise"))
    wanted = []
    for label, part in enumerate(start.items):
        inputs = part.detach().clone().requires_grad_()
        adam = torch.optim.Adam([inputs], lr=0.1)
        for _ in range(3):
            adam.zero_grad()
            error = cross_entropy(model(inputs), torch.full((4,), label))
            (0.01 * inputs.square().sum((1, 2, 3)).mean() - error).backward()
            adam.step()
        wanted.append(inputs.detach())
    torch.testing.assert_close(of_noise(learnt("images", noise_steps=3)), torch.cat(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_unsir_noise_is_the_smaller_the_larger_the_penalty(kind: str) -> None:
    free, bound = (of_noise(learnt(kind, penalty=penalty)).square().mean() for penalty in (0.0, 10.0))
    assert bound < 0.5 * free


def test_unsir_learns_noise_for_the_classes_of_the_forgotten_items_only() -> None:
    sets, labels = cases.sets(), cases.task("images").labels
    bees = ForgetSets(sets.forget[labels[sets.forget] == 1], sets.retain, sets.stop, sets.aside)
    assert of_noise(learnt("images", bees)).shape == (4, 1, 8, 8)
    assert unlearn(sets=bees).effort.forward["noise"] == 20 * 4 + 2 * 4


@pytest.mark.parametrize("kind", cases.KINDS)
def test_unsir_impairs_by_training_on_noise_and_retained_items(kind: str) -> None:
    """One batch of all of them, so that their order is nothing."""
    model, task, retain = cases.original(kind).train(), cases.task(kind, crop=0, noise=0.0), cases.sets().retain
    noise, batch = of_noise(learnt(kind)), task.batch(retain)
    order = torch.cat([torch.arange(40), 40 + torch.arange(12), 40 + torch.arange(12)])
    inputs, labels = torch.cat([batch.inputs, noise]), torch.cat([batch.labels, torch.arange(3).repeat_interleave(4)])
    loss = cross_entropy(model.eval()(inputs[order]), labels[order]).item()
    recipe = cases.recipe(epochs=1, batch_size=64, optimiser=cases.optimiser(kind="sgd", learning_rate=1e-30))
    settings = UnsirSettings(**{**SETTINGS, "impair": recipe, "repair": cases.recipe(epochs=0)})
    original = cases.original(kind)
    original.train = lambda _mode=True: original  # type: ignore[method-assign, assignment]
    unlearned = unsir(original, task, cases.sets(), settings, seed=0)
    assert unlearned.history[1]["train_loss"] == pytest.approx(loss, rel=1e-5)
    assert unlearned.effort.forward == {"noise": 3 * 4 * 20 + 24, "retain": 40}


@pytest.mark.parametrize("kind", cases.KINDS)
def test_unsir_impairs_every_class_and_repairs(kind: str) -> None:
    task, sets = cases.task(kind), cases.sets()
    models = [unlearn(kind, repair=cases.recipe(epochs=n), noise_items=16).model for n in (0, 10)]
    for cells in (sets.forget, sets.retain):
        before, impaired, repaired = (task.error(model, cells) for model in (cases.original(kind), *models))
        assert impaired > 1.3 * before
    assert repaired < impaired
    assert task.accuracy(models[1], sets.retain) > 0.9


def test_unsir_repairs_by_plain_training_on_the_retained_items(same_bytes: Same) -> None:
    impaired, repaired = (unlearn(repair=cases.recipe(epochs=n)) for n in (0, 2))
    task, settings = cases.task("images"), ClassTrainingSettings(**cases.recipe(epochs=2))
    wanted = fit_classifier(impaired.model, task, cases.sets().retain, settings, seed=0, phase="repair")  # type: ignore[arg-type]
    assert same_bytes(repaired.model.state_dict(), wanted.model.state_dict())


@pytest.mark.parametrize("kind", cases.KINDS)
def test_unsir_reads_nothing_of_the_forgotten_items_but_their_labels(kind: str, same_bytes: Same) -> None:
    task, spoilt, settings = cases.task(kind), cases.task(kind), UnsirSettings(**SETTINGS)
    spoilt.inputs = spoilt.inputs.copy()
    spoilt.inputs[np.setdiff1d(np.arange(72), cases.sets().retain)] = np.nan if kind == "vectors" else 255
    clean, other = (unsir(cases.original(kind), one, cases.sets(), settings, seed=0) for one in (task, spoilt))
    assert same_bytes(clean.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("kind", cases.KINDS)
def test_unsir_of_no_epoch_is_the_original_bit_for_bit(kind: str, same_bytes: Same) -> None:
    unlearned = unlearn(kind, impair=cases.recipe(epochs=0), repair=cases.recipe(epochs=0))
    assert same_bytes(unlearned.model.state_dict(), cases.original(kind).state_dict())
    assert (unlearned.effort.passes, unlearned.history) == (0, [])
    assert not unlearned.model.training


def test_unsir_leaves_the_model_trainable() -> None:
    model = unlearn().model
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("save", [1, 2, 3, 4])
def test_unsir_resumes_bit_for_bit_in_each_phase(save: int, same_bytes: Same) -> None:
    values = {"impair": cases.recipe(epochs=2, schedule="cosine"), "repair": cases.recipe(epochs=2)}
    run = functools.partial(unlearn, **values)
    whole, again = run(), cases.resumed(run, save)
    assert len(whole.history) == 5
    assert same_bytes(again.model.state_dict(), whole.model.state_dict())
    assert (again.history, again.effort) == (whole.history, whole.effort)


def test_unsir_counts_its_effort() -> None:
    effort = unlearn(copies=3, repair=cases.recipe(epochs=2)).effort
    # noise, 40 + 36 items in batches of 16, 40 in batches of 16
    assert effort.steps == 3 * 20 + 5 + 2 * 3
    assert effort.forward == effort.backward == {"noise": 3 * 4 * 20 + 36, "retain": 40 + 80}


def test_unsir_says_so_when_it_runs_away() -> None:
    with pytest.raises(NonFiniteError):
        unlearn("vectors", impair=cases.recipe(optimiser=cases.optimiser(kind="sgd", learning_rate=1e38)))


@pytest.mark.parametrize(
    ("key", "value"), [("noise_items", 0), ("noise_steps", -1), ("penalty", -1.0), ("copies", 0), ("impair", {})]
)
def test_unsir_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        unlearn(**{key: value})

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from torch import Tensor

from methods import class_cases as cases
from scforget import seeding
from scforget.class_tasks import ClassifierTask
from scforget.class_training import ClassTrainingSettings, fit_classifier
from scforget.methods.random_labels import RandomLabelsSettings, draw_labels, random_labels, relabelled
from scforget.training import Trained

Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]


def unlearn(
    kind: str = "images", seed: int = 0, checkpoint: Any = None, exclude_true: bool = True, **changes: Any
) -> Trained:  # fmt: skip
    settings = RandomLabelsSettings(**cases.recipe(**changes), exclude_true=exclude_true)
    task = cases.task(kind)
    return random_labels(cases.original(kind), task, cases.sets(), settings, seed=seed, checkpoint=checkpoint)


@pytest.mark.parametrize("exclude_true", [False, True])
def test_draw_labels_is_uniform_over_the_classes_that_may_be_drawn(exclude_true: bool) -> None:
    true = np.repeat(np.arange(4), 20_000).astype(np.int64)
    drawn = draw_labels(true, 4, np.random.default_rng(0), exclude_true=exclude_true)
    for label in range(4):
        counts = np.bincount(drawn[true == label], minlength=4)
        wanted = np.full(4, 1 / 4)
        if exclude_true:
            wanted = np.where(np.arange(4) == label, 0, 1 / 3)
            assert counts[label] == 0
        # five standard deviations of a binomial of 20,000
        assert (np.abs(counts - 20_000 * wanted) <= 5 * np.sqrt(20_000 * wanted * (1 - wanted))).all()


def test_draw_labels_of_two_classes_without_the_true_one_is_the_other() -> None:
    true = np.array([0, 1, 1, 0], dtype=np.int64)
    assert draw_labels(true, 2, np.random.default_rng(0), exclude_true=True).tolist() == [1, 0, 0, 1]
    assert draw_labels(true[:0], 2, np.random.default_rng(0), exclude_true=True).tolist() == []


@pytest.mark.parametrize("weights", [None, np.array([0.5, 1.0, 2.5])])
def test_relabelled_changes_the_labels_of_the_given_items_only(weights: Any) -> None:
    task, forget = cases.task("images", weights=weights), cases.sets().forget
    kept = task.labels.copy()
    task.batch(forget)  # puts the labels on the device, which the other must not take over
    other = relabelled(task, forget, (task.labels[forget] + 1) % 3)
    rest = np.setdiff1d(np.arange(72), forget)
    assert task.labels.tolist() == kept.tolist()
    assert other.batch(forget).labels.tolist() == ((kept[forget] + 1) % 3).tolist()
    assert other.batch(rest).labels.tolist() == kept[rest].tolist()
    assert other.inputs is task.inputs
    assert (other.settings, other.augmentation, other.classes) == (task.settings, task.augmentation, task.classes)
    if weights is None:
        assert other.weights is None
    else:
        assert other.weights is not None
        assert other.weights.tolist() == weights.tolist()


@pytest.mark.parametrize("kind", cases.KINDS)
def test_random_labels_is_training_on_all_items_under_labels_drawn_once(kind: str, same_bytes: Same) -> None:
    task, sets = cases.task(kind), cases.sets()
    labels = task.labels.copy()
    rng = seeding.numpy_generator(7, "random labels")
    for item in sets.forget:
        labels[item] = (labels[item] + rng.integers(1, 3)) % 3
    wrong = ClassifierTask(task.inputs, labels, task.classes, task.settings, task.augmentation)
    train = np.sort(np.concatenate([sets.forget, sets.retain]))
    wanted = fit_classifier(cases.original(kind), wrong, train, ClassTrainingSettings(**cases.recipe()), seed=7)
    unlearned = unlearn(kind, seed=7)
    assert same_bytes(unlearned.model.state_dict(), wanted.model.state_dict())
    assert unlearned.facts == {"labels_kept": 0.0}


def test_random_labels_says_how_many_labels_stayed_true() -> None:
    labels, forget = cases.task("vectors").labels, cases.sets().forget
    found = [unlearn("vectors", seed=seed, exclude_true=False, epochs=0).facts["labels_kept"] for seed in range(20)]
    for seed, share in enumerate(found):
        drawn = seeding.numpy_generator(seed, "random labels").integers(3, size=8)
        assert share == sum(a == b for a, b in zip(drawn, labels[forget], strict=True)) / 8
    assert len(set(found)) > 2


@pytest.mark.parametrize("kind", cases.KINDS)
def test_random_labels_makes_the_model_unsure_of_the_forgotten_items(kind: str) -> None:
    task, sets = cases.task(kind), cases.sets()
    models = cases.original(kind), unlearn(kind, epochs=10).model
    before, after = (task.signals(model, sets.forget).confidence.mean() for model in models)
    assert after < before - 1
    assert task.accuracy(models[1], sets.retain) > 0.9


@pytest.mark.parametrize("kind", cases.KINDS)
def test_random_labels_of_no_epoch_is_the_original_bit_for_bit(kind: str, same_bytes: Same) -> None:
    unlearned = unlearn(kind, epochs=0)
    assert same_bytes(unlearned.model.state_dict(), cases.original(kind).state_dict())
    assert (unlearned.effort.passes, unlearned.history) == (0, [])
    assert not unlearned.model.training


def test_random_labels_resumes_bit_for_bit(same_bytes: Same) -> None:
    run = functools.partial(unlearn, exclude_true=False, epochs=3)
    whole, again = run(), cases.resumed(run, 1)
    assert same_bytes(again.model.state_dict(), whole.model.state_dict())
    assert (again.history, again.effort, again.facts) == (whole.history, whole.effort, whole.facts)


def test_random_labels_counts_its_effort() -> None:
    effort = unlearn(epochs=2).effort
    assert effort.steps == 2 * 3
    assert effort.forward == effort.backward == {"forget": 16, "retain": 80}


@pytest.mark.parametrize(("key", "value"), [("epochs", -1), ("batch_size", 0), ("exclude_true", 1)])
def test_random_labels_settings_refuse_what_is_out_of_range(key: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=key):
        unlearn(**{key: value})

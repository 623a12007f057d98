"""Random labels: teach the forgotten items wrongly, among the others that are taught rightly."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from scforget import seeding
from scforget.arrays import IntArray
from scforget.class_tasks import ClassifierTask
from scforget.class_training import ClassTrainingSettings, fit_classifier
from scforget.data.splits import ForgetSets
from scforget.models.classifiers import Classifier
from scforget.search import Choice, Range
from scforget.training import Checkpoint, Trained


class RandomLabelsSettings(ClassTrainingSettings):
    """The training recipe on all items; ``epochs: 0`` returns the original bit for bit.

    Attributes
    ----------
    exclude_true
        Draw among the other C − 1 classes. Otherwise among all C, so that one label in C stays right (the UnGAN paper
        says no more than "random").

    Ranges: from one epoch to twice the ten of UnGAN's comparison.
    """

    epochs: Annotated[int, Field(ge=0), Range(1, 20, log=True)]
    exclude_true: Annotated[bool, Choice(False, True)]


def draw_labels(labels: IntArray, classes: int, rng: np.random.Generator, *, exclude_true: bool) -> IntArray:
    """Draw a class for each item, uniformly.

    Parameters
    ----------
    labels : ``[N]``
        True classes, 0 to C − 1.
    classes
        C; at least 2.
    exclude_true
        Whether the true class is left out.

    Returns
    -------
    ``[N]``
        Drawn classes.
    """
    if exclude_true:
        return (labels + rng.integers(1, classes, size=len(labels))) % classes
    return rng.integers(classes, size=len(labels))


def relabelled(task: ClassifierTask, cells: IntArray, labels: IntArray) -> ClassifierTask:
    """Return a task that differs in the labels of some items, ``[N]`` each."""
    changed = task.labels.copy()
    changed[cells] = labels
    weights = None if task.weights is None else task.weights.double().numpy()
    return ClassifierTask(
        task.inputs, changed, task.classes, task.settings, task.augmentation, weights, task.donors
    )  # fmt: skip


def random_labels(
    model: Classifier, task: ClassifierTask, sets: ForgetSets, settings: RandomLabelsSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Train on all items from the original's parameters, the forgotten ones under labels drawn once.

    Returns
    -------
    Trained
        With the share of forgotten items whose drawn label is the true one, ``labels_kept``, among its facts.

    Raises
    ------
    NonFiniteError
        If a loss is NaN or infinite.

    Notes
    -----
    The baseline of Graves et al. 2021 as the UnGAN paper has it: θ ← argmin L_D(θ) from θ0, with y ~ U on F. Under the
    task's class weights a forgotten item weighs what its drawn class weighs.
    """
    true = task.labels[sets.forget]
    rng = seeding.numpy_generator(seed, "random labels")
    labels = draw_labels(true, len(task.classes), rng, exclude_true=settings.exclude_true)
    wrong, train = relabelled(task, sets.forget, labels), np.union1d(sets.forget, sets.retain)
    trained = fit_classifier(model, wrong, train, settings, seed=seed, checkpoint=checkpoint, cell_set="train")
    # counted as one set on the way: an epoch passes each item once
    share = trained.effort.forward.pop("train", 0) // len(train)
    trained.effort.backward.pop("train", None)
    for name, cells in (("forget", sets.forget), ("retain", sets.retain)):
        if share:
            trained.effort.count(name, share * len(cells))
    trained.facts = {"labels_kept": float((labels == true).mean())}
    return trained

"""Bad teaching by a net of the retained items, on forgotten items and the retained ones that are most like them."""

from __future__ import annotations

import copy
from itertools import zip_longest
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch.optim import Optimizer

from scforget import seeding
from scforget.arrays import FloatArray, IntArray
from scforget.class_tasks import ClassifierTask
from scforget.class_training import (
    ClassTrainingSettings,
    OptimiserSettings,
    class_batches,
    class_epoch,
    class_rates,
    new_optimiser,
)
from scforget.data.splits import ForgetSets
from scforget.errors import EmptyGroupError, NonFiniteError
from scforget.models.classifiers import Classifier
from scforget.search import Range
from scforget.settings import Settings
from scforget.training import Checkpoint, Effort, Epoch, Loop, Part, Trained, descend


class SimilarityTeacherSettings(Settings):
    """Settings of similarity-sampled teachers.

    Attributes
    ----------
    training
        How the bad teacher is trained on the retained items, from scratch.
    neighbours
        Retained items that serve each forgotten one, nearest in the original's features.
    optimiser
        Of the student.
    epochs
        Passes over forgotten and serving items; 0 returns the original bit for bit.
    batch_size
        Items a step, all forgotten or all retained.

    Ranges: the neighbours about the 3 retained items an item that the Kaggle report draws at random; up to three times
    its 5 epochs.
    """

    training: ClassTrainingSettings
    neighbours: Annotated[int, Field(gt=0), Range(1, 10)]
    optimiser: OptimiserSettings
    epochs: Annotated[int, Field(ge=0), Range(1, 15)]
    batch_size: Annotated[int, Field(gt=0)]


def serving(forget: FloatArray, retain: FloatArray, neighbours: int) -> IntArray:
    """For each retained item the number of forgotten ones that it is among the nearest of, ``[R]``, >= 0.

    Parameters
    ----------
    forget, retain : ``[F, ·]``, ``[R, ·]``
        Features.
    neighbours : k >= 1
        Retained items of each forgotten one, by Euclidean distance.

    Raises
    ------
    EmptyGroupError
        If there are fewer retained items than neighbours, or none to forget.
    """
    from sklearn.neighbors import NearestNeighbors

    if not len(forget):
        raise EmptyGroupError("items for the similarity teacher", "none to forget", "at least one")
    if len(retain) < neighbours:
        raise EmptyGroupError("retained neighbours", f"{len(retain)} retained items", f"at least {neighbours}")
    index = NearestNeighbors(n_neighbors=neighbours).fit(retain).kneighbors(forget, return_distance=False)
    return np.bincount(index.ravel(), minlength=len(retain))


def _neighbours(
    model: Classifier, task: ClassifierTask, sets: ForgetSets, neighbours: int
) -> tuple[IntArray, FloatArray]:
    """Retained items that serve forgotten ones, and how much each counts: in proportion to how many, 1 in the mean."""
    forget, retain = (task.signals(model, items).latent for items in (sets.forget, sets.retain))
    for features in (forget, retain):
        if not np.isfinite(features).all():
            raise NonFiniteError(0, "a feature of the original")
    counts = serving(forget, retain, neighbours)
    chosen = counts > 0
    return sets.retain[chosen], counts[chosen] / counts[chosen].mean()


def _epoch(  # noqa: PLR0917
    student: Classifier, good: Classifier, bad: Classifier, task: ClassifierTask, forget: IntArray, retained: IntArray,
    weights: FloatArray, batch_size: int, optimiser: Optimizer, noise: torch.Generator, effort: Effort,
) -> Epoch:  # fmt: skip
    """Alternate batches of forgotten items with batches of retained ones, a pass over each; return mean divergences."""
    student.train()
    weight = dict(zip(retained.tolist(), weights.tolist(), strict=True))
    row = {"forget_divergence": 0.0, "retain_divergence": 0.0}
    turns = zip_longest(class_batches(forget, batch_size, noise), class_batches(retained, batch_size, noise))
    for turn in turns:
        for name, part, teacher in zip(("forget", "retain"), turn, (bad, good), strict=True):
            if part is None:
                continue
            divergence = task.divergence(student, teacher, task.batch(part, noise)).total
            if name == "retain":
                divergence = divergence * torch.tensor([weight[item] for item in part.tolist()]).to(divergence)
            descend(optimiser, divergence.mean(), effort)
            effort.count(name, len(part), forward=2)  # the teacher's pass and the student's
            items = len(forget) if name == "forget" else len(retained)
            row[f"{name}_divergence"] += float(divergence.detach().double().sum()) / items
    return row


def similarity_teacher(
    model: Classifier, task: ClassifierTask, sets: ForgetSets, settings: SimilarityTeacherSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Train a net on the retained items, and teach the original what that net says of the forgotten ones.

    Returns
    -------
    Trained
        History: epochs of the bad teacher's training, then ``forget_divergence`` from it and the weighted
        ``retain_divergence`` from the original, mean nats per item on the way. Facts: ``retained_items`` that serve,
        and ``most_served``, the largest number of forgotten items that one of them serves over the mean.

    Raises
    ------
    EmptyGroupError
        If there is no item to forget, or fewer retained ones than neighbours.
    NonFiniteError
        If a loss, a divergence or a feature is NaN or infinite.

    Notes
    -----
    Suprun (2023), §6.1.1, after the Kaggle competition's 12th public place: batches take turns between
    KL(T_bad ‖ S) on forgotten items and w·KL(T_good ‖ S) on the retained items that are nearest to them, w
    proportional to how many each serves; the longer of the two passes goes on alone. The bad teacher is trained from
    scratch and long enough it is a retrained model, so that this method then costs more than retraining does.
    Teachers are in eval mode and see the student's view of an item.
    """
    if not settings.epochs:
        return Trained(model.eval())
    good, bad = copy.deepcopy(model).eval(), task.new_model(seeding.derive(seed, "similarity teacher"))
    retained, weights = _neighbours(good, task, sets, settings.neighbours)
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    effort, training = loop.effort, settings.training
    if not loop.history:  # a resumed run has counted it
        effort.count("forget", len(sets.forget), backward=0)
        effort.count("retain", len(sets.retain), backward=0)

    def teacher_epoch(number: int, noise: torch.Generator) -> Epoch:
        rates = class_rates(training, len(sets.retain), number)
        return class_epoch(bad, task, sets.retain, training.batch_size, trainer, noise, effort, rates=rates)

    trainer = new_optimiser(bad.parameters(), training.optimiser)
    parts: dict[str, Part] = {"teacher": bad, "trainer": trainer}
    loop.run("teacher", teacher_epoch, training.epochs, parts=parts)
    bad.eval()

    def epoch(_number: int, noise: torch.Generator) -> Epoch:
        return _epoch(
            model, good, bad, task, sets.forget, retained, weights, settings.batch_size, optimiser, noise, effort
        )  # fmt: skip

    optimiser = new_optimiser(model.parameters(), settings.optimiser)
    loop.run("unlearn", epoch, settings.epochs, parts={"teacher": bad, "optimiser": optimiser})
    facts: dict[str, float | str] = {"retained_items": float(len(retained)), "most_served": float(weights.max())}
    return Trained(model, loop.history, effort, facts)

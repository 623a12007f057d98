"""Bad teaching: the model is taught forgotten items by an untrained net, and some retained ones by the original."""

from __future__ import annotations

import copy
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from scforget import engine, seeding
from scforget.arrays import IntArray
from scforget.class_tasks import ClassBatch, ClassifierTask, class_kl
from scforget.class_training import OptimiserSettings, class_batches, new_optimiser
from scforget.data.splits import ForgetSets
from scforget.errors import EmptyGroupError
from scforget.models.classifiers import Classifier
from scforget.search import Range
from scforget.settings import Settings
from scforget.training import Checkpoint, Effort, Epoch, Loop, Trained, descend


class BadTeacherSettings(Settings):
    """Settings of bad teaching.

    Attributes
    ----------
    optimiser
        Of the student.
    retain_scale
        Retained items for each forgotten one; all of them where there are no more.
    epochs
        Passes over both; 0 returns the original bit for bit.
    batch_size
        Items a step, forgotten and retained ones mixed.

    Ranges: from as many retained items as forgotten ones to ten times as many, about the 3 of the Kaggle report; up to
    three times its 5 epochs.
    """

    optimiser: OptimiserSettings
    retain_scale: Annotated[float, Field(ge=0), Range(1.0, 10.0, log=True)]
    epochs: Annotated[int, Field(ge=0), Range(1, 15)]
    batch_size: Annotated[int, Field(gt=0)]


def taught(student: nn.Module, good: nn.Module, bad: nn.Module, batch: ClassBatch, forgotten: Tensor) -> Tensor:
    """How far the student is from the teacher of each item, ``[B]`` nats; differentiable in the student.

    Parameters
    ----------
    good, bad
        Teachers, of retained items and of forgotten ones.
    forgotten : ``[B]`` bool
        The unlearning label l.

    Notes
    -----
    (1 − l)·KL(T_good ‖ S) + l·KL(T_bad ‖ S), at temperature 1 (Chundawat et al. 2023).
    """
    with torch.no_grad():
        wanted = torch.where(forgotten[:, None], bad(batch.inputs).float(), good(batch.inputs).float())
    return class_kl(wanted, student(batch.inputs).float())


def retained_sample(sets: ForgetSets, retain_scale: float, seed: int) -> IntArray:
    """Draw ``retain_scale`` retained items for each forgotten one, without replacement; all if there are no more."""
    size = min(round(retain_scale * len(sets.forget)), len(sets.retain))
    rng = seeding.numpy_generator(seed, "bad teacher", "retained")
    return np.sort(rng.choice(sets.retain, size, replace=False))


def _epoch(  # noqa: PLR0917
    student: Classifier, good: Classifier, bad: Classifier, task: ClassifierTask, sets: ForgetSets, retained: IntArray,
    batch_size: int, optimiser: Optimizer, noise: torch.Generator, effort: Effort,
) -> Epoch:  # fmt: skip
    """Make one pass over forgotten and sampled retained items, mixed; return mean divergences on the way."""
    student.train()
    items, sums = np.concatenate([sets.forget, retained]), np.zeros(2)
    for part in class_batches(items, batch_size, noise):
        is_forgotten = np.isin(part, sets.forget)
        forgotten, batch = torch.from_numpy(is_forgotten).to(engine.device()), task.batch(part, noise)
        divergence = taught(student, good, bad, batch, forgotten)
        descend(optimiser, divergence.mean(), effort)
        for name, chosen in (("forget", is_forgotten), ("retain", ~is_forgotten)):
            if chosen.any():
                effort.count(name, int(chosen.sum()), forward=3)  # both teachers see the whole batch
        found = divergence.detach().double().cpu().numpy()
        sums += found[is_forgotten].sum(), found[~is_forgotten].sum()
    row = {"forget_divergence": sums[0] / len(sets.forget)}
    return row | ({"retain_divergence": sums[1] / len(retained)} if len(retained) else {})


def bad_teacher(
    model: Classifier, task: ClassifierTask, sets: ForgetSets, settings: BadTeacherSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Teach the original what a randomly initialised net says of forgotten items, and what it said itself of others.

    Returns
    -------
    Trained
        History: ``forget_divergence`` from the bad teacher and ``retain_divergence`` from the good one, mean nats per
        item on the way. Facts: ``retained_items``.

    Raises
    ------
    EmptyGroupError
        If there is no item to forget.
    NonFiniteError
        If a divergence is NaN or infinite.

    Notes
    -----
    Chundawat et al. 2023; see :func:`taught`. As in their experiments the retained items are drawn once, and batches
    mix both kinds. Teachers are in eval mode and see the student's view of an item.
    """
    if not len(sets.forget):
        raise EmptyGroupError("items for the bad teacher", "none to forget", "at least one")
    if not settings.epochs:
        return Trained(model.eval())
    good, bad = copy.deepcopy(model).eval(), task.new_model(seeding.derive(seed, "bad teacher")).eval()
    retained = retained_sample(sets, settings.retain_scale, seed)
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    optimiser = new_optimiser(model.parameters(), settings.optimiser)

    def epoch(_number: int, noise: torch.Generator) -> Epoch:
        return _epoch(
            model, good, bad, task, sets, retained, settings.batch_size, optimiser, noise, loop.effort
        )  # fmt: skip

    loop.run("bad teacher", epoch, settings.epochs, parts={"optimiser": optimiser})
    return Trained(model, loop.history, loop.effort, {"retained_items": float(len(retained))})

"""Negative gradient: climb the cross-entropy of the forgotten items, then perhaps repair on the retained ones."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from scforget import engine
from scforget.class_tasks import ClassifierTask
from scforget.class_training import (
    ClassTrainingSettings,
    OptimiserSettings,
    class_batches,
    fit_classifier,
    new_optimiser,
)
from scforget.curvature import require_finite
from scforget.data.splits import ForgetSets
from scforget.models.classifiers import Classifier
from scforget.search import Range
from scforget.settings import Settings
from scforget.training import Checkpoint, Epoch, Loop, Trained, descend


class NegGradSettings(Settings):
    """Settings of the negative gradient.

    Attributes
    ----------
    optimiser
        Of the ascent, and afresh of the repair.
    batch_size
        Items a step.
    epochs
        Passes over the forgotten items.
    clip
        Largest L2 norm of an ascent step's gradient; null leaves it.
    repair
        Passes over the retained items that follow. With 0 epochs and 0 passes the original comes back bit for bit.

    Ranges: to twice the ten epochs of UnGAN's comparison, and from no repair to five times its one.
    """

    optimiser: OptimiserSettings
    batch_size: Annotated[int, Field(gt=0)]
    epochs: Annotated[int, Field(ge=0), Range(1, 20, log=True)]
    clip: Annotated[float, Field(gt=0)] | None
    repair: Annotated[int, Field(ge=0), Range(0, 5)]


def neg_grad(
    model: Classifier, task: ClassifierTask, sets: ForgetSets, settings: NegGradSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Maximise the cross-entropy of the forgotten items, then minimise that of the retained ones.

    Raises
    ------
    NonFiniteError
        If a loss or a parameter is NaN or infinite: the cross-entropy has no upper bound, and nothing but the rate, the
        epochs and the clip says when to stop.

    Notes
    -----
    θ ← argmax L_F(θ) from θ0, then argmin L_R(θ) (Choi and Na 2023; the "neg grads" of the UnGAN paper, whose released
    code has the repair).
    """
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    optimiser, effort = new_optimiser(model.parameters(), settings.optimiser), loop.effort

    def epoch(_number: int, noise: torch.Generator) -> Epoch:
        model.train()
        total = 0.0
        for part in class_batches(sets.forget, settings.batch_size, noise):
            with engine.autocast():
                loss = task.loss(model, task.batch(part, noise)).total
            descend(optimiser, -loss.mean(), effort, clip=settings.clip)
            effort.count("forget", len(part))
            total += float(loss.detach().double().sum())
        return {"forget_loss": total / len(sets.forget)}

    loop.run("ascent", epoch, settings.epochs, parts={"optimiser": optimiser})
    repair = ClassTrainingSettings(
        optimiser=settings.optimiser, schedule="constant", batch_size=settings.batch_size, epochs=settings.repair
    )
    trained = fit_classifier(model, task, sets.retain, repair, seed=seed, loop=loop, phase="repair")
    require_finite(model.parameters(), effort.steps, "a parameter")
    return trained

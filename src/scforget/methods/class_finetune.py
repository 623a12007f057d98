"""Retain-only fine-tuning of a classifier: go on training on the items that stay, and hope that the others fade."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from scforget.class_tasks import ClassifierTask
from scforget.class_training import ClassTrainingSettings, fit_classifier
from scforget.data.splits import ForgetSets
from scforget.models.classifiers import Classifier
from scforget.search import Range
from scforget.training import Checkpoint, Trained


class ClassFinetuneSettings(ClassTrainingSettings):
    """The training recipe of the fine-tuning; ``epochs: 0`` returns the original bit for bit.

    Ranges: from the Kaggle report's one epoch to twice the ten of UnGAN's comparison.
    """

    epochs: Annotated[int, Field(ge=0), Range(1, 20, log=True)]


def class_finetune(
    model: Classifier, task: ClassifierTask, sets: ForgetSets, settings: ClassFinetuneSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Minimise the cross-entropy of the retained items from the original's parameters.

    Raises
    ------
    NonFiniteError
        If a loss is NaN or infinite.

    Notes
    -----
    θ ← argmin L_R(θ) from θ0; the forgotten items are never read. BatchNorm's running statistics become those of R.
    """
    return fit_classifier(model, task, sets.retain, settings, seed=seed, checkpoint=checkpoint)

"""Retain-only fine-tuning: go on training on the cells that stay, and hope that the others fade."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from scforget.class_tasks import ClassifierTask
from scforget.class_training import ClassTrainingSettings, fit_classifier
from scforget.data.splits import ForgetSets
from scforget.models.classifiers import Classifier
from scforget.models.vae import VAE
from scforget.search import Range
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Trained, TrainingSettings, fit


class RetainFinetuneSettings(TrainingSettings):
    """The training recipe of the fine-tuning; ``max_epochs: 0`` returns the original bit for bit.

    Ranges: the rate from a tenth of the single-cell paper's 1e-4, which forgets next to nothing
    (``docs/results/frontier.md``), to three times what training takes; the epochs to past its 50.
    """

    learning_rate: Annotated[float, Field(gt=0), Range(1e-5, 3e-3, log=True)]
    max_epochs: Annotated[int, Field(ge=0), Range(5, 60, log=True)]


def retain_finetune(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: RetainFinetuneSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Minimise the loss on the retained cells from the original's parameters.

    Notes
    -----
    θ ← argmin L_R(θ) from θ0, early-stopped on ``stop``; the forgotten cells are never touched.
    """
    return fit(model, task, sets.retain, sets.stop, settings, seed=seed, checkpoint=checkpoint)


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

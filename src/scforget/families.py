"""The two families of models that go through the same stages: VAEs of cells, and classifiers of cells or images.

A family knows where its data lie, which settings are its own, and how one of its models is trained and read. Stages
ask it, and are written once. Its stages are named alike but for a suffix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from scforget import artifacts, loading
from scforget.arrays import IntArray
from scforget.artifacts import Workspace
from scforget.audit import BaseAuditSettings
from scforget.class_tasks import ClassifierTask
from scforget.class_training import ClassTrainingSettings, fit_classifier
from scforget.data.splits import CellSets, Scenario, ScenarioSettings, whose
from scforget.methods import CLASSIFIER_METHODS, METHODS, Method
from scforget.models.classifiers import Classifier
from scforget.schema import ClassifierSettings, Params, PlanSettings
from scforget.shadows import fit_together
from scforget.training import Checkpoint, Trained, fit

#: The stage that reads, deals and keeps a classifier's items.
ITEMS = "prepare_classifier"


@dataclass(frozen=True)
class Group:
    """How classifiers are trained side by side: ``size`` of them, by one recipe."""

    size: int
    settings: ClassTrainingSettings

    def fit(
        self, task: ClassifierTask, cells: Sequence[IntArray], *,
        seeds: Sequence[int], checkpoint: Checkpoint, cell_set: str,
    ) -> list[Trained]:  # fmt: skip
        """Train new models, each on its own cells."""
        models = [task.new_model(seed) for seed in seeds]
        return fit_together(models, task, cells, self.settings, seeds=seeds, checkpoint=checkpoint, cell_set=cell_set)


class Family(ABC):
    """What a stage asks.

    Attributes
    ----------
    suffix
        Of its stages' names, and so of its folders.
    primary
        Name of the score that the audit's primary statistics rest on.
    methods
        Registry of its unlearning methods.
    methods_key, settings_key
        Where params.yaml lists the methods to run, and where it has their settings.
    """

    suffix: str
    primary: str
    methods: Mapping[str, Method]
    methods_key: str
    settings_key: str

    def stage(self, name: str) -> str:
        """Name of one of the family's stages."""
        return f"{name}{self.suffix}"

    def train_folder(self, workspace: Workspace, dataset: str) -> Path:
        """Where its originals lie."""
        return workspace.work(self.stage("train"), dataset)

    @abstractmethod
    def plan(self, params: Params) -> PlanSettings:
        """What the pipeline runs."""

    @abstractmethod
    def requests(self, params: Params, dataset: str) -> Mapping[str, ScenarioSettings]:
        """Forget requests of a data set."""

    @abstractmethod
    def seeds(self, params: Params, stage: str) -> Sequence[int]:
        """Seeds of the originals (``train``) or of the retrains (``retrain``)."""

    @abstractmethod
    def settings(self, params: Params, method: str) -> Any:
        """Settings of an unlearning method."""

    @abstractmethod
    def audit(self, params: Params) -> BaseAuditSettings:
        """Settings of the audit."""

    @abstractmethod
    def task(self, workspace: Workspace, params: Params, dataset: str) -> Any:
        """Read what models of a data set are asked about."""

    @abstractmethod
    def sets(self, workspace: Workspace, dataset: str) -> CellSets:
        """Read how a data set was dealt."""

    @abstractmethod
    def scenario(self, workspace: Workspace, dataset: str, scenario: str) -> Scenario:
        """Read a forget request."""

    @abstractmethod
    def original(self, task: Any, path: Path) -> nn.Module:
        """Read the model that a method starts from."""

    @abstractmethod
    def model(self, task: Any, path: Path) -> nn.Module:
        """Read any model of the family."""

    @abstractmethod
    def fit(
        self, params: Params, dataset: str, task: Any, cells: IntArray, stop: IntArray, *,
        seed: int, checkpoint: Checkpoint, cell_set: str,
    ) -> Trained:  # fmt: skip
        """Train a new model by the data set's recipe."""

    def owners(self, params: Params, dataset: str, task: Any, cells: IntArray) -> IntArray:  # noqa: ARG002
        """``[n]``: equal numbers for those of the cells that were dealt together."""
        return cells

    def group(self, params: Params, dataset: str) -> Group | None:  # noqa: ARG002
        """How its shadow models are trained side by side; none: one by one."""
        return None


class _Vaes(Family):
    suffix, primary, methods = "", "elbo", METHODS
    methods_key, settings_key = "pipeline.methods", "unlearn"

    def plan(self, params: Params) -> PlanSettings:
        return params.pipeline

    def requests(self, params: Params, dataset: str) -> Mapping[str, ScenarioSettings]:
        return params.datasets[dataset].scenarios

    def seeds(self, params: Params, stage: str) -> Sequence[int]:
        return (params.train if stage == "train" else params.retrain).seeds

    def settings(self, params: Params, method: str) -> Any:
        return getattr(params.unlearn, method)

    def audit(self, params: Params) -> BaseAuditSettings:
        return params.audit

    def task(self, workspace: Workspace, params: Params, dataset: str) -> Any:
        return loading.load_task(workspace, params.datasets[dataset].model, dataset)

    def sets(self, workspace: Workspace, dataset: str) -> CellSets:
        return loading.load_sets(workspace, dataset)

    def scenario(self, workspace: Workspace, dataset: str, scenario: str) -> Scenario:
        return loading.load_scenario(workspace, dataset, scenario)

    def original(self, task: Any, path: Path) -> nn.Module:
        return loading.load_original(task, path)

    def model(self, task: Any, path: Path) -> nn.Module:
        return loading.load_model(task, path)

    def fit(
        self, params: Params, dataset: str, task: Any, cells: IntArray, stop: IntArray, *,
        seed: int, checkpoint: Checkpoint, cell_set: str,
    ) -> Trained:  # fmt: skip
        recipe = params.datasets[dataset].training
        return fit(task.new_model(seed), task, cells, stop, recipe, seed=seed, checkpoint=checkpoint, cell_set=cell_set)


def _load_classifier(task: ClassifierTask, path: Path) -> Classifier:
    """Read a classifier of the task's architecture, in eval mode."""
    model = task.new_model(0)
    loading.fill(model, artifacts.read_tensors(path)[0], path)
    return model


def _load_items(workspace: Workspace, settings: ClassifierSettings, dataset: str) -> ClassifierTask:
    """Read the labelled items of a data set."""
    items = artifacts.read_arrays(workspace.work(ITEMS, dataset) / "items.npz")
    labels = items["labels"].astype(np.int64)
    weights = None
    if settings.class_weights == "balanced":
        counts = np.bincount(labels, minlength=len(items["classes"]))
        # of all items, not of the members alone; their mean over items is 1
        weights = len(labels) / (len(counts) * counts)
    donors = items["donors"] if (items["donors"] != "").any() else None
    return ClassifierTask(
        items["inputs"], labels, items["classes"].tolist(), settings.model, settings.augmentation, weights, donors
    )


class _Classifiers(Family):
    suffix, primary, methods = "_classifier", "confidence", CLASSIFIER_METHODS
    methods_key, settings_key = "pipeline.classifiers.methods", "unlearn_classifier"

    def plan(self, params: Params) -> PlanSettings:
        return params.pipeline.classifiers

    def requests(self, params: Params, dataset: str) -> Mapping[str, ScenarioSettings]:
        return params.classifiers[dataset].scenarios

    def seeds(self, params: Params, stage: str) -> Sequence[int]:
        return (params.train_classifier if stage == "train" else params.retrain_classifier).seeds

    def settings(self, params: Params, method: str) -> Any:
        return getattr(params.unlearn_classifier, method)

    def audit(self, params: Params) -> BaseAuditSettings:
        return params.audit_classifier

    def task(self, workspace: Workspace, params: Params, dataset: str) -> Any:
        return _load_items(workspace, params.classifiers[dataset], dataset)

    def sets(self, workspace: Workspace, dataset: str) -> CellSets:
        return loading.load_sets(workspace, dataset, ITEMS)

    def scenario(self, workspace: Workspace, dataset: str, scenario: str) -> Scenario:
        return loading.load_scenario(workspace, dataset, scenario, ITEMS)

    def original(self, task: Any, path: Path) -> nn.Module:
        return _load_classifier(task, path)

    def model(self, task: Any, path: Path) -> nn.Module:
        return _load_classifier(task, path)

    def fit(
        self, params: Params, dataset: str, task: Any, cells: IntArray, stop: IntArray, *,  # noqa: ARG002
        seed: int, checkpoint: Checkpoint, cell_set: str,
    ) -> Trained:  # fmt: skip
        recipe = params.classifiers[dataset].training
        return fit_classifier(
            task.new_model(seed), task, cells, recipe, seed=seed, checkpoint=checkpoint, cell_set=cell_set
        )

    def owners(self, params: Params, dataset: str, task: ClassifierTask, cells: IntArray) -> IntArray:
        by_identity = params.classifiers[dataset].split.by_identity
        return whose(task.donors)[cells] if by_identity and task.donors is not None else cells

    def group(self, params: Params, dataset: str) -> Group | None:
        settings = params.classifiers[dataset]
        return Group(settings.together, settings.training)


VAES: Family = _Vaes()
CLASSIFIERS: Family = _Classifiers()


def of(stage: str) -> Family:
    """Whose stage it is, by its name."""
    return CLASSIFIERS if stage.endswith(CLASSIFIERS.suffix) else VAES

"""The shape of ``params.yaml``, assembled from the settings classes of the rooms below."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, create_model, field_validator, model_validator

from scforget import config
from scforget.audit import AuditSettings, ClassAuditSettings
from scforget.class_tasks import AugmentationSettings
from scforget.class_training import ClassTrainingSettings
from scforget.data.class_splits import ClassSplitSettings
from scforget.data.items import ItemsSettings
from scforget.data.prepare import PrepareSettings
from scforget.data.splits import ScenarioSettings, SplitSettings, check_siblings
from scforget.engine import ComputeSettings
from scforget.methods import CLASSIFIER_METHODS, METHODS
from scforget.models.classifiers import MLPSettings, NetSettings
from scforget.models.vae import VAESettings
from scforget.search import SearchSettings
from scforget.settings import Settings
from scforget.theory.ablations import GridSettings
from scforget.theory.curves import CurveSettings
from scforget.theory.factorisation import FactorisationSettings
from scforget.theory.nets import NetsSettings
from scforget.theory.overlap import OverlapSettings
from scforget.theory.propositions import PropositionSettings
from scforget.theory.sizes import SizeSettings
from scforget.theory.worlds import WorldsSettings
from scforget.training import TrainingSettings

NAME = r"^[A-Za-z0-9_]+$"  # names become parts of stage names (no dash), paths, dotted keys and MLflow keys
Name = Annotated[str, Field(pattern=NAME)]
Names = Annotated[list[Name], Field(min_length=1)]


class PlanSettings(Settings):
    """What ``dvc repro`` runs of one family of models: the full product of these lists."""

    datasets: Names
    scenarios: Names
    shadow_blocks: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    methods: Names


class ClassifierPlanSettings(PlanSettings):
    """The same of classifiers; no data set, no classifier."""

    datasets: list[Name]

    @field_validator("methods")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in CLASSIFIER_METHODS:
                raise ValueError(f"unknown method {name!r}; known: {', '.join(CLASSIFIER_METHODS)}")
        return names


class PipelineSettings(PlanSettings):
    """What ``dvc repro`` runs: of VAEs, and under ``classifiers`` of classifiers."""

    classifiers: ClassifierPlanSettings

    @field_validator("methods")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            if name not in METHODS:
                known = [method for method in METHODS if not method.endswith("_published")]
                raise ValueError(f"unknown method {name!r}; known: {', '.join(known)}; most also as NAME_published")
        return names


class DatasetSettings(Settings):
    """Everything that belongs to one data set."""

    prepare: PrepareSettings
    split: SplitSettings
    scenarios: Annotated[dict[Name, ScenarioSettings], Field(min_length=1), AfterValidator(check_siblings)]
    model: VAESettings
    training: TrainingSettings

    @property
    def largest_product(self) -> int:
        """Multiplications of the largest layer in a training step."""
        return self.training.batch_size * self.split.n_genes * self.model.hidden[0]


class ClassifierSettings(Settings):
    """Everything that belongs to the classifiers of one data set.

    Attributes
    ----------
    items, split, scenarios
        What is classified, how it is dealt, and what is to be forgotten.
    model, augmentation, training
        The net and its recipe.
    class_weights
        ``balanced``: the loss of each class weighs as one over its share of the items.
    together
        Shadow models that are trained side by side in one process; 1 for one after the other. Part of their recipe: the
        last digits differ.
    """

    items: ItemsSettings
    split: ClassSplitSettings
    scenarios: Annotated[dict[Name, ScenarioSettings], Field(min_length=1), AfterValidator(check_siblings)]
    model: NetSettings
    augmentation: AugmentationSettings
    class_weights: Literal["none", "balanced"]
    training: ClassTrainingSettings
    together: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _no_dropout_together(self) -> ClassifierSettings:
        if self.together > 1 and isinstance(self.model, MLPSettings) and self.model.dropout:
            raise ValueError("nets with dropout are trained one by one: together: 1, or dropout: 0.0")
        return self


class Population(Settings):
    """A population of models: one for each seed."""

    seeds: Annotated[list[int], Field(min_length=2)]

    @field_validator("seeds")
    @classmethod
    def _unique(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) != len(seeds):
            raise ValueError("seeds must differ: two models of one seed are one model")
        return seeds


class FullSweep(Settings):
    """The sweeps of ``pipelines/sweep``: every method on every scenario."""

    methods: Names
    scenarios: Names
    trials: Annotated[int, Field(gt=0)]


class SweepSettings(Settings):
    """Searches for methods' settings.

    Attributes
    ----------
    methods, scenarios, trials
        The small sweep in the pipeline: these methods, tuned for these requests, in so many trials each; none for [].
    development
        By request: the other request that settings are chosen on; they share no forgotten cell.
    startup_trials
        Drawn at random before TPE takes over.
    seeds
        Originals that each trial unlearns from, >= 3; the final audit takes the others.
    retrains
        Retrained models of a development request that the pipeline does not have itself, >= 4.
    ranges
        By method and dotted key of its settings: ranges in place of those that stand beside the settings in the code.
    full
        ``make sweep``.
    """

    methods: list[Name]
    scenarios: list[Name]
    trials: Annotated[int, Field(gt=0)]
    development: dict[Name, Name]
    startup_trials: Annotated[int, Field(ge=1)]
    seeds: Annotated[int, Field(ge=3)]
    retrains: Annotated[int, Field(ge=4)]
    ranges: dict[Name, dict[str, SearchSettings]]
    full: FullSweep

    @model_validator(mode="after")
    def _known(self) -> SweepSettings:
        for name in (*self.methods, *self.full.methods, *self.ranges):
            if name not in METHODS:
                known = [method for method in METHODS if not method.endswith("_published")]
                raise ValueError(f"unknown method {name!r}; known: {', '.join(known)}")
        for name in (*self.scenarios, *self.full.scenarios):
            if name not in self.development:
                raise ValueError(f"development names no request to choose settings on for {name!r}")
        return self


class AblationSettings(Settings):
    """What is varied, and on which requests of the pipeline.

    Attributes
    ----------
    scenario
        Of the grids and the learning curves.
    grids
        One method's settings each.
    sizes, curves
        Forget sets of several sizes; learning curves.
    feature_scenarios
        Where the learned attack is given parts of what it sees.
    conditional_scenario, conditional_methods, conditional_retrains
        Of the comparison between the plain decoder and one that is told each cell's group.
    """

    scenario: Name
    grids: list[GridSettings]
    sizes: SizeSettings
    curves: CurveSettings
    feature_scenarios: Names
    conditional_scenario: Name
    conditional_methods: Names
    conditional_retrains: Annotated[int, Field(ge=4)]


class TheorySettings(Settings):
    """The second pipeline (``make theory``): why methods that move parameters fail.

    Attributes
    ----------
    models
        Originals, from the first, and as many models of every other kind.
    latent
        Dimensions of the VAE with a small latent space.
    request
        Whose numbers stand beside the single-cell paper's: a rare whole group.
    overlap, factorisation, nets
        Of the Fisher analysis and its classifiers.
    proposition, worlds, ablation
        Of the other stages.
    """

    models: Annotated[int, Field(ge=2)]
    latent: Annotated[int, Field(gt=0)]
    request: Name
    overlap: OverlapSettings
    factorisation: FactorisationSettings
    nets: NetsSettings
    proposition: PropositionSettings
    worlds: WorldsSettings
    ablation: AblationSettings


_unlearn_fields: dict[str, Any] = {name: (method.settings, ...) for name, method in METHODS.items()}
UnlearnSettings = create_model("UnlearnSettings", __base__=Settings, **_unlearn_fields)
_class_fields: dict[str, Any] = {name: (method.settings, ...) for name, method in CLASSIFIER_METHODS.items()}
UnlearnClassifierSettings = create_model("UnlearnClassifierSettings", __base__=Settings, **_class_fields)


class Params(Settings):
    """The whole of ``params.yaml``.

    ``protocol: published`` repeats the single-cell paper as it was made: of each method its published variant, and
    controls matched by a sampled z.
    """

    seed: int
    protocol: Literal["canonical", "published"]
    compute: ComputeSettings
    pipeline: PipelineSettings
    downloads: dict[Name, str | None]
    datasets: dict[Name, DatasetSettings]
    train: Population
    retrain: Population
    unlearn: UnlearnSettings
    audit: AuditSettings
    classifiers: dict[Name, ClassifierSettings]
    train_classifier: Population
    retrain_classifier: Population
    unlearn_classifier: UnlearnClassifierSettings
    audit_classifier: ClassAuditSettings
    sweep: SweepSettings
    theory: TheorySettings

    @model_validator(mode="after")
    def _described(self) -> Params:
        plans: list[tuple[str, PlanSettings, str, Mapping[str, DatasetSettings | ClassifierSettings]]] = [
            ("pipeline", self.pipeline, "datasets", self.datasets),
            ("pipeline.classifiers", self.pipeline.classifiers, "classifiers", self.classifiers),
        ]
        for key, plan, section, described in plans:
            for dataset in plan.datasets:
                if dataset not in described:
                    raise ValueError(f"{key}.datasets names {dataset!r}, which has no section under {section}")
                known = described[dataset].scenarios
                for scenario in plan.scenarios:
                    if scenario not in known:
                        raise ValueError(f"{section}.{dataset}.scenarios lacks {scenario!r}; it has {', '.join(known)}")
        return self

    @model_validator(mode="after")
    def _prepared(self) -> Params:
        for name, described in self.classifiers.items():
            if described.items.kind == "cells" and name not in self.datasets:
                raise ValueError(f"classifiers.{name}.items: cells are prepared as datasets.{name} says; it is missing")
        return self

    @model_validator(mode="after")
    def _searchable(self) -> Params:
        for name in self.sweep.scenarios if self.sweep.methods else []:
            if name not in self.pipeline.scenarios:
                raise ValueError(f"sweep.scenarios: {name!r} is not in pipeline.scenarios, whose retrains judge")
            for dataset in self.pipeline.datasets:
                if self.sweep.development[name] not in self.datasets[dataset].scenarios:
                    lacks = f"datasets.{dataset}.scenarios lacks {self.sweep.development[name]!r}"
                    raise ValueError(f"sweep.development: {lacks}; add it ({{kind: sibling, of: {name}}})")
        return self

    @model_validator(mode="after")
    def _of_one_protocol(self) -> Params:
        if self.protocol == "published":
            for name in self.pipeline.methods:
                if f"{name}_published" in METHODS:
                    why = f"pipeline.methods: protocol published runs {name}_published, not {name}"
                    raise ValueError(f"{why}; `scforget profile published` names them all")
        return self


def load(path: Path) -> Params:
    """Read and check ``params.yaml``; raises :class:`~scforget.errors.ConfigError`."""
    return config.load(path, Params)

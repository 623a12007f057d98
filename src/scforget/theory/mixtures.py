"""Mixtures of Gaussians as data: their law, a forget request, and populations of models trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field
from scipy.special import logsumexp

from scforget import seeding
from scforget.arrays import BoolArray, FloatArray, IntArray
from scforget.audit import roc
from scforget.data.splits import ForgetSets
from scforget.errors import DataError
from scforget.models.mixture import Model
from scforget.settings import Settings
from scforget.theory.gaussian_vae import GaussianTask, GaussianVAE
from scforget.training import TrainingSettings, fit

Fraction = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(gt=0)]


class ComponentRequest(Settings):
    """Forget every training point of the first component."""

    kind: Literal["component"]


class PartialRequest(Settings):
    """Forget a random share of the first component's training points; the others stay."""

    kind: Literal["partial"]
    fraction: Fraction


class ScatteredRequest(Settings):
    """Forget random training points of any component."""

    kind: Literal["scattered"]
    points: Count


class WorldSettings(Settings):
    """A mixture, a request and the net that learns it.

    Attributes
    ----------
    components, dimension
        K equally likely Gaussians with unit covariance in G dimensions, both at least 2.
    spacing
        Distance between neighbouring means in standard deviations; they are the corners of a regular polygon.
    points
        Training points; as many of each component as go.
    forget
        The request.
    hidden, dropout
        Widths of the encoder's hidden layers, and the probability in every hidden block.
    training
        Recipe of originals and retrains. The epoch kept is the one with the best ELBO on the training points
        themselves, as in the single-cell paper: nothing held out stops a model from remembering.
    """

    components: Annotated[int, Field(ge=2)]
    dimension: Annotated[int, Field(ge=2)]
    spacing: Annotated[float, Field(ge=0)]
    points: Annotated[int, Field(ge=4)]
    forget: Annotated[ComponentRequest | PartialRequest | ScatteredRequest, Field(discriminator="kind")]
    hidden: Annotated[list[Count], Field(min_length=1)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    training: TrainingSettings


class FreshSettings(Settings):
    """How many points of a world nobody is trained on.

    Attributes
    ----------
    aside, unseen
        Of the whole mixture: for methods that ask for non-members, and for utility and matching.
    controls
        Of the forgotten points' own law: the non-members.
    """

    aside: Count
    unseen: Count
    controls: Annotated[int, Field(ge=2)]


class Mixture(NamedTuple):
    """K equally likely Gaussians with unit covariance; ``means [K, G]``."""

    means: FloatArray

    def draw(self, labels: IntArray, generator: np.random.Generator) -> FloatArray:
        """One point of each named component, ``[N, G]``."""
        return self.means[labels] + generator.normal(size=(len(labels), self.means.shape[1]))

    def log_joint(self, points: FloatArray) -> FloatArray:
        """Log p(x, k) of every point and component, ``[N, K]`` nats."""
        squares = ((points[:, None] - self.means) ** 2).sum(-1)
        return -0.5 * (squares + points.shape[1] * np.log(2 * np.pi)) - np.log(len(self.means))

    def log_density(self, points: FloatArray) -> FloatArray:
        """Log p(x), ``[N]`` nats."""
        return np.asarray(logsumexp(self.log_joint(points), axis=1))

    def posterior(self, points: FloatArray) -> FloatArray:
        """p(k | x), ``[N, K]``: rows sum to 1."""
        joint = self.log_joint(points)
        return np.exp(joint - logsumexp(joint, axis=1, keepdims=True))


def polygon(components: int, dimension: int, spacing: float) -> Mixture:
    """Means on the corners of a regular polygon in the first two coordinates, neighbours ``spacing`` apart."""
    angles = 2 * np.pi * np.arange(components) / components
    means = np.zeros((components, dimension))
    means[:, :2] = spacing / (2 * np.sin(np.pi / components)) * np.stack([np.cos(angles), np.sin(angles)], 1)
    return Mixture(means)


@dataclass(frozen=True)
class World:
    """One draw of a world.

    Attributes
    ----------
    mixture, task
        The law, and all points as the models are asked about them.
    points, labels : ``[N, G]``, ``[N]``
        Every point and its component.
    train, sets
        Training points, and the request; ``stop`` holds the retained points themselves.
    controls, unseen
        Fresh points of the forgotten ones' own law, and of the whole mixture.
    kept : ``[U]`` bool
        Which unseen points are of a law that the request leaves.
    scattered
        Whether the forgotten points' law is the whole mixture, not the first component.
    """

    mixture: Mixture
    task: GaussianTask
    points: FloatArray
    labels: IntArray
    train: IntArray
    sets: ForgetSets
    controls: IntArray
    unseen: IntArray
    kept: BoolArray
    scattered: bool


def draw_world(world: WorldSettings, fresh: FreshSettings, seed: int) -> World:
    """Draw the points of a world and of its request.

    Notes
    -----
    Given the component, forgotten points and controls are draws of one law, so that a model trained without the
    former has a membership AUC whose expectation over draws of the world is exactly ½.
    """
    generator = seeding.numpy_generator(seed, "points")
    mixture, K = polygon(world.components, world.dimension, world.spacing), world.components
    scattered = isinstance(world.forget, ScatteredRequest)
    labels = np.concatenate([
        np.arange(world.points) % K,
        generator.integers(0, K, fresh.aside + fresh.unseen),
        generator.integers(0, K if scattered else 1, fresh.controls),
    ])  # fmt: skip
    points = mixture.draw(labels, generator)
    ends = np.cumsum([world.points, fresh.aside, fresh.unseen])
    train, aside, unseen, controls = np.split(np.arange(len(points)), ends)
    pool = train if scattered else train[labels[train] == 0]
    wanted = len(pool)
    if isinstance(world.forget, PartialRequest):
        wanted = max(1, round(world.forget.fraction * len(pool)))
    elif isinstance(world.forget, ScatteredRequest):
        wanted = world.forget.points
    if not 2 <= wanted < len(train):
        raise DataError(
            f"request {world.forget.model_dump()}", f"{wanted} of {len(train)} points", "at least 2, and some to stay"
        )
    forget = np.sort(generator.permutation(pool)[:wanted])
    retain = np.setdiff1d(train, forget)
    task = GaussianTask(points, hidden=world.hidden, latent=2, dropout=world.dropout)
    whole = isinstance(world.forget, ComponentRequest)
    kept = labels[unseen] != 0 if whole else np.ones(len(unseen), dtype=bool)
    sets = ForgetSets(forget, retain, retain, aside)
    return World(mixture, task, points, labels, train, sets, controls, unseen, kept, scattered)


class Population(NamedTuple):
    """Scores of M models, nats: ELBO and reconstruction at z = μ.

    Attributes
    ----------
    forgotten, controls : ``[M, F]``, ``[M, U]``
        ELBO.
    reconstruction, control_reconstruction
        Of the same points.
    unseen : ``[M, V]``
        ELBO of the unseen points of the whole mixture.
    """

    forgotten: FloatArray
    controls: FloatArray
    reconstruction: FloatArray
    control_reconstruction: FloatArray
    unseen: FloatArray

    @property
    def aucs(self) -> FloatArray:
        """Membership AUC of each model, ``[M]``."""
        return np.array([roc.auc(one, two) for one, two in zip(self.forgotten, self.controls, strict=True)])


def score(world: World, models: Sequence[Model]) -> Population:
    """Score the forgotten points, the controls and the unseen points under every model."""
    rows = []
    for model in models:
        forgotten, controls, unseen = (
            world.task.signals(model, cells) for cells in (world.sets.forget, world.controls, world.unseen)
        )
        rows.append((forgotten.elbo, controls.elbo, forgotten.reconstruction, controls.reconstruction, unseen.elbo))
    return Population(*(np.stack(column) for column in zip(*rows, strict=True)))


def train_models(world: World, recipe: TrainingSettings, kind: str, number: int, seed: int) -> list[GaussianVAE]:
    """Train ``original`` models on all training points, or others on those that stay, each from its own seed."""
    cells = world.train if kind == "original" else world.sets.retain
    models = []
    for index in range(number):
        model = world.task.new_model(seeding.derive(seed, kind, index))
        fit(model, world.task, cells, cells, recipe, seed=seeding.derive(seed, kind, index, "training"))
        models.append(model)
    return models

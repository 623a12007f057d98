"""A forget request as a search sees it: retrained models to come near to, and one fold of the unseen cells.

Settings are chosen on a development request and one half of the unseen cells, and judged on another request, other
originals and the other half, so that what choosing alone has gained shows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scforget import artifacts, loading, parallel, seeding
from scforget.arrays import FloatArray, IntArray
from scforget.artifacts import Workspace
from scforget.audit import distance, equivalence, roc, utility, verdict
from scforget.audit.distance import Distance
from scforget.context import Context
from scforget.errors import DataError, EmptyGroupError, NonFiniteError
from scforget.methods import METHODS
from scforget.models.mixture import Model
from scforget.pipeline import Item, Pipeline
from scforget.populations import Population
from scforget.progress import Progress
from scforget.results import Record
from scforget.settings import Settings
from scforget.tasks import VaeTask

FOLDS = ("development", "final")


class Scored(NamedTuple):
    """What is known of one model in one fold.

    Attributes
    ----------
    forgotten : ``[F]``, nats
        ELBO of the forgotten cells.
    auc
        Of those against their controls.
    elbo, marker_r
        Utility on the fold's cells outside the forgotten kind.
    passes
        Cells fed through a model, forwards or backwards, to make it.
    """

    forgotten: FloatArray
    auc: float
    elbo: float
    marker_r: float
    passes: int


def deal_folds(cells: IntArray, labels: IntArray, seed: int) -> dict[str, IntArray]:
    """Deal cells into two halves, kind by kind (to within one cell of each), at random.

    Parameters
    ----------
    cells : ``[n]``
        Indices of cells.
    labels : ``[n]``
        Their kinds.
    seed
        Of the deal.

    Returns
    -------
    dict
        Sorted cells by the names of :data:`FOLDS`.
    """
    order = np.lexsort((seeding.numpy_generator(seed).random(len(cells)), labels))
    return {name: np.sort(cells[order[start::2]]) for start, name in enumerate(FOLDS)}


@dataclass(frozen=True)
class Arena:
    """Models, cells and settings of one data set, and one method to be tried on it."""

    context: Context
    method: str

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return self.context.item.keys[0]

    @property
    def workspace(self) -> Workspace:
        """Of the project."""
        return self.context.workspace

    @property
    def base(self) -> Settings:
        """The method's settings in params.yaml."""
        found: Settings = getattr(self.context.params.unlearn, self.method)
        return found

    @cached_property
    def _loaded(self) -> tuple[VaeTask, IntArray, IntArray]:
        cells, genes, markers = loading.load_cells(self.workspace, self.dataset)
        task = loading.make_task(cells, genes, self.context.params.datasets[self.dataset].model)
        _, kinds = np.unique(cells.obs["label"].astype(str).to_numpy(), return_inverse=True)
        return task, np.flatnonzero(np.isin(genes, markers)).astype(np.int64), kinds.astype(np.int64)

    @property
    def task(self) -> VaeTask:
        """The counts, and what may be asked of a model."""
        return self._loaded[0]

    @property
    def markers(self) -> IntArray:
        """Places of the marker genes among the modelled ones."""
        return self._loaded[1]

    @cached_property
    def folds(self) -> dict[str, IntArray]:
        """The unseen cells, dealt in two halves."""
        unseen = loading.load_sets(self.workspace, self.dataset).unseen
        seed = seeding.derive(self.context.params.seed, "sweep", "folds", self.dataset)
        return deal_folds(unseen, self._loaded[2][unseen], seed)

    @cached_property
    def originals(self) -> list[int]:
        """Seeds of the originals that there are."""
        made = artifacts.read_json(self.workspace.results("train", self.dataset) / "result.json")
        return sorted(int(seed) for seed in made["seeds"])

    def original(self, seed: int) -> Path:
        """Where an original lies."""
        return self.workspace.work("train", self.dataset) / f"{seed}.safetensors"


class Request:
    """One forget request, its retrained models, and one fold of the unseen cells.

    Parameters
    ----------
    arena
        Of the data set and the method.
    scenario, fold
        Which request; one of :data:`FOLDS`.

    Raises
    ------
    EmptyGroupError
        If the fold holds too few controls, or there are fewer than 4 retrained models.
    """

    def __init__(self, arena: Arena, scenario: str, fold: str) -> None:
        self._arena, self.name = arena, scenario
        found, unseen = loading.load_scenario(arena.workspace, arena.dataset, scenario), arena.folds[fold]
        self.sets = found.sets
        self._controls = np.intersect1d(found.controls, unseen)
        self._fewest = arena.context.params.audit.min_controls
        if len(self._controls) < self._fewest:
            who = f"{scenario}: controls in the {fold} half of the unseen cells"
            raise EmptyGroupError(who, len(self._controls), f"at least {self._fewest} (audit.min_controls)")
        group = found.group[unseen]
        self._kept = unseen if group.all() else unseen[~group]  # scattered: no kind is forgotten
        self.retrains = self._retrains()
        if len(self.retrains) < 4:
            raise EmptyGroupError(f"{scenario}: retrained models", len(self.retrains), "at least 4")

    def _retrains(self) -> list[Scored]:
        """Those of the pipeline's ``retrain`` stage if it has this request, else made here (and kept, as there)."""
        context, dataset = self._arena.context, self._arena.dataset
        pipeline = context.params.pipeline
        if dataset in pipeline.datasets and self.name in pipeline.scenarios:
            folder = context.workspace.work("retrain", dataset, self.name)
            made = artifacts.read_json(context.workspace.results("retrain", dataset, self.name) / "result.json")
            known = {int(seed): row["passes"] for seed, row in made["seeds"].items()}
            paths = {seed: folder / f"{seed}.safetensors" for seed in sorted(known)}
        else:
            item = Item("retrain", (dataset, self.name))
            inputs = Pipeline(context.workspace.root).inputs(item)
            population = Population(replace(context, inputs=inputs), self._arena.task, self.sets, "retain")
            seeds = range(context.params.sweep.retrains)
            with Progress(item.name, len(seeds)) as progress:
                found = parallel.each(population.make, seeds, progress.advance)
            records = {
                seed: (folder, record) for seed, (folder, record) in enumerate(found) if isinstance(record, dict)
            }
            paths = {seed: folder / "model.safetensors" for seed, (folder, _) in records.items()}
            known = {seed: record["metrics"]["passes"] for seed, (_, record) in records.items()}
        return [self.score(loading.load_model(self._arena.task, paths[seed]), known[seed]) for seed in sorted(known)]

    def score(self, model: Model, passes: int) -> Scored:
        """Score one model."""
        task = self._arena.task
        forgotten, controls = (task.signals(model, cells).elbo for cells in (self.sets.forget, self._controls))
        expressed = task.batch(self._kept).inputs[:, self._arena.markers].double().cpu().numpy()
        decoded = task.decoded_means(model, self._kept, self._arena.markers)
        return Scored(
            forgotten, roc.auc(forgotten, controls), float(task.signals(model, self._kept).elbo.mean()),
            utility.marker_correlation(expressed, decoded), passes,
        )  # fmt: skip

    def unlearned(self, settings: Settings, original: int, seed: int) -> Scored | str:
        """Unlearn from an original, and score the result; a diverged one is the reason in words."""
        arena = self._arena
        model = loading.load_original(arena.task, arena.original(original))
        try:
            trained = METHODS[arena.method].run(model, arena.task, self.sets, settings, seed=seed)
            return self.score(trained.model, trained.effort.passes)
        except NonFiniteError as error:
            return str(error)
        except DataError as error:  # scores of a model whose ELBO is NaN
            return f"{error.what}: found {error.found}"

    def originals(self, seeds: list[int]) -> list[Scored]:
        """The originals themselves: what doing nothing comes to."""
        arena = self._arena
        return [self.score(loading.load_original(arena.task, arena.original(seed)), 0) for seed in seeds]

    def distance(self, models: list[Scored]) -> Distance:
        """How far models are from the retrained ones."""
        audit = self._arena.context.params.audit
        return distance.to_retrains(
            *_columns(models), *_columns(self.retrains), margins=audit.margins, shrinkage=audit.trace_shrinkage
        )

    def floor(self) -> Distance:
        """How far the retrained models are from each other."""
        audit = self._arena.context.params.audit
        return distance.between_retrains(
            *_columns(self.retrains), margins=audit.margins, shrinkage=audit.trace_shrinkage
        )

    def cost(self, models: list[Scored]) -> float:
        """Mean passes over cells, as a share of the retrained models'."""
        return float(np.mean([one.passes for one in models]) / np.mean([one.passes for one in self.retrains]))

    def losses(self, models: list[Scored]) -> dict[str, float]:
        """Mean utility lost against the retrained models, in margins: above 1 is more than does not matter."""
        margins = self._arena.context.params.audit.margins

        def mean(rows: list[Scored], name: str) -> float:
            return float(np.mean([getattr(one, name) for one in rows]))

        return {
            name: (mean(self.retrains, name) - mean(models, name)) / getattr(margins, name)
            for name in ("elbo", "marker_r")
        }

    def _statistics(self, models: list[Scored]) -> dict[str, FloatArray]:
        """Both primary statistics of each model."""
        shrinkage = self._arena.context.params.audit.trace_shrinkage
        (own, aucs), (base, _) = _columns(models), _columns(self.retrains)
        if models is self.retrains:
            return {"membership": aucs, "trace": equivalence.trace_leave_one_out(base, shrinkage)}
        return {"membership": aucs, "trace": equivalence.trace(own, base, shrinkage=shrinkage)}

    def verdict(self, models: list[Scored], originals: list[Scored]) -> dict[str, str]:
        """The audit's verdict by this fold, and whether utility is kept; the originals say which side is memory."""
        audit = self._arena.context.params.audit
        own, start, base = map(self._statistics, (models, originals, self.retrains))
        tested = {
            name: equivalence.welch_equivalence(
                own[name], base[name], margin=getattr(audit.margins, name), level=audit.level,
                original_side=1 if start[name].mean() >= base[name].mean() else -1,
            )
            for name in own
        }  # fmt: skip
        kept = [
            verdict.utility_verdict(
                [getattr(one, name) for one in models], [getattr(one, name) for one in self.retrains],
                getattr(audit.margins, name), audit.level,
            )
            for name in ("elbo", "marker_r")
        ]  # fmt: skip
        return {
            "verdict": str(verdict.decide(tested["membership"], tested["trace"])),
            "utility": verdict.combined_utility(kept),
        }


def _columns(models: list[Scored]) -> tuple[FloatArray, FloatArray]:
    return np.stack([one.forgotten for one in models]), np.array([one.auc for one in models])


def evaluate(request: Request, models: list[Scored]) -> Record:
    """Describe a population of models: distance and its parts, cost, losses of utility."""
    found = request.distance(models)
    error = float(found.total.std(ddof=1) / np.sqrt(len(models))) if len(models) > 1 else float("nan")
    return {
        "distance": float(found.total.mean()), "standard_error": error,
        "scores": float(found.scores.mean()), "membership": float(found.membership.mean()),
        "cost": request.cost(models), "models": len(models),
        **{f"{name}_loss": value for name, value in request.losses(models).items()},
        "per_model": found.total.tolist(),
    }  # fmt: skip


def disjoint(development: Request, final: Request) -> None:
    """Refuse two requests that share forgotten cells: the choice would be judged by what it was made on."""
    both = np.intersect1d(development.sets.forget, final.sets.forget)
    if len(both):
        raise DataError(
            f"{development.name} and {final.name}", f"{len(both)} forgotten cells in both",
            f"none: describe the first as {{kind: sibling, of: {final.name}}}",
        )  # fmt: skip

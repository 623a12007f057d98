"""What the stages of the theory pipeline share: one data set's cells, requests and models, of several kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from scforget import artifacts, engine, loading, parallel
from scforget.arrays import FloatArray, IntArray
from scforget.context import Context
from scforget.data.splits import CellSets, ForgetSets, Scenario
from scforget.errors import EmptyGroupError
from scforget.models.vae import VAE
from scforget.pipeline import Item, Pipeline
from scforget.populations import Population
from scforget.progress import Progress
from scforget.schema import TheorySettings
from scforget.tasks import VaeTask
from scforget.theory import analysis
from scforget.theory.analysis import Request

#: Least cells of a kind that is to stand for "unrelated".
_FEWEST_UNRELATED = 10


@dataclass(frozen=True)
class Variant(Population):
    """Models of another architecture, by the originals' recipe; kept as the originals are."""

    name: str

    def fingerprint(self, seed: int) -> str:
        """Identity of one model."""
        narrowed = {"numerics": str(engine.current()), "variant": self.name}
        return self.context.inputs.model_fingerprint(seed, narrowed)


class Arena:
    """What the stages of one data set share: its cells, its requests, its originals, and models of other kinds.

    Raises
    ------
    EmptyGroupError
        If there are fewer originals than ``theory.models``.
    """

    def __init__(self, context: Context) -> None:
        self.context, (self.dataset, *_) = context, context.item.keys
        self.settings: TheorySettings = context.params.theory
        model = context.params.datasets[self.dataset].model
        cells, genes, _ = loading.load_cells(context.workspace, self.dataset)
        self.task, self.obs = loading.make_task(cells, genes, model), cells.obs
        self.labels = cells.obs["label"].astype(str).to_numpy().astype(np.str_)
        self.sets: CellSets = loading.load_sets(context.workspace, self.dataset)
        made = artifacts.read_json(context.workspace.results("train", self.dataset) / "result.json")
        self.seeds = sorted(int(seed) for seed in made["seeds"])[: self.settings.models]
        if len(self.seeds) < self.settings.models:
            who = f"originals of {self.dataset}"
            raise EmptyGroupError(who, len(self.seeds), f"at least {self.settings.models} (theory.models)")

    @property
    def codes(self) -> IntArray:
        """``[N]``: the kind of each cell as a number."""
        return np.unique(self.labels, return_inverse=True)[1].astype(np.int64)

    def scenario(self, name: str) -> Scenario:
        """A forget request."""
        return loading.load_scenario(self.context.workspace, self.dataset, name)

    def requests(self) -> dict[str, Request]:
        """Every request, with the retained cells of the kind that is least like the forgotten ones."""
        found = {}
        for name in self.context.params.pipeline.scenarios:
            forget = self.scenario(name).sets.forget
            found[name] = Request(forget, self._unrelated(forget))
        return found

    def _unrelated(self, forget: IntArray) -> IntArray:
        retain = np.setdiff1d(self.sets.train, forget)
        own = np.unique(self.labels[forget])
        kinds = {}
        for kind in np.unique(self.labels[retain]):
            members = retain[self.labels[retain] == kind]
            if len(members) >= _FEWEST_UNRELATED and (len(own) > 1 or kind not in own):
                kinds[str(kind)] = members
        means = {kind: self._mean(members) for kind, members in kinds.items()}
        return kinds[analysis.farthest(means, self._mean(forget))]

    def _mean(self, cells: IntArray) -> FloatArray:
        return np.asarray(self.task.batch(cells).inputs.double().mean(0).cpu().numpy())

    def originals(self) -> list[VAE]:
        """The first originals."""
        folder = self.context.workspace.work("train", self.dataset)
        return [loading.load_original(self.task, folder / f"{seed}.safetensors") for seed in self.seeds]

    def tasks(self) -> dict[str, VaeTask]:
        """How models of other kinds are asked, by their names."""
        task, settings = self.task, self.task.settings
        other = "nb" if settings.likelihood == "log_mse" else "log_mse"
        totals = self.obs["total_counts"].to_numpy(dtype=np.float64)

        def changed(conditions: IntArray | None = None, **changes: object) -> VaeTask:
            return VaeTask(task.counts, totals, settings.model_copy(update=changes), task.donors, conditions=conditions)

        return {
            other: changed(likelihood=other),
            f"latent_{self.settings.latent}": changed(latent=self.settings.latent),
            "conditional": changed(self.codes),
        }

    def trained(self, name: str, task: VaeTask, sets: ForgetSets | None = None) -> Variant:
        """How models of another kind are trained: on all training cells, or on what a request retains."""
        train = Pipeline(self.context.workspace.root).inputs(Item("train", (self.dataset,)))
        nothing = ForgetSets(self.sets.train[:0], self.sets.train, self.sets.stop, self.sets.aside)
        cell_set = "train" if sets is None else "retain"
        return Variant(replace(self.context, inputs=train), task, sets or nothing, cell_set, name)


class _Place(NamedTuple):
    population: Variant
    seed: int


def _make(place: _Place) -> VAE | str:
    folder, record = place.population.make(place.seed)
    if isinstance(record, str):
        return record
    return loading.load_original(place.population.task, folder / "model.safetensors")


def make_all(name: str, populations: Mapping[str, Variant], seeds: Sequence[int]) -> dict[str, list[VAE]]:
    """Train every model of some populations on all cores; those that diverged are left out."""
    places = [_Place(population, seed) for population in populations.values() for seed in seeds]
    with Progress(name, len(places)) as progress:
        made = parallel.each(_make, places, progress.advance)
    by_name: dict[str, list[VAE]] = {key: [] for key in populations}
    for place, model in zip(places, made, strict=True):
        if isinstance(model, VAE):
            by_name[place.population.name].append(model)
    for key, models in by_name.items():
        if len(models) < 2:
            raise EmptyGroupError(f"{name}: models of {key}", len(models), "at least 2 that did not diverge")
    return by_name

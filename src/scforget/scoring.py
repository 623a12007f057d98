"""From models on disk to what the audit needs of them: scores of cells, utility, embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from scforget import artifacts, loading, parallel, seeding
from scforget.arrays import BoolArray, FloatArray, IntArray
from scforget.artifacts import Workspace
from scforget.attacks import ATTACKS
from scforget.audit import utility
from scforget.audit.assess import Groups, Population
from scforget.data import controls
from scforget.errors import EmptyGroupError
from scforget.models.mixture import Model
from scforget.progress import Progress
from scforget.schema import Params
from scforget.tasks import Signals


class _Scored(NamedTuple):
    """What is known of one model."""

    seed: int
    scores: dict[str, FloatArray]
    utility: dict[str, dict[str, float]]
    latent: FloatArray


def _stack(models: list[_Scored]) -> Population:
    scores = {name: np.stack([model.scores[name] for model in models]) for name in models[0].scores}
    return Population(
        [m.seed for m in models], scores, [m.utility for m in models], models[0].latent.astype(np.float32)
    )


def _models(folder: Path) -> list[Path]:
    """Models of a population in the order of their seeds."""
    paths = sorted(folder.glob("*.safetensors"), key=lambda path: int(path.stem))
    if len(paths) < 2:
        raise EmptyGroupError(str(folder), f"{len(paths)} models", "at least 2 to know how much models differ")
    return paths


class Scorer:
    """Scores populations of models on the forget cells and the unseen cells of one scenario.

    Parameters
    ----------
    workspace, params
        Of the project.
    dataset, scenario
        Names in params.yaml.

    Attributes
    ----------
    cells, labels : ``[n]``
        The scored cells and their labels: forget cells first, then all unseen ones.
    """

    def __init__(self, workspace: Workspace, params: Params, dataset: str, scenario: str) -> None:
        cells, genes, markers = loading.load_cells(workspace, dataset)
        self._settings = params.audit
        self._seed = params.seed
        self._samples_latent = params.protocol == "published"
        self._task = loading.make_task(cells, genes, params.datasets[dataset].model)
        self._markers = np.flatnonzero(np.isin(genes, markers)).astype(np.int64)
        self._scenario = loading.load_scenario(workspace, dataset, scenario)
        self._name = f"{dataset} {scenario}"
        unseen = loading.load_sets(workspace, dataset).unseen
        self.cells: IntArray = np.concatenate([self._scenario.sets.forget, unseen])
        self.labels = cells.obs["label"].astype(str).to_numpy()[self.cells].astype(np.str_)
        self._is_forget: BoolArray = np.arange(len(self.cells)) < len(self._scenario.sets.forget)

    def _score(self, path: Path) -> _Scored:
        """Score one model."""
        model = loading.load_model(self._task, path)
        signals = self._task.signals(model, self.cells)
        known = self._task.signals(model, self._scenario.sets.retain)
        scores: dict[str, FloatArray] = {}
        for name, attack in ATTACKS.items():
            scores |= attack.run(signals, known, getattr(self._settings.attacks, name))
        return _Scored(int(path.stem), scores, self._utility(model, signals), signals.mu)

    def populations(self, *folders: Path, meanwhile: Callable[[], None] | None = None) -> list[Population]:
        """Score every model of some folders on all cores, models in the order of their seeds; see ``parallel.each``."""
        groups = [_models(folder) for folder in folders]
        with Progress(f"scoring {self._name}", sum(map(len, groups))) as progress:
            every = [path for paths in groups for path in paths]
            scored = iter(parallel.each(self._score, every, progress.advance, meanwhile))
        return [_stack([next(scored) for _ in paths]) for paths in groups]

    def population(self, folder: Path) -> Population:
        """Score every model of a folder, one after the other."""
        return _stack([self._score(path) for path in _models(folder)])

    def groups(self, folder: Path) -> Groups:
        """Forget cells and the three kinds of control among the scored cells; neighbours by the first original.

        Neighbours are by posterior means, or by one draw of each posterior under ``protocol: published``.
        """
        first = min(folder.glob("*.safetensors"), key=lambda path: int(path.stem))
        signals = self._task.signals(loading.load_model(self._task, first), self.cells)
        latent = signals.mu
        if self._samples_latent:
            noise = seeding.numpy_generator(self._seed, "matched", self._name)
            latent = latent + np.exp(0.5 * signals.log_var) * noise.standard_normal(latent.shape)
        unseen = ~self._is_forget
        matched = unseen.copy()
        matched[unseen] = controls.matched_knn(
            latent[self._is_forget], latent[unseen], self._settings.matched_neighbours
        )
        same_group = unseen & np.isin(self.cells, self._scenario.controls)
        return Groups(self._is_forget, {"same_group": same_group, "matched_knn": matched, "all_unseen": unseen})

    def references(self, folder: Path) -> tuple[Population, Population, Groups]:
        """Read back originals, retrains and groups as the ``reference`` stage scored them."""
        arrays = artifacts.read_arrays(folder / "scores.npz")
        records = artifacts.read_json(folder / "result.json")

        def read(name: str) -> Population:
            scores = {key.removeprefix(f"{name}/"): v for key, v in arrays.items() if key.startswith(f"{name}/")}
            latent = scores.pop("latent")
            return Population(records[name]["seeds"], scores, records[name]["utility_rows"], latent)

        kinds = {name: arrays[name] for name in ("same_group", "matched_knn", "all_unseen")}
        return read("original"), read("retrain"), Groups(arrays["forget"], kinds)

    def _utility(self, model: Model, signals: Signals) -> dict[str, dict[str, float]]:
        """Utility on unseen cells outside the forgotten kind, and inside it."""
        unseen, group = ~self._is_forget, self._scenario.group[self.cells]
        if group[unseen].all():  # scattered: no kind is forgotten, every unseen cell counts as outside
            group = np.zeros_like(group)
        places = {"outside": unseen & ~group, "inside": unseen & group}
        return {name: self._utility_of(model, signals, mask) for name, mask in places.items() if mask.any()}

    def _utility_of(self, model: Model, signals: Signals, mask: BoolArray) -> dict[str, float]:
        cells, mu, labels = self.cells[mask], signals.mu[mask], self.labels[mask]
        expressed = self._task.batch(cells).inputs[:, torch.from_numpy(self._markers)].double().numpy()
        decoded = self._task.decoded_means(model, cells, self._markers)
        found = {
            "elbo": float(signals.elbo[mask].mean()),
            "kl": float(signals.kl[mask].mean()),
            "marker_r": utility.marker_correlation(expressed, decoded),
            **utility.latent_agreement(mu, labels, seed=self._seed),
            **utility.cell_type_accuracy(mu, labels, seed=self._seed),
            **utility.posterior_predictive(self._task.counts[cells].toarray(), *self._task.predicted(model, cells)),
        }
        return {name: value for name, value in found.items() if np.isfinite(value)}

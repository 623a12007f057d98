"""From models on disk to what the audit needs of them: scores of cells, utility, embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from anndata import AnnData
from scipy import sparse

from scforget import artifacts, parallel
from scforget.arrays import BoolArray, FloatArray, IntArray
from scforget.artifacts import Workspace
from scforget.attacks import ATTACKS
from scforget.audit import utility
from scforget.audit.assess import Groups, Population
from scforget.data import controls
from scforget.data import prepare as preparing
from scforget.data.splits import CellSets, ForgetSets, Scenario
from scforget.errors import ArtifactError, DataError, EmptyGroupError
from scforget.models.vae import VAE, VAESettings
from scforget.pipeline import dvc_md5
from scforget.progress import Progress
from scforget.schema import Params, SplitSettings
from scforget.tasks import Signals, VaeTask


def choose_genes(
    cells: AnnData, sets: CellSets, scenarios: Iterable[Scenario], settings: SplitSettings, root: Path
) -> dict[str, Any]:
    """Choose the modelled genes as ``genes_from`` says, and the marker genes among them, in the file's order.

    Raises
    ------
    DataError
        If a gene list names genes that the data lack, or a named marker is not modelled.
    """
    source = settings.genes_from
    if source == "all":
        genes = preparing.select_genes(cells, None, settings.n_genes)
    elif source in ("train", "unseen"):
        genes = preparing.select_genes(cells, getattr(sets, source), settings.n_genes)
    elif source == "retain":
        forgotten = np.concatenate([scenario.sets.forget for scenario in scenarios])
        genes = preparing.select_genes(cells, np.setdiff1d(sets.train, forgotten), settings.n_genes)
    else:
        listed = artifacts.read_bytes(root / source).decode(errors="replace").split()
        missing = [gene for gene in listed if gene not in cells.var_names]
        if missing or not listed:
            found = f"{len(missing)} of {len(listed)} genes not in the data ({', '.join(missing[:3])})"
            raise DataError(f"gene list {source}", found, "names of genes in the data")
        genes = [gene for gene in cells.var_names if gene in set(listed)]
    markers = [gene for gene in settings.markers if gene in genes]
    if settings.markers and not markers:
        raise DataError("split.markers", "none of the named markers among the modelled genes", "at least one")
    if not markers:
        by_label = preparing.markers(cells, cells.obs["label"].astype(str).tolist(), genes, settings.markers_per_label)
        chosen = {gene for listed in by_label.values() for gene in listed}
        markers = [gene for gene in genes if gene in chosen]
    return {"genes": genes, "markers": markers}


def load_sets(workspace: Workspace, dataset: str) -> CellSets:
    """Read the four cell sets."""
    return CellSets(**artifacts.read_arrays(workspace.work("split", dataset) / "sets.npz"))


def load_scenario(workspace: Workspace, dataset: str, scenario: str) -> Scenario:
    """Read a scenario's cell sets."""
    arrays = artifacts.read_arrays(workspace.work("split", dataset) / f"{scenario}.npz")
    group = arrays.pop("group")
    return Scenario(ForgetSets(**arrays), group)


def _load_cells(workspace: Workspace, dataset: str) -> tuple[AnnData, list[str], list[str]]:
    cells = artifacts.read_cells(workspace.work("prepare", dataset) / "cells.h5ad")
    genes = artifacts.read_json(workspace.work("split", dataset) / "genes.json")
    return cells, genes["genes"], genes["markers"]


def _task(cells: AnnData, genes: list[str], settings: VAESettings) -> VaeTask:
    counts = sparse.csr_matrix(cells[:, genes].X)
    return VaeTask(counts, cells.obs["total_counts"].to_numpy(dtype=np.float64), settings)


def load_task(workspace: Workspace, settings: VAESettings, dataset: str) -> VaeTask:
    """Read the counts of the modelled genes."""
    cells, genes, _ = _load_cells(workspace, dataset)
    return _task(cells, genes, settings)


def load_model(task: VaeTask, path: Path) -> VAE:
    """Read a model of the task's architecture, in eval mode."""
    model = task.new_model(0)
    tensors, _ = artifacts.read_tensors(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        why = "its layers are not those of params.yaml; run the stage that makes it again"
        raise ArtifactError(path, why) from error
    return model.eval()


def own_original(workspace: Workspace, dataset: str, seed: int) -> dict[str, str]:
    """The one original that a method starts from, in place of the folder of all of them."""
    folder = workspace.work("train", dataset)
    return {folder.relative_to(workspace.root).as_posix(): dvc_md5(folder / f"{seed}.safetensors")}


def relative_change(task: VaeTask, original: Path, model: VAE) -> float:
    """‖θ − θ0‖ / ‖θ0‖ over all parameters."""

    def flat(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.cat([parameter.detach().double().ravel() for parameter in parameters])

    before, after = flat(load_model(task, original).parameters()), flat(model.parameters())
    return float((after - before).norm() / before.norm())


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
        cells, genes, markers = _load_cells(workspace, dataset)
        self._settings = params.audit
        self._seed = params.seed
        self._task = _task(cells, genes, params.datasets[dataset].model)
        self._markers = np.flatnonzero(np.isin(genes, markers)).astype(np.int64)
        self._scenario = load_scenario(workspace, dataset, scenario)
        self._name = f"{dataset} {scenario}"
        unseen = load_sets(workspace, dataset).unseen
        self.cells: IntArray = np.concatenate([self._scenario.sets.forget, unseen])
        self.labels = cells.obs["label"].astype(str).to_numpy()[self.cells].astype(np.str_)
        self._is_forget: BoolArray = np.arange(len(self.cells)) < len(self._scenario.sets.forget)

    def _score(self, path: Path) -> _Scored:
        """Score one model."""
        model = load_model(self._task, path)
        signals = self._task.signals(model, self.cells)
        known = self._task.signals(model, self._scenario.sets.retain)
        scores: dict[str, FloatArray] = {}
        for name, attack in ATTACKS.items():
            scores |= attack.run(signals, known, getattr(self._settings.attacks, name))
        return _Scored(int(path.stem), scores, self._utility(model, signals), signals.mu)

    def populations(self, *folders: Path) -> list[Population]:
        """Score every model of some folders on all cores; models in the order of their seeds."""
        groups = [sorted(folder.glob("*.safetensors"), key=lambda path: int(path.stem)) for folder in folders]
        for folder, paths in zip(folders, groups, strict=True):
            if len(paths) < 2:
                raise EmptyGroupError(str(folder), f"{len(paths)} models", "at least 2 to know how much models differ")
        with Progress(f"scoring {self._name}", sum(map(len, groups))) as progress:
            scored = iter(parallel.each(self._score, [p for paths in groups for p in paths], progress.advance))
        return [_stack([next(scored) for _ in paths]) for paths in groups]

    def groups(self, originals: Population) -> Groups:
        """Forget cells and the three kinds of control among the scored cells; neighbours by the first original."""
        group = self._scenario.group[self.cells]
        unseen = ~self._is_forget
        matched = unseen.copy()
        matched[unseen] = controls.matched_knn(
            originals.latent[self._is_forget], originals.latent[unseen], self._settings.matched_neighbours
        )
        kinds = {"same_group": unseen & group, "matched_knn": matched, "all_unseen": unseen}
        if (found := int(kinds["same_group"].sum())) < self._settings.min_controls:
            wanted = f"at least audit.min_controls = {self._settings.min_controls}; a larger unseen share"
            raise EmptyGroupError(f"same_group controls of {self._name}", f"{found} unseen cells", wanted)
        return Groups(self._is_forget, kinds)

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

    def _utility(self, model: VAE, signals: Signals) -> dict[str, dict[str, float]]:
        """Utility on unseen cells outside the forgotten kind, and inside it."""
        unseen, group = ~self._is_forget, self._scenario.group[self.cells]
        if group[unseen].all():  # scattered: no kind is forgotten, every unseen cell counts as outside
            group = np.zeros_like(group)
        places = {"outside": unseen & ~group, "inside": unseen & group}
        return {name: self._utility_of(model, signals, mask) for name, mask in places.items() if mask.any()}

    def _utility_of(self, model: VAE, signals: Signals, mask: BoolArray) -> dict[str, float]:
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

"""Reads back what the early stages made: cells, splits, models; every model of the pipeline is fed through here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from anndata import AnnData
from scipy import sparse
from torch import nn

from scforget import artifacts
from scforget.artifacts import Workspace
from scforget.data.splits import CellSets, ForgetSets, Scenario
from scforget.errors import ArtifactError
from scforget.models.mixture import Mixture, Model, members_of
from scforget.models.vae import VAE, VAESettings
from scforget.pipeline import dvc_md5
from scforget.tasks import VaeTask


def load_sets(workspace: Workspace, dataset: str, stage: str = "split") -> CellSets:
    """Read the four cell sets, as a stage dealt them."""
    return CellSets(**artifacts.read_arrays(workspace.work(stage, dataset) / "sets.npz"))


def load_scenario(workspace: Workspace, dataset: str, scenario: str, stage: str = "split") -> Scenario:
    """Read a scenario's cell sets."""
    arrays = artifacts.read_arrays(workspace.work(stage, dataset) / f"{scenario}.npz")
    group, controls = arrays.pop("group"), arrays.pop("controls")
    return Scenario(ForgetSets(**arrays), group, controls)


def load_cells(workspace: Workspace, dataset: str) -> tuple[AnnData, list[str], list[str]]:
    """Read the prepared cells, the names of the modelled genes, and those of the markers among them."""
    cells = artifacts.read_cells(workspace.work("prepare", dataset) / "cells.h5ad")
    genes = artifacts.read_json(workspace.work("split", dataset) / "genes.json")
    return cells, genes["genes"], genes["markers"]


def make_task(cells: AnnData, genes: list[str], settings: VAESettings) -> VaeTask:
    """Restrict the cells to the modelled genes."""
    counts = sparse.csr_matrix(cells[:, genes].X)
    donors = cells.obs["donor"].astype(str).to_numpy().astype(np.str_) if "donor" in cells.obs else None
    return VaeTask(counts, cells.obs["total_counts"].to_numpy(dtype=np.float64), settings, donors)


def load_task(workspace: Workspace, settings: VAESettings, dataset: str) -> VaeTask:
    """Read the counts of the modelled genes."""
    cells, genes, _ = load_cells(workspace, dataset)
    return make_task(cells, genes, settings)


def load_model(task: VaeTask, path: Path) -> Model:
    """Read a model of the task's architecture, or a mixture of such, in eval mode."""
    tensors, _ = artifacts.read_tensors(path)
    members = {name.split(".")[1] for name in tensors if name.startswith("members.")}
    model: Model = Mixture([task.new_model(0) for _ in members]) if members else task.new_model(0)
    fill(model, tensors, path)
    return model


def fill(model: nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Put weights into a model, in eval mode from now."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        why = "its layers are not those of params.yaml; run the stage that makes it again"
        raise ArtifactError(path, why) from error
    model.eval()


def load_original(task: VaeTask, path: Path) -> VAE:
    """Read the model that a method starts from; an original is never a mixture."""
    (model,) = members_of(load_model(task, path))
    return model


def own_original(workspace: Workspace, dataset: str, seed: int, stage: str = "train") -> dict[str, str]:
    """The one original that a method starts from, in place of the folder of all of them."""
    folder = workspace.work(stage, dataset)
    return {folder.relative_to(workspace.root).as_posix(): dvc_md5(folder / f"{seed}.safetensors")}


def relative_change(original: nn.Module, model: nn.Module) -> float:
    """‖θ − θ0‖ / ‖θ0‖ over all parameters; NaN for a mixture, which has others."""

    def flat(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
        return torch.cat([parameter.detach().double().ravel() for parameter in parameters])

    if isinstance(model, Mixture):
        return float("nan")
    before, after = flat(original.parameters()), flat(model.parameters())
    return float((after - before).norm() / before.norm())

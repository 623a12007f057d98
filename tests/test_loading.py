"""What the early stages wrote is read back as it was, and a file of another architecture is named."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from scforget import artifacts, loading
from scforget.artifacts import Workspace
from scforget.errors import ArtifactError
from scforget.models.mixture import Mixture, Model
from scforget.models.vae import VAE
from scforget.tasks import VaeTask

MakeTask = Callable[..., VaeTask]


def saved(model: Model, path: Path) -> Path:
    artifacts.write_tensors(path, model.state_dict())
    return path


def equal(one: Model, other: Model) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "models" / "3.safetensors"


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "log_mse"])
@pytest.mark.parametrize("dispersion", ["gene-cell", "gene"])
def test_load_model_reads_a_vae_back(make_task: MakeTask, file: Path, likelihood: str, dispersion: str) -> None:
    task = make_task(likelihood=likelihood, dispersion=dispersion)
    model = task.new_model(7)
    loaded = loading.load_model(task, saved(model, file))
    assert isinstance(loaded, VAE)
    assert equal(loaded, model)
    assert not loaded.training


@pytest.mark.parametrize("members", [1, 2, 11])
def test_load_model_reads_a_mixture_back_in_the_order_of_its_members(
    task: VaeTask, file: Path, members: int
) -> None:  # fmt: skip
    model = Mixture([task.new_model(seed) for seed in range(20, 20 + members)])
    loaded = loading.load_model(task, saved(model, file))
    assert isinstance(loaded, Mixture)
    assert len(loaded) == members
    assert equal(loaded, model)
    assert not any(module.training for module in loaded.modules())
    cells = np.arange(9)
    np.testing.assert_array_equal(task.signals(loaded, cells).elbo, task.signals(model, cells).elbo)


@pytest.mark.parametrize(
    "change", [{"hidden": [17, 8]}, {"hidden": [16]}, {"latent": 5}, {"likelihood": "zinb"}, {"dispersion": "gene"}]
)
@pytest.mark.parametrize("mixed", [False, True])
def test_load_model_refuses_another_architecture(
    task: VaeTask, make_task: MakeTask, file: Path, change: dict[str, object], mixed: bool
) -> None:
    other = make_task(**change).new_model(0)
    saved(Mixture([other, other]) if mixed else other, file)
    with pytest.raises(ArtifactError, match=r"its layers are not those of params\.yaml") as caught:
        loading.load_model(task, file)
    assert caught.value.path == file


def test_load_model_says_which_file_is_missing(task: VaeTask, file: Path) -> None:
    with pytest.raises(ArtifactError, match=r"3\.safetensors: no such file"):
        loading.load_model(task, file)


def test_load_original_gives_the_one_vae(task: VaeTask, file: Path) -> None:
    loaded = loading.load_original(task, saved(task.new_model(7), file))
    assert type(loaded) is VAE
    assert equal(loaded, task.new_model(7))
    assert not loaded.training


def test_own_original_is_one_file_and_its_hash(task: VaeTask, tmp_path: Path) -> None:
    path = saved(task.new_model(7), tmp_path / "work/train/tiny/7.safetensors")
    saved(task.new_model(8), tmp_path / "work/train/tiny/8.safetensors")
    wanted = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    assert loading.own_original(Workspace(tmp_path), "tiny", 7) == {"work/train/tiny": wanted}


@pytest.mark.parametrize("factor", [1.0, 1.5, 0.0, -1.0])
def test_relative_change_is_of_all_parameters_together(task: VaeTask, factor: float) -> None:
    model = task.new_model(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    assert loading.relative_change(task.new_model(7), model) == pytest.approx(abs(factor - 1))


def test_relative_change_of_one_weight_is_its_own(task: VaeTask) -> None:
    model = task.new_model(7)
    norm = math.sqrt(sum(float(p.detach().double().square().sum()) for p in model.parameters()))
    with torch.no_grad():
        model.mu.bias[0] += 3.0
    assert loading.relative_change(task.new_model(7), model) == pytest.approx(3.0 / norm, rel=1e-6)


def test_relative_change_of_a_mixture_is_unknown(task: VaeTask) -> None:
    assert math.isnan(loading.relative_change(task.new_model(7), Mixture([task.new_model(7)])))


@pytest.fixture
def cells(tiny_counts: sparse.csr_matrix) -> AnnData:
    """Ten cells of all 60 genes, from three donors whose names look like numbers."""
    columns = {"donor": [3, 1, 1, 2, 3, 1, 2, 2, 3, 1], "total_counts": np.arange(10) + 100.0}
    obs = pd.DataFrame(columns, index=[f"c{i}" for i in range(10)])
    return AnnData(tiny_counts[:10].astype(np.float32), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(60)]))


def test_make_task_has_the_modelled_genes_in_their_order_and_the_donors(cells: AnnData, task: VaeTask) -> None:
    made = loading.make_task(cells, ["g5", "g0", "g41"], task.settings)
    np.testing.assert_array_equal(made.counts.toarray(), cells.X.toarray()[:, [5, 0, 41]])
    assert made.donors is not None
    assert made.donors.tolist() == ["3", "1", "1", "2", "3", "1", "2", "2", "3", "1"]
    assert made.settings == task.settings
    squared = task.settings.model_copy(update={"likelihood": "log_mse"})
    assert loading.make_task(cells, ["g5"], squared).normaliser.tolist() == cells.obs["total_counts"].tolist()


def test_make_task_of_cells_without_donors_knows_none(cells: AnnData, task: VaeTask) -> None:
    del cells.obs["donor"]
    assert loading.make_task(cells, ["g5"], task.settings).donors is None


def test_load_task_reads_what_prepare_and_split_wrote(cells: AnnData, task: VaeTask, tmp_path: Path) -> None:
    workspace, genes = Workspace(tmp_path), ["g2", "g1"]
    wanted = loading.make_task(cells, genes, task.settings)
    artifacts.write_cells(workspace.work("prepare", "tiny") / "cells.h5ad", cells)
    artifacts.write_json(workspace.work("split", "tiny") / "genes.json", {"genes": genes, "markers": ["g1"]})
    found = loading.load_task(workspace, task.settings, "tiny")
    np.testing.assert_array_equal(found.counts.toarray(), wanted.counts.toarray())
    np.testing.assert_array_equal(found.library, wanted.library)
    assert found.donors is not None
    assert wanted.donors is not None
    assert found.donors.tolist() == wanted.donors.tolist()
    assert loading.load_cells(workspace, "tiny")[1:] == (genes, ["g1"])


def test_load_sets_and_scenario_read_every_role(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    roles = {name: np.arange(n) + n for n, name in enumerate(["train", "stop", "aside", "unseen"], 2)}
    parts = {name: np.arange(n) + n for n, name in enumerate(["forget", "retain", "stop", "aside"], 3)}
    rest = {"group": np.arange(9) % 2 == 0, "controls": np.array([1, 4])}
    artifacts.write_arrays(workspace.work("split", "tiny") / "sets.npz", roles)
    artifacts.write_arrays(workspace.work("split", "tiny") / "half.npz", {**parts, **rest})
    sets, scenario = loading.load_sets(workspace, "tiny"), loading.load_scenario(workspace, "tiny", "half")
    for name, cells in roles.items():
        np.testing.assert_array_equal(getattr(sets, name), cells)
    for name, cells in parts.items():
        np.testing.assert_array_equal(getattr(scenario.sets, name), cells)
    np.testing.assert_array_equal(scenario.group, rest["group"])
    np.testing.assert_array_equal(scenario.controls, rest["controls"])

"""Blocks of shadow models: which cells each was trained on, what each says of every cell, and blocks side by side."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from scforget import artifacts, loading, populations, schema, seeding, stages
from scforget.artifacts import Arrays, FileCheckpoint, Workspace
from scforget.context import Context
from scforget.data.splits import CellSets
from scforget.errors import NonFiniteError
from scforget.pipeline import Item, Pipeline
from scforget.tasks import VaeTask
from scforget.training import Trained, fit
from spoiling import of_tiny, put, stages_in, tiny_project

ROOT = Path(__file__).parents[1]
PLACES = ("work/shadows/tiny", "results/shadows/tiny")
# 108 training and 107 unseen cells: their number is odd, so that the halves differ by one.
FRACTIONS = {"train": 0.45, "stop": 0.05, "aside": 0.055, "unseen": 0.445}
DEALT, APART = 215, 13


class Made(NamedTuple):
    """A project with two blocks; what the first one was when it was the only one: its files, its identity."""

    root: Path
    files: dict[str, bytes]
    fingerprint: str

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.root)

    @property
    def sets(self) -> CellSets:
        return loading.load_sets(self.workspace, "tiny")

    @property
    def task(self) -> VaeTask:
        params = schema.load(self.root / "params.yaml")
        return loading.load_task(self.workspace, params.datasets["tiny"].model, "tiny")

    def scores(self, block: int) -> Arrays:
        return artifacts.read_arrays(self.root / PLACES[0] / str(block) / "scores.npz")


def files(root: Path, block: int) -> dict[str, bytes]:
    """Every file of a block, the timings included."""
    folders = [root / place / str(block) for place in PLACES]
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def fingerprint(root: Path) -> str:
    """Identity of the first block."""
    return Pipeline(root).inputs(Item("shadows", ("tiny", "0"))).fingerprint


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("shadows")
    tiny_project(root)
    of_tiny("split", "fractions", value=FRACTIONS)(root)
    with stages_in(root):
        stages.prepare("tiny")
        stages.split("tiny")
        stages.shadows("tiny", "0")
        before, identity = files(root, 0), fingerprint(root)
        put("pipeline", "shadow_blocks", value=[0, 1])(root)
        stages.shadows("tiny", "1")
    return Made(root, before, identity)


@pytest.mark.parametrize("block", [0, 1])
def test_shadows_score_each_training_unseen_and_aside_cell_once_and_no_stop_cell(made: Made, block: int) -> None:
    cells, sets = made.scores(block)["cells"], made.sets
    assert len(cells) == len(np.unique(cells)) == DEALT + APART
    assert set(cells) == {*sets.train, *sets.unseen, *sets.aside}
    assert not np.isin(sets.stop, cells).any()


@pytest.mark.parametrize("block", [0, 1])
def test_shadows_hold_the_elbo_that_each_model_gives_to_each_cell(made: Made, block: int) -> None:
    found, task = made.scores(block), made.task
    assert found["elbo"].shape == (stages.SHADOWS, DEALT + APART)
    order = np.random.default_rng(0).permutation(DEALT + APART)  # a cell's score has nothing to do with its place
    for seed, row in enumerate(found["elbo"]):
        model = loading.load_model(task, made.root / PLACES[0] / str(block) / f"{seed}.safetensors")
        np.testing.assert_allclose(row[order], task.signals(model, found["cells"][order]).elbo, rtol=1e-5)
        others = np.delete(found["elbo"], seed, axis=0)
        assert not np.isclose(others, row, rtol=1e-5).all(axis=1).any()  # no other model says the same


@pytest.mark.parametrize("block", [0, 1])
def test_shadows_are_members_of_halves_that_no_cell_set_aside_is_in(made: Made, block: int) -> None:
    found = made.scores(block)
    aside = np.isin(found["cells"], made.sets.aside)
    assert found["members"].dtype == bool
    assert not found["members"][:, aside].any()
    halves = found["members"][:, ~aside]
    assert halves.sum(axis=1).tolist() == [DEALT // 2, DEALT - DEALT // 2] * (stages.SHADOWS // 2)
    assert (halves.sum(axis=0) == stages.SHADOWS // 2).all()  # and each cell of half of the models
    assert len(np.unique(halves, axis=0)) == stages.SHADOWS


@pytest.mark.parametrize("seed", [0, 1])
def test_shadows_are_trained_on_their_members_alone(made: Made, seed: int) -> None:
    """The same recipe on the cells of the mask gives the same weights, and on the other half it does not."""
    found, task = made.scores(1), made.task
    params = schema.load(made.root / "params.yaml")
    own = seeding.derive(params.seed, "shadows", "tiny", "1", seed)
    saved, _ = artifacts.read_tensors(made.root / PLACES[0] / "1" / f"{seed}.safetensors")
    aside = np.isin(found["cells"], made.sets.aside)
    same = []
    for members in (found["members"][seed], ~found["members"][seed] & ~aside):
        cells = np.sort(found["cells"][members])
        trained = fit(
            task.new_model(own), task, cells, made.sets.stop, params.datasets["tiny"].training,
            seed=own, cell_set="half",
        )  # fmt: skip
        same.append(all(torch.equal(value, saved[name]) for name, value in trained.model.state_dict().items()))
    assert same == [True, False]


def test_shadows_of_a_further_block_leave_the_first_as_it_was(made: Made) -> None:
    assert files(made.root, 0) == made.files
    assert {Path(name).name for name in made.files} == {
        "scores.npz", "result.json", "history.csv", "cost.json", *(f"{seed}.safetensors" for seed in range(8))
    }  # fmt: skip
    assert fingerprint(made.root) == made.fingerprint  # so that it is not made again either


def test_shadows_of_a_further_block_are_other_models_on_other_halves(made: Made) -> None:
    first, second = made.scores(0), made.scores(1)
    np.testing.assert_array_equal(first["cells"], second["cells"])
    both = np.concatenate([first["members"], second["members"]])
    assert len(np.unique(both, axis=0)) == 2 * stages.SHADOWS
    assert not np.isclose(first["elbo"], second["elbo"]).all(axis=1).any()


def test_shadows_leave_a_diverged_model_out_with_its_half(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "project"
    shutil.copytree(made.root, root, symlinks=True)
    shutil.rmtree(root / "work/.resume")
    shutil.rmtree(root / PLACES[0])
    build = populations.Shadows.build

    def diverge(self: populations.Shadows, seed: int, checkpoint: FileCheckpoint) -> Trained:
        if seed == 3:
            raise NonFiniteError(7, "the loss")
        return build(self, seed, checkpoint)

    monkeypatch.setattr(populations.Shadows, "build", diverge)
    monkeypatch.setattr(Context, "track", lambda _: None)
    monkeypatch.setenv("SCFORGET_WORKERS", "1")
    monkeypatch.chdir(root)
    stages.shadows("tiny", "1")
    found, whole = artifacts.read_arrays(root / PLACES[0] / "1" / "scores.npz"), made.scores(1)
    left = [0, 1, 2, 4, 5, 6, 7]
    for name in ("members", "elbo"):
        np.testing.assert_array_equal(found[name], whole[name][left])
    np.testing.assert_array_equal(found["cells"], whole["cells"])
    assert list(artifacts.read_json(root / PLACES[1] / "1" / "result.json")["failed"]) == ["3"]

"""Which of the scored cells the forgotten ones are compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from anndata import AnnData

from scforget import artifacts, seeding
from scforget.artifacts import Workspace
from scforget.data import controls
from scforget.data.synthetic import PRESETS, simulate
from scforget.errors import EmptyGroupError
from scforget.models.vae import VAESettings
from scforget.scoring import Scorer
from scforget.tasks import Signals, VaeTask

NEIGHBOURS = 2
ARCHITECTURE = VAESettings(hidden=[16], latent=4, likelihood="nb", dispersion="gene-cell", dropout=0.1)
ORDER = np.random.default_rng(1).permutation(240).astype(np.int64)
TRAIN, STOP, ASIDE, UNSEEN = (np.sort(part) for part in np.split(ORDER, [120, 140, 150]))


@pytest.fixture(scope="session")
def cells() -> AnnData:
    made = simulate(PRESETS["tiny"], seed=0)
    made.obs["label"] = made.obs.pop("cluster").astype(str)
    made.obs["total_counts"] = np.asarray(made.X.sum(axis=1), dtype=np.float64).ravel()
    return made


@pytest.fixture(scope="session")
def scenario(cells: AnnData) -> dict[str, np.ndarray]:
    """Half of the training cells of cluster 1 are forgotten; its unseen cells are their controls."""
    group = (cells.obs["label"] == "1").to_numpy()
    forget = TRAIN[group[TRAIN]][::2]
    retain = np.setdiff1d(TRAIN, forget)
    roles = {"forget": forget, "retain": retain, "stop": STOP, "aside": ASIDE}
    return {**roles, "group": group, "controls": UNSEEN[group[UNSEEN]]}


@pytest.fixture
def workspace(tmp_path: Path, cells: AnnData, scenario: dict[str, np.ndarray]) -> Workspace:
    """What the first stages leave; the originals of seeds 2 and 10, of which names the second comes first."""
    workspace = Workspace(tmp_path)
    genes = list(cells.var_names)
    artifacts.write_cells(workspace.work("prepare", "tiny") / "cells.h5ad", cells.copy())
    artifacts.write_json(workspace.work("split", "tiny") / "genes.json", {"genes": genes, "markers": genes[:5]})
    sets = {"train": TRAIN, "stop": STOP, "aside": ASIDE, "unseen": UNSEEN}
    artifacts.write_arrays(workspace.work("split", "tiny") / "sets.npz", sets)
    artifacts.write_arrays(workspace.work("split", "tiny") / "half.npz", scenario)
    task = VaeTask(cells.X, cells.obs["total_counts"].to_numpy(), ARCHITECTURE)
    for seed in (2, 10):
        artifacts.write_tensors(originals(workspace) / f"{seed}.safetensors", task.new_model(seed).state_dict())
    return workspace


def originals(workspace: Workspace) -> Path:
    return workspace.work("train", "tiny")


@pytest.fixture
def scorer(workspace: Workspace) -> Callable[..., Scorer]:
    """The parts of params.yaml that matter here."""

    def make(protocol: str = "canonical", seed: int = 42, neighbours: int = NEIGHBOURS) -> Scorer:
        params = SimpleNamespace(
            seed=seed,
            protocol=protocol,
            audit=SimpleNamespace(matched_neighbours=neighbours),
            datasets={"tiny": SimpleNamespace(model=ARCHITECTURE)},
        )
        return Scorer(workspace, params, "tiny", "half")

    return make


def signals_of(cells: AnnData, scored: np.ndarray, seed: int) -> Signals:
    task = VaeTask(cells.X, cells.obs["total_counts"].to_numpy(), ARCHITECTURE)
    return task.signals(task.new_model(seed), scored)


def matched(latent: np.ndarray, forgotten: int) -> np.ndarray:
    """Among all scored cells, of which the forgotten ones come first."""
    found = controls.matched_knn(latent[:forgotten], latent[forgotten:], NEIGHBOURS)
    return np.concatenate([np.zeros(forgotten, dtype=bool), found])


def test_scorer_scores_the_forgotten_cells_first_and_then_all_unseen_ones(
    scorer: Callable[..., Scorer], cells: AnnData, scenario: dict[str, np.ndarray]
) -> None:
    made = scorer()
    np.testing.assert_array_equal(made.cells, [*scenario["forget"], *UNSEEN])
    np.testing.assert_array_equal(made.labels, cells.obs["label"].to_numpy()[made.cells])


def test_groups_are_forgotten_cells_and_three_kinds_of_control(
    scorer: Callable[..., Scorer], workspace: Workspace, scenario: dict[str, np.ndarray]
) -> None:
    made = scorer()
    groups = made.groups(originals(workspace))
    n = len(scenario["forget"])
    np.testing.assert_array_equal(groups.forget, np.arange(len(made.cells)) < n)
    np.testing.assert_array_equal(made.cells[groups.controls["same_group"]], scenario["controls"])
    np.testing.assert_array_equal(groups.controls["all_unseen"], ~groups.forget)
    assert list(groups.controls) == ["same_group", "matched_knn", "all_unseen"]
    size = groups.sizes()["matched_knn"]
    assert NEIGHBOURS <= size <= NEIGHBOURS * n
    assert size < len(UNSEEN)
    assert not (groups.controls["matched_knn"] & groups.forget).any()


def test_groups_match_by_posterior_means_of_the_first_original(
    scorer: Callable[..., Scorer], workspace: Workspace, cells: AnnData, scenario: dict[str, np.ndarray]
) -> None:
    made, n = scorer(), len(scenario["forget"])
    found = made.groups(originals(workspace)).controls["matched_knn"]
    np.testing.assert_array_equal(found, matched(signals_of(cells, made.cells, 2).mu, n))
    assert not np.array_equal(found, matched(signals_of(cells, made.cells, 10).mu, n))
    again = scorer(seed=43).groups(originals(workspace)).controls["matched_knn"]
    np.testing.assert_array_equal(found, again)  # nothing is drawn


def test_groups_as_published_match_by_one_draw_of_each_posterior(
    scorer: Callable[..., Scorer], workspace: Workspace, cells: AnnData, scenario: dict[str, np.ndarray]
) -> None:
    made, n = scorer("published"), len(scenario["forget"])
    found, canonical = (one.groups(originals(workspace)).controls for one in (made, scorer()))
    signals = signals_of(cells, made.cells, 2)
    noise = seeding.numpy_generator(42, "matched", "tiny half").standard_normal(signals.mu.shape)
    wanted = matched(signals.mu + np.sqrt(np.exp(signals.log_var)) * noise, n)
    np.testing.assert_array_equal(found["matched_knn"], wanted)
    assert not np.array_equal(found["matched_knn"], canonical["matched_knn"])
    for name in ("same_group", "all_unseen"):  # no other control depends on a latent
        np.testing.assert_array_equal(found[name], canonical[name])


def test_groups_as_published_are_the_same_for_the_same_seed_only(
    scorer: Callable[..., Scorer], workspace: Workspace
) -> None:  # fmt: skip
    first, again, other = (
        scorer("published", seed).groups(originals(workspace)).controls["matched_knn"] for seed in (42, 42, 43)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_groups_want_as_many_unseen_cells_as_neighbours(scorer: Callable[..., Scorer], workspace: Workspace) -> None:
    assert scorer(neighbours=len(UNSEEN)).groups(originals(workspace)).sizes()["matched_knn"] == len(UNSEEN)
    with pytest.raises(EmptyGroupError, match="matched_knn controls: found 90 unseen cells; wanted at least 91"):
        scorer(neighbours=len(UNSEEN) + 1).groups(originals(workspace))

"""Scored cells and their controls, the scores that every attack leaves, and what the stages write and read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from anndata import AnnData

from scforget import artifacts, config, scoring, seeding
from scforget.artifacts import Workspace
from scforget.attacks import MODEL_ATTACKS
from scforget.attacks.mlp import PublishedAttacker
from scforget.attacks.references import References
from scforget.audit import AuditSettings
from scforget.audit.assess import with_references
from scforget.audit.scene import Groups, Population, Scene
from scforget.data import controls
from scforget.data.synthetic import PRESETS, simulate
from scforget.errors import ArtifactError, DataError, EmptyGroupError
from scforget.models.vae import VAESettings
from scforget.scoring import Scorer
from scforget.tasks import Signals, VaeTask

AUDIT = config.read_yaml(Path(__file__).parents[1] / "params.yaml")["audit"]
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


def audit_settings(neighbours: int) -> AuditSettings:
    """The project's own, with attackers that learn for a moment only."""
    mlp = {**AUDIT["attacks"]["mlp"], "hidden": [4], "epochs": 1, "folds": 2, "attackers": 2, "shuffled_draws": 2}
    changes = {"matched_neighbours": neighbours, "attacks": {**AUDIT["attacks"], "mlp": mlp}}
    return AuditSettings.model_validate({**AUDIT, **changes})


def originals(workspace: Workspace) -> Path:
    return workspace.work("train", "tiny")


@pytest.fixture
def scorer(workspace: Workspace) -> Callable[..., Scorer]:
    """The parts of params.yaml that matter here."""

    def make(protocol: str = "canonical", seed: int = 42, neighbours: int = NEIGHBOURS) -> Scorer:
        params: Any = SimpleNamespace(
            seed=seed,
            protocol=protocol,
            audit=audit_settings(neighbours),
            datasets={"tiny": SimpleNamespace(model=ARCHITECTURE)},
        )
        return Scorer(workspace, params, "tiny", "half")

    return make


def signals_of(cells: AnnData, scored: np.ndarray, seed: int) -> Signals:
    task = VaeTask(cells.X, cells.obs["total_counts"].to_numpy(), ARCHITECTURE)
    return task.signals(task.new_model(seed), scored)


def matched(latent: np.ndarray, forgotten: int) -> np.ndarray:
    """Among all scored cells, of which the forgotten ones come first and those set aside last."""
    found = controls.matched_knn(latent[:forgotten], latent[forgotten : forgotten + len(UNSEEN)], NEIGHBOURS)
    return np.concatenate([np.zeros(forgotten, dtype=bool), found, np.zeros(len(ASIDE), dtype=bool)])


def test_scorer_scores_forgotten_cells_then_all_unseen_ones_then_those_set_aside(
    scorer: Callable[..., Scorer], cells: AnnData, scenario: dict[str, np.ndarray]
) -> None:
    made = scorer()
    np.testing.assert_array_equal(made.cells, [*scenario["forget"], *UNSEEN, *ASIDE])
    for mask, wanted in ((made.forget, scenario["forget"]), (made.unseen, UNSEEN), (made.aside, ASIDE)):
        np.testing.assert_array_equal(made.cells[mask], wanted)
    np.testing.assert_array_equal(made.labels, cells.obs["label"].to_numpy()[made.cells])
    np.testing.assert_array_equal(made.names, cells.obs_names.to_numpy()[made.cells])


def test_scorer_knows_donors_where_the_cells_have_them(
    scorer: Callable[..., Scorer], workspace: Workspace, cells: AnnData
) -> None:
    path, known = workspace.work("prepare", "tiny") / "cells.h5ad", cells.copy()
    known.obs["donor"] = np.array(["d1", "d22"])[np.arange(cells.n_obs) % 2]
    artifacts.write_cells(path, known)
    made = scorer()
    np.testing.assert_array_equal(made.donors, np.array(["d1", "d22"])[made.cells % 2])
    del known.obs["donor"]
    artifacts.write_cells(path, known)
    np.testing.assert_array_equal(scorer().donors, [""] * len(made.cells))


def test_groups_are_forgotten_cells_and_three_kinds_of_control(
    scorer: Callable[..., Scorer], workspace: Workspace, scenario: dict[str, np.ndarray]
) -> None:
    made = scorer()
    groups = made.groups(originals(workspace))
    n = len(scenario["forget"])
    np.testing.assert_array_equal(groups.forget, np.arange(len(made.cells)) < n)
    np.testing.assert_array_equal(made.cells[groups.controls["same_group"]], scenario["controls"])
    np.testing.assert_array_equal(made.cells[groups.controls["all_unseen"]], UNSEEN)
    assert not any((mask & made.aside).any() for mask in groups.controls.values())
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


# scores of every attack


@pytest.fixture
def shadows(workspace: Workspace) -> list[Path]:
    """Two blocks of shadow models, each with its own order of the cells; ELBOs say which model and which cell."""
    paths = [workspace.work("shadows", "tiny", str(block)) / "scores.npz" for block in range(2)]
    for block, path in enumerate(paths):
        held = np.random.default_rng(block).permutation(np.concatenate([TRAIN, UNSEEN, ASIDE]))
        models = 100 * block + np.arange(8 + 2 * block)[:, None]
        arrays = {"cells": held, "elbo": shadow_elbo(models, held), "members": shadow_member(models, held)}
        artifacts.write_arrays(path, arrays)
    return paths


def shadow_elbo(models: np.ndarray, cells: np.ndarray) -> np.ndarray:
    return np.asarray(-100.0 - models + 0.001 * cells + 0.1 * shadow_member(models, cells))


def shadow_member(models: np.ndarray, cells: np.ndarray) -> np.ndarray:
    return np.asarray(((models + cells) % 2 == 0) & ~np.isin(cells, ASIDE))


def test_references_map_each_block_of_shadow_models_onto_the_scored_cells(
    scorer: Callable[..., Scorer], shadows: list[Path]
) -> None:
    made = scorer()
    retrains = np.random.default_rng(0).normal(size=(3, len(made.cells)))
    found = made.references(retrains, shadows)
    models = np.array([*range(8), *range(100, 110)])[:, None]
    np.testing.assert_array_equal(found.shadows, shadow_elbo(models, made.cells))
    np.testing.assert_array_equal(found.members, shadow_member(models, made.cells))
    np.testing.assert_array_equal(found.retrains, retrains)
    np.testing.assert_array_equal(found.aside, made.aside)


def test_references_refuse_a_shadow_model_without_a_score(scorer: Callable[..., Scorer], shadows: list[Path]) -> None:
    made = scorer()
    block = artifacts.read_arrays(shadows[1])
    block["elbo"][0, list(block["cells"]).index(made.cells[0])] = np.nan
    artifacts.write_arrays(shadows[1], block)
    with pytest.raises(DataError, match="scores of the shadow models: found 1 scores that are NaN"):
        made.references(np.zeros((3, len(made.cells))), shadows)


@pytest.mark.parametrize("kind", ["population", "populations"])
def test_populations_hold_the_scores_of_every_attack_model_by_model(
    scorer: Callable[..., Scorer], workspace: Workspace, shadows: list[Path], cells: AnnData, kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("SCFORGET_WORKERS", "1")
    made, folder = scorer(), originals(workspace)
    made.train_published(folder, made.groups(folder))
    found = made.population(folder) if kind == "population" else made.populations(folder)[0]
    n = len(made.cells)
    assert found.seeds == [2, 10]
    assert found.attackers.shape == (2, 2, n)
    for model, seed in enumerate(found.seeds):
        signals = signals_of(cells, made.cells, seed)
        np.testing.assert_allclose(found.scores["elbo"][model], signals.elbo)
        np.testing.assert_allclose(found.scores["mlp"][model], found.attackers[model].mean(axis=0))
    np.testing.assert_allclose(found.latent, signals_of(cells, made.cells, 2).mu, rtol=1e-6)
    references = made.references(found.scores["elbo"], shadows)
    scores = with_references(found, references, audit_settings(NEIGHBOURS), own=False).scores
    assert set(scores) == {
        "reconstruction", "kl", "elbo", "knn", "mlp", "published_mlp", "likelihood_ratio", "lira_online",
        "lira_offline", "rmia_online", "rmia_offline",
    }  # fmt: skip
    assert all(values.shape == (2, n) and np.isfinite(values[:, ~made.aside]).all() for values in scores.values())


def test_population_without_the_published_attacker_lacks_its_score_only(
    scorer: Callable[..., Scorer], workspace: Workspace
) -> None:
    found = scorer().population(originals(workspace))
    assert "published_mlp" not in found.scores
    assert len(found.scores) == 3 + len(MODEL_ATTACKS)  # threshold has three scores; and mlp


def test_population_refuses_a_folder_with_a_single_model(scorer: Callable[..., Scorer], workspace: Workspace) -> None:
    (originals(workspace) / "10.safetensors").unlink()
    with pytest.raises(EmptyGroupError, match="found 1 models; wanted at least 2"):
        scorer().population(originals(workspace))


# what the stages write and read back


def made_population(seed: int, models: int, n: int) -> Population:
    rng = np.random.default_rng(seed)
    scores = {name: rng.normal(size=(models, n)) for name in ("elbo", "lira_online")}
    scores["lira_online"][:, -1] = np.nan
    rows = [{"outside": {"elbo": float(rng.normal())}} for _ in range(models)]
    seeds, latent = rng.permutation(50)[:models].tolist(), rng.normal(size=(n, 2)).astype(np.float32)
    return Population(seeds, scores, rows, latent, rng.normal(size=(models, 3, n)))


@pytest.fixture
def scene() -> Scene:
    n, part = 7, np.array([0, 0, 1, 1, 2, 3, 3])
    originals, retrains = made_population(0, 2, n), made_population(1, 4, n)
    groups = Groups(part == 0, {"same_group": part == 1, "matched_knn": part == 2, "all_unseen": (part % 3) > 0})
    members = (np.arange(n) % 2 == np.arange(2)[:, None]) & (part < 3)
    references = References(retrains.scores["elbo"], np.random.default_rng(2).normal(size=(2, n)), members, part == 3)
    labels, names = np.array(list("BBTTTBé")), np.array([f"AAAC-{cell}" for cell in range(n)])
    return Scene(originals, retrains, groups, references, labels, names, np.array(["d1", "", *"abcde"]))


@pytest.fixture
def folder(tmp_path: Path, scene: Scene) -> Path:
    """What the reference stage leaves, the published attacker included."""
    rng = np.random.default_rng(3)
    weights = tuple(rng.normal(size=shape).astype(np.float32) for shape in ((4, 5), (4, 4), (1, 4)))
    attacker = PublishedAttacker(weights, tuple(weight[:, 0] for weight in weights), np.array([0, 2, 5]))
    arrays = {f"attacker/{name}": values for name, values in attacker.to_arrays().items()}
    artifacts.write_arrays(tmp_path / "scores.npz", {**scoring.scene_arrays(scene), **arrays})
    populations = {"original": scene.originals, "retrain": scene.target}
    records = {name: {"seeds": own.seeds, "utility_rows": own.utility} for name, own in populations.items()}
    artifacts.write_json(tmp_path / "result.json", records)
    return tmp_path


def test_read_scene_gives_back_what_scene_arrays_wrote(folder: Path, scene: Scene) -> None:
    found = scoring.read_scene(folder)
    for one, other in ((found.originals, scene.originals), (found.target, scene.target)):
        assert (one.seeds, one.utility) == (other.seeds, other.utility)
        np.testing.assert_equal(one.scores, other.scores)
        np.testing.assert_array_equal(one.latent, other.latent)
        np.testing.assert_array_equal(one.attackers, other.attackers)
    np.testing.assert_array_equal(found.groups.forget, scene.groups.forget)
    np.testing.assert_equal(found.groups.controls, scene.groups.controls)
    for part in ("retrains", "shadows", "members", "aside"):
        np.testing.assert_array_equal(getattr(found.references, part), getattr(scene.references, part))
    for part in ("labels", "names", "donors"):
        np.testing.assert_array_equal(getattr(found, part), getattr(scene, part))
    assert found.references.members.dtype == found.groups.forget.dtype == bool


def test_read_attacker_gives_back_the_attacker_that_was_written(folder: Path) -> None:
    found = scoring.read_attacker(folder)
    features = np.random.default_rng(4).normal(size=(6, 5))
    rng = np.random.default_rng(3)
    weights = [rng.normal(size=shape).astype(np.float32).astype(float) for shape in ((4, 5), (4, 4), (1, 4))]
    values = features
    for weight in weights[:2]:
        values = np.maximum(values @ weight.T + weight[:, 0], 0)
    np.testing.assert_allclose(found.score(features), (values @ weights[2].T + weights[2][:, 0]).ravel())
    np.testing.assert_array_equal(found.trained_on, [0, 2, 5])


def test_read_scene_and_read_attacker_name_what_is_missing(folder: Path) -> None:
    arrays = artifacts.read_arrays(folder / "scores.npz")
    artifacts.write_arrays(folder / "scores.npz", {k: v for k, v in arrays.items() if k != "attacker/bias_1"})
    with pytest.raises(DataError, match="found no bias_1"):
        scoring.read_attacker(folder)
    (folder / "result.json").unlink()
    with pytest.raises(ArtifactError, match=r"result\.json: no such file"):
        scoring.read_scene(folder)

"""Scored items and their controls, what every attack leaves of a classifier, and what stages write and read back."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from scforget import artifacts, config, scoring
from scforget.artifacts import Workspace
from scforget.attacks import CLASS_MODEL_ATTACKS
from scforget.attacks.confidence import attack_features
from scforget.audit import ClassAuditSettings
from scforget.audit.assess import describe_target
from scforget.audit.classification import ClassPopulation, ClassScene
from scforget.class_scoring import ClassScorer
from scforget.class_tasks import AugmentationSettings, ClassifierTask, ClassSignals
from scforget.errors import ArtifactError, EmptyGroupError
from scforget.models.classifiers import NetSettings

AUDIT = config.read_yaml(Path(__file__).parents[1] / "params.yaml")["audit_classifier"]
NET: NetSettings = TypeAdapter(NetSettings).validate_python({"kind": "mlp", "hidden": [8], "dropout": 0.1})
PLAIN = AugmentationSettings(crop=0, flip=False, noise=0.0)
CLASSES = np.array(["ant", "bee", "cow"])
N = 160
ORDER = np.random.default_rng(1).permutation(N).astype(np.int64)
TRAIN, ASIDE, UNSEEN, TEST = (np.sort(part) for part in np.split(ORDER, [60, 75, 135]))
FORGET, RETAIN = TRAIN[::5], np.setdiff1d(TRAIN, TRAIN[::5])
SCORED = np.concatenate([FORGET, UNSEEN, ASIDE])
LABELS = (np.arange(N) % 3).astype(np.int64)
SEEDS = (2, 10, 11)


@cache
def task() -> ClassifierTask:
    inputs = np.random.default_rng(0).normal(size=(N, 5)).astype(np.float32)
    return ClassifierTask(inputs, LABELS, CLASSES.tolist(), NET, PLAIN)


def signals_of(seed: int, cells: np.ndarray) -> ClassSignals:
    return task().signals(task().new_model(seed), cells)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """What the first stages leave: originals of seeds 2, 10 and 11, retrains of others, one block of shadows."""
    workspace = Workspace(tmp_path)
    folder = workspace.work("prepare_classifier", "tiny")
    names = np.array([f"item {item}" for item in range(N)])
    donors = np.array(["d1", ""])[np.arange(N) % 2]
    items = {"inputs": task().inputs, "labels": LABELS, "classes": CLASSES, "names": names, "donors": donors}
    artifacts.write_arrays(folder / "items.npz", {**items, "test": TEST})
    none = TRAIN[:0]
    sets = {"train": TRAIN, "stop": none, "aside": ASIDE, "unseen": UNSEEN}
    artifacts.write_arrays(folder / "sets.npz", sets)
    request(workspace, np.ones(N, dtype=bool))
    for stage, seeds in (("train_classifier/tiny", SEEDS), ("retrain_classifier/tiny/some", range(20, 26))):
        for seed in seeds:
            path = workspace.root / "work" / stage / f"{seed}.safetensors"
            artifacts.write_tensors(path, task().new_model(seed).state_dict())
    return workspace


def request(workspace: Workspace, group: np.ndarray) -> None:
    """Write the forget request; ``group`` is the kind that it forgets a part of."""
    roles = {"forget": FORGET, "retain": RETAIN, "stop": TRAIN[:0], "aside": ASIDE}
    arrays = {**roles, "group": group, "controls": UNSEEN[group[UNSEEN]][::2]}
    artifacts.write_arrays(workspace.work("prepare_classifier", "tiny") / "some.npz", arrays)


def folders(workspace: Workspace) -> tuple[Path, Path]:
    return workspace.work("train_classifier", "tiny"), workspace.work("retrain_classifier", "tiny", "some")


def shadow_block(workspace: Workspace, cells: np.ndarray) -> list[Path]:
    """Eight shadow models whose scores say which model and which item; items set aside are in none."""
    path = workspace.work("shadows_classifier", "tiny", "0") / "scores.npz"
    held = np.random.default_rng(2).permutation(cells)
    models = np.arange(8)[:, None]
    members = ((models + held) % 2 == 0) & ~np.isin(held, ASIDE)
    artifacts.write_arrays(path, {"cells": held, "members": members, "confidence": models + 0.001 * held + members})
    return [path]


@pytest.fixture
def scorer(workspace: Workspace) -> Callable[..., ClassScorer]:
    def make() -> ClassScorer:
        mlp = {**AUDIT["attacks"]["mlp"], "hidden": [4], "epochs": 1, "folds": 2, "attackers": 2, "shuffled_draws": 2}
        less = {"bootstrap_draws": 20, "null_draws": 20, "permutation_draws": 20, "matched_neighbours": 2}
        audit = ClassAuditSettings.model_validate({**AUDIT, **less, "attacks": {**AUDIT["attacks"], "mlp": mlp}})
        section = SimpleNamespace(model=NET, augmentation=PLAIN, class_weights="none")
        params: Any = SimpleNamespace(seed=42, audit_classifier=audit, classifiers={"tiny": section})
        return ClassScorer(workspace, params, "tiny", "some")

    return make


def test_class_scorer_scores_forget_items_then_unseen_ones_then_those_set_aside(
    scorer: Callable[..., ClassScorer],
) -> None:
    made = scorer()
    np.testing.assert_array_equal(made.cells, SCORED)
    np.testing.assert_array_equal(made.labels, CLASSES[LABELS[SCORED]])
    np.testing.assert_array_equal(made.names, [f"item {item}" for item in SCORED])
    np.testing.assert_array_equal(made.donors, np.array(["d1", ""])[SCORED % 2])
    for mask, wanted in ((made.forget, FORGET), (made.unseen, UNSEEN), (made.aside, ASIDE)):
        np.testing.assert_array_equal(made.cells[mask], wanted)
    assert made.gene_list() is None
    assert made.train_published(Path(), made.groups) is None  # type: ignore[arg-type]
    assert made.attacker is None


def test_groups_of_classifiers_match_neighbours_by_features(
    scorer: Callable[..., ClassScorer], workspace: Workspace
) -> None:
    made = scorer()
    found = made.groups(folders(workspace)[0])
    features = signals_of(2, SCORED).features
    nearest = [np.argsort(((features[made.unseen] - one) ** 2).sum(axis=1))[:2] for one in features[made.forget]]
    matched = np.flatnonzero(made.unseen)[np.unique(nearest)]
    np.testing.assert_array_equal(np.flatnonzero(found.controls["matched_knn"]), matched)
    np.testing.assert_array_equal(made.cells[found.controls["same_group"]], UNSEEN[::2])


def test_population_of_classifiers_has_every_attack_and_all_outputs(
    scorer: Callable[..., ClassScorer], workspace: Workspace
) -> None:
    found = scorer().population(folders(workspace)[0])
    assert isinstance(found, ClassPopulation)
    assert (found.seeds, found.primary) == (list(SEEDS), "confidence")
    assert set(found.scores) == {"confidence", "loss", "entropy", "max_prob", "knn", "mlp"}
    assert set(CLASS_MODEL_ATTACKS) == {"confidence", "knn"}
    every = np.concatenate([SCORED, RETAIN, TEST])
    for model, seed in enumerate(SEEDS):
        signals = signals_of(seed, every)
        np.testing.assert_allclose(found.score[model], signals.confidence[: len(SCORED)], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.outputs.logits[model], signals.logits, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.scores["mlp"][model], found.attackers[model].mean(axis=0))
    np.testing.assert_array_equal(found.outputs.labels, LABELS[every])
    parts = {"forget": FORGET, "retain": RETAIN, "test": TEST, "controls": UNSEEN[::2]}
    for name, wanted in parts.items():
        np.testing.assert_array_equal(every[getattr(found.outputs, name)], wanted)
    np.testing.assert_allclose(found.latent, signals_of(2, SCORED).features, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["scattered", "class"])
def test_utility_of_classifiers_is_accuracy_on_unseen_and_test_items(
    scorer: Callable[..., ClassScorer], workspace: Workspace, kind: str
) -> None:
    group = np.ones(N, dtype=bool) if kind == "scattered" else LABELS == 1
    request(workspace, group)
    found = scorer().population(folders(workspace)[0]).utility
    judged = np.concatenate([UNSEEN, TEST])
    for seed, row in zip(SEEDS, found, strict=True):
        right = signals_of(seed, judged).logits.argmax(axis=1) == LABELS[judged]
        inside = np.zeros(len(judged), dtype=bool) if kind == "scattered" else group[judged]
        assert row["outside"] == {"accuracy": right[~inside].mean()}
        assert row.get("inside") == (None if kind == "scattered" else {"accuracy": right[inside].mean()})


def test_population_of_classifiers_refuses_a_single_model(
    scorer: Callable[..., ClassScorer], workspace: Workspace
) -> None:
    for seed in SEEDS[1:]:
        (folders(workspace)[0] / f"{seed}.safetensors").unlink()
    with pytest.raises(EmptyGroupError, match="found 1 models; wanted at least 2"):
        scorer().population(folders(workspace)[0])


def test_shuffled_labels_are_those_of_the_classifiers_own_features(
    scorer: Callable[..., ClassScorer], workspace: Workspace
) -> None:
    made = scorer()
    found = made.shuffled(folders(workspace)[1])
    assert 0 <= found["low"] <= found["mean"] <= found["high"] <= 1
    assert made._features(signals_of(20, SCORED)).shape == attack_features(signals_of(20, SCORED)).shape


def scene_of(made: ClassScorer, workspace: Workspace, paths: list[Path]) -> ClassScene:
    originals, retrains = (made.population(folder) for folder in folders(workspace))
    return made.scene(originals, retrains, made.groups(folders(workspace)[0]), paths)


def test_scene_of_classifiers_has_shadow_models_on_scored_and_on_training_items(
    scorer: Callable[..., ClassScorer], workspace: Workspace
) -> None:
    made = scorer()
    found = scene_of(made, workspace, shadow_block(workspace, np.concatenate([TRAIN, UNSEEN, ASIDE])))
    trained = np.concatenate([FORGET, RETAIN])
    for references, cells in ((found.references, SCORED), (found.trained, trained)):
        members = ((np.arange(8)[:, None] + cells) % 2 == 0) & ~np.isin(cells, ASIDE)
        np.testing.assert_array_equal(references.members, members)
        np.testing.assert_allclose(references.shadows, np.arange(8)[:, None] + 0.001 * cells + members)
    wanted = [signals_of(seed, trained).confidence for seed in range(20, 26)]
    np.testing.assert_allclose(found.trained.retrains, wanted, rtol=1e-5, atol=1e-6)
    assert {"lira_online", "rmia_online", "likelihood_ratio"} < set(found.target.scores)


def test_scene_of_classifiers_names_items_that_no_shadow_model_scored(
    scorer: Callable[..., ClassScorer], workspace: Workspace
) -> None:
    paths = shadow_block(workspace, np.concatenate([TRAIN[RETAIN[0] != TRAIN], UNSEEN, ASIDE]))
    with pytest.raises(ArtifactError, match="1 cells of tiny some are not in it; run the shadows stage again"):
        scene_of(scorer(), workspace, paths)


def test_read_scene_gives_back_a_scene_of_classifiers(
    scorer: Callable[..., ClassScorer], workspace: Workspace, tmp_path: Path
) -> None:
    made = scorer()
    scene = scene_of(made, workspace, shadow_block(workspace, np.concatenate([TRAIN, UNSEEN, ASIDE])))
    target = describe_target(scene, made._settings, 42) | made.more(scene.target, scene, None)
    original = {"score": "confidence", "seeds": scene.originals.seeds, "utility_rows": scene.originals.utility}
    artifacts.write_arrays(tmp_path / "scores.npz", scoring.scene_arrays(scene))
    artifacts.write_json(tmp_path / "result.json", {"original": original, "retrain": target})
    found = scoring.read_scene(tmp_path)
    assert isinstance(found, ClassScene)
    assert found.target.primary == "confidence"
    for name in ("retrains", "shadows", "members", "aside"):
        np.testing.assert_array_equal(getattr(found.trained, name), getattr(scene.trained, name))
        np.testing.assert_array_equal(getattr(found.references, name), getattr(scene.references, name))
    own = made.population(folders(workspace)[0])
    again = artifacts.read_json(tmp_path / "result.json")["retrain"]
    assert made.more(own, found, again) == made.more(own, scene, target)

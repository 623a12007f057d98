"""How tests of the classifiers' stages lay out a tiny project: cells by an MLP, and pictures of people by a CNN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from scforget import auditing, stages
from scforget.families import CLASSIFIERS
from spoiling import shrink as shrink_cells
from spoiling import tiny_project

METHODS = ["retain_finetune", "ssd", "ungan"]


def shrink(params: Any) -> None:
    """Classify the tiny simulated cells and a hundred pictures: 2 originals, 4 retrains, 2 epochs."""
    of_images, of_cells = params["classifiers"].pop("digits"), params["classifiers"].pop("pbmc68k")
    params["classifiers"] = {"tiny": of_cells, "people": of_images}
    of_cells["split"]["fractions"] = of_images["split"]["fractions"] = {
        "train": 0.4, "aside": 0.1, "unseen": 0.4, "test": 0.1
    }  # fmt: skip
    of_cells["model"]["hidden"] = [8]
    of_images["model"].update(widths=[4], hidden=8)
    of_images["split"]["by_identity"] = True
    of_cells["scenarios"] = {"some": {"kind": "scattered", "cells": 12}}
    of_images["scenarios"] = {"some": {"kind": "people", "fraction": 0.3}}
    for section in (of_cells, of_images):
        section["training"]["epochs"] = 2
        section["together"] = 2
    params["pipeline"]["classifiers"] = {
        "datasets": ["tiny", "people"], "scenarios": ["some"], "shadow_blocks": [0], "methods": METHODS,
    }  # fmt: skip
    params["train_classifier"]["seeds"], params["retrain_classifier"]["seeds"] = [0, 1], [0, 1, 2, 3]
    audit = params["audit_classifier"]
    audit.update(bootstrap_draws=50, null_draws=200, permutation_draws=100, min_controls=5, matched_neighbours=3)
    audit["attacks"]["mlp"].update(hidden=[8], epochs=2, attackers=1)
    audit["attacks"]["knn"]["neighbours"] = 3
    params["unlearn_classifier"]["ungan"].update(epochs=1)


def pictures(path: Path) -> None:
    """Write 120 noisy 4 × 4 pictures in 3 classes, six of each of twenty people."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    people = np.arange(120) // 6
    images = rng.integers(0, 60, (120, 4, 4)) + 60 * labels[:, None, None]
    path.mkdir(parents=True)
    names = np.array([f"person {number}" for number in people])
    np.savez(path / "images.npz", images=images.astype(np.uint8), labels=labels, identities=names)


def class_project(root: Path) -> None:
    """Lay out the project; nothing is made yet."""

    def both(params: Any) -> None:
        kept, plan = params["classifiers"], params["pipeline"]["classifiers"]
        shrink_cells(params)
        params["classifiers"], params["pipeline"]["classifiers"] = kept, plan
        shrink(params)

    tiny_project(root, both)
    pictures(root / "data" / "people")


def run_all(dataset: str) -> None:
    """Run every stage of one data set's classifiers."""
    stages.prepare_classifier(dataset)
    stages.train(dataset, CLASSIFIERS)
    stages.retrain(dataset, "some", CLASSIFIERS)
    stages.shadows(dataset, "0", CLASSIFIERS)
    stages.unlearn(dataset, "some", None, CLASSIFIERS)
    auditing.reference(dataset, "some", CLASSIFIERS)
    auditing.audit(dataset, "some", CLASSIFIERS)

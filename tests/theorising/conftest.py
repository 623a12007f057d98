"""A tiny project whose originals and retrained models are made, once for all tests of the theory pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import spoiling
from scforget import stages
from scforget.pipeline import THEORY


def shrink(params: Any) -> None:
    """A theory pipeline of seconds: 2 models of each kind, one request, two methods."""
    params["retrain"]["seeds"] = [0, 1, 2, 3]
    params["unlearn"]["fisher_scrub"]["finetune"]["max_epochs"] = 1
    params["unlearn"]["partial_reset"].update(max_epochs=1, patience=1)
    params["audit"]["attacks"]["mlp"].update(epochs=2, attackers=1, folds=2, hidden=[8])
    theory = params["theory"]
    theory.update(models=2, latent=2)
    theory["overlap"].update(draws=2, cells=200, bootstrap_draws=100, random_sets=20, batch_size=16)
    theory["factorisation"].update(draws=1, cells=30, resamples=50, shuffles=2)
    theory["nets"]["probe"]["max_epochs"] = 5
    theory["nets"]["deep"].update(hidden=[8], max_epochs=2)
    theory["nets"]["tolerance"] = 0.1
    theory["ablation"] = {
        "scenario": "half", "feature_scenarios": ["half"], "conditional_scenario": "half",
        "conditional_methods": ["fisher_scrub"], "conditional_retrains": 4,
        "grids": [{"method": "ssd", "fixed": {}, "grid": {"alpha": [1.0, 5.0]}}],
        "sizes": {"sizes": [10], "retained_share": 0.3, "retrains": 4, "methods": ["ssd"]},
        "curves": {"methods": ["partial_reset"], "runs": 2, "growth": 2.0},
    }  # fmt: skip


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared, split, with 2 originals and 4 retrained models."""
    root = tmp_path_factory.mktemp("theory")
    spoiling.tiny_project(root)
    (root / THEORY).mkdir(parents=True)
    shutil.copy(spoiling.ROOT / THEORY / "dvc.yaml", root / THEORY)
    spoiling.edit(root, shrink)
    with spoiling.stages_in(root):
        stages.prepare("tiny")
        stages.split("tiny")
        stages.train("tiny")
        stages.retrain("tiny", "half")
    return root

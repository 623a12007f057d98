"""A small forget request, and models of it that are only scores: what the tests of the ablations share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from scforget.arrays import IntArray
from scforget.audit import AuditSettings
from scforget.config import read_yaml
from scforget.data.splits import ForgetSets, Scenario
from scforget.tasks import VaeTask
from scforget.theory.judging import Case, Scored, make_case

CELLS = 240


def audit_settings() -> AuditSettings:
    """The project's own, with few resamples and a weak attacker."""
    content: dict[str, Any] = read_yaml(Path(__file__).parents[1] / "params.yaml")["audit"]
    attacks = content["attacks"]
    mlp = {**attacks["mlp"], "hidden": [8], "dropout": 0.0, "epochs": 25, "batch_size": 16, "learning_rate": 3e-2,
           "attackers": 1, "folds": 2}  # fmt: skip
    return AuditSettings.model_validate({**content, "bootstrap_draws": 50, "attacks": {**attacks, "mlp": mlp}})


def unseen_cells(sets: ForgetSets) -> IntArray:
    """Cells that no set of the request holds."""
    used = np.concatenate([sets.forget, sets.retain, sets.stop, sets.aside])
    return np.setdiff1d(np.arange(CELLS), used)


def small_case(task: VaeTask, sets: ForgetSets) -> Case:
    """A request for cells of a kind of which 25 are unseen."""
    group, unseen = np.zeros(CELLS, dtype=bool), unseen_cells(sets)
    group[sets.forget] = group[unseen[:25]] = True
    return make_case(task, Scenario(sets, group, unseen[:25]), unseen, task.new_model(0), 3)


def draw(case: Case, models: int, seed: int, shift: float = 0.0) -> list[Scored]:
    """Models of 3 latent dimensions that agree on each cell up to noise; ``shift`` nats more for the forgotten ones."""
    cells = np.random.default_rng(0).normal(-300, 20, len(case.cells))
    noise, found = np.random.default_rng(seed), []
    for _ in range(models):
        elbo = cells + noise.normal(0, 2, len(cells)) + shift * case.groups.forget
        kl = noise.uniform(5, 9, len(cells))
        latent = noise.normal(size=(len(cells), 8))  # μ, log σ² and two norms
        found.append(Scored(np.column_stack([elbo + kl, kl, elbo, latent]), 100))
    return found

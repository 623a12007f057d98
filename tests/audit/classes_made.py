"""Made-up classifiers of two classes, told by the confidence of the true class: originals, retrains, shadows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from scforget import config
from scforget.arrays import FloatArray
from scforget.attacks.references import References
from scforget.audit import ClassAuditSettings
from scforget.audit.classification import ClassOutputs, ClassPopulation, ClassScene
from scforget.audit.scene import Groups

AUDIT = config.read_yaml(Path(__file__).parents[2] / "params.yaml")["audit_classifier"]
#: Forget items, controls, items set aside, retained ones, test items.
F, U, A, R, T = 12, 20, 5, 300, 40
N = F + U + A
PART = np.repeat(np.arange(5), [F, U, A, R, T])
LABELS = (np.arange(PART.size) % 2).astype(np.int64)
LEVEL = 0.95


def settings(**attacks: Any) -> ClassAuditSettings:
    """The project's own, fast."""
    chosen = {**AUDIT["attacks"], "population": {**AUDIT["attacks"]["population"], "ceiling_draws": 2}, **attacks}
    changes = {"bootstrap_draws": 50, "null_draws": 100, "permutation_draws": 50, "attacks": chosen}
    return ClassAuditSettings.model_validate({**AUDIT, **changes})


def outputs(sure: FloatArray) -> ClassOutputs:
    """Outputs of two classes with these confidences ``[M, F + U + A + R + T]``."""
    logits = np.zeros((*sure.shape, 2))
    logits[:, np.arange(PART.size), LABELS] = sure
    return ClassOutputs(logits, LABELS, PART == 0, PART == 3, PART == 4, PART == 1)


def population(seed: int, models: int, *, remembered: float) -> ClassPopulation:
    """Models that know retained items by 4 more than others, and forget items by ``remembered``."""
    rng = np.random.default_rng(seed)
    hardness = np.random.default_rng(99).normal(size=PART.size)  # the same of an item under every model
    sure = 2 + hardness + rng.normal(size=(models, PART.size)) + 4 * (PART == 3) + remembered * (PART == 0)
    scored = sure[:, :N]
    scores = {"confidence": scored, "max_prob": np.abs(scored), "mlp": rng.normal(size=scored.shape)}
    rows = [{"outside": {"accuracy": float((row[PART != 3] > 0).mean())}} for row in sure]
    return ClassPopulation(
        list(range(models)), scores, rows, np.zeros((N, 2)), rng.normal(size=(models, 2, N)), outputs=outputs(sure)
    )


def scene(originals: int = 6, retrains: int = 12) -> ClassScene:
    """Originals that remember the forget items as they do the retained ones, and retrains that never saw them."""
    first, target = population(0, originals, remembered=4), population(1, retrains, remembered=0)
    controls = PART[:N] == 1
    groups = Groups(PART[:N] == 0, {"same_group": controls, "matched_knn": controls, "all_unseen": controls})
    rng = np.random.default_rng(2)
    members = rng.permuted(np.arange(8)[:, None] % 2 == np.zeros(PART.size), axis=0)
    hardness = np.random.default_rng(99).normal(size=PART.size)
    sure = 2 + hardness + rng.normal(size=members.shape) + 4 * members
    trained = np.isin(PART, (0, 3))
    base = [target.outputs.confidence(mask) for mask in (target.outputs.forget, target.outputs.retain)]
    known = References(
        np.concatenate(base, axis=1), sure[:, trained], members[:, trained], np.zeros(trained.sum(), dtype=bool)
    )
    held = members[:, :N] & (PART[:N] != 2)
    names = np.array([f"item {item}" for item in range(N)])
    references = References(target.score, sure[:, :N], held, PART[:N] == 2)
    return ClassScene(first, target, groups, references, names, names, np.full(N, ""), trained=known)

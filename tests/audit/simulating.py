"""Populations and scenes for whole audits of made-up scores, and the verdict by the parts of ``judge`` that decide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from scforget.arrays import BoolArray, FloatArray
from scforget.attacks.references import References
from scforget.audit import AuditSettings, assess, verdict
from scforget.audit.scene import Groups, Population, Scene
from scforget.audit.verdict import Verdict

# What decides is as in the default recipe; resamples, which no verdict looks at, are few.
SETTINGS = AuditSettings.model_validate(
    {
        "margins": {"membership": 0.02, "trace": 1.0, "elbo": 5.0, "marker_r": 0.02},
        "level": 0.9, "interval_level": 0.95, "bootstrap_draws": 50, "null_draws": 100, "trace_shrinkage": 0.5,
        "min_controls": 10, "matched_neighbours": 10, "fpr_targets": [0.01, 0.05], "permutation_draws": 199,
        "delta": 1e-5,
        "attacks": {
            "threshold": {}, "knn": {"neighbours": 10},
            "mlp": {
                "hidden": [8], "dropout": 0.0, "learning_rate": 1e-3, "batch_size": 32, "epochs": 1,
                "folds": 2, "attackers": 2, "shuffled_draws": 2,
            },
            "likelihood_ratio": {}, "lira": {"variance": "global", "min_models": 4}, "rmia": {"gamma": 1.0},
            "population": {
                "scorer": "exact", "ceiling_draws": 20, "klom_bins": 20, "klom_floor": 1e-5, "min_models": 8,
            },
        },
    }
)  # fmt: skip


def cell_groups(forget: int, controls: int, aside: int) -> tuple[Groups, BoolArray]:
    """Groups of the scored cells, the forget cells first and then the controls, and which ``[n]`` are set aside."""
    masks = np.repeat(np.eye(3, dtype=bool), [forget, controls, aside], axis=1)
    return Groups(masks[0], dict.fromkeys(("same_group", "matched_knn", "all_unseen"), masks[1])), masks[2]


def population(elbo: FloatArray, utility: list[Mapping[str, float]] | None = None) -> Population:
    """M models by their scores ``[M, n]``, in nats; noise stands for the learned attack and the latent space.

    Without rows of its own, every model is as useful as any other.
    """
    rng = np.random.default_rng(len(elbo))
    rows = utility or [{"elbo": -100 + rng.normal(), "kl": 10.0} for _ in elbo]
    attackers = rng.normal(size=(len(elbo), 2, elbo.shape[1]))
    return Population(
        range(len(elbo)), {"elbo": elbo, "mlp": attackers.mean(axis=1)}, [{"outside": row} for row in rows],
        rng.normal(size=(elbo.shape[1], 2)), attackers,
    )  # fmt: skip


def make_scene(
    originals: Population, target: Population, groups: Groups, aside: BoolArray, shadows: FloatArray, members: BoolArray
) -> Scene:  # fmt: skip
    """What a population is judged against; cells are of one kind and nobody knows their donors."""
    n = len(aside)
    return Scene(
        originals, target, groups, References(target.scores["elbo"], shadows, members, aside),
        np.full(n, "kind"), np.array([f"cell {i}" for i in range(n)]), np.full(n, ""),
    )  # fmt: skip


def decided(own: Population, scene: Scene) -> Verdict:
    """Decide as ``judge`` does, without all that only stands beside a verdict."""
    start, found = (
        assess._statistics(models, scene.target, scene.groups, SETTINGS) for models in (scene.originals, own)
    )
    sides = {name: 1 if one.mean() >= base.mean() else -1 for name, (one, base) in start.items()}
    primary = assess._equivalences(found, sides, SETTINGS)
    return verdict.decide(primary["membership"], primary["trace"])


def judged(own: Population, scene: Scene) -> dict[str, Any]:
    """Return the whole record; the reference attacks are added to every population first, as the stages do it."""
    references = scene.references
    known = replace(
        scene,
        originals=assess.with_references(scene.originals, references, SETTINGS, own=False),
        target=assess.with_references(scene.target, references, SETTINGS, own=True),
    )
    table = assess.attacks(known.target, known.target, known.groups, SETTINGS, 0)
    found = assess.with_references(own, references, SETTINGS, own=False)
    return assess.judge("method", found, known, target_attacks=table, settings=SETTINGS, seed=0)

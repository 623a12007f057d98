"""Membership inference attacks: one file each, with its settings and its functions; this registry names them all.

Every score is higher = more member-like, and its name is unique among all attacks. Three kinds are called alike:

model attacks
    look at one model: ``NAME(signals, reference, settings)``, what it says of the scored and of the retained cells.
reference attacks
    compare the scores of many models: ``NAME(scores, references, settings, own=)``, see ``references.References``.
the others
    ``mlp`` learns from the labels; ``population`` and ``kaggle`` compare whole populations of models, by one section of
    settings; ``gene_list`` needs neither model nor settings.

The attacks on classifiers have registries of their own, by the same names where the attack is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scforget.attacks import confidence, knn, likelihood_ratio, lira, mlp, population, rmia, threshold
from scforget.settings import Settings

__all__ = [
    "ATTACKS", "CLASS_ATTACKS", "CLASS_MODEL_ATTACKS", "CLASS_REFERENCE_ATTACKS", "LEARNED", "MODEL_ATTACKS",
    "REFERENCE_ATTACKS", "Attack",
]  # fmt: skip


@dataclass(frozen=True)
class Attack:
    """An attack's settings class and its function."""

    settings: type[Settings]
    run: Callable[..., Any]


MODEL_ATTACKS: dict[str, Attack] = {
    "threshold": Attack(threshold.ThresholdSettings, threshold.threshold),
    "knn": Attack(knn.KnnSettings, knn.knn),
}
REFERENCE_ATTACKS: dict[str, Attack] = {
    "likelihood_ratio": Attack(likelihood_ratio.LikelihoodRatioSettings, likelihood_ratio.likelihood_ratio),
    "lira": Attack(lira.LiraSettings, lira.lira),
    "rmia": Attack(rmia.RmiaSettings, rmia.rmia),
}
ATTACKS: dict[str, Attack] = {
    **MODEL_ATTACKS,
    "mlp": Attack(mlp.MlpSettings, mlp.mlp),
    **REFERENCE_ATTACKS,
    "population": Attack(population.PopulationSettings, population.u_lira),
}
CLASS_MODEL_ATTACKS: dict[str, Attack] = {
    "confidence": Attack(confidence.ConfidenceSettings, confidence.confidence),
    "knn": MODEL_ATTACKS["knn"],
}
CLASS_REFERENCE_ATTACKS: dict[str, Attack] = {
    "likelihood_ratio": REFERENCE_ATTACKS["likelihood_ratio"],
    "lira": REFERENCE_ATTACKS["lira"],
    "rmia": Attack(rmia.RmiaSettings, confidence.rmia_of_probabilities),
}
CLASS_ATTACKS: dict[str, Attack] = {
    **CLASS_MODEL_ATTACKS,
    "mlp": ATTACKS["mlp"],
    **CLASS_REFERENCE_ATTACKS,
    "population": ATTACKS["population"],
}
#: Scores of attackers that were trained on the labels of the cells they score.
LEARNED = ("mlp", "published_mlp")

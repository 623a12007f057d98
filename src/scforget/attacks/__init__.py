"""Membership inference attacks: one file each, with its settings and one function; this registry names them all.

An attack gets what one model says of the cells to score and of reference (retained) cells, and its settings; it
returns one or more scores a cell. Every score is higher = more member-like, and its name is unique among all attacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scforget.arrays import FloatArray
from scforget.attacks import knn, threshold
from scforget.settings import Settings
from scforget.tasks import Signals

__all__ = ["ATTACKS", "Attack"]


@dataclass(frozen=True)
class Attack:
    """An attack's settings class, its function ``(signals, reference, settings)``, and the names of its scores."""

    settings: type[Settings]
    run: Callable[[Signals, Signals, Any], dict[str, FloatArray]]
    scores: tuple[str, ...]


ATTACKS: dict[str, Attack] = {
    "threshold": Attack(threshold.ThresholdSettings, threshold.threshold, threshold.SCORES),
    "knn": Attack(knn.KnnSettings, knn.knn, knn.SCORES),
}

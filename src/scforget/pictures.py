"""Figures of one scenario and method, drawn from what lies in ``results/``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scforget.artifacts import Arrays, Workspace, read_arrays, read_json, read_table
from scforget.audit import utility
from scforget.report import cells, comparisons, figures
from scforget.report.tables import SCORES, bounds, ordered, score_in
from scforget.results import REFERENCES, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure


#: What a score is, on an axis.
_AXES = {"elbo": "ELBO at z = μ (nats per cell)", "confidence": "confidence φ (logit of the probability of the label)"}


def _scores(workspace: Workspace, dataset: str, scenario: str, method: str, suffix: str) -> tuple[Arrays, Arrays]:
    """Arrays of the ``reference`` stage, and those that hold the method's scores."""
    reference = read_arrays(workspace.results(f"reference{suffix}", dataset, scenario) / "scores.npz")
    if method in REFERENCES:
        return reference, reference
    return reference, read_arrays(workspace.results(f"audit{suffix}", dataset, scenario, method) / "scores.npz")


def _cells(folder: Path, method: str, title: str) -> dict[str, Figure]:
    """Exposure of single cells; nothing for originals and retrains, whose stage leaves no table of cells."""
    if method in REFERENCES or not (folder / "cells.csv").exists():
        return {}
    band = bounds(read_json(folder / "result.json"), "exposure", "null_band")
    return {"cell_scores": cells.cell_scores(read_table(folder / "cells.csv"), band, title)}


def compared(
    workspace: Workspace, dataset: str, scenario: str, audits: Mapping[str, Record], suffix: str = ""
) -> dict[str, Figure]:  # fmt: skip
    """All methods of a scenario on common axes; by file stem.

    Parameters
    ----------
    audits
        method -> record with its ``cost``, ``original`` and ``retrain`` among them.
    suffix
        Of the stages of the models' family.
    """
    reference = read_arrays(workspace.results(f"reference{suffix}", dataset, scenario) / "scores.npz")
    forget, controls = reference["forget"], reference["same_group"]
    curves, score = {}, score_in(audits)
    for method in ordered(audits):
        _, scores = _scores(workspace, dataset, scenario, method, suffix)
        values = scores[f"{method}/{score}"]
        curves[method] = values[:, forget], values[:, controls]
    return {
        "distance_against_passes": comparisons.distance_against_passes(audits, scenario),
        "distance_to_target": comparisons.distance_to_target(audits),
        "attack_grid": comparisons.attack_grid(audits),
        "roc_overlay": comparisons.roc_overlay(curves, audits, scenario),
    }


def audited(workspace: Workspace, dataset: str, scenario: str, method: str, suffix: str = "") -> dict[str, Figure]:
    """ROC, score histograms and, of an unlearning method, exposure of single cells; by file stem."""
    reference, scores = _scores(workspace, dataset, scenario, method, suffix)
    forget, controls = reference["forget"], reference["same_group"]
    score = next(name for name in SCORES if f"original/{name}" in reference)

    def of(name: str) -> tuple[np.ndarray, np.ndarray]:
        values = (scores if name == method else reference)[f"{name}/{score}"]
        return values[:, forget], values[:, controls]

    names = list(dict.fromkeys(["original", "retrain", method]))
    title = f"{scenario}, {method}"
    return {
        "roc": figures.roc({name: of(name) for name in names}, title),
        "score_histograms": figures.score_histograms(*of(method), of("retrain")[0], title=title, label=_AXES[score]),
        **_cells(workspace.results(f"audit{suffix}", dataset, scenario, method), method, title),
    }


def umap(  # noqa: PLR0917
    workspace: Workspace, dataset: str, scenario: str, method: str, suffix: str, seed: int
) -> Figure:  # fmt: skip
    """UMAP of the first model's latent space. Drawn only by the report: UMAP compiles for ten seconds a process."""
    reference, scores = _scores(workspace, dataset, scenario, method, suffix)
    embedding = utility.embedding(scores[f"{method}/latent"], seed=seed)
    title = f"{scenario}, {method}: {'features' if suffix else 'latent means'} of one model"
    return figures.umap(embedding, reference["labels"], reference["forget"], title)

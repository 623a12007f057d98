"""Figures of one scenario and method, drawn from what lies in ``results/``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from scforget.artifacts import Arrays, Workspace, read_arrays, read_json, read_table
from scforget.audit import utility
from scforget.report import cells, comparisons, figures
from scforget.report.tables import bounds, ordered
from scforget.results import REFERENCES, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SCORE = "elbo"  # the score that both primary statistics rest on


def _scores(workspace: Workspace, dataset: str, scenario: str, method: str) -> tuple[Arrays, Arrays]:
    """Arrays of the ``reference`` stage, and those that hold the method's scores."""
    reference = read_arrays(workspace.results("reference", dataset, scenario) / "scores.npz")
    if method in REFERENCES:
        return reference, reference
    return reference, read_arrays(workspace.results("audit", dataset, scenario, method) / "scores.npz")


def _cells(workspace: Workspace, dataset: str, scenario: str, method: str, title: str) -> dict[str, Figure]:
    """Exposure of single cells; nothing for originals and retrains, whose stage leaves no table of cells."""
    folder = workspace.results("audit", dataset, scenario, method)
    if method in REFERENCES or not (folder / "cells.csv").exists():
        return {}
    band = bounds(read_json(folder / "result.json"), "exposure", "null_band")
    return {"cell_scores": cells.cell_scores(read_table(folder / "cells.csv"), band, title)}


def compared(workspace: Workspace, dataset: str, scenario: str, audits: Mapping[str, Record]) -> dict[str, Figure]:
    """All methods of a scenario on common axes; by file stem.

    Parameters
    ----------
    audits
        method -> record with its ``cost``, ``original`` and ``retrain`` among them.
    """
    reference = read_arrays(workspace.results("reference", dataset, scenario) / "scores.npz")
    forget, controls = reference["forget"], reference["same_group"]
    curves = {}
    for method in ordered(audits):
        _, scores = _scores(workspace, dataset, scenario, method)
        values = scores[f"{method}/{_SCORE}"]
        curves[method] = values[:, forget], values[:, controls]
    return {
        "distance_against_passes": comparisons.distance_against_passes(audits, scenario),
        "distance_to_target": comparisons.distance_to_target(audits),
        "attack_grid": comparisons.attack_grid(audits),
        "roc_overlay": comparisons.roc_overlay(curves, audits, scenario),
    }


def audited(workspace: Workspace, dataset: str, scenario: str, method: str) -> dict[str, Figure]:
    """ROC, score histograms and, of an unlearning method, exposure of single cells; by file stem."""
    reference, scores = _scores(workspace, dataset, scenario, method)
    forget, controls = reference["forget"], reference["same_group"]

    def of(name: str) -> tuple[np.ndarray, np.ndarray]:
        values = (scores if name == method else reference)[f"{name}/{_SCORE}"]
        return values[:, forget], values[:, controls]

    names = list(dict.fromkeys(["original", "retrain", method]))
    title = f"{scenario}, {method}"
    return {
        "roc": figures.roc({name: of(name) for name in names}, title),
        "score_histograms": figures.score_histograms(*of(method), of("retrain")[0], title=title),
        **_cells(workspace, dataset, scenario, method, title),
    }


def umap(workspace: Workspace, dataset: str, scenario: str, method: str, seed: int) -> Figure:
    """UMAP of the first model's latent means. Drawn only by the report: UMAP compiles for ten seconds a process."""
    reference, scores = _scores(workspace, dataset, scenario, method)
    embedding = utility.embedding(scores[f"{method}/latent"], seed=seed)
    title = f"{scenario}, {method}: latent means of one model"
    return figures.umap(embedding, reference["labels"], reference["forget"], title)

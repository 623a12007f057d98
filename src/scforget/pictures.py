"""Figures of one scenario and method, drawn from what lies in ``results/``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scforget.artifacts import Arrays, Workspace, read_arrays
from scforget.audit import utility
from scforget.report import figures
from scforget.results import REFERENCES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SCORE = "elbo"  # the score that both primary statistics rest on


def _scores(workspace: Workspace, dataset: str, scenario: str, method: str) -> tuple[Arrays, Arrays]:
    """Arrays of the ``reference`` stage, and those that hold the method's scores."""
    reference = read_arrays(workspace.results("reference", dataset, scenario) / "scores.npz")
    if method in REFERENCES:
        return reference, reference
    return reference, read_arrays(workspace.results("audit", dataset, scenario, method) / "scores.npz")


def audited(workspace: Workspace, dataset: str, scenario: str, method: str) -> dict[str, Figure]:
    """ROC and score histograms of an audited population, by file stem."""
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
    }


def umap(workspace: Workspace, dataset: str, scenario: str, method: str, seed: int) -> Figure:
    """UMAP of the first model's latent means. Drawn only by the report: UMAP compiles for ten seconds a process."""
    reference, scores = _scores(workspace, dataset, scenario, method)
    embedding = utility.embedding(scores[f"{method}/latent"], seed=seed)
    title = f"{scenario}, {method}: latent means of one model"
    return figures.umap(embedding, reference["labels"], reference["forget"], title)

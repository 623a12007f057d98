"""Nearest-neighbour attack: whether a cell sits among the retained cells in latent space."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from scforget.arrays import FloatArray
from scforget.class_tasks import ClassSignals
from scforget.errors import DataError, EmptyGroupError
from scforget.settings import Settings
from scforget.tasks import Signals

SCORES = ("knn",)


class KnnSettings(Settings):
    """Settings of the nearest-neighbour attack.

    Attributes
    ----------
    neighbours
        k, how many nearest retained cells the distance is averaged over.
    """

    neighbours: Annotated[int, Field(gt=0)]


def knn(
    signals: Signals | ClassSignals, reference: Signals | ClassSignals, settings: KnnSettings
) -> dict[str, FloatArray]:  # fmt: skip
    """Score each cell by its closeness to the retained cells in the audited model's latent space.

    Parameters
    ----------
    signals : of N cells
        What the audited model says of the cells to score.
    reference : of R cells
        The same of retained cells, under the same model. A scored cell that is in it (same index in ``cells``) is not
        its own neighbour.
    settings
        Number of neighbours.

    Returns
    -------
    dict
        ``knn`` ``[N]``: minus the mean Euclidean distance to the k nearest, higher = more member-like.

    Raises
    ------
    EmptyGroupError
        If fewer than k retained cells other than the scored one exist.
    DataError
        If the latent dimensions differ.

    Notes
    -----
    P0 §3 with z = μ: its sampled z adds noise of ±0.01 AUC. A classifier's latent space is what its last layer sees.
    """
    from sklearn.neighbors import NearestNeighbors

    k, R = settings.neighbours, len(reference.cells)
    shared = bool(np.isin(signals.cells, reference.cells).any())
    if k + shared > R:
        raise EmptyGroupError("retained cells of the knn attack", R, f"at least {k + shared}")
    if signals.latent.shape[1] != reference.latent.shape[1]:
        found = f"{signals.latent.shape[1]} and {reference.latent.shape[1]}"
        raise DataError("latent dimensions of the knn attack", found, "one model's")
    if len(signals.cells) == 0:
        return {"knn": np.empty(0)}
    index = NearestNeighbors(n_neighbors=k + shared).fit(reference.latent)
    distance, nearest = index.kneighbors(signals.latent)
    distance[reference.cells[nearest] == signals.cells[:, None]] = np.inf
    return {"knn": -np.sort(distance, axis=1)[:, :k].mean(axis=1)}

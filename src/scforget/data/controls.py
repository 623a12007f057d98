"""Non-members that the forgotten cells are compared with."""

from __future__ import annotations

import numpy as np

from scforget.arrays import BoolArray, FloatArray
from scforget.errors import EmptyGroupError


def matched_knn(forget_mu: FloatArray, unseen_mu: FloatArray, neighbours: int) -> BoolArray:
    """Mark the unseen cells that lie nearest to the forgotten ones in an original's latent means.

    Parameters
    ----------
    forget_mu : ``[F, Z]``
    unseen_mu : ``[U, Z]``
    neighbours : k >= 1
        Neighbours of each forgotten cell (the published protocol: 10).

    Returns
    -------
    ``[U]`` bool
        The union over forgotten cells of their k nearest unseen cells.

    Notes
    -----
    The single-cell paper's controls. For a rare cluster most of them are of other types, so a score against them
    measures biology as well as membership; here they use z = μ, not a sampled z, and are labelled as what they are.
    """
    from sklearn.neighbors import NearestNeighbors

    if len(unseen_mu) < neighbours:
        raise EmptyGroupError("matched_knn controls", f"{len(unseen_mu)} unseen cells", f"at least {neighbours}")
    index = NearestNeighbors(n_neighbors=neighbours).fit(unseen_mu).kneighbors(forget_mu, return_distance=False)
    chosen = np.zeros(len(unseen_mu), dtype=bool)
    chosen[index.ravel()] = True
    return chosen

"""How far models are from the retrained population: what a search for settings makes small."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from scforget.arrays import FloatArray
from scforget.audit import BaseMargins, equivalence


class Distance(NamedTuple):
    """Distance of M models to the retrained ones, ``[M]`` each, and its two parts.

    Attributes
    ----------
    total
        ``scores`` / margin of the trace + ``membership`` / margin of membership: both parts in differences that matter.
    scores
        Mean over the forgotten cells of absolute z, in spreads of the retrained models, beyond what a retrained model
        shows against the others; at least 0.
    membership
        Absolute difference of the AUC from the retrained models' mean.
    """

    total: FloatArray
    scores: FloatArray
    membership: FloatArray


def _combine(scores: FloatArray, membership: FloatArray, margins: BaseMargins) -> Distance:
    scores = np.maximum(scores, 0.0)
    return Distance(scores / margins.trace + membership / margins.membership, scores, membership)


def to_retrains(
    scores: FloatArray, aucs: FloatArray, retrain_scores: FloatArray, retrain_aucs: FloatArray, *,
    margins: BaseMargins, shrinkage: float,
) -> Distance:  # fmt: skip
    """Distance of each model to the retrained population; too much forgetting is as far as too little.

    Parameters
    ----------
    scores : ``[M, F]``, nats
        Per-cell ELBO of the F forgotten cells under M models.
    aucs : ``[M]``
        Of the forgotten cells against their controls.
    retrain_scores, retrain_aucs : ``[K, F]``, ``[K]``
        The same under K >= 3 retrained models.
    margins, shrinkage
        Of the audit.

    Raises
    ------
    EmptyGroupError
        With fewer than 3 retrained models, or without a cell.
    DataError
        If a score is not finite.
    """
    excess = equivalence.excess_abs_z(scores, retrain_scores, shrinkage)
    return _combine(excess, np.abs(aucs - retrain_aucs.mean()), margins)


def between_retrains(
    retrain_scores: FloatArray, retrain_aucs: FloatArray, *, margins: BaseMargins, shrinkage: float
) -> Distance:
    """Distance of each retrained model to the others, ``[K]``, K >= 4: what nothing but another seed makes."""
    others = ~np.eye(len(retrain_aucs), dtype=bool)
    rows = [
        to_retrains(retrain_scores[~keep], retrain_aucs[~keep], retrain_scores[keep], retrain_aucs[keep],
                    margins=margins, shrinkage=shrinkage)
        for keep in others
    ]  # fmt: skip
    return Distance(*(np.concatenate(part) for part in zip(*rows, strict=True)))

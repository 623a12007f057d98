"""What a gene list chosen with the forgotten cells still tells of them: retrained weights against a retrained pipeline.

``retrain`` is a model whose weights never saw the forgotten cells F, on a gene list as it is given; if F helped to
choose that list, F is in the model all the same. ``retrain_pipeline`` repeats every step that looks at data on the
retained cells R alone. The two see different genes, so their likelihoods cannot be compared; their membership AUCs can.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scforget.arrays import FloatArray
from scforget.audit.intervals import Interval, mean_interval, plain
from scforget.errors import DataError, EmptyGroupError


@dataclass(frozen=True)
class PreprocessingLeak:
    """Membership AUC of ``retrain`` minus that of ``retrain_pipeline``, paired by split.

    Attributes
    ----------
    retrain, retrain_pipeline
        Mean AUC over splits, of each.
    difference
        The first minus the second: above 0, the steps before training give the forgotten cells away as members; below
        0, they mark them too, as cells that the model explains worse than their like.
    interval, level
        Student-t interval of the difference over splits, on S − 1 degrees of freedom, and its coverage.
    n_splits
        S.
    """

    retrain: float
    retrain_pipeline: float
    difference: float
    interval: Interval
    level: float
    n_splits: int

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return plain(self)


def _by_split(name: str, aucs: npt.ArrayLike) -> FloatArray:
    """``[S]``: mean over the models of each split, after checks."""
    array = np.asarray(aucs, dtype=np.float64)
    if array.ndim != 2 or not array.shape[1]:
        raise DataError(f"AUCs of {name}", f"shape {array.shape}", "splits x models, at least one model a split")
    if array.shape[0] < 2:
        raise EmptyGroupError(f"splits of {name}", array.shape[0], "at least 2: one says nothing of their spread")
    if not ((array >= 0) & (array <= 1)).all():
        raise DataError(f"AUCs of {name}", f"{array[~((array >= 0) & (array <= 1))][0]:g}", "numbers in [0, 1]")
    return np.asarray(array.mean(axis=1))


def preprocessing_leak(
    retrain: npt.ArrayLike, retrain_pipeline: npt.ArrayLike, *, level: float
) -> PreprocessingLeak:  # fmt: skip
    """Compare two candidates' membership AUCs over splits of the same cells.

    Parameters
    ----------
    retrain : ``[S, M]``
        Membership AUC of M >= 1 models on each of S >= 2 splits: weights retrained on R, the gene list given.
    retrain_pipeline : ``[S, M']``
        The same of models whose genes were chosen on R too; row s is of the same cells as row s of ``retrain``.
    level
        Coverage of the interval, in (0, 1).

    Returns
    -------
    PreprocessingLeak

    Raises
    ------
    EmptyGroupError
        With fewer than 2 splits.
    DataError
        If the shapes do not fit, a number is not an AUC, or the level cannot be.

    Notes
    -----
    d_s = mean over models of AUC_retrain − mean over models of AUC_pipeline; Student-t on the S differences. The unit
    is a split: models of one split share its cells. AUCs of a small cluster move by several hundredths with the draw of
    its cells, which pairing takes out. Splits of one data set share cells, so the interval is about further splits of
    these cells and not about further donors.
    """
    weights, pipeline = _by_split("retrain", retrain), _by_split("retrain_pipeline", retrain_pipeline)
    if weights.shape != pipeline.shape:
        found = f"{weights.size} and {pipeline.size}"
        raise DataError("splits of retrain and retrain_pipeline", found, "the same splits")
    if not 0 < level < 1:
        raise DataError("level of an interval", level, "a number between 0 and 1")
    differences = weights - pipeline
    return PreprocessingLeak(
        retrain=float(weights.mean()),
        retrain_pipeline=float(pipeline.mean()),
        difference=float(differences.mean()),
        interval=mean_interval(differences, level),
        level=level,
        n_splits=differences.size,
    )

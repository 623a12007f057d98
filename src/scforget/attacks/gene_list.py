"""Gene-list attack, without any model: whether a cell lies further out in the selected genes than in the others.

Genes that vary much among the cells they were chosen on are the genes in which those very cells lie far out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from scforget.arrays import BoolArray, FloatArray
from scforget.errors import DataError, EmptyGroupError

SCORES = ("gene_list",)

# Genes made dense at a time: 1024 genes of 10,000 cells are 80 MiB.
BLOCK = 1024


def _dense(values: Any) -> FloatArray:
    return np.asarray(values.toarray() if sparse.issparse(values) else values, dtype=np.float64)


def _add_squares(total: FloatArray, genes: FloatArray) -> int:
    """Add each cell's squared standardised values over ``genes [n, B]`` to ``total [n]``; return how many genes vary.

    A gene is judged constant by its values: the spread of equal values may round to more than 0.
    """
    spread = genes.std(axis=0)
    varies = (genes.max(axis=0) > genes.min(axis=0)) & (spread > 0)
    genes = genes[:, varies]
    total += (((genes - genes.mean(axis=0)) / spread[varies]) ** 2).sum(axis=1)
    return int(varies.sum())


def gene_list(log_expression: FloatArray | sparse.spmatrix | sparse.sparray, selected: BoolArray) -> FloatArray:
    """Score each cell by how much further out it lies in the selected genes than in the others.

    Parameters
    ----------
    log_expression : ``[n, A]``, dense or sparse
        Log-normalised expression of the n scored cells over **all** prepared genes.
    selected : ``[A]`` bool
        The genes that the models see.

    Returns
    -------
    ``[n]``
        Higher = more member-like; 0 on average over the scored cells.

    Raises
    ------
    EmptyGroupError
        With fewer than 2 cells.
    DataError
        If the shapes do not fit, a value is not finite, or no selected gene or no other one varies.

    Notes
    -----
    mean over selected genes of z² − mean over the other genes of z², z standardised over the n scored cells; genes
    that are constant over them are dropped. A cell that helped to choose the most variable genes is one that makes them
    variable; one that was left out of the choice is not.
    """
    known = sparse.csc_array(log_expression) if sparse.issparse(log_expression) else np.asarray(log_expression)
    if known.ndim != 2 or np.shape(selected) != known.shape[1:] or selected.dtype != np.bool_:
        found = f"shapes {known.shape} and {np.shape(selected)}"
        raise DataError("expression and selected genes", found, "[n, A] and booleans [A]")
    n = known.shape[0]
    if n < 2:
        raise EmptyGroupError("scored cells of the gene-list attack", n, "at least 2")
    if not np.isfinite(known.data if sparse.issparse(known) else known).all():
        raise DataError("expression of the gene-list attack", "NaN or infinite values", "finite numbers")
    means = []
    for name, genes in (("selected", np.flatnonzero(selected)), ("other", np.flatnonzero(~selected))):
        total, varying = np.zeros(n), 0
        for start in range(0, genes.size, BLOCK):
            varying += _add_squares(total, _dense(known[:, genes[start : start + BLOCK]]))
        if not varying:
            found = f"{genes.size}, none of which varies over the {n} scored cells"
            raise DataError(f"{name} genes of the gene-list attack", found, "at least 1 that varies")
        means.append(total / varying)
    return means[0] - means[1]

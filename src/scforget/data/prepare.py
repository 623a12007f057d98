"""From raw counts to prepared cells: quality control, labels, informative genes and marker genes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field, model_validator
from scipy import sparse

from scforget.arrays import BoolArray, FloatArray, IntArray
from scforget.data.genes import log_cp10k, select_genes
from scforget.errors import DataError, EmptyGroupError
from scforget.settings import Settings

if TYPE_CHECKING:
    from anndata import AnnData

UNLABELLED = "unlabelled"


class LeidenSettings(Settings):
    """How cells without labels are clustered.

    Attributes
    ----------
    resolution : > 0
        Higher gives more clusters.
    n_neighbors : >= 2
        Neighbours of a cell in the graph.
    n_pcs : >= 2
        Principal components that the graph is built on; fewer where cells or genes are fewer.
    n_top_genes : >= 2
        Informative genes that the components are computed on.
    """

    resolution: Annotated[float, Field(gt=0)]
    n_neighbors: Annotated[int, Field(ge=2)]
    n_pcs: Annotated[int, Field(ge=2)]
    n_top_genes: Annotated[int, Field(ge=2)]


class PrepareSettings(Settings):
    """Which cells are kept, and what names them.

    Attributes
    ----------
    layer
        The layer of an h5ad that holds raw counts; ``None`` for ``X``.
    min_genes : >= 1
        A cell with fewer detected genes is dropped.
    max_mito_fraction : in [0, 1]
        A cell with a larger fraction of mitochondrial counts is dropped.
    mito_prefixes
        What the names of mitochondrial genes begin with.
    mito_column
        An ``obs`` column that holds the fraction already, used instead of counting; ``None`` to count.
    label_column
        The ``obs`` column of cell types; ``None`` to cluster.
    unlabelled
        Values of that column that mean "no label", such as ``nan``; missing values always do.
    leiden
        How to cluster; ``None`` where ``label_column`` is given.
    donor_column
        The ``obs`` column of donors; ``None`` where there is but one.
    """

    layer: str | None
    min_genes: Annotated[int, Field(ge=1)]
    max_mito_fraction: Annotated[float, Field(ge=0, le=1)]
    mito_prefixes: list[str]
    mito_column: str | None
    label_column: str | None
    unlabelled: list[str]
    leiden: LeidenSettings | None
    donor_column: str | None

    @model_validator(mode="after")
    def _one_source_of_labels(self) -> PrepareSettings:
        if (self.label_column is None) == (self.leiden is None):
            which = "neither" if self.leiden is None else "both"
            raise ValueError(f"give exactly one of label_column and leiden, the other null; {which} is given")
        return self


def prepare(raw: AnnData, settings: PrepareSettings, *, seed: int) -> tuple[AnnData, dict[str, object]]:
    """Drop unusable cells and unexpressed genes, and name what is left.

    Cells need ``min_genes`` detected genes and at most ``max_mito_fraction`` of mitochondrial counts. A gene stays when
    one kept cell expresses it: choosing informative genes is part of a model, and is done there.

    Parameters
    ----------
    raw
        Raw counts ``[N, G]``, as ``sources.read`` gives them.
    settings
        See `PrepareSettings`; ``layer`` has been used by the reader.
    seed
        For the clustering only.

    Returns
    -------
    AnnData
        ``X`` CSR int32; ``obs`` keeps its columns and gains ``label`` (categorical), ``donor`` (where named),
        ``total_counts`` (over all genes), ``n_genes`` and ``mito_fraction``; ``uns`` is empty.
    dict
        Cells and genes before and after each filter, cells of each label and donor, median total counts, sparsity
        (fraction of zeros) and warnings; plain JSON types.

    Raises
    ------
    DataError
        A column is missing or not what it must be.
    EmptyGroupError
        No cell is left.
    """
    from anndata import AnnData

    notes: list[str] = []
    measures, enough, kept = _quality(raw, settings, notes)
    counts = sparse.csr_matrix(raw.X)[kept]
    expressed = np.asarray(counts.sum(axis=0)).ravel() > 0
    obs = raw.obs[kept].copy()
    for name, values in measures.items():
        if name != settings.mito_column:
            _note_replaced(obs, name, notes)
        obs[name] = values[kept]
    cells = AnnData(X=counts[:, expressed].astype(np.int32), obs=obs, var=raw.var[expressed].copy())
    if settings.donor_column is not None:
        donors = _names(raw, settings.donor_column, [], "unknown")
        _add_names(cells, "donor", donors[kept], notes, source=settings.donor_column)
    if settings.label_column is not None:
        labels = _names(raw, settings.label_column, settings.unlabelled, UNLABELLED)
        lost = sorted(set(labels) - set(labels[kept]))
        notes.extend(f"label {label!r}: quality control removed all its cells" for label in lost)
        _add_names(cells, "label", labels[kept], notes, source=settings.label_column)
    elif settings.leiden is not None:
        _add_names(cells, "label", leiden(cells, settings.leiden, seed=seed), notes)
    filters = {"read": raw.n_obs, "after_min_genes": int(enough.sum()), "after_mito": cells.n_obs}
    return cells, _summary(cells, filters, raw.n_vars, notes)


def _quality(
    raw: AnnData, settings: PrepareSettings, notes: list[str]
) -> tuple[dict[str, npt.NDArray[Any]], BoolArray, BoolArray]:
    """Measure each cell ``[N]``; say which have enough genes, and which are kept."""
    counts = sparse.csr_matrix(raw.X)
    n_genes = np.asarray((counts > 0).sum(axis=1, dtype=np.int64)).ravel()
    totals = np.asarray(counts.sum(axis=1, dtype=np.int64)).ravel()
    mito = _mito_fraction(raw, counts, totals, settings, notes)
    enough = n_genes >= settings.min_genes
    kept = enough & (mito <= settings.max_mito_fraction)
    if not kept.any():
        found = f"0 of {raw.n_obs} cells ({int(enough.sum())} have {settings.min_genes} genes or more)"
        raise EmptyGroupError("prepare", found, "at least one cell; lower min_genes or raise max_mito_fraction")
    return {"total_counts": totals, "n_genes": n_genes, "mito_fraction": mito}, enough, kept


def _mito_fraction(
    raw: AnnData, counts: sparse.csr_matrix, totals: IntArray, settings: PrepareSettings, notes: list[str]
) -> FloatArray:
    """Return the mitochondrial fraction of counts ``[N]``, in [0, 1]."""
    if settings.mito_column is not None:
        column = _column(raw, settings.mito_column)
        fraction = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
        if not ((fraction >= 0) & (fraction <= 1)).all():
            found = f"values outside [0, 1], or none: {column[~((fraction >= 0) & (fraction <= 1))].iloc[0]}"
            raise DataError(
                f"obs column {settings.mito_column!r}", found, "a fraction (not a percentage) for each cell"
            )
        return fraction
    mito = np.asarray(raw.var_names.str.startswith(tuple(settings.mito_prefixes)), dtype=bool)
    if not mito.any():
        notes.append(
            f"no gene name begins with any of {settings.mito_prefixes}: no cell is dropped for its mitochondria"
        )
    of_mito = np.asarray(counts[:, mito].sum(axis=1, dtype=np.int64)).ravel()
    return of_mito / np.maximum(totals, 1)


def _column(raw: AnnData, name: str) -> Any:
    if name not in raw.obs:
        there = ", ".join(map(str, raw.obs.columns)) or "none"
        raise DataError("cells", f"no obs column {name!r}", f"one of its columns: {there}")
    return raw.obs[name]


def _names(raw: AnnData, column: str, unnamed: Sequence[str], missing: str) -> npt.NDArray[Any]:
    """Return a column as text ``[N]``; ``missing`` stands for missing values and for those in ``unnamed``."""
    values = _column(raw, column).astype(object)
    # A cluster number becomes "3.0" in a column that has gaps.
    texts = [str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in values]
    gaps = values.isna().to_numpy()
    named = [missing if gap or text in unnamed else text for gap, text in zip(gaps, texts, strict=True)]
    return np.array(named, dtype=object)


def _add_names(
    cells: AnnData, name: str, values: npt.NDArray[Any], notes: list[str], *, source: str | None = None
) -> None:
    """Add a categorical column; its categories are in order, numbers as numbers."""
    if source != name:
        _note_replaced(cells.obs, name, notes)
    distinct = sorted(set(values), key=lambda text: (not text.isdigit(), int(text) if text.isdigit() else 0, text))
    cells.obs[name] = pd.Categorical(values, categories=distinct)


def _note_replaced(obs: pd.DataFrame, name: str, notes: list[str]) -> None:
    if name in obs:
        notes.append(f"obs column {name!r} of the file was replaced")


def _summary(cells: AnnData, filters: dict[str, int], n_genes: int, notes: list[str]) -> dict[str, object]:
    def sizes(column: str) -> dict[str, int]:
        return {str(name): int(size) for name, size in cells.obs[column].value_counts(sort=False).items()}

    return {
        "cells": filters,
        "genes": {"read": n_genes, "expressed": cells.n_vars},
        "labels": sizes("label"),
        "donors": sizes("donor") if "donor" in cells.obs else {},
        "median_total_counts": float(np.median(cells.obs["total_counts"])),
        "sparsity": float(1 - cells.X.count_nonzero() / (cells.n_obs * cells.n_vars)),
        "warnings": notes,
    }


def leiden(cells: AnnData, settings: LeidenSettings, *, seed: int) -> npt.NDArray[Any]:
    """Cluster cells: log1p CP10k of informative genes, principal components, neighbour graph, Leiden.

    Parameters
    ----------
    cells
        Counts ``[N, G]``.
    settings
        See `LeidenSettings`.
    seed
        Any integer; the streams are derived from it.

    Returns
    -------
    ``[N]`` of str
        Cluster "0" is the largest; of equal ones the one whose first cell comes first.

    Raises
    ------
    EmptyGroupError
        Fewer cells than the graph has neighbours.
    """
    import scanpy
    from anndata import AnnData

    from scforget.seeding import derive  # brings torch, which reading and filtering do without

    if cells.n_obs <= settings.n_neighbors:
        raise EmptyGroupError("leiden", f"{cells.n_obs} cells", f"more than n_neighbors = {settings.n_neighbors}")
    genes = select_genes(cells, None, settings.n_top_genes)
    state = derive(seed, "leiden") % 2**32
    graph = AnnData(X=log_cp10k(cells, genes))
    components = min(settings.n_pcs, cells.n_obs - 1, len(genes) - 1)
    scanpy.pp.pca(graph, n_comps=components, svd_solver="arpack", random_state=state)
    scanpy.pp.neighbors(graph, n_neighbors=settings.n_neighbors, use_rep="X_pca", random_state=state)
    scanpy.tl.leiden(
        graph, resolution=settings.resolution, flavor="igraph", n_iterations=2, directed=False, random_state=state
    )
    _, first, found, sizes = np.unique(
        graph.obs["leiden"].to_numpy(str), return_index=True, return_inverse=True, return_counts=True
    )
    rank = np.empty(len(sizes), dtype=np.int64)
    rank[np.lexsort((first, -sizes))] = np.arange(len(sizes))
    return rank[found].astype(str).astype(object)

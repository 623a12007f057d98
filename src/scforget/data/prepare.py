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
from scforget.errors import DataError, EmptyGroupError
from scforget.settings import Settings

if TYPE_CHECKING:
    from anndata import AnnData

UNLABELLED = "unlabelled"
LOESS_SPANS = (0.3, 0.5, 0.75, 1.0)


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
    graph = AnnData(X=_log_cp10k(cells, genes))
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


def _log_cp10k(cells: AnnData, genes: Sequence[str]) -> sparse.csr_matrix:
    """Return ln(1 + 10^4 · count / total) of the named genes, ``[N, len(genes)]``; totals are over all genes."""
    totals = np.asarray(cells.X.sum(axis=1, dtype=np.float64)).ravel()
    chosen = cells.X[:, cells.var_names.get_indexer(list(genes))]
    return (sparse.diags(1e4 / np.maximum(totals, 1)) @ chosen).tocsr().log1p().astype(np.float32)


def select_genes(cells: AnnData, chosen_on: IntArray | None, n_top: int) -> list[str]:
    """Choose the genes that vary most for their mean (Seurat v3) over some cells.

    Parameters
    ----------
    cells
        Counts ``[N, G]``.
    chosen_on
        Indices of the cells that may shape the list; ``None`` for all. A list chosen on members marks them in every
        model that uses it.
    n_top : >= 1
        How many; all genes that the chosen cells express, where those are no more.

    Returns
    -------
    list of str
        In the order of the file; of equally variable genes the first are taken.

    Raises
    ------
    EmptyGroupError
        Fewer than two cells, which have no variance.
    DataError
        The trend of variance over mean cannot be fitted: too few cells or too few genes.

    Notes
    -----
    Variance of (x − mean) / sd(mean), clipped at sqrt(N), where sd(mean) is a loess fit of log10 variance on log10 mean
    (Stuart et al. 2019, doi:10.1016/j.cell.2019.05.031). On few genes the fit is singular with the usual span of 0.3;
    wider spans are then tried.
    """
    import scanpy
    from anndata import AnnData

    counts = cells.X if chosen_on is None else cells.X[chosen_on]
    if counts.shape[0] < 2:
        raise EmptyGroupError("select_genes", f"{counts.shape[0]} cells", "at least 2")
    expressed = np.flatnonzero(np.asarray(counts.sum(axis=0)).ravel() > 0)
    names = cells.var_names[expressed]
    if n_top >= len(expressed):
        return [str(name) for name in names]
    counts = counts[:, expressed]
    varying = int((counts.max(axis=0).toarray() > counts.min(axis=0).toarray()).sum())
    chosen = AnnData(X=counts, var=pd.DataFrame(index=names))
    reason = "too few genes vary"
    # A window of fewer than three genes holds no parabola; loess crashes the process on an empty one.
    for span in (span for span in LOESS_SPANS if int(span * varying) >= 3):
        try:
            table = scanpy.pp.highly_variable_genes(
                chosen, flavor="seurat_v3", n_top_genes=n_top, span=span, inplace=False
            )
        except ValueError as error:  # how loess reports a singular fit
            reason = str(error)
            continue
        # Ranked here: scanpy leaves ties (genes seen once) to an unstable sort.
        order = np.argsort(-table["variances_norm"].to_numpy(), kind="stable")[:n_top]
        return [str(names[gene]) for gene in np.sort(order)]
    found = f"{counts.shape[0]} cells x {len(expressed)} expressed genes, where loess fails ({reason})"
    raise DataError("select_genes", found, f"more cells or genes, or n_top >= {len(expressed)} to take all")


def markers(cells: AnnData, labels: Sequence[str], genes: Sequence[str], n: int) -> dict[str, list[str]]:
    """Find the genes that single out each label: one label against all other cells, Wilcoxon rank sum.

    Parameters
    ----------
    cells
        Counts ``[N, G]``.
    labels : ``[N]``
        The label of each cell.
    genes
        The candidates, unique, all in ``cells``.
    n : >= 1
        How many genes a label gets; all candidates, where those are fewer.

    Returns
    -------
    dict
        Label -> genes, the strongest first (of equals, the first candidate). Labels with fewer than two cells, or with
        every cell, are left out.

    Raises
    ------
    DataError
        ``labels`` has another length, or a gene is not there.

    Notes
    -----
    Scores are tie-corrected z of the rank sum of log1p CP10k; higher = more expressed in the label.
    """
    import scanpy
    from anndata import AnnData

    if len(labels) != cells.n_obs:
        raise DataError("markers", f"{len(labels)} labels", f"one for each of {cells.n_obs} cells")
    absent = [gene for gene in genes if gene not in cells.var_names]
    if absent:
        raise DataError("markers", f"{len(absent)} unknown genes, first {absent[0]!r}", "names of genes in the cells")
    names = np.asarray(labels, dtype=str)
    distinct, sizes = np.unique(names, return_counts=True)
    groups = [str(label) for label, size in zip(distinct, sizes, strict=True) if 2 <= size < cells.n_obs]
    if not groups or not len(genes):
        return {}
    table = AnnData(
        X=_log_cp10k(cells, genes),
        obs=pd.DataFrame({"label": pd.Categorical(names)}, index=cells.obs_names),
        var=pd.DataFrame(index=pd.Index(list(genes))),
    )
    scanpy.tl.rank_genes_groups(table, "label", groups=groups, method="wilcoxon", tie_correct=True, use_raw=False)
    found = table.uns["rank_genes_groups"]
    strongest = {}
    for group in groups:
        scores = pd.Series(found["scores"][group], index=found["names"][group])[list(genes)]
        order = np.argsort(-scores.to_numpy(), kind="stable")[:n]
        strongest[group] = [str(genes[gene]) for gene in order]
    return strongest

"""Which genes a model sees, and which of them mark a cell type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from scforget.arrays import IntArray
from scforget.errors import DataError, EmptyGroupError

if TYPE_CHECKING:
    from anndata import AnnData

LOESS_SPANS = (0.3, 0.5, 0.75, 1.0)


def log_cp10k(cells: AnnData, genes: Sequence[str]) -> sparse.csr_matrix:
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
        X=log_cp10k(cells, genes),
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


def listed_genes(cells: AnnData, listed: Sequence[str], name: str) -> list[str]:
    """Return a person's gene list in the order of the file; raises :class:`DataError` if the data lack one of them."""
    missing = [gene for gene in listed if gene not in cells.var_names]
    if missing or not listed:
        found = f"{len(missing)} of {len(listed)} genes not in the data ({', '.join(missing[:3])})"
        raise DataError(f"gene list {name}", found, "names of genes in the data")
    return [str(gene) for gene in cells.var_names if gene in set(listed)]


def choose_markers(cells: AnnData, genes: Sequence[str], named: Sequence[str], per_label: int) -> list[str]:
    """Return the named markers that are modelled, or the top ones of each label, in the order of ``genes``.

    Raises
    ------
    DataError
        If markers are named and none is modelled.
    """
    if named and not set(named) & set(genes):
        raise DataError("split.markers", "none of the named markers among the modelled genes", "at least one")
    chosen = set(named)
    if not named:
        by_label = markers(cells, cells.obs["label"].astype(str).tolist(), genes, per_label)
        chosen = {gene for found in by_label.values() for gene in found}
    return [gene for gene in genes if gene in chosen]

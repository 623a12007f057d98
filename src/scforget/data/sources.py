"""Where counts come from: h5ad and 10x files, the bundled set, and public sets that are fetched on demand."""

from __future__ import annotations

import csv
import gzip
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import io as sio
from scipy import sparse

from scforget.data.public import PUBLIC, FetchResult, PublicSet, fetch
from scforget.errors import DataError, ScforgetError

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["PUBLIC", "FetchResult", "PublicSet", "fetch", "join", "read", "write_bundled"]

MATRIX_NAMES = ("matrix.mtx", "matrix.mtx.gz")
WANTED_SOURCE = "one .h5ad, one 10x .h5, or a 10x folder (matrix.mtx, features.tsv or genes.tsv, barcodes.tsv)"
MAX_ROUNDING = 0.1


def read(path: Path, *, layer: str | None) -> AnnData:
    """Read raw counts, and refuse anything that is not raw counts.

    Parameters
    ----------
    path
        An ``.h5ad``, a 10x ``.h5`` or a 10x ``matrix.mtx[.gz]``, or a folder that holds exactly one of them. A
        ``cells.csv`` beside a 10x matrix (first column: the barcode) is joined into ``obs``.
    layer
        The layer of an h5ad that holds the counts; ``None`` for ``X``.

    Returns
    -------
    AnnData
        ``X`` ``[N, G]`` CSR int32, ``obs`` and ``var`` as in the file; nothing else.

    Raises
    ------
    DataError
        Nothing readable there, the layer is missing, an entry is not a count, or two cells share a barcode: a withdrawn
        consent must name one cell.

    Warns
    -----
    UserWarning
        Gene names occur twice; they get the suffixes -1, -2, …
    """
    source = _locate(Path(path))
    with warnings.catch_warnings():
        # Said once below in our words; the others are about how old the file is, which changes no count.
        for text in ("(Variable|Observation) names are not unique", "Suffix used", "Moving element from"):
            warnings.filterwarnings("ignore", message=text)
        warnings.filterwarnings("ignore", message="Element .* was written without encoding metadata")
        cells = _load(source)
        counts = _as_counts(_values(cells, layer, source), cells, source)
        _check_barcodes(cells.obs_names, source)
        result = type(cells)(X=counts, obs=cells.obs.copy(), var=cells.var.copy())
        repeated = int(result.var_names.duplicated().sum())
        result.var_names_make_unique()
    if repeated:
        text = f"{source}: {repeated} gene names were in use already; they got the suffixes -1, -2, …"
        warnings.warn(text, UserWarning, stacklevel=2)
    return result


def _locate(path: Path) -> Path:
    """Return the one file to read: an .h5ad, an .h5 or a matrix.mtx[.gz]."""
    if not path.exists():
        raise DataError(str(path), "no such file or folder", WANTED_SOURCE)
    if path.is_file():
        if path.suffix in (".h5ad", ".h5") or path.name in MATRIX_NAMES:
            return path
        raise DataError(str(path), f"a file of kind {path.suffix or path.name!r}", WANTED_SOURCE)
    files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    found = [file for file in files if file.suffix in (".h5ad", ".h5") or file.name in MATRIX_NAMES]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none of them"
        raise DataError(str(path), names, WANTED_SOURCE)
    return found[0]


def _load(source: Path) -> AnnData:
    """Read a file with the reader of its kind; whatever the reader meets becomes one line."""
    import anndata

    try:
        if source.suffix == ".h5ad":
            return anndata.read_h5ad(source)
        if source.suffix == ".h5":
            import scanpy

            return scanpy.read_10x_h5(source)
        return _load_mtx(source)
    except ScforgetError:
        raise
    except Exception as error:  # a foreign file can break its reader in any way
        lines = str(error).splitlines() or [""]
        raise DataError(str(source), f"{type(error).__name__}: {lines[0]}", "a file that can be read") from error


def _load_mtx(matrix: Path) -> AnnData:
    """Read a 10x folder of any age: compressed or not, genes.tsv or features.tsv.

    scanpy's reader goes through float32, which rounds counts above 2^24, and knows only the two layouts of Cell Ranger.
    """
    from anndata import AnnData

    folder = matrix.parent
    counts = sparse.csr_matrix(sio.mmread(matrix).T)
    barcodes = _table(folder, "barcodes.tsv")[0]
    genes = _table(folder, "features.tsv", "genes.tsv")
    if counts.shape != (len(barcodes), len(genes)):
        found = (
            f"{counts.shape[1]} genes x {counts.shape[0]} cells, {len(genes)} gene and {len(barcodes)} barcode lines"
        )
        raise DataError(str(matrix), found, "one line for each gene and each cell")
    names = genes[1] if 1 in genes else genes[0]
    var = pd.DataFrame({"gene_ids": genes[0].to_numpy()}, index=pd.Index(names.to_numpy()))
    cells = AnnData(X=counts, obs=pd.DataFrame(index=pd.Index(barcodes.to_numpy())), var=var)
    if 2 in genes and (genes[2] == "Gene Expression").any():
        # Antibody and guide counts follow other distributions than gene counts.
        cells = cells[:, (genes[2] == "Gene Expression").to_numpy()].copy()
    if (folder / "cells.csv").is_file():
        cells.obs = cells.obs.join(_cell_table(folder / "cells.csv", cells.obs_names))
    return cells


def _table(folder: Path, *names: str) -> pd.DataFrame:
    """Read the one of the named tab-separated files, plain or gzipped, that is in the folder; all text."""
    for file in (folder / f"{name}{suffix}" for name in names for suffix in ("", ".gz")):
        if file.is_file():
            # A gene may be called "NA", and a name may hold a quote.
            return pd.read_csv(file, sep="\t", header=None, dtype=str, na_filter=False, quoting=csv.QUOTE_NONE)
    raise DataError(str(folder), f"no {' or '.join(names)}", "the three files of a 10x folder")


def _cell_table(file: Path, barcodes: pd.Index[str]) -> pd.DataFrame:
    """Read a CSV whose first column is the barcode; cells without a line get missing values."""
    first = pd.read_csv(file, nrows=0).columns[0]
    table = pd.read_csv(file, index_col=0, dtype={first: str})
    if not table.index.is_unique:
        twice = table.index[table.index.duplicated()][0]
        raise DataError(str(file), f"barcode {twice!r} more than once", "one line for each cell")
    if not barcodes.isin(table.index).any():
        raise DataError(str(file), f"no barcode of the matrix in column {first!r}", "the barcode in the first column")
    return table


def _values(cells: AnnData, layer: str | None, source: Path) -> Any:
    """Return the matrix that should hold the counts."""
    if layer is not None and layer not in cells.layers:
        raise DataError(str(source), f"no layer {layer!r}", f"null (for X), or one of its layers: {_layers(cells)}")
    values = cells.X if layer is None else cells.layers[layer]
    if values is None or 0 in values.shape:
        raise DataError(str(source), f"an empty matrix, {cells.n_obs} cells x {cells.n_vars} genes", "counts")
    return values


def _layers(cells: AnnData) -> str:
    return ", ".join(sorted(cells.layers)) or "none"


def _as_counts(values: Any, cells: AnnData, source: Path) -> sparse.csr_matrix:
    """Turn ``[N, G]`` values into CSR int32, or say which of them are not counts."""
    counts = sparse.csr_matrix(values)
    counts.sum_duplicates()
    data = counts.data
    largest = np.iinfo(np.int32).max
    refused = {
        "NaN": np.isnan(data),
        "infinite": np.isinf(data),
        "negative": data < 0,
        "non-integer": data != np.floor(data),
        f"above {largest}": data > largest,
    }
    for kind, bad in refused.items():
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            cell = int(np.searchsorted(counts.indptr, first, side="right")) - 1
            where = f"cell {cells.obs_names[cell]!r}, gene {cells.var_names[counts.indices[first]]!r}"
            found = f"{int(bad.sum())} {kind} values, the first ({data[first]:g}) in {where}"
            raise DataError(str(source), found, f"raw counts (layers in the file: {_layers(cells)})")
    counts = counts.astype(np.int32)
    counts.eliminate_zeros()
    if counts.nnz == 0:
        raise DataError(str(source), "an empty matrix: every count is zero", "counts")
    return counts


def _check_barcodes(names: pd.Index[str], source: Path) -> None:
    repeated = names[names.duplicated()]
    if len(repeated):
        found = f"barcode {str(repeated[0])!r} more than once ({len(repeated)} repeats in all)"
        raise DataError(str(source), found, "unique barcodes, so that a request to forget names one cell")


def join(paths: Sequence[Path]) -> AnnData:
    """Read what ``fetch`` brought; several 10x runs become one set.

    Parameters
    ----------
    paths
        10x folders, and at most one CSV of annotations whose ``cell`` column names cells as ``<channel>_<barcode>``
        (Tabula Muris). Given that, cells without an annotation are left out: most are droplets without a cell.

    Returns
    -------
    AnnData
        As ``read`` gives it. Of several runs: cells are named as in the annotations, genes are those that all runs
        share, ``obs`` gains ``run`` (the folder's name), and its parts ``tissue`` and ``channel`` (split at ``-``).

    Raises
    ------
    DataError
        No folder is given, or the annotations name none of the cells.
    """
    import anndata

    folders = [path for path in paths if path.is_dir()]
    if not folders:
        raise DataError("join", "no 10x folder", "at least one")
    runs = [read(folder, layer=None) for folder in folders]
    if len(runs) == 1:
        return runs[0]
    for folder, cells in zip(folders, runs, strict=True):
        tissue, _, channel = folder.name.partition("-")
        cells.obs["run"], cells.obs["tissue"], cells.obs["channel"] = folder.name, tissue, channel
        cells.obs_names = [f"{channel}_{barcode.partition('-')[0]}" for barcode in cells.obs_names]
    names = np.concatenate([cells.obs_names for cells in runs])
    _check_barcodes(pd.Index(names), folders[0].parent)
    joined = anndata.concat(runs, join="inner", merge="same")
    for file in (path for path in paths if path.is_file()):
        notes = pd.read_csv(file, dtype={"cell": str}).set_index("cell")
        joined = joined[joined.obs_names.isin(notes.index)].copy()
        if joined.n_obs == 0:
            raise DataError(str(file), "no cell of the runs", "a column 'cell' of <channel>_<barcode>")
        joined.obs = joined.obs.join(notes.drop(columns=list(joined.obs.columns), errors="ignore"))
    return joined


def write_bundled(destination: Path) -> None:
    """Make the bundled set ``pbmc68k``: 700 cells x 765 genes of counts in a 10x v3 folder, the same bytes each time.

    scanpy distributes the cells log-normalised; their counts are recovered, not imitated.

    Parameters
    ----------
    destination
        The folder to write into; made if need be.

    Raises
    ------
    DataError
        scanpy's file is not what it was: some count would be rounded by 0.1 or more.

    Notes
    -----
    x = round(expm1(y) · n / 10^4), with y = ln(1 + 10^4 · x / n) as distributed and n the cell's ``n_counts``.
    """
    import scanpy

    reduced = scanpy.datasets.pbmc68k_reduced()
    totals = reduced.obs["n_counts"].to_numpy(np.float64)
    exact = np.expm1(reduced.raw.X.toarray().astype(np.float64)) * totals[:, None] / 1e4
    worst = float(np.abs(exact - np.rint(exact)).max())
    if not worst < MAX_ROUNDING:
        found = f"a count {worst:.3f} away from a whole number"
        raise DataError("scanpy.datasets.pbmc68k_reduced", found, f"at most {MAX_ROUNDING}")
    genes = sparse.coo_matrix(np.rint(exact).astype(np.int64).T)
    # Column by column, as Cell Ranger writes it.
    order = np.lexsort((genes.row, genes.col))
    genes = sparse.coo_matrix((genes.data[order], (genes.row[order], genes.col[order])), shape=genes.shape)
    text = io.BytesIO()
    sio.mmwrite(text, genes, field="integer", symmetry="general")
    obs = reduced.obs[["bulk_labels", "louvain", "percent_mito", "n_counts"]].astype({"n_counts": np.int64})
    names = reduced.raw.var_names
    destination.mkdir(parents=True, exist_ok=True)
    _write_gzip(destination / "matrix.mtx.gz", text.getvalue())
    _write_gzip(destination / "features.tsv.gz", "".join(f"{g}\t{g}\tGene Expression\n" for g in names).encode())
    _write_gzip(destination / "barcodes.tsv.gz", "".join(f"{cell}\n" for cell in obs.index).encode())
    obs.to_csv(destination / "cells.csv", index_label="barcode", float_format="%.9g", lineterminator="\n")
    (destination / "ATTRIBUTION.md").write_text(ATTRIBUTION, encoding="utf-8")


def _write_gzip(file: Path, content: bytes) -> None:
    """Compress without the file name and the time, which would change the bytes from run to run."""
    file.write_bytes(gzip.compress(content, compresslevel=9, mtime=0))


ATTRIBUTION = """\
# pbmc68k: where these cells come from

- **Cells**: *Fresh 68k PBMCs (Donor A)*, 10x Genomics, Single Cell Gene Expression Dataset by Cell Ranger 1.1.0,
  licensed under [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/). Described in Zheng et al., "Massively
  parallel digital transcriptional profiling of single cells", Nature Communications 8, 14049 (2017).
- **Selection of 700 cells and 765 genes, and the columns of `cells.csv`**: `scanpy.datasets.pbmc68k_reduced()`,
  distributed with [scanpy](https://scanpy.readthedocs.io) (BSD-3-Clause).
- **What was changed here**: scanpy's log-normalised values y were turned back into counts by
  `round(expm1(y) * n_counts / 10000)`; no value was further than 0.1 from a whole number. Written as a 10x v3 folder
  (gene names stand in for gene identifiers). `bulk_labels`, `louvain`, `percent_mito` (a fraction) and `n_counts`
  (over all genes, not only these 765) are scanpy's.
"""

"""What the tests of this room share: a small simulated set, and writers of files as they come from instruments."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from anndata import AnnData
from scipy import io as sio
from scipy import sparse

from scforget.data.synthetic import PRESETS, simulate


@pytest.fixture(scope="session")
def tiny() -> AnnData:
    return simulate(PRESETS["tiny"], seed=0)


@pytest.fixture(scope="session")
def write_10x() -> Callable[..., Path]:
    return _write_10x


@pytest.fixture(scope="session")
def same_counts() -> Callable[[AnnData, AnnData], bool]:
    return _same_counts


def _write_10x(cells: AnnData, folder: Path, *, legacy: bool, kinds: list[str] | None = None) -> Path:
    """Write what Cell Ranger writes: version 2 (plain, genes.tsv) or 3 (gzipped, features.tsv with a third column)."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.BytesIO()
    sio.mmwrite(text, sparse.coo_matrix(cells.X.T), field="integer", symmetry="general")
    kinds = kinds or ["Gene Expression"] * cells.n_vars
    genes = [f"id_{g}\t{g}" if legacy else f"id_{g}\t{g}\t{k}" for g, k in zip(cells.var_names, kinds, strict=True)]
    parts = {
        "matrix.mtx": text.getvalue(),
        "genes.tsv" if legacy else "features.tsv": "".join(f"{line}\n" for line in genes).encode(),
        "barcodes.tsv": "".join(f"{cell}\n" for cell in cells.obs_names).encode(),
    }
    for name, content in parts.items():
        (folder / (name if legacy else f"{name}.gz")).write_bytes(content if legacy else gzip.compress(content))
    return folder


def _same_counts(one: AnnData, other: AnnData) -> bool:
    return (
        one.shape == other.shape
        and (one.X != other.X).nnz == 0
        and one.obs_names.equals(other.obs_names)
        and list(one.var_names) == list(other.var_names)
    )

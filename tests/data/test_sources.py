"""Reading counts, the bundled set, and fetching over a network that fails (a local server, never a real one)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scforget.data.sources import read, write_bundled
from scforget.errors import DataError


def small(values: object, **more: object) -> AnnData:
    matrix = sparse.csr_matrix(np.asarray(values))
    return AnnData(
        X=matrix,
        obs=pd.DataFrame(index=[f"c{i}" for i in range(matrix.shape[0])]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(matrix.shape[1])]),
        **more,
    )


def write_10x_h5(cells: AnnData, file: Path) -> Path:
    by_cell = sparse.csr_matrix(cells.X)
    with h5py.File(file, "w") as out:
        group = out.create_group("matrix")
        group["data"], group["indices"], group["indptr"] = by_cell.data, by_cell.indices, by_cell.indptr
        group["shape"] = np.array(by_cell.shape[::-1])
        group["barcodes"] = cells.obs_names.to_numpy().astype("S")
        features = group.create_group("features")
        features["id"] = features["name"] = cells.var_names.to_numpy().astype("S")
        features["feature_type"] = np.array(["Gene Expression"] * cells.n_vars, dtype="S")
        features["genome"] = np.array(["x"] * cells.n_vars, dtype="S")
    return file


# read: round trips


def test_read_gives_back_what_was_written_in_every_format(tiny, tmp_path, write_10x, same_counts):
    (tmp_path / "h5ad").mkdir()
    tiny.write_h5ad(tmp_path / "h5ad" / "cells.h5ad")
    places = [
        tmp_path / "h5ad",
        tmp_path / "h5ad" / "cells.h5ad",
        write_10x(tiny, tmp_path / "v2", legacy=True),
        write_10x(tiny, tmp_path / "v3", legacy=False),
        tmp_path / "v2" / "matrix.mtx",
        tmp_path / "v3" / "matrix.mtx.gz",
        write_10x_h5(tiny, tmp_path / "cells.h5"),
    ]
    for place in places:
        cells = read(place, layer=None)
        assert same_counts(cells, tiny), place
        assert cells.X.format == "csr"
        assert cells.X.dtype == np.int32


@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    legacy=st.booleans(),
    dense=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_read_keeps_any_counts(tmp_path_factory, seed, shape, legacy, dense, write_10x):
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.5, shape) * rng.integers(1, 2**31, shape) % 2**31
    counts[0, 0] = 2**31 - 1
    cells = small(counts.astype(np.int64))
    folder = tmp_path_factory.mktemp("cells")
    write_10x(cells, folder / "mtx", legacy=legacy)
    if dense:
        cells.X = cells.X.toarray().astype(np.float64)
    cells.write_h5ad(folder / "cells.h5ad")
    for place in (folder / "mtx", folder / "cells.h5ad"):
        np.testing.assert_array_equal(read(place, layer=None).X.toarray(), counts)


def test_read_agrees_with_scanpy_on_10x_folders(tiny, tmp_path, write_10x):
    for legacy in (True, False):
        folder = write_10x(tiny, tmp_path / str(legacy), legacy=legacy)
        theirs = scanpy.read_10x_mtx(folder)
        ours = read(folder, layer=None)
        np.testing.assert_array_equal(ours.X.toarray(), theirs.X.toarray())
        assert list(ours.var_names) == list(theirs.var_names)
        assert list(ours.var["gene_ids"]) == list(theirs.var["gene_ids"])


def test_read_takes_counts_from_a_layer_and_keeps_obs_and_var(tmp_path):
    cells = small([[0.5, 1.5], [2.5, 0.1]], layers={"counts": sparse.csr_matrix(np.array([[3.0, 0], [0, 7]]))})
    cells.obs["age"], cells.var["length"] = [1, 2], [10, 20]
    cells.uns["note"] = "volatile"
    cells.write_h5ad(tmp_path / "a.h5ad")
    got = read(tmp_path, layer="counts")
    np.testing.assert_array_equal(got.X.toarray(), [[3, 0], [0, 7]])
    assert got.obs["age"].tolist() == [1, 2]
    assert got.var["length"].tolist() == [10, 20]
    assert not got.uns
    assert not got.layers


def test_read_drops_stored_zeros(tmp_path):
    matrix = sparse.csr_matrix((np.array([1, 0, 2]), np.array([0, 1, 1]), np.array([0, 2, 3])), shape=(2, 2))
    cells = small([[1, 1], [0, 2]])
    cells.X = matrix
    cells.write_h5ad(tmp_path / "a.h5ad")
    assert read(tmp_path, layer=None).X.nnz == 2


def test_read_joins_cells_csv_by_barcode(tiny, tmp_path, write_10x):
    folder = write_10x(tiny, tmp_path, legacy=False)
    table = pd.DataFrame({"barcode": tiny.obs_names[::-1], "kind": tiny.obs["cluster"].to_numpy()[::-1]})
    table.iloc[:-1].to_csv(folder / "cells.csv", index=False)  # all but the first cell
    kinds = read(folder, layer=None).obs["kind"]
    assert np.isnan(kinds.iloc[0])
    np.testing.assert_array_equal(kinds.iloc[1:].astype(int), tiny.obs["cluster"].iloc[1:].astype(int))


def test_read_keeps_gene_expression_only(tiny, tmp_path, write_10x):
    kinds = ["Gene Expression"] * 50 + ["Antibody Capture"] * 10
    cells = read(write_10x(tiny, tmp_path, legacy=False, kinds=kinds), layer=None)
    assert list(cells.var_names) == list(tiny.var_names[:50])


def test_read_keeps_genes_with_awkward_names(tmp_path, write_10x):
    cells = small([[1, 2, 3]])
    cells.var_names = ["NA", '5"-x', "nan"]
    for legacy in (True, False):
        folder = write_10x(cells, tmp_path / str(legacy), legacy=legacy)
        assert list(read(folder, layer=None).var_names) == ["NA", '5"-x', "nan"]


def test_read_makes_gene_names_unique_and_says_so(tmp_path, write_10x):
    cells = small([[1, 2, 3]])
    folder = write_10x(cells, tmp_path, legacy=True)
    (folder / "genes.tsv").write_text("i\tA\nj\tB\nk\tA\n")
    with pytest.warns(UserWarning, match="1 gene names were in use already"):
        assert list(read(folder, layer=None).var_names) == ["A", "B", "A-1"]


# read: refusals, each in one line


def refused(path: Path, layer: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read(path, layer=layer)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (-1.0, "1 negative values, the first (-1) in cell 'c1', gene 'g0'"),
        (1.5, "1 non-integer values, the first (1.5)"),
        (np.nan, "1 NaN values"),
        (np.inf, "1 infinite values"),
        (-np.inf, "1 infinite values"),
        (2.0**31, "1 above 2147483647 values"),
    ],
)
@pytest.mark.parametrize("dense", [True, False])
def test_read_refuses_what_is_no_count(tmp_path, bad, words, dense):
    cells = small([[1.0, 0.0], [bad, 2.0]], layers={"counts": np.ones((2, 2))})
    if dense:
        cells.X = cells.X.toarray()
    cells.write_h5ad(tmp_path / "a.h5ad")
    message = refused(tmp_path)
    assert words in message
    assert "cell 'c1', gene 'g0'" in message
    assert "layers in the file: counts" in message


def test_read_counts_every_bad_value_and_names_the_first(tmp_path):
    small([[0, 1], [1, -3], [-2, -1]]).write_h5ad(tmp_path / "a.h5ad")
    assert "3 negative values, the first (-3) in cell 'c1', gene 'g1'" in refused(tmp_path)


def test_read_refuses_a_missing_layer_and_names_those_there(tmp_path):
    small([[1]], layers={"spliced": np.ones((1, 1)), "raw": np.ones((1, 1))}).write_h5ad(tmp_path / "a.h5ad")
    assert "no layer 'counts'; wanted null (for X), or one of its layers: raw, spliced" in refused(tmp_path, "counts")


@pytest.mark.parametrize("values", [np.zeros((3, 2)), np.zeros((0, 2)), np.zeros((2, 0))])
def test_read_refuses_an_empty_matrix(tmp_path, values):
    small(values).write_h5ad(tmp_path / "a.h5ad")
    assert "empty matrix" in refused(tmp_path)


def test_read_refuses_an_h5ad_without_x(tmp_path):
    AnnData(obs=pd.DataFrame(index=["a"]), var=pd.DataFrame(index=["g"])).write_h5ad(tmp_path / "a.h5ad")
    assert "empty matrix" in refused(tmp_path)


def test_read_refuses_two_cells_of_one_barcode(tmp_path, write_10x):
    folder = write_10x(small([[1], [2], [3]]), tmp_path, legacy=True)
    (folder / "barcodes.tsv").write_text("AAA\nCCC\nAAA\n")
    assert "barcode 'AAA' more than once (1 repeats in all)" in refused(folder)


def test_read_refuses_what_is_not_there_or_not_one(tmp_path):
    assert "no such file or folder" in refused(tmp_path / "nowhere")
    (tmp_path / ".hidden.h5ad").touch()
    assert "none of them" in refused(tmp_path)
    for name in ("b.h5ad", "a.h5"):
        (tmp_path / name).touch()
    assert "found a.h5, b.h5ad" in refused(tmp_path)
    (tmp_path / "notes.txt").touch()
    assert "'.txt'" in refused(tmp_path / "notes.txt")


@pytest.mark.parametrize("name", ["a.h5ad", "a.h5", "matrix.mtx", "matrix.mtx.gz"])
@pytest.mark.parametrize("content", [b"", b"not what it says\nat all\n"])
def test_read_refuses_a_broken_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert "a file that can be read" in refused(tmp_path / name)


def test_read_refuses_an_incomplete_10x_folder(tiny, tmp_path, write_10x):
    folder = write_10x(tiny, tmp_path, legacy=True)
    (folder / "barcodes.tsv").write_text("one\ntwo\n")
    assert "60 genes x 240 cells, 60 gene and 2 barcode lines" in refused(folder)
    (folder / "genes.tsv").unlink()
    assert "no features.tsv or genes.tsv" in refused(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [("barcode,kind\nc0,1\nc0,2\n", "barcode 'c0' more than once"), ("row,kind\n0,1\n1,2\n", "no barcode of the")],
)
def test_read_refuses_a_cell_table_that_does_not_fit(tmp_path, text, words, write_10x):
    folder = write_10x(small([[1], [2]]), tmp_path, legacy=True)
    (folder / "cells.csv").write_text(text)
    assert words in refused(folder)


# the bundled set


@pytest.fixture(scope="module")
def bundled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundled") / "pbmc68k"
    write_bundled(folder)
    return folder


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_write_bundled_gives_the_same_bytes_each_time(bundled, tmp_path):
    write_bundled(tmp_path)
    assert digest(tmp_path) == digest(bundled)
    assert set(digest(bundled)) == {
        "ATTRIBUTION.md",
        "barcodes.tsv.gz",
        "cells.csv",
        "features.tsv.gz",
        "matrix.mtx.gz",
    }
    assert sum(file.stat().st_size for file in bundled.iterdir()) < 1.5e6


def test_write_bundled_recovers_the_counts(bundled):
    cells = read(bundled, layer=None)
    reduced = scanpy.datasets.pbmc68k_reduced()
    assert cells.shape == (700, 765)
    # Normalising the counts anew gives what scanpy distributes (its float32, its rounding of n_counts).
    again = np.log1p(cells.X.toarray() * 1e4 / reduced.obs["n_counts"].to_numpy()[:, None])
    np.testing.assert_allclose(again, reduced.raw.X.toarray(), atol=0.02, rtol=1e-3)
    np.testing.assert_array_equal(cells.X.toarray() > 0, reduced.raw.X.toarray() > 0)
    for column in ("bulk_labels", "louvain"):
        assert cells.obs[column].astype(str).tolist() == reduced.obs[column].astype(str).tolist()
    np.testing.assert_allclose(cells.obs["percent_mito"], reduced.obs["percent_mito"], rtol=1e-6)


def test_write_bundled_reads_alike_with_scanpy(bundled, same_counts):
    assert same_counts(read(bundled, layer=None), scanpy.read_10x_mtx(bundled))


def test_write_bundled_refuses_values_that_are_no_counts(monkeypatch, tmp_path):
    reduced = scanpy.datasets.pbmc68k_reduced()
    reduced.obs["n_counts"] *= 1.37
    monkeypatch.setattr(scanpy.datasets, "pbmc68k_reduced", lambda: reduced)
    with pytest.raises(DataError, match="away from a whole number"):
        write_bundled(tmp_path / "out")
    assert not (tmp_path / "out").exists()

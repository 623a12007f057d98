"""Preparing cells: filters, labels, gene selection, markers, clustering."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import sparse
from sklearn.metrics import adjusted_rand_score

from scforget.data.prepare import LeidenSettings, PrepareSettings, prepare
from scforget.errors import DataError, EmptyGroupError

LEIDEN = LeidenSettings(resolution=0.5, n_neighbors=15, n_pcs=10, n_top_genes=60)


def settings(**changes: object) -> PrepareSettings:
    values: dict[str, object] = {
        "layer": None,
        "min_genes": 1,
        "max_mito_fraction": 1.0,
        "mito_prefixes": ["MT-", "mt-"],
        "mito_column": None,
        "label_column": "kind",
        "unlabelled": ["nan"],
        "leiden": None,
        "donor_column": None,
    }
    return PrepareSettings(**{**values, **changes})


def table(counts: list[list[int]], kinds: list[object], genes: list[str] | None = None, **obs: object) -> AnnData:
    names = genes or [f"g{i}" for i in range(len(counts[0]))]
    return AnnData(
        X=sparse.csr_matrix(np.array(counts, dtype=np.int32)),
        obs=pd.DataFrame({"kind": kinds, **obs}, index=[f"c{i}" for i in range(len(counts))]),
        var=pd.DataFrame(index=names),
    )


# settings


@pytest.mark.parametrize(("label", "given"), [("kind", LEIDEN), (None, None)])
def test_prepare_settings_want_exactly_one_source_of_labels(label, given):
    with pytest.raises(ValidationError, match="exactly one of label_column and leiden"):
        settings(label_column=label, leiden=given)


def test_prepare_settings_give_no_defaults():
    for kind in (PrepareSettings, LeidenSettings):
        assert all(field.is_required() for field in kind.model_fields.values())


# prepare: quality control


def test_prepare_drops_cells_with_few_genes_and_many_mitochondrial_counts():
    raw = table(
        [[5, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 8], [1, 1, 0, 2]], ["a", "a", "b", "b"], genes=["x", "y", "z", "MT-1"]
    )
    cells, summary = prepare(raw, settings(min_genes=2, max_mito_fraction=0.5), seed=0)
    assert list(cells.obs_names) == ["c1", "c3"]
    assert cells.obs["mito_fraction"].tolist() == [0.0, 0.5]
    assert cells.obs["n_genes"].tolist() == [3, 3]
    assert cells.obs["total_counts"].tolist() == [3, 4]
    assert summary["cells"] == {"read": 4, "after_min_genes": 3, "after_mito": 2}


def test_prepare_keeps_every_gene_that_a_kept_cell_expresses():
    raw = table([[1, 1, 0, 0], [2, 0, 1, 0], [9, 0, 0, 0]], ["a"] * 3)
    cells, summary = prepare(raw, settings(min_genes=2), seed=0)
    assert list(cells.var_names) == ["g0", "g1", "g2"]
    assert summary["genes"] == {"read": 4, "expressed": 3}
    assert summary["sparsity"] == pytest.approx(2 / 6)


def test_prepare_takes_the_mitochondrial_fraction_from_a_column():
    raw = table([[1, 1], [1, 1]], ["a", "a"], mito=[0.01, 0.2])
    cells, summary = prepare(raw, settings(mito_column="mito", max_mito_fraction=0.1), seed=0)
    assert list(cells.obs_names) == ["c0"]
    assert cells.obs["mito_fraction"].tolist() == [0.01]
    assert summary["warnings"] == []


@pytest.mark.parametrize("values", [[0.1, 5.0], [0.1, np.nan], [0.1, -0.2], ["a", "b"]])
def test_prepare_refuses_a_column_that_is_no_fraction(values):
    with pytest.raises(DataError, match="fraction"):
        prepare(table([[1], [1]], ["a", "a"], mito=values), settings(mito_column="mito"), seed=0)


def test_prepare_warns_when_no_gene_is_mitochondrial():
    _, summary = prepare(table([[1, 1]], ["a"]), settings(), seed=0)
    assert any("no gene name begins with" in note for note in summary["warnings"])


def test_prepare_raises_when_nothing_is_left():
    with pytest.raises(EmptyGroupError, match="0 of 2 cells"):
        prepare(table([[1, 1], [1, 1]], ["a", "a"]), settings(min_genes=3), seed=0)


def test_prepare_warns_of_a_label_that_quality_control_empties():
    _, summary = prepare(table([[1, 1], [1, 0]], ["a", "rare"]), settings(min_genes=2), seed=0)
    assert any("'rare'" in note for note in summary["warnings"])
    assert summary["labels"] == {"a": 1}


def test_prepare_leaves_the_raw_cells_alone(tiny):
    before, columns = tiny.X.copy(), list(tiny.obs.columns)
    prepare(tiny, settings(label_column="cluster", min_genes=30), seed=0)
    assert (before != tiny.X).nnz == 0
    assert list(tiny.obs.columns) == columns


@given(st.integers(0, 2**32), st.integers(1, 6), st.floats(0, 1))
@hypothesis_settings(max_examples=40, deadline=None)
def test_prepare_agrees_with_a_loop_over_cells(seed, min_genes, limit):
    counts = np.random.default_rng(seed).poisson(0.7, (12, 8))
    raw = table(counts.tolist(), ["a"] * 12, genes=["MT-1", "mt-2", *(f"g{i}" for i in range(6))])
    wanted = []
    for cell, row in enumerate(counts):
        fraction = (row[0] + row[1]) / row.sum() if row.sum() else 0.0
        if sum(count > 0 for count in row) >= min_genes and fraction <= limit:
            wanted.append(f"c{cell}")
    if not wanted:
        with pytest.raises(EmptyGroupError):
            prepare(raw, settings(min_genes=min_genes, max_mito_fraction=limit), seed=0)
        return
    cells, _ = prepare(raw, settings(min_genes=min_genes, max_mito_fraction=limit), seed=0)
    assert list(cells.obs_names) == wanted
    kept = raw[wanted].X.toarray()
    np.testing.assert_array_equal(cells.X.toarray(), kept[:, kept.sum(axis=0) > 0])
    assert cells.X.format == "csr"
    assert cells.X.dtype == np.int32


# prepare: labels and donors


def test_prepare_names_missing_labels_unlabelled():
    raw = table([[1]] * 5, ["B", None, "nan", np.nan, "A"])
    cells, summary = prepare(raw, settings(), seed=0)
    assert cells.obs["label"].tolist() == ["B", "unlabelled", "unlabelled", "unlabelled", "A"]
    assert summary["labels"] == {"A": 1, "B": 1, "unlabelled": 3}


def test_prepare_writes_cluster_numbers_as_whole_numbers_in_order():
    # One gap turns a column of numbers into floats.
    raw = table([[1]] * 4, [10.0, 2.0, np.nan, 10.0])
    cells, _ = prepare(raw, settings(), seed=0)
    assert cells.obs["label"].cat.categories.tolist() == ["2", "10", "unlabelled"]


def test_prepare_keeps_the_columns_of_the_file_and_says_which_it_replaces():
    raw = table([[1, 2]], ["a"], age=[7], n_genes=[99])
    cells, summary = prepare(raw, settings(), seed=0)
    assert cells.obs["age"].tolist() == [7]
    assert cells.obs["n_genes"].tolist() == [2]
    assert "obs column 'n_genes' of the file was replaced" in summary["warnings"]


def test_prepare_reports_no_replacement_when_the_column_is_its_own_source():
    raw = table([[1], [2]], ["a", "b"], label=["p", "q"], donor=[3, 4])
    cells, summary = prepare(raw, settings(label_column="label", donor_column="donor"), seed=0)
    assert cells.obs["label"].tolist() == ["p", "q"]
    assert not any("replaced" in note for note in summary["warnings"])


def test_prepare_gives_donors_as_text():
    raw = table([[1], [2], [3]], ["a"] * 3, patient=[3, 12, 3])
    cells, summary = prepare(raw, settings(donor_column="patient"), seed=0)
    assert cells.obs["donor"].tolist() == ["3", "12", "3"]
    assert summary["donors"] == {"3": 2, "12": 1}


@pytest.mark.parametrize("wrong", [{"label_column": "no"}, {"donor_column": "no"}, {"mito_column": "no"}])
def test_prepare_names_the_columns_there_when_one_is_missing(wrong):
    with pytest.raises(DataError, match="no obs column 'no'; wanted one of its columns: kind, age"):
        prepare(table([[1]], ["a"], age=[1]), settings(**wrong), seed=0)


def test_prepare_summary_is_plain_json(tiny):
    cells, summary = prepare(tiny, settings(label_column="cluster", donor_column="donor"), seed=0)
    assert json.loads(json.dumps(summary)) == summary
    assert summary["labels"] == {"0": 120, "1": 80, "2": 40}
    assert summary["median_total_counts"] == np.median(tiny.X.toarray().sum(axis=1))
    assert not cells.uns


def test_prepare_survives_a_round_trip_through_h5ad(tiny, tmp_path):
    import anndata

    cells, _ = prepare(tiny, settings(label_column="cluster", donor_column="donor"), seed=0)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    back = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert (back.X != cells.X).nnz == 0
    pd.testing.assert_frame_equal(back.obs, cells.obs)


def test_prepare_labels_by_clustering_where_no_column_does(tiny):
    cells, summary = prepare(tiny, settings(label_column=None, leiden=LEIDEN), seed=0)
    assert sum(summary["labels"].values()) == 240
    assert adjusted_rand_score(cells.obs["cluster"], cells.obs["label"]) > 0.8


def test_importing_prepare_stays_cheap():
    import subprocess
    import sys

    rooms = "scforget.data.prepare, scforget.data.sources, scforget.data.synthetic"
    code = f"import sys, {rooms}; print({{'torch', 'scanpy', 'anndata', 'pooch'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

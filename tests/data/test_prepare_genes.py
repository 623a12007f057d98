"""Choosing genes, marker genes and clustering, against the methods written out."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse, stats
from sklearn.metrics import adjusted_rand_score

from scforget.data import genes as room
from scforget.data.genes import choose_markers, listed_genes, markers, select_genes
from scforget.data.prepare import LeidenSettings, leiden
from scforget.data.synthetic import PRESETS, SyntheticSettings, simulate
from scforget.errors import DataError, EmptyGroupError

LEIDEN = LeidenSettings(resolution=0.5, n_neighbors=15, n_pcs=10, n_top_genes=60)


def table(counts: list[list[int]]) -> AnnData:
    return AnnData(
        X=sparse.csr_matrix(np.array(counts, dtype=np.int32)),
        var=pd.DataFrame(index=[f"g{i}" for i in range(len(counts[0]))]),
    )


# leiden


def test_leiden_finds_planted_clusters_and_names_them_by_size(tiny):
    labels = leiden(tiny, LEIDEN, seed=1)
    assert adjusted_rand_score(tiny.obs["cluster"], labels) > 0.8
    names, sizes = np.unique(labels, return_counts=True)
    assert names.tolist() == [str(i) for i in range(len(names))]
    assert sizes.tolist() == sorted(sizes, reverse=True)


def test_leiden_is_the_same_for_the_same_seed(tiny):
    np.testing.assert_array_equal(leiden(tiny, LEIDEN, seed=5), leiden(tiny, LEIDEN, seed=5))


def test_leiden_refuses_fewer_cells_than_neighbours(tiny):
    with pytest.raises(EmptyGroupError, match="n_neighbors = 15"):
        leiden(tiny[:15].copy(), LEIDEN, seed=0)


# select_genes


def seurat_v3(counts: np.ndarray, n_top: int, span: float) -> list[int]:
    """The method as its paper states it, in dense NumPy."""
    from skmisc.loess import loess

    mean, var = counts.mean(axis=0), counts.var(axis=0, ddof=1)
    varies = var > 0
    fit = loess(np.log10(mean[varies]), np.log10(var[varies]), span=span, degree=2)
    fit.fit()
    sd = np.ones(len(mean))
    sd[varies] = np.sqrt(10 ** np.asarray(fit.outputs.fitted_values))
    z = np.minimum((counts - mean) / sd, np.sqrt(len(counts)))
    score = (z**2).sum(axis=0) / (len(counts) - 1)
    return sorted(np.argsort(-score, kind="stable")[:n_top].tolist())


@pytest.mark.parametrize("chosen", [None, np.arange(0, 600, 2)])
def test_select_genes_agrees_with_the_method_written_out(chosen):
    larger = SyntheticSettings(
        **{**PRESETS["tiny"].model_dump(), "n_genes": 300, "cluster_sizes": [300, 200, 100], "library_median": 900.0}
    )
    cells = simulate(larger, seed=2)
    counts = cells.X.toarray()[slice(None) if chosen is None else chosen].astype(float)
    wanted = [cells.var_names[gene] for gene in seurat_v3(counts, 50, 0.3)]
    assert select_genes(cells, chosen, 50) == wanted


def test_select_genes_prefers_planted_markers(tiny):
    chosen = select_genes(tiny, None, 18)
    planted = set(tiny.var_names[tiny.var["marker_of"] != ""])
    assert len(planted & set(chosen)) >= 12


def test_select_genes_depends_on_the_cells_it_is_chosen_on(tiny):
    first = select_genes(tiny, np.flatnonzero(tiny.obs["cluster"] != "2"), 20)
    assert first != select_genes(tiny, None, 20)
    assert first == select_genes(tiny[tiny.obs["cluster"] != "2"].copy(), None, 20)


def test_select_genes_returns_all_expressed_genes_when_asked_for_more():
    cells = table([[1, 0, 2, 0], [3, 0, 0, 0], [0, 0, 0, 5]])
    assert select_genes(cells, None, 4) == ["g0", "g2", "g3"]
    assert select_genes(cells, np.array([0, 1]), 2) == ["g0", "g2"]


def test_select_genes_keeps_the_order_of_the_file(tiny):
    chosen = select_genes(tiny, None, 20)
    assert len(chosen) == 20
    assert chosen == [name for name in tiny.var_names if name in set(chosen)]


def test_select_genes_takes_constant_genes_last(tiny):
    counts = tiny.X.toarray()
    counts[:, :10] = 3
    cells = AnnData(X=sparse.csr_matrix(counts), var=tiny.var)
    assert not set(select_genes(cells, None, 50)) & set(tiny.var_names[:10])


def test_select_genes_takes_the_first_of_equally_variable_genes(tiny):
    counts = tiny.X.toarray()
    copies = [7, 20, 41, 55]
    counts[:, copies] = counts[:, [20]]
    cells = AnnData(X=sparse.csr_matrix(counts), var=tiny.var)
    taken = [
        [gene for gene in copies if tiny.var_names[gene] in select_genes(cells, None, n_top)] for n_top in range(1, 60)
    ]
    assert all(genes == copies[: len(genes)] for genes in taken)
    assert {len(genes) for genes in taken} == {0, 1, 2, 3, 4}


def test_select_genes_tries_wider_spans_where_the_usual_one_is_singular():
    rng = np.random.default_rng(0)
    cells = table(rng.poisson(rng.gamma(1.0, 3.0, 8), (30, 8)).tolist())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "LOESS_SPANS", (0.3,))
        with pytest.raises(DataError, match="loess fails"):
            select_genes(cells, None, 4)
    assert len(select_genes(cells, None, 4)) == 4


@pytest.mark.parametrize(
    "counts",
    [
        [[1, 0, 1], [0, 1, 1], [1, 1, 0]],  # loess would crash the process with a window of no gene
        [[2, 2, 2], [2, 2, 2], [2, 2, 2]],  # nothing varies
        [[1, 0] * 10, [0, 1] * 10, [0, 0] * 10],  # all genes have the same mean
    ],
)
def test_select_genes_says_so_when_no_span_works(counts):
    with pytest.raises(DataError, match=f"3 cells x {len(counts[0])} expressed genes"):
        select_genes(table(counts), None, 2)


@pytest.mark.parametrize("chosen", [np.array([], dtype=np.int64), np.array([4])])
def test_select_genes_refuses_fewer_than_two_cells(tiny, chosen):
    with pytest.raises(EmptyGroupError, match="at least 2"):
        select_genes(tiny, chosen, 5)


# markers


def test_markers_rank_as_scipy_mann_whitney_does(tiny):
    labels, genes = tiny.obs["cluster"].tolist(), list(tiny.var_names[::2])
    found = markers(tiny, labels, genes, 30)
    logs = np.log1p(tiny.X.toarray() / np.asarray(tiny.X.sum(axis=1)) * 1e4).astype(np.float32)[:, ::2]
    for label in "012":
        own = np.array(labels) == label
        u = stats.mannwhitneyu(logs[own], logs[~own]).statistic
        ties = np.array([stats.tiecorrect(stats.rankdata(gene)) for gene in logs.T])
        inside, outside = own.sum(), (~own).sum()
        z = (u - inside * outside / 2) / np.sqrt(ties * inside * outside * (inside + outside + 1) / 12)
        scores = dict(zip(genes, z, strict=True))
        ranked = np.array([scores[gene] for gene in found[label]])
        assert sorted(found[label]) == sorted(genes)
        assert np.all(np.diff(ranked) <= 1e-5)


def test_markers_find_the_planted_ones(tiny):
    found = markers(tiny, tiny.obs["cluster"].tolist(), list(tiny.var_names), 4)
    for cluster, genes in found.items():
        assert set(tiny.var.loc[genes, "marker_of"]) == {cluster}


def test_markers_come_only_from_the_candidates(tiny):
    candidates = list(tiny.var_names[5:12])
    found = markers(tiny, tiny.obs["cluster"].tolist(), candidates, 100)
    assert all(sorted(genes) == sorted(candidates) for genes in found.values())


def test_markers_skip_labels_of_one_cell_or_of_all(tiny):
    labels = ["lone"] + ["a"] * 100 + ["b"] * 139
    assert set(markers(tiny, labels, list(tiny.var_names), 2)) == {"a", "b"}
    assert markers(tiny, ["a"] * 240, list(tiny.var_names), 2) == {}


def test_markers_take_the_first_of_equals():
    counts = np.zeros((8, 4), dtype=int)
    counts[:, 3] = 5
    counts[:4, :3] = 2
    found = markers(table(counts.tolist()), ["a"] * 4 + ["b"] * 4, ["g2", "g0", "g1", "g3"], 2)
    assert found["a"] == ["g2", "g0"]


def test_markers_refuse_unknown_genes_and_wrong_lengths(tiny):
    with pytest.raises(DataError, match="'nope'"):
        markers(tiny, ["a"] * 240, ["nope"], 1)
    with pytest.raises(DataError, match="3 labels"):
        markers(tiny, ["a", "b", "c"], list(tiny.var_names), 1)


def test_listed_genes_keeps_the_order_of_the_file_and_refuses_strangers() -> None:
    cells = simulate(PRESETS["tiny"], seed=1)
    names = [str(name) for name in cells.var_names[:5]]
    assert listed_genes(cells, names[::-1], "list.txt") == names
    with pytest.raises(DataError, match=r"gene list list\.txt: found 1 of 2 genes not in the data \(nosuch\)"):
        listed_genes(cells, [names[0], "nosuch"], "list.txt")
    with pytest.raises(DataError, match="0 of 0 genes"):
        listed_genes(cells, [], "list.txt")


def test_choose_markers_takes_the_named_ones_that_are_modelled() -> None:
    cells = simulate(PRESETS["tiny"], seed=1)
    names = [str(name) for name in cells.var_names[:5]]
    assert choose_markers(cells, names, [names[3], "absent", names[1]], 2) == [names[1], names[3]]
    with pytest.raises(DataError, match="none of the named markers"):
        choose_markers(cells, names, ["absent"], 2)


def test_choose_markers_falls_back_on_the_top_markers_of_each_label() -> None:
    cells = simulate(PRESETS["tiny"], seed=1)
    cells.obs["label"] = cells.obs["cluster"].astype(str)
    names = [str(name) for name in cells.var_names]
    top = markers(cells, cells.obs["label"].tolist(), names, 2)
    assert set(choose_markers(cells, names, [], 2)) == {gene for found in top.values() for gene in found}

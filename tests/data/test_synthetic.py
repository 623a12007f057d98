"""Simulated counts: sizes, determinism, moments, planted structure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import sparse

from scforget.data import synthetic
from scforget.data.synthetic import PRESETS, SyntheticSettings, simulate

TINY = PRESETS["tiny"]


def change(**changes: object) -> SyntheticSettings:
    return SyntheticSettings(**{**TINY.model_dump(), **changes})


def test_simulate_gives_the_shape_and_sizes_asked_for():
    cells = simulate(TINY, seed=0)
    assert cells.shape == (240, 60)
    assert cells.X.format == "csr"
    assert cells.X.dtype == np.int32
    assert cells.obs["cluster"].value_counts().to_dict() == {"0": 120, "1": 80, "2": 40}
    assert set(cells.obs["donor"].value_counts()) == {60}
    assert cells.obs_names.is_unique
    assert cells.var["marker_of"].value_counts().to_dict() == {"": 42, "0": 6, "1": 6, "2": 6}


def test_simulate_is_the_same_for_the_same_seed_only():
    first, again, other = simulate(TINY, seed=3), simulate(TINY, seed=3), simulate(TINY, seed=4)
    assert (first.X != again.X).nnz == 0
    assert first.obs.equals(again.obs)
    assert first.var.equals(again.var)
    assert (first.X != other.X).nnz > 0
    assert not first.obs["cluster"].equals(other.obs["cluster"])


def test_simulate_mixes_clusters_over_rows():
    clusters = simulate(TINY, seed=0).obs["cluster"].to_numpy()
    assert len(set(clusters[:40])) == 3


def test_simulate_plants_markers_where_it_says():
    cells = simulate(change(marker_fold=8.0, donor_sigma=0.0), seed=1)
    dense = cells.X.toarray() / cells.obs["library"].to_numpy()[:, None]
    for cluster in "012":
        own = cells.obs["cluster"].to_numpy() == cluster
        marked = cells.var["marker_of"].to_numpy() == cluster
        folds = dense[np.ix_(own, marked)].mean(axis=0) / dense[np.ix_(~own, marked)].mean(axis=0)
        assert np.all(folds > 3)


def test_simulate_has_the_mean_and_variance_of_a_negative_binomial():
    # One cluster, one donor, constant library and equal genes: every entry has mean 8 and variance 8 + 8²/2 = 40.
    flat = change(
        cluster_sizes=[3000],
        n_genes=20,
        n_donors=1,
        library_median=160.0,
        library_sigma=0.0,
        gene_sigma=0.0,
        donor_sigma=0.0,
        dispersion=2.0,
        markers_per_cluster=0,
    )
    dense = simulate(flat, seed=0).X.toarray()
    standard_error = np.sqrt(40 / dense.size)
    assert dense.mean() == pytest.approx(8, abs=4 * standard_error)
    assert dense.var() == pytest.approx(40, rel=0.05)
    # P(0) = (θ / (θ + mean))^θ = (2/10)².
    assert (dense == 0).mean() == pytest.approx(0.04, abs=4 * np.sqrt(0.04 * 0.96 / dense.size))


def test_simulate_gives_donors_effects_of_the_size_asked_for():
    settings = change(
        cluster_sizes=[4000], n_donors=2, donor_sigma=0.5, markers_per_cluster=0, dispersion=50.0, library_sigma=0.0
    )
    cells = simulate(settings, seed=0)
    dense, donors = cells.X.toarray(), cells.obs["donor"].to_numpy()
    means = np.stack([dense[donors == f"donor_{d}"].mean(axis=0) for d in (0, 1)])
    # The difference of two N(0, 0.5²) logarithms; its sd over 60 genes is known to about 1/sqrt(2·59) = 9 %.
    assert np.std(np.log(means[0] / means[1])) == pytest.approx(0.5 * np.sqrt(2), rel=0.3)


def test_simulate_has_lognormal_libraries():
    library = simulate(change(cluster_sizes=[20000], n_genes=3, markers_per_cluster=0), seed=0).obs["library"]
    logs = np.log(library)
    assert np.exp(logs.mean()) == pytest.approx(150.0, rel=0.02)
    assert logs.std() == pytest.approx(0.3, rel=0.02)


def test_simulate_joins_blocks_without_loss(monkeypatch):
    monkeypatch.setattr(synthetic, "BLOCK", 100)
    cells = simulate(TINY, seed=0)
    assert cells.shape == (240, 60)
    # The last, short block is there: its totals follow their expectation.
    totals = np.asarray(cells.X[200:].sum(axis=1)).ravel()
    assert totals.mean() == pytest.approx(cells.obs["library"].to_numpy()[200:].mean(), rel=0.1)


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    donors=st.integers(1, 5),
    markers=st.integers(0, 3),
    seed=st.integers(-5, 2**63),
)
@hypothesis_settings(max_examples=20, deadline=None)
def test_simulate_keeps_its_promises_for_any_settings(sizes, donors, markers, seed):
    settings = change(cluster_sizes=sizes, n_donors=donors, markers_per_cluster=markers, n_genes=12)
    cells = simulate(settings, seed=seed)
    assert cells.shape == (settings.n_cells, 12) == (sum(sizes), 12)
    assert [int((cells.obs["cluster"] == str(c)).sum()) for c in range(len(sizes))] == sizes
    of_donors = [int((cells.obs["donor"] == f"donor_{d}").sum()) for d in range(donors)]
    assert max(of_donors) - min(of_donors) <= 1
    assert cells.X.nnz == 0 or cells.X.data.min() >= 1


def test_settings_refuse_more_markers_than_genes():
    with pytest.raises(ValidationError, match="63 genes, but n_genes is 60"):
        change(markers_per_cluster=21)


def test_settings_give_no_defaults():
    assert all(field.is_required() for field in SyntheticSettings.model_fields.values())


def test_presets_hold_the_published_shape():
    paper = PRESETS["paper_shape"]
    assert (paper.n_cells, paper.n_genes, len(paper.cluster_sizes)) == (33088, 2000, 14)
    assert min(paper.cluster_sizes) == 35


def test_presets_paper_shape_has_the_published_sparsity():
    # A tenth of each cluster has the same profile mix as the whole, at a tenth of the cost.
    paper = PRESETS["paper_shape"].model_dump()
    tenth = SyntheticSettings(**{**paper, "cluster_sizes": [max(1, size // 10) for size in paper["cluster_sizes"]]})
    counts = simulate(tenth, seed=0).X
    assert isinstance(counts, sparse.csr_matrix)
    assert 1 - counts.nnz / np.prod(counts.shape) == pytest.approx(0.9, abs=0.03)
    assert np.median(np.asarray(counts.sum(axis=1))) == pytest.approx(400, rel=0.1)

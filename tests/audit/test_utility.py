from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, silhouette_score

from scforget.arrays import FloatArray
from scforget.audit import utility
from scforget.errors import DataError, EmptyGroupError


def blobs(sizes: list[int], distance: float, seed: int = 0) -> tuple[FloatArray, np.ndarray]:
    """Clusters along the corners of a simplex, with a spread of 1."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return distance * np.eye(max(len(sizes), 3))[labels] + rng.normal(size=(len(labels), max(len(sizes), 3))), labels


def test_latent_agreement_equals_sklearn() -> None:
    mu, labels = blobs([40, 30, 20], 6)
    found = utility.latent_agreement(mu, labels, seed=1)
    kmeans = KMeans(3, n_init=10, random_state=0).fit(mu)
    assert found["ari"] == pytest.approx(adjusted_rand_score(labels, kmeans.labels_), abs=0.05)
    assert found["silhouette"] == pytest.approx(silhouette_score(mu, labels))


def test_latent_agreement_tells_separate_from_shuffled() -> None:
    mu, labels = blobs([50, 50, 50], 12)
    assert utility.latent_agreement(mu, labels, seed=0)["ari"] == 1
    shuffled = utility.latent_agreement(mu, np.random.default_rng(0).permutation(labels), seed=0)
    assert abs(shuffled["ari"]) < 0.05
    assert shuffled["silhouette"] < 0.05


def test_latent_agreement_repeats_and_takes_text_labels() -> None:
    mu, labels = blobs([20, 20], 1)
    names = np.array(["B cell", "NK"])[labels]
    assert utility.latent_agreement(mu, names, seed=3) == utility.latent_agreement(mu, labels, seed=3)


def test_latent_agreement_of_a_collapsed_latent_is_chance() -> None:
    found = utility.latent_agreement(np.zeros((30, 4)), np.arange(30) % 3, seed=0)
    assert found == {"ari": 0, "silhouette": 0}


def test_latent_agreement_samples_many_cells_for_the_silhouette(monkeypatch: pytest.MonkeyPatch) -> None:
    mu, labels = blobs([200, 200], 5)
    full = utility.latent_agreement(mu, labels, seed=0)
    monkeypatch.setattr(utility, "SILHOUETTE_CELLS", 100)
    sampled = utility.latent_agreement(mu, labels, seed=0)
    assert sampled["silhouette"] != full["silhouette"]
    assert sampled["silhouette"] == pytest.approx(full["silhouette"], abs=0.05)


@pytest.mark.parametrize("labels", [["a"] * 4, ["a", "b", "c", "d"]])
def test_latent_agreement_leaves_out_what_labels_do_not_allow(labels: list[str]) -> None:
    assert utility.latent_agreement(np.eye(4), labels, seed=0) == {}


def test_cell_type_accuracy_equals_a_loop_over_folds() -> None:
    from sklearn.model_selection import StratifiedKFold

    mu, labels = blobs([40, 30, 20], 2)
    state = utility._random_state(5, "cell_type_accuracy")
    right = 0
    for fit, test in StratifiedKFold(5, shuffle=True, random_state=state).split(mu, labels):
        mean, spread = mu[fit].mean(axis=0), mu[fit].std(axis=0)
        model = LogisticRegression(max_iter=2000).fit((mu[fit] - mean) / spread, labels[fit])
        right += (model.predict((mu[test] - mean) / spread) == labels[test]).sum()
    found = utility.cell_type_accuracy(mu, labels, seed=5)
    assert found == {"cell_type_accuracy": pytest.approx(right / 90), "cell_types_left_out": 0}


def test_cell_type_accuracy_leaves_out_and_counts_rare_types() -> None:
    mu, labels = blobs([30, 30, 4, 1], 12)
    assert utility.cell_type_accuracy(mu, labels, seed=0) == {"cell_type_accuracy": 1, "cell_types_left_out": 2}
    assert utility.cell_type_accuracy(mu[30:], labels[30:], seed=0) == {"cell_types_left_out": 2}


def test_cell_type_accuracy_of_noise_is_chance() -> None:
    rng = np.random.default_rng(0)
    found = utility.cell_type_accuracy(rng.normal(size=(200, 5)), np.arange(200) % 2, seed=0)
    assert found["cell_type_accuracy"] == pytest.approx(0.5, abs=0.12)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_marker_correlation_equals_numpy_gene_by_gene(seed: int) -> None:
    rng = np.random.default_rng(seed)
    observed, decoded = rng.normal(size=(12, 4)), rng.normal(size=(12, 4))
    expected = np.mean([np.corrcoef(observed[:, g], decoded[:, g])[0, 1] for g in range(4)])
    assert utility.marker_correlation(observed, decoded) == pytest.approx(expected)


def test_marker_correlation_skips_silent_genes_but_not_constant_predictions() -> None:
    rng = np.random.default_rng(0)
    observed = rng.normal(size=(10, 3))
    decoded = observed.copy()
    observed[:, 1] = 0.1  # silent: no correlation exists
    assert utility.marker_correlation(observed, decoded) == pytest.approx(1)
    decoded[:, 2] = 0.1  # collapsed: predicts nothing
    assert utility.marker_correlation(observed, decoded) == pytest.approx(0.5)


def test_marker_correlation_without_variation_is_nan() -> None:
    assert np.isnan(utility.marker_correlation(np.full((5, 2), 0.1), np.ones((5, 2))))
    assert np.isnan(utility.marker_correlation(np.ones((1, 2)), np.ones((1, 2))))


def test_marker_correlation_refuses_empty_and_unequal_shapes() -> None:
    with pytest.raises(EmptyGroupError):
        utility.marker_correlation(np.zeros((0, 3)), np.zeros((0, 3)))
    with pytest.raises(DataError, match="one shape"):
        utility.marker_correlation(np.zeros((4, 3)), np.zeros((4, 2)))


def test_posterior_predictive_of_the_true_model_is_near_one_and_of_another_is_not() -> None:
    rng = np.random.default_rng(0)
    rates = rng.gamma(0.5, 2, 300)
    counts = rng.poisson(rates, (200, 300))
    true = utility.posterior_predictive(counts, rates, np.exp(-rates))
    assert true["mean_r"] > 0.99
    assert true["zero_fraction_r"] > 0.99
    wrong = rng.permutation(rates)
    other = utility.posterior_predictive(counts, wrong, np.exp(-wrong))
    assert abs(other["mean_r"]) < 0.2
    assert abs(other["zero_fraction_r"]) < 0.2


def test_posterior_predictive_leaves_out_what_does_not_vary() -> None:
    counts = np.tile([1, 2, 3], (5, 1))
    assert set(utility.posterior_predictive(counts, [1, 2, 3], [0, 0, 0])) == {"mean_r"}


def test_posterior_predictive_refuses_other_genes_and_no_cells() -> None:
    with pytest.raises(DataError, match="genes"):
        utility.posterior_predictive(np.ones((4, 3)), np.ones(2), np.ones(3))
    with pytest.raises(EmptyGroupError):
        utility.posterior_predictive(np.ones((0, 3)), np.ones(3), np.ones(3))


def test_embedding_repeats_with_its_seed_and_keeps_clusters_apart() -> None:
    mu, labels = blobs([20, 20], 30)
    layout = utility.embedding(mu, seed=1)
    assert layout.shape == (40, 2)
    np.testing.assert_array_equal(layout, utility.embedding(mu, seed=1))
    assert silhouette_score(layout, labels) > 0.5
    assert utility.embedding(mu[:4], seed=1).shape == (4, 2)


def test_embedding_refuses_too_few_cells() -> None:
    with pytest.raises(EmptyGroupError, match="at least 4"):
        utility.embedding(np.zeros((3, 2)), seed=0)


def test_latent_agreement_and_accuracy_refuse_no_cells() -> None:
    for function in (utility.latent_agreement, utility.cell_type_accuracy):
        with pytest.raises(EmptyGroupError):
            function(np.zeros((0, 2)), np.zeros(0), seed=0)

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats
from sklearn import metrics

from scforget.arrays import BoolArray, FloatArray
from scforget.attacks import gene_list as module
from scforget.attacks.gene_list import gene_list
from scforget.errors import DataError, EmptyGroupError

MEMBERS = np.arange(120) < 60


def log_counts(rng: np.random.Generator, n: int, A: int) -> FloatArray:
    """Sparse logarithms of counts; every gene has a mean of its own."""
    return np.log1p(rng.poisson(rng.gamma(1.0, 1.0, A), (n, A)).astype(np.float64))


def loop(values: FloatArray, selected: BoolArray) -> FloatArray:
    n, A = values.shape
    scores = []
    for x in range(n):
        parts: tuple[list[float], list[float]] = ([], [])
        for g in range(A):
            if len(set(values[:, g])) > 1:
                z = (values[x, g] - np.mean(values[:, g])) / np.std(values[:, g])
                parts[0 if selected[g] else 1].append(float(z) ** 2)
        scores.append(np.mean(parts[0]) - np.mean(parts[1]))
    return np.array(scores)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_gene_list_equals_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = log_counts(rng, 6, 9)
    values[:, [0, 8]] = rng.normal(size=(6, 2))
    values[:, 3] = 0.1
    selected = np.arange(9) < rng.integers(1, 9)
    np.testing.assert_allclose(gene_list(values, selected), loop(values, selected), atol=1e-10)


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_array, sparse.coo_array])
def test_gene_list_of_sparse_equals_dense(form: type) -> None:
    rng = np.random.default_rng(0)
    values, selected = log_counts(rng, 30, 50), rng.random(50) < 0.3
    np.testing.assert_array_equal(gene_list(form(values), selected), gene_list(values, selected))


def test_gene_list_takes_single_precision_as_prepared() -> None:
    rng = np.random.default_rng(1)
    values, selected = log_counts(rng, 30, 50).astype(np.float32), rng.random(50) < 0.3
    found = gene_list(sparse.csr_matrix(values), selected)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, gene_list(values.astype(np.float64), selected))


def test_gene_list_is_the_same_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    values, selected = log_counts(rng, 20, 47), rng.random(47) < 0.5
    whole = gene_list(values, selected)
    monkeypatch.setattr(module, "BLOCK", 5)
    np.testing.assert_allclose(gene_list(values, selected), whole, atol=1e-12)


def test_gene_list_is_zero_on_average_and_blind_to_the_unit_of_a_gene() -> None:
    rng = np.random.default_rng(3)
    values, selected = log_counts(rng, 40, 60), rng.random(60) < 0.5
    found = gene_list(values, selected)
    assert found.mean() == pytest.approx(0, abs=1e-12)
    moved = values * rng.uniform(0.5, 3, 60) + rng.normal(0, 10, 60)
    moved[:, values.std(axis=0) == 0] = 0.0
    np.testing.assert_allclose(gene_list(moved, selected), found, atol=1e-9)
    np.testing.assert_allclose(gene_list(values, ~selected), -found, atol=1e-12)


def test_gene_list_drops_constant_genes_of_any_value() -> None:
    rng = np.random.default_rng(4)
    values, selected = rng.normal(size=(7, 10)), np.arange(10) < 4
    constant = np.repeat([[0.1, -1e5 / 3, 0.0]], 7, axis=0)
    constant[0, 2] = 1e-200  # whose variance is 0 in floating point
    found = gene_list(np.hstack([values, constant]), np.append(selected, [True, False, True]))
    np.testing.assert_allclose(found, gene_list(values, selected), atol=1e-12)


def aucs(chosen_on: BoolArray, draw: str, runs: int) -> FloatArray:
    """AUC of 60 members against 60 others of one law, the list being the tenth of genes that varies most."""
    found = []
    for run in range(runs):
        rng = np.random.default_rng([run, len(draw)])
        values = rng.normal(size=(120, 1000)) if draw == "normal" else np.log1p(rng.poisson(1.0, (120, 1000)))
        selected = np.zeros(1000, dtype=bool)
        selected[np.argsort(-values[chosen_on].var(axis=0), kind="stable")[:100]] = True
        found.append(metrics.roc_auc_score(MEMBERS, gene_list(values, selected)))
    return np.array(found)


@pytest.mark.parametrize("draw", ["normal", "poisson"])
@pytest.mark.parametrize(("chosen", "side"), [("members", 1), ("both", 0), ("others", -1)])
def test_gene_list_marks_the_cells_that_the_genes_were_chosen_on(chosen: str, side: int, draw: str) -> None:
    chosen_on = {"members": MEMBERS, "both": np.ones(120, dtype=bool), "others": ~MEMBERS}[chosen]
    found = aucs(chosen_on, draw, 60)
    half = stats.t.ppf(0.995, 59) * stats.sem(found)
    if side:
        assert side * (found.mean() - 0.5) - half > 0.2
    else:
        assert found.mean() == pytest.approx(0.5, abs=half)


def test_gene_list_refuses_a_side_without_a_gene_that_varies() -> None:
    values = np.random.default_rng(5).normal(size=(5, 4))
    for selected in (np.ones(4, dtype=bool), np.zeros(4, dtype=bool)):
        with pytest.raises(DataError, match="at least 1 that varies"):
            gene_list(values, selected)
    values[:, 2:] = 1.0
    with pytest.raises(DataError, match="other genes of the gene-list attack: found 2, none of which varies"):
        gene_list(values, np.array([True, True, False, False]))


def test_gene_list_refuses_input_that_does_not_fit() -> None:
    values, selected = np.random.default_rng(6).normal(size=(5, 4)), np.arange(4) < 2
    for wrong in (selected[:3], np.arange(4)):
        with pytest.raises(DataError, match=r"booleans \[A\]"):
            gene_list(values, wrong)
    with pytest.raises(DataError, match=r"booleans \[A\]"):
        gene_list(values[0], selected)
    with pytest.raises(EmptyGroupError, match="at least 2"):
        gene_list(values[:1], selected)
    values[1, 1] = np.nan
    for form in (values, sparse.csr_array(values)):
        with pytest.raises(DataError, match="finite"):
            gene_list(form, selected)

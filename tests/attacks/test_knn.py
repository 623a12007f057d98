from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from scforget.arrays import FloatArray
from scforget.attacks.knn import KnnSettings, knn
from scforget.errors import DataError, EmptyGroupError
from scforget.tasks import Signals


def signals(cells: list[int], mu: FloatArray) -> Signals:
    zeros = np.zeros(len(cells))
    return Signals(np.array(cells, dtype=np.int64), zeros, zeros, mu, np.zeros_like(mu))


def brute_force(query: Signals, reference: Signals, k: int) -> FloatArray:
    scores = []
    for cell, point in zip(query.cells, query.mu, strict=True):
        distances = [
            np.sqrt(((point - other) ** 2).sum())
            for index, other in zip(reference.cells, reference.mu, strict=True)
            if index != cell
        ]
        scores.append(-np.mean(sorted(distances)[:k]))
    return np.array(scores)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 5), copies=st.booleans())
def test_knn_equals_brute_force_loop(seed: int, k: int, copies: bool) -> None:
    rng = np.random.default_rng(seed)
    mu = rng.integers(0, 2, (20, 2)).astype(float) if copies else rng.normal(size=(20, 2))
    query, reference = signals(list(range(5, 15)), mu[5:15]), signals(list(range(12)), mu[:12])
    found = knn(query, reference, KnnSettings(neighbours=k))["knn"]
    np.testing.assert_allclose(found, brute_force(query, reference, k), atol=1e-9)


def test_knn_leaves_out_a_cell_that_is_its_own_reference() -> None:
    mu = np.array([[0.0], [3.0], [10.0]])
    scores = knn(signals([7, 8, 9], mu), signals([7, 8, 9], mu), KnnSettings(neighbours=1))["knn"]
    np.testing.assert_allclose(scores, [-3, -3, -7])
    foreign = knn(signals([1, 2, 3], mu), signals([7, 8, 9], mu), KnnSettings(neighbours=1))["knn"]
    np.testing.assert_allclose(foreign, 0)


def test_knn_ranks_a_nearer_cell_higher() -> None:
    reference = signals([0, 1, 2], np.array([[0.0], [0.1], [0.2]]))
    scores = knn(signals([5, 6], np.array([[0.3], [4.0]])), reference, KnnSettings(neighbours=2))["knn"]
    assert scores[0] > scores[1]


def test_knn_refuses_too_few_reference_cells() -> None:
    mu = np.zeros((3, 2))
    with pytest.raises(EmptyGroupError, match="at least 4"):
        knn(signals([0, 1, 2], mu), signals([0, 1, 2], mu), KnnSettings(neighbours=3))
    knn(signals([7, 8, 9], mu), signals([0, 1, 2], mu), KnnSettings(neighbours=3))


def test_knn_refuses_two_latent_spaces() -> None:
    with pytest.raises(DataError, match="latent dimensions"):
        knn(signals([0], np.zeros((1, 2))), signals([1, 2], np.zeros((2, 3))), KnnSettings(neighbours=1))


def test_knn_of_no_cells_is_empty() -> None:
    scores = knn(signals([], np.zeros((0, 2))), signals([1, 2], np.zeros((2, 2))), KnnSettings(neighbours=1))
    assert scores["knn"].shape == (0,)


def test_knn_settings_refuse_no_neighbours() -> None:
    with pytest.raises(ValidationError):
        KnnSettings(neighbours=0)

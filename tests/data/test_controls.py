from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scforget.data.controls import matched_knn
from scforget.errors import EmptyGroupError


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(9, 40), st.integers(1, 9))
def test_matched_knn_equals_brute_force(seed: int, forget: int, unseen: int, neighbours: int) -> None:
    rng = np.random.default_rng(seed)
    own, others = rng.normal(size=(forget, 3)), rng.normal(size=(unseen, 3))
    nearest: set[int] = set()
    for cell in own:
        distances = [float(np.linalg.norm(cell - other)) for other in others]
        nearest |= set(sorted(range(unseen), key=distances.__getitem__)[:neighbours])
    found = matched_knn(own, others, neighbours)
    assert found.dtype == bool
    assert found.shape == (unseen,)
    assert set(np.flatnonzero(found)) == nearest


def test_matched_knn_takes_every_unseen_cell_when_there_are_just_enough() -> None:
    assert matched_knn(np.zeros((2, 3)), np.eye(5, 3), 5).all()


def test_matched_knn_refuses_too_few_unseen_cells() -> None:
    with pytest.raises(EmptyGroupError, match="found 4 unseen cells; wanted at least 5"):
        matched_knn(np.zeros((2, 3)), np.ones((4, 3)), 5)

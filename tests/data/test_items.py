from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from scforget.data import items
from scforget.data.images import Images
from scforget.errors import DataError


def cells(**columns: list[str]) -> AnnData:
    counts = sparse.csr_matrix(np.array([[1, 3, 0], [0, 0, 0], [2, 2, 4]], dtype=np.int32))
    obs = pd.DataFrame({"label": ["b", "a", "b"], **columns}, index=["c1", "c2", "c3"])
    return AnnData(counts, obs=obs)


def images(labels: list[str], identities: list[str]) -> Images:
    number = len(labels)
    names = np.array([f"i{k}" for k in range(number)])
    inputs = np.arange(number * 4, dtype=np.uint8).reshape(number, 1, 2, 2)
    return Images(inputs, np.array(labels), np.array(identities), names, np.arange(number) == 0)


def test_from_cells_is_log1p_of_counts_per_ten_thousand_over_all_genes():
    found = items.from_cells(cells())
    wanted = np.log1p(1e4 * np.array([[0.25, 0.75, 0], [0, 0, 0], [0.25, 0.25, 0.5]]))  # a cell of no count stays 0
    np.testing.assert_allclose(found.inputs, wanted, rtol=1e-6)
    assert found.inputs.dtype == np.float32
    assert found.classes.tolist() == ["a", "b"]
    assert found.labels.tolist() == [1, 0, 1]
    assert not found.test.any()


def test_obs_has_a_donor_where_one_is_known():
    assert list(items.from_cells(cells()).obs.columns) == ["label"]
    known = items.from_cells(cells(donor=["x", "y", "x"])).obs
    assert known["donor"].tolist() == ["x", "y", "x"]
    assert known["label"].tolist() == ["b", "a", "b"]
    assert known.index.tolist() == ["c1", "c2", "c3"]


def test_a_missing_donor_is_nobody_and_not_one_person():
    found = items.from_cells(cells(donor=["x", "unknown", "x"]))
    assert found.donors.tolist() == ["x", "", "x"]


def test_from_images_keeps_pixels_identities_and_the_makers_test_set():
    found = items.from_images(images(["cat", "dog", "cat"], ["p", "", "p"]))
    assert found.inputs.dtype == np.uint8
    assert found.inputs.shape == (3, 1, 2, 2)
    assert found.labels.tolist() == [0, 1, 0]
    assert found.donors.tolist() == ["p", "", "p"]
    assert found.test.tolist() == [True, False, False]


def test_items_of_one_class_are_refused():
    with pytest.raises(DataError, match="one alone: cat"):
        items.from_images(images(["cat", "cat"], ["", ""]))

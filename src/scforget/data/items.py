"""Labelled items that a classifier learns from: cells by their expression, or images; one form for both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse

from scforget.arrays import BoolArray, IntArray
from scforget.data.images import Images
from scforget.errors import DataError
from scforget.settings import Settings

if TYPE_CHECKING:
    from anndata import AnnData

_SCALE = 1e4
_NOBODY = "unknown"  # as prepared cells have it where the donor is missing


class ItemsSettings(Settings):
    """What a classifier's items are.

    Attributes
    ----------
    kind
        ``images``: a set of pictures under ``data/``. ``cells``: a set of cells there, prepared as the section
        ``datasets`` of the same name says; their labels are the classes.
    """

    kind: Literal["cells", "images"]


@dataclass(frozen=True)
class Items:
    """N labelled items.

    Attributes
    ----------
    inputs : ``[N, …]``
        Images ``[N, channels, H, W]`` uint8, or vectors ``[N, F]`` float32.
    labels : ``[N]``
        Class codes.
    classes
        Names of the C classes, sorted.
    names, donors : ``[N]``
        What each item is called; whose it is, empty where that is not known.
    test : ``[N]``
        Whether the set's makers put it into their test set.
    """

    inputs: npt.NDArray[Any]
    labels: IntArray
    classes: npt.NDArray[np.str_]
    names: npt.NDArray[np.str_]
    donors: npt.NDArray[np.str_]
    test: BoolArray

    @property
    def obs(self) -> pd.DataFrame:
        """A row for each item, as forget requests ask for them: ``label`` and, if it is known, ``donor``."""
        table = pd.DataFrame({"label": self.classes[self.labels]}, index=pd.Index(self.names))
        return table.assign(donor=self.donors) if (self.donors != "").any() else table


def _items(
    inputs: npt.NDArray[Any], labels: npt.NDArray[np.str_], names: npt.NDArray[np.str_],
    donors: npt.NDArray[np.str_], test: BoolArray,
) -> Items:  # fmt: skip
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise DataError("classes of the items", f"one alone: {', '.join(classes)}", "at least 2")
    return Items(inputs, codes.astype(np.int64), classes.astype(np.str_), names, donors, test)


def from_images(images: Images) -> Items:
    """Take images as items."""
    return _items(images.inputs, images.labels, images.names, images.identities, images.test)


def from_cells(cells: AnnData) -> Items:
    """Take prepared cells as items: log1p(CP10k) over all their genes, and their labels as classes."""
    counts = sparse.csr_matrix(cells.X, dtype=np.float64)
    totals = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1.0)
    expression = sparse.csr_matrix(sparse.diags(_SCALE / totals) @ counts).log1p().toarray().astype(np.float32)
    labels = cells.obs["label"].astype(str).to_numpy().astype(np.str_)
    known = cells.obs["donor"].astype(str).to_numpy() if "donor" in cells.obs else np.full(cells.n_obs, "")
    known = np.where(known == _NOBODY, "", known)  # nobody, not a person of that name
    names = cells.obs_names.to_numpy().astype(np.str_)
    return _items(expression, labels, names, known.astype(np.str_), np.zeros(cells.n_obs, dtype=bool))

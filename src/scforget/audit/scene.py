"""What the audit knows: scores of populations of models, groups of cells, and what a forget request is judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scforget.arrays import BoolArray, FloatArray
from scforget.attacks.references import References
from scforget.audit import roc
from scforget.errors import DataError

#: Fewest retrained models of which each can be measured against the others, whose spread is the unit.
RETRAINS_FOR_SPREAD = 3

UtilityRow = Mapping[str, Mapping[str, float]]  # place -> metric -> value, of one model


@dataclass(frozen=True)
class Groups:
    """Which of the n scored cells are ``forget [n]``, and which serve as each kind of control, ``[n]`` each."""

    forget: BoolArray
    controls: Mapping[str, BoolArray]

    def __post_init__(self) -> None:
        for name, mask in self.controls.items():
            if both := int((self.forget & mask).sum()):
                raise DataError(f"{name} controls", f"{both} forget cells among them", "cells that are not forgotten")

    def aucs(self, scores: FloatArray, control: str) -> FloatArray:
        """``[M]``: AUC of the forget cells against one kind of control, by scores ``[M, n]`` of M models."""
        return np.array([roc.auc(row[self.forget], row[self.controls[control]]) for row in scores])

    def sizes(self) -> dict[str, int]:
        """Number of cells of each group."""
        return {"forget": int(self.forget.sum()), **{name: int(mask.sum()) for name, mask in self.controls.items()}}


@dataclass(frozen=True)
class Population:
    """What is known of M models.

    Attributes
    ----------
    seeds
        Where they came from, M of them.
    scores : ``[M, n]`` by name
        Higher = more member-like.
    utility
        A row for each model.
    latent : ``[n, Z]``
        Latent means under the first model.
    attackers : ``[M, A, n]``
        The learned attack's scores, for each of its A seeds.
    primary
        Name of the score that both primary statistics rest on: ``elbo`` of a VAE, ``confidence`` of a classifier.
    """

    seeds: Sequence[int]
    scores: Mapping[str, FloatArray]
    utility: Sequence[UtilityRow]
    latent: npt.NDArray[np.floating[Any]]
    attackers: FloatArray
    primary: str = "elbo"

    @property
    def what(self) -> str:
        """What was scored, a plural."""
        return "cells" if self.primary == "elbo" else "items"

    @property
    def score(self) -> FloatArray:
        """``[M, n]``: the primary score.

        Raises
        ------
        DataError
            If no score has its name.
        """
        if self.primary not in self.scores:
            raise DataError("scores of a population", ", ".join(self.scores), f"{self.primary} among them")
        return self.scores[self.primary]


@dataclass(frozen=True)
class Scene:
    """What every population of one forget request is judged against.

    Attributes
    ----------
    originals
        Where the methods start: they say on which side "not forgotten" lies, and whether there was anything to forget.
    target
        The retrained models.
    groups
        Which of the n scored cells are members and controls.
    references
        Models that attacks compare with.
    labels, names, donors : ``[n]``
        Kind and barcode of each cell, and whose it is (empty where that is not known).
    """

    originals: Population
    target: Population
    groups: Groups
    references: References
    labels: npt.NDArray[np.str_]
    names: npt.NDArray[np.str_]
    donors: npt.NDArray[np.str_]

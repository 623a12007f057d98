"""Which labelled item plays which part: a classifier's four sets, by item or by person, and the papers' own shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from scforget.arrays import BoolArray, IntArray
from scforget.data.splits import CellSets, Fraction, whose
from scforget.errors import DataError, EmptyGroupError
from scforget.settings import Settings


class ClassFractions(Settings):
    """Shares of a classifier's sets.

    Attributes
    ----------
    train, aside, unseen
        As of cells, see :class:`~scforget.data.splits.CellSets`; there is no ``stop`` set.
    test
        A share of all items, the four summing to 1; or ``official`` for those that the set's makers chose, the other
        three summing to 1.
    """

    train: Fraction
    aside: Fraction
    unseen: Fraction
    test: Fraction | Literal["official"]

    @model_validator(mode="after")
    def _sums_to_one(self) -> ClassFractions:
        total = self.train + self.aside + self.unseen + (0.0 if self.test == "official" else self.test)
        if abs(total - 1) > 1e-9:
            raise ValueError(f"train + aside + unseen + test (if a share) must be 1, not {total:g}")
        return self


class Preset(NamedTuple):
    """A paper's way to deal: its shares, and whether people are dealt whole."""

    fractions: ClassFractions
    by_identity: bool


#: P2 (Suprun): people apart, 2 % of the training images forgotten. The set it ran on has 77, 12 and 12 % of the images
#: in training, validation and test and nothing aside; here four sets are wanted. P3 (UnGAN): 10 % aside ("unseen" in
#: its words) and the rest halved, one half for the shadow models alone; 5 % of the training images forgotten.
PRESETS: Mapping[str, Preset] = {
    "p2": Preset(ClassFractions(train=0.8, aside=0.04, unseen=0.08, test=0.08), by_identity=True),
    "p3": Preset(ClassFractions(train=0.45, aside=0.1, unseen=0.45, test="official"), by_identity=False),
}


class ClassSplitSettings(Settings):
    """How labelled items are dealt.

    Attributes
    ----------
    preset
        ``p2`` or ``p3`` for a paper's shares; ``none`` for those below.
    fractions
        Null with a preset.
    by_identity
        Whether all items of a person go to one set; items of nobody known are dealt one by one. ``p2`` needs it.
    limit
        Items outside the test set that are used, drawn at random; null for all.
    """

    preset: Literal["none", "p2", "p3"]
    fractions: ClassFractions | None
    by_identity: bool
    limit: Annotated[int, Field(gt=0)] | None

    @model_validator(mode="after")
    def _one_of_both(self) -> ClassSplitSettings:
        if (self.preset == "none") == (self.fractions is None):
            raise ValueError("give fractions with preset: none, and fractions: null with another preset")
        if self.preset != "none" and PRESETS[self.preset].by_identity and not self.by_identity:
            raise ValueError(f"preset {self.preset} deals people: by_identity: true")
        return self

    @property
    def shares(self) -> ClassFractions:
        """The preset's, or those that are given."""
        return self.fractions or PRESETS[self.preset].fractions


@dataclass(frozen=True)
class ItemSets:
    """A classifier's sets, disjoint: ``sets`` without any ``stop``, and ``test``, sorted, by which it is judged."""

    sets: CellSets
    test: IntArray


def split_items(
    obs: pd.DataFrame, official: BoolArray, settings: ClassSplitSettings, rng: np.random.Generator
) -> ItemSets:
    """Deal labelled items.

    Parameters
    ----------
    obs : N rows
        With ``label`` and, where it is known whose an item is, ``donor``; ``''`` for nobody. Exact duplicates must have
        been dropped (:func:`~scforget.data.images.without_duplicates`), or one of them may be on either side.
    official : ``[N]``
        Which items the set's makers keep for testing; looked at with ``test: official`` only.
    settings, rng
        How; and the generator of the draws.

    Returns
    -------
    ItemSets
        Shares hold up to rounding, by identity up to the size of a person's share.

    Raises
    ------
    EmptyGroupError
        If a set would get no item, or a class no training item.
    DataError
        If there are fewer items than the limit, identities are wanted and unknown, or one is on both sides of the
        official test set.
    """
    owners = _owners(obs, by_identity=settings.by_identity)
    shares = settings.shares
    every = np.arange(len(obs))
    if shares.test == "official":
        rest, test = every[~official], every[official]
        if not len(test):
            raise EmptyGroupError("split of items", "no official test items", "preset: none with a share for test")
        if shared := np.intersect1d(owners[rest], owners[test]).size:
            wanted = "a share for test, or by_identity: false"
            raise DataError("official test set", f"{shared} people on both sides", wanted)
    else:
        rest, test = _deal(every, owners, [1 - shares.test, shares.test], rng)
    if settings.limit is not None:
        if settings.limit > len(rest):
            raise DataError("limit of a split", f"{len(rest)} items outside the test set", f"{settings.limit}, or null")
        rest = np.sort(rng.permutation(rest)[: settings.limit])
    parts = dict(zip(("train", "aside", "unseen"), _deal(rest, owners, _three(shares), rng), strict=True))
    for name, part in {**parts, "test": test}.items():
        if not len(part):
            wanted = "more items, a larger share, or smaller shares of single people"
            raise EmptyGroupError(f"split of {len(obs)} items", f"no item for {name!r}", wanted)
    labels = obs["label"].astype(str).to_numpy(dtype=object)
    if missing := sorted(set(labels) - set(labels[parts["train"]])):
        raise EmptyGroupError(f"class {missing[0]!r}", "no training item", "one or more; a larger train share or limit")
    return ItemSets(CellSets(parts["train"], test[:0], parts["aside"], parts["unseen"]), test)


def _three(shares: ClassFractions) -> list[float]:
    return [shares.train, shares.aside, shares.unseen]


def _owners(obs: pd.DataFrame, *, by_identity: bool) -> IntArray:
    """``[N]``: the same number for items that must stay together."""
    if not by_identity:
        return np.arange(len(obs), dtype=np.int64)
    donors = np.full(len(obs), "", dtype=object)
    if "donor" in obs:
        donors = np.where(obs["donor"].notna(), obs["donor"].astype(str), "")
    if (donors == "").all():
        raise DataError("by_identity", "items of nobody known", "identities (metadata.csv), or by_identity: false")
    return whose(donors)


def _deal(items: IntArray, owners: IntArray, shares: list[float], rng: np.random.Generator) -> list[IntArray]:
    """Shuffle the owners and cut their row at the shares, which count items and need not sum to 1."""
    _, which, counts = np.unique(owners[items], return_inverse=True, return_counts=True)
    order = rng.permutation(len(counts))
    ends = counts[order].cumsum()
    cuts = np.round(np.cumsum(shares)[:-1] / sum(shares) * len(items))
    part = np.empty(len(counts), dtype=np.int64)
    part[order] = np.searchsorted(cuts, ends - counts[order] / 2, side="right")  # by where most of an owner lies
    return [items[part[which] == number].astype(np.int64) for number in range(len(shares))]

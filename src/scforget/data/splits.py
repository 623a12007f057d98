"""Which cell plays which part: the four cell sets, the cells that a scenario forgets, the halves of shadow models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field, model_validator

from scforget.arrays import BoolArray, IntArray
from scforget.errors import DataError, EmptyGroupError
from scforget.settings import Settings

#: Values of ``genes_from`` that name cells; any other names a file.
GENE_SOURCES = ("all", "train", "retain", "unseen")

Fraction = Annotated[float, Field(gt=0, lt=1)]


class Fractions(Settings):
    """Shares of the four cell sets; they sum to 1."""

    train: Fraction
    stop: Fraction
    aside: Fraction
    unseen: Fraction

    @model_validator(mode="after")
    def _sums_to_one(self) -> Fractions:
        total = self.train + self.stop + self.aside + self.unseen
        if abs(total - 1) > 1e-9:
            raise ValueError(f"train + stop + aside + unseen must be 1, not {total:g}")
        return self


class ClusterScenario(Settings):
    """Forget a whole cluster: every training cell with this label."""

    kind: Literal["cluster"]
    cluster: str


class SubsetScenario(Settings):
    """Forget random training members of one cluster; the others stay."""

    kind: Literal["subset"]
    cluster: str
    fraction: Fraction


class ScatteredScenario(Settings):
    """Forget random training cells of any kind: so many, or below 1 so large a share of them."""

    kind: Literal["scattered"]
    cells: Annotated[int, Field(gt=0)] | Fraction


class DonorScenario(Settings):
    """Forget every training cell of a donor (the obs column named in ``prepare.donor_column``)."""

    kind: Literal["donor"]
    donor: str


class PeopleScenario(Settings):
    """Forget every training item of some donors, drawn at random: together about this share of the training items."""

    kind: Literal["people"]
    fraction: Fraction


class QueryScenario(Settings):
    """Forget the training cells that a pandas query on obs selects.

    For example ``"label == 'B' and n_genes > 900"``, or a list of barcodes: ``"index in ['AAAC-1', 'AAAG-1']"``.
    """

    kind: Literal["query"]
    query: str


class SiblingScenario(Settings):
    """Forget as many training cells of the same kind as another request does, none of which that one forgets.

    What is tuned on the one can be judged on the other. Only of ``subset``, ``scattered`` and ``people``, of whom it
    takes others: the rest leave no cell of their kind. Two siblings of one request may share cells.
    """

    kind: Literal["sibling"]
    of: str


Request = ClusterScenario | SubsetScenario | ScatteredScenario | DonorScenario | PeopleScenario | QueryScenario
ScenarioSettings = Annotated[Request | SiblingScenario, Field(discriminator="kind")]


def check_siblings(scenarios: dict[str, ScenarioSettings]) -> dict[str, ScenarioSettings]:
    """Return the scenarios of a data set; raises ``ValueError`` if a sibling is of none of them, or of a sibling."""
    first = [name for name, settings in scenarios.items() if not isinstance(settings, SiblingScenario)]
    for name, settings in scenarios.items():
        if isinstance(settings, SiblingScenario) and settings.of not in first:
            found = "is a sibling itself" if settings.of in scenarios else "is not a scenario of this data set"
            why = f"{name} is a sibling of {settings.of!r}, which {found}"
            raise ValueError(f"{why}; name one of {', '.join(first) or 'those that you add'}")
    return scenarios


@dataclass(frozen=True)
class CellSets:
    """Sorted indices into the prepared cells; a partition of them.

    The model is fitted on ``train``; ``stop`` decides when to stop; ``aside`` are non-members that methods may use;
    ``unseen`` are the audit's: no method ever sees them.
    """

    train: IntArray
    stop: IntArray
    aside: IntArray
    unseen: IntArray


@dataclass(frozen=True)
class ForgetSets:
    """What a method may see of a forget request: ``forget`` and ``retain`` partition ``train``.

    ``stop`` lacks the cells that the request would have withdrawn, had they been trained on.
    """

    forget: IntArray
    retain: IntArray
    stop: IntArray
    aside: IntArray


@dataclass(frozen=True)
class Scenario:
    """A forget request.

    Attributes
    ----------
    sets
        What a method may see of it.
    group : ``[N]`` bool
        Which prepared cells are of the forgotten kind.
    controls
        The ``same_group`` controls: unseen cells that had the same chance to be forgotten cells.
    """

    sets: ForgetSets
    group: BoolArray
    controls: IntArray


def split_cells(n_cells: int, fractions: Fractions, rng: np.random.Generator) -> CellSets:
    """Shuffle the cells and deal them into the four sets.

    Raises
    ------
    EmptyGroupError
        If a set would get no cell.
    """
    shares = np.cumsum([fractions.train, fractions.stop, fractions.aside])
    parts = np.split(rng.permutation(n_cells), np.round(shares * n_cells).astype(int))
    for name, part in zip(("train", "stop", "aside", "unseen"), parts, strict=True):
        if not len(part):
            raise EmptyGroupError(f"split of {n_cells} cells", f"no cell for {name!r}", "more cells, or a larger share")
    return CellSets(*(np.sort(part).astype(np.int64) for part in parts))


class SplitSettings(Settings):
    """How cells are dealt, and which genes the model sees.

    Attributes
    ----------
    genes_from
        Cells on which informative genes are chosen: ``all``, ``train``, ``retain`` (training cells that no scenario
        forgets), ``unseen``; or the name of a text file beside the data, one gene a line.
    markers
        Genes of the marker correlation; if empty, the top ``markers_per_label`` Wilcoxon markers of each label.
    """

    fractions: Fractions
    genes_from: str
    n_genes: Annotated[int, Field(gt=0)]
    markers: list[str]
    markers_per_label: Annotated[int, Field(gt=0)]


def _group(obs: pd.DataFrame, settings: Request) -> BoolArray:
    """``[N]``: which cells are of the kind that the request names."""
    if isinstance(settings, ScatteredScenario):
        return np.ones(len(obs), dtype=bool)
    if isinstance(settings, PeopleScenario):
        if "donor" not in obs:
            raise DataError("scenario kind 'people'", "items of nobody known", "an identity, or donor, for each")
        return np.asarray(obs["donor"].notna() & (obs["donor"].astype(str) != ""), dtype=bool)
    if isinstance(settings, QueryScenario):
        try:
            selected = obs.index.isin(obs.query(settings.query).index)
        except Exception as error:  # pandas raises a dozen kinds for a bad query, all of them the asker's mistake
            columns = ", ".join(map(str, obs.columns))
            raise DataError(f"query {settings.query!r}", str(error).splitlines()[0], f"columns {columns}") from error
        return np.asarray(selected, dtype=bool)
    column, value = ("donor", settings.donor) if isinstance(settings, DonorScenario) else ("label", settings.cluster)
    if column not in obs:
        raise DataError(f"scenario kind {settings.kind!r}", f"no obs column {column!r}", "prepare.donor_column set")
    values = obs[column].astype(str).to_numpy()
    if value not in values:
        raise EmptyGroupError(f"{column} {value!r}", "no cell", f"one of {', '.join(sorted(set(values)))}")
    return np.asarray(values == value, dtype=bool)


def _selected(candidates: IntArray, settings: Request, rng: np.random.Generator) -> IntArray:
    """Choose among the training cells of the group those that are to be forgotten."""
    if not isinstance(settings, ScatteredScenario | SubsetScenario):
        return candidates
    asked = settings.cells if isinstance(settings, ScatteredScenario) else settings.fraction
    wanted = asked if isinstance(asked, int) else max(1, round(asked * len(candidates)))
    if candidates.size and wanted > len(candidates):
        raise EmptyGroupError(f"scenario kind {settings.kind!r}", f"{len(candidates)} training cells", f"{wanted}")
    return np.sort(rng.choice(candidates, size=wanted, replace=False))


def _people(
    obs: pd.DataFrame, candidates: IntArray, wanted: float, taken: IntArray, rng: np.random.Generator
) -> IntArray:
    """All candidates of some donors in random order, as many as come nearest to the number wanted, at least one.

    Donors of the cells ``taken`` are left out.
    """
    donors = obs["donor"].astype(str).to_numpy()
    candidates = candidates[~np.isin(donors[candidates], donors[taken])]
    names, which, counts = np.unique(donors[candidates], return_inverse=True, return_counts=True)
    if not len(names):
        return candidates
    order = rng.permutation(len(names))
    nearest = int(np.abs(counts[order].cumsum() - wanted).argmin())
    return candidates[np.isin(which, order[: nearest + 1])]


def _controls(
    labels: npt.NDArray[np.object_], forget: IntArray, unseen: IntArray, group: BoolArray, rng: np.random.Generator
) -> IntArray:
    """Unseen cells of the group; if it has none (a list of training cells), of the same labels in the same shares."""
    if group[unseen].any():
        return unseen[group[unseen]]
    kinds, wanted = np.unique(labels[forget], return_counts=True)
    pools = [unseen[labels[unseen] == kind] for kind in kinds]
    times = min(len(pool) / n for pool, n in zip(pools, wanted, strict=True))
    drawn = [rng.choice(pool, size=int(times * n), replace=False) for pool, n in zip(pools, wanted, strict=True)]
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def _apart(candidates: IntArray, other: IntArray, rng: np.random.Generator) -> IntArray:
    """Choose as many training cells of the group as the other request forgets, or all that it leaves."""
    left = np.setdiff1d(candidates, other)
    return np.sort(rng.choice(left, size=min(len(other), len(left)), replace=False))


def draw_scenario(
    obs: pd.DataFrame, sets: CellSets, settings: Request, rng: np.random.Generator, min_controls: int,
    *, other: Scenario | None = None,
) -> Scenario:  # fmt: skip
    """Turn a forget request into cell sets.

    Parameters
    ----------
    obs : N rows
        Of the prepared cells, with ``label`` and, for donors, ``donor``.
    sets
        From :func:`split_cells`; without any ``stop`` cell where none decides when to stop.
    rng
        Chooses the cells of ``subset`` and ``scattered``, and the donors of ``people``.
    min_controls
        The fewest ``same_group`` controls that a verdict can rest on.
    other
        For a sibling: what was drawn by the same ``settings``; none of its forgotten cells is drawn again.

    Raises
    ------
    EmptyGroupError
        If the request selects no training cell, every training cell, takes all ``stop`` cells, or leaves too few
        ``unseen`` cells of the same kind to compare with; or if the other request leaves a sibling no cell.
    DataError
        If the query or the column cannot be used.
    """
    group = _group(obs, settings)
    what = f"{'scenario' if other is None else 'sibling of'} {settings.model_dump()}"
    if not group.any():
        raise EmptyGroupError(what, "a request that selects no cell", "at least one cell; check spelling and quotes")
    candidates = sets.train[group[sets.train]]
    taken = sets.train[:0] if other is None else other.sets.forget
    if isinstance(settings, PeopleScenario):
        forget = _people(obs, candidates, settings.fraction * len(sets.train), taken, rng)
    else:
        forget = _selected(candidates, settings, rng) if other is None else _apart(candidates, taken, rng)
    if not len(forget):
        found = "(only cells the model never saw)" if other is None else "that the other does not hold already"
        wanted = "at least one to forget" if other is None else "a sibling of a smaller subset, or of scattered cells"
        raise EmptyGroupError(what, f"no training cell {found}", wanted)
    retain = np.setdiff1d(sets.train, forget)
    if not len(retain):
        raise EmptyGroupError(what, "a request that selects every training cell", "some to retain; delete the model")
    like = group
    if isinstance(settings, PeopleScenario):
        group = np.asarray(obs["donor"].isin(obs["donor"].iloc[forget]), dtype=bool)
        # where donors are all in one set, the controls are of other people, who might as well have been drawn
        like = group if group[sets.unseen].any() else like
    controls = _controls(obs["label"].astype(str).to_numpy(dtype=object), forget, sets.unseen, like, rng)
    if len(controls) < min_controls:
        wanted = f"at least audit.min_controls = {min_controls} to compare with; a larger unseen share"
        raise EmptyGroupError(what, f"{len(controls)} unseen cells of the same kind", wanted)
    whole = not isinstance(settings, ScatteredScenario | SubsetScenario)
    stop = sets.stop[~group[sets.stop]] if whole else sets.stop
    if len(sets.stop) and not len(stop):
        raise EmptyGroupError(what, "no stop cell outside the request", "a larger stop share")
    return Scenario(ForgetSets(forget, retain, stop, sets.aside), group, controls)


def draw_scenarios(
    obs: pd.DataFrame, sets: CellSets, scenarios: Mapping[str, ScenarioSettings],
    generator: Callable[[str], np.random.Generator], min_controls: int,
) -> dict[str, Scenario]:  # fmt: skip
    """Draw every scenario of a data set by :func:`draw_scenario`, siblings after those that they are siblings of.

    Parameters
    ----------
    scenarios
        By name, as :func:`check_siblings` accepts them; what is returned has their order.
    generator
        Of the draw of one name, so that no scenario shifts the draw of another.
    """
    requests = {name: settings for name, settings in scenarios.items() if not isinstance(settings, SiblingScenario)}
    drawn = {
        name: draw_scenario(obs, sets, request, generator(name), min_controls) for name, request in requests.items()
    }
    for name, settings in scenarios.items():
        if isinstance(settings, SiblingScenario):
            request, other = requests[settings.of], drawn[settings.of]
            drawn[name] = draw_scenario(obs, sets, request, generator(name), min_controls, other=other)
    return {name: drawn[name] for name in scenarios}


def gene_cells(source: str, sets: CellSets, scenarios: Iterable[Scenario]) -> IntArray | None:
    """Cells on which genes are chosen, by a name of :data:`GENE_SOURCES`; ``None`` stands for all.

    ``retain`` is what no scenario forgets, so that one list serves the originals and every retrain.
    """
    if source == "all":
        return None
    if source == "retain":
        forgotten = [scenario.sets.forget for scenario in scenarios]
        return np.setdiff1d(sets.train, np.concatenate(forgotten))
    return sets.train if source == "train" else sets.unseen


def whose(donors: npt.NDArray[Any]) -> IntArray:
    """``[N]``: a number for each donor's name, and one of its own for each cell of nobody known (``''``)."""
    codes = np.unique(donors, return_inverse=True)[1]
    return np.where(donors == "", len(donors) + np.arange(len(donors)), codes).astype(np.int64)


def deal_halves(owners: IntArray, models: int, generator: np.random.Generator) -> BoolArray:
    """Deal cells to shadow models so that each is a member of exactly half of them.

    Parameters
    ----------
    owners : ``[cells]``
        Equal numbers for cells that go together: where people were dealt whole, a model that has not seen one of a
        person's items must not have seen the others. At least two differ.
    models
        How many, an even number.
    generator
        Of the draw.

    Returns
    -------
    ``[models, cells]``
        True where a model is trained on a cell: models come in pairs that share the cells out between them, so all
        are trained on equally many, give or take one (or what one owner has).
    """
    names, which, counts = np.unique(owners, return_inverse=True, return_counts=True)
    if models < 2 or models % 2 or len(names) < 2:
        found = f"{models} on {len(names)} cells or people"
        raise DataError("shadow models", found, "an even number of models and at least 2 cells or people")
    members = np.zeros((models, len(which)), dtype=bool)
    for first in range(0, models, 2):
        order = generator.permutation(len(names))
        ends = counts[order].cumsum()
        # an owner is in the half in which most of it lies; of single cells, the first ⌊n/2⌋
        inside = order[2 * ends - counts[order] < len(which)]
        members[first] = np.isin(which, inside)
        members[first + 1] = ~members[first]
    return members

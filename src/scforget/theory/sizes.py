"""Size and kind of the forget set: how much more is remembered of a cluster's cells than of scattered ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field

from scforget import seeding
from scforget.arrays import FloatArray
from scforget.audit import AuditSettings, equivalence
from scforget.data.splits import CellSets, Request, ScatteredScenario, SubsetScenario, draw_scenario
from scforget.errors import EmptyGroupError
from scforget.models.vae import VAE
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.theory.ablations import ORIGINAL, RETRAIN, Job, judged, method_jobs, rows_of, scratch_jobs
from scforget.theory.judging import RETRAINS, Case, Judge, Record, Scored, contrast, make_case
from scforget.training import TrainingSettings

KINDS = ("cluster_subset", "scattered")


class SizeSettings(Settings):
    """Settings of the size ablation.

    Attributes
    ----------
    sizes
        Cells to forget; those that the data set does not allow are left out. With none there is no such ablation.
    retained_share
        At least this share of the training cells must be retained.
    retrains
        Models trained without each forget set.
    methods
        Unlearned from every original, with their own settings.
    """

    sizes: list[Annotated[int, Field(ge=2)]]
    retained_share: Annotated[float, Field(gt=0, lt=1)]
    retrains: Annotated[int, Field(ge=RETRAINS)]
    methods: list[str]


@dataclass(frozen=True)
class Sized:
    """A forget set of one kind and size."""

    kind: str
    size: int
    case: Case


def _requests(labels: npt.NDArray[np.str_], settings: SizeSettings) -> list[tuple[str, int, Request]]:
    """Kinds, sizes and requests that fit the labels of the training cells."""
    names, counts = np.unique(labels, return_counts=True)
    cluster, members = str(names[counts.argmax()]), int(counts.max())
    fitting = [n for n in settings.sizes if n < members and len(labels) - n >= settings.retained_share * len(labels)]
    if not fitting:
        raise EmptyGroupError("sizes of a forget set", f"none of {settings.sizes} fits", f"some below {members}")
    found: list[tuple[str, int, Request]] = []
    for n in fitting:
        found.append((KINDS[0], n, SubsetScenario(kind="subset", cluster=cluster, fraction=n / members)))
        found.append((KINDS[1], n, ScatteredScenario(kind="scattered", cells=n)))
    return found


def size_cases(
    task: VaeTask, obs: pd.DataFrame, sets: CellSets, original: VAE, *, settings: SizeSettings, audit: AuditSettings,
    seed: int,
) -> list[Sized]:  # fmt: skip
    """Draw forget sets of every size that fits: members of the largest cluster, and scattered cells.

    Parameters
    ----------
    obs
        Of the prepared cells, with ``label``; the largest cluster is the one with most training cells.
    original
        For the ``matched_knn`` controls.

    Raises
    ------
    EmptyGroupError
        If no size fits, or the cluster has fewer unseen cells than ``audit.min_controls``.
    """
    found = []
    for kind, size, request in _requests(obs["label"].to_numpy().astype(np.str_)[sets.train], settings):
        rng = seeding.numpy_generator(seed, "size", kind, size)
        scenario = draw_scenario(obs, sets, request, rng, audit.min_controls)
        found.append(Sized(kind, size, make_case(task, scenario, sets.unseen, original, audit.matched_neighbours)))
    return found


def _places(cases: Sequence[Sized], settings: SizeSettings) -> list[tuple[Sized, str]]:
    """What each row of jobs is about."""
    return [(sized, method) for sized in cases for method in (RETRAIN, *settings.methods)]


def size_jobs(
    cases: Sequence[Sized], originals: Sequence[VAE], recipe: TrainingSettings, methods: Mapping[str, Settings], *,
    settings: SizeSettings, seed: int,
) -> list[Job]:  # fmt: skip
    """Models of the size ablation: retrained without each forget set, and unlearned from each original.

    Parameters
    ----------
    recipe
        Of the retrained models: the originals' own.
    methods
        Settings by method, at least of ``settings.methods``.
    """
    jobs: list[Job] = []
    for row, (sized, method) in enumerate(_places(cases, settings)):
        own = seeding.derive(seed, "size", sized.kind, sized.size)
        if method == RETRAIN:
            seeds = [seeding.derive(own, RETRAIN, i) for i in range(settings.retrains)]
            jobs += scratch_jobs(sized.case, RETRAIN, recipe, seeds, row)
        else:
            jobs += method_jobs(sized.case, method, methods[method], originals, own, row=row)
    return jobs


def leak_of_cells(judge: Judge, models: Sequence[Scored], name: str) -> list[FloatArray]:
    """Difference of a statistic from the retrained models', cell by cell; each array's mean is the difference.

    Parameters
    ----------
    name
        ``membership`` or ``trace``.

    Returns
    -------
    list
        ``[F]``; of the AUC, ``[U]`` of the controls as well.

    Notes
    -----
    Of the AUC: the kernel 1(member > control) + ½·1(tie), averaged over models, and over controls or members. Of the
    trace: for one cell, F times the trace of a model that says of all others what retrained models say on average.
    """
    if name == "trace":
        base = judge.retrained
        mean = base.mean(axis=0)
        alone = mean + np.diag(judge.forgotten(models).mean(axis=0) - mean)
        return [len(mean) * equivalence.trace(alone, base, shrinkage=judge.settings.trace_shrinkage)]
    groups = judge.case.groups

    def kernel(group: Sequence[Scored]) -> FloatArray:
        found = np.zeros(())
        for one in group:
            member, control = one.elbo[groups.forget][:, None], one.elbo[groups.controls["same_group"]][None]
            found = found + ((member > control) + 0.5 * (member == control)) / len(group)
        return found

    above = kernel(models) - kernel(judge.retrains)
    return [above.mean(axis=1), above.mean(axis=0)]


def structured_against_scattered(
    judges: Mapping[str, Judge], starts: Mapping[str, Sequence[Scored]], level: float
) -> Record:
    """How much more the originals remember of a cluster's cells than of scattered ones.

    Parameters
    ----------
    judges, starts
        By kind: the judge of that forget set, and the same originals scored on its cells.

    Returns
    -------
    dict
        By ``membership`` and ``trace``: ``difference``, ``interval`` and ``models_interval`` of
        (original − retrained of a cluster's cells) − (original − retrained of scattered cells).

    Notes
    -----
    The same originals are asked about both kinds, so they are subtracted one by one. Controls of the two kinds overlap
    (a cluster's unseen cells are among all unseen cells), of which the interval takes no notice.
    """
    found: Record = {}
    one, two = KINDS
    for name in ("membership", "trace"):
        own = {kind: judges[kind].statistics(starts[kind])[name] for kind in KINDS}
        cells = [part for kind in KINDS for part in leak_of_cells(judges[kind], starts[kind], name)]
        terms = [(1, own[one] - own[two]), (-1, judges[one].target[name]), (1, judges[two].target[name])]
        difference, interval = contrast(terms, level, cells)
        found[name] = {"difference": difference, "interval": interval, "models_interval": contrast(terms, level)[1]}
    return found


def size_rows(
    cases: Sequence[Sized], originals: Sequence[VAE], jobs: Sequence[Job], results: Sequence[Scored | str], *,
    settings: SizeSettings, audit: AuditSettings, seed: int,
) -> Record:  # fmt: skip
    """Judge the models of :func:`size_jobs`.

    Returns
    -------
    dict
        ``rows``: ``kind``, ``size``, ``method`` (``original`` first), ``failed`` and :meth:`Judge.judge`'s record.
        ``contrasts``: for each ``size``, :func:`structured_against_scattered`; ``interval`` is of models and cells,
        ``models_interval`` of models on these very cells, both at the audit's ``level``.

    Raises
    ------
    EmptyGroupError
        If fewer than 4 retrained models of a forget set are left.
    """
    models, failed = rows_of(jobs, results)
    rows: list[Record] = []
    judges: dict[int, dict[str, Judge]] = {sized.size: {} for sized in cases}
    starts: dict[int, dict[str, list[Scored]]] = {sized.size: {} for sized in cases}
    for row, (sized, method) in enumerate(_places(cases, settings)):
        kind, size, own = sized.kind, sized.size, models[row]
        if method == RETRAIN:
            judges[size][kind] = Judge(sized.case, own, audit, seeding.derive(seed, "judge", kind, size))
            starts[size][kind] = own = [sized.case.score(original) for original in originals]
        label = {"kind": kind, "size": size, "method": ORIGINAL if method == RETRAIN else method}
        rows.append(label | judged(judges[size][kind], own, starts[size][kind], failed[row]))
    contrasts = [
        {"size": size, **structured_against_scattered(judges[size], starts[size], audit.level)} for size in judges
    ]
    return {"rows": rows, "contrasts": contrasts}

"""The Fisher analysis of one model: exact and published diagonals of every forget request, and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from scforget import published, seeding
from scforget.arrays import FloatArray, IntArray
from scforget.fisher import Diagonal
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.theory import overlap
from scforget.theory.overlap import OverlapSettings, Record

_LADDER_CELLS = 300  # retained cells that are gone through one by one
_SCATTER = 4000  # parameters in the picture


class Request(NamedTuple):
    """Training cells to be forgotten, and retained ones of another kind."""

    forget: IntArray
    unrelated: IntArray


class Subject(NamedTuple):
    """One model to be looked at."""

    name: str
    seed: int
    task: VaeTask
    model: VAE


class Found(NamedTuple):
    """What :func:`analyse` finds: numbers by request, inner products by part, points of the picture by request."""

    numbers: dict[str, Record]
    grams: dict[str, FloatArray]
    scatter: dict[str, FloatArray]


def farthest(means: Mapping[str, FloatArray], own: FloatArray) -> str:
    """Name the group whose mean expression correlates least with that of the forgotten cells: the unrelated kind."""
    return min(sorted(means), key=lambda name: float(np.corrcoef(means[name], own)[0, 1]))


def sample(train: IntArray, requests: Mapping[str, Request], most: int, seed: int) -> IntArray:
    """Cells whose inner products are taken: all forgotten ones, and a random part of the others; sorted."""
    forgotten = np.unique(np.concatenate([request.forget for request in requests.values()]))
    order = seeding.numpy_generator(seed, "sample").permutation(np.setdiff1d(train, forgotten))
    return np.sort(np.concatenate([forgotten, order[: max(most - len(forgotten), 2)]]))


def _pieces(train: IntArray, requests: Sequence[Request]) -> list[tuple[tuple[bool, ...], IntArray]]:
    """The training cells by which requests they are in."""
    inside = np.stack([np.isin(train, request.forget) for request in requests], 1)
    patterns = np.unique(inside, axis=0)
    return [(tuple(map(bool, pattern)), train[(inside == pattern).all(1)]) for pattern in patterns]


def _ladder(subject: Subject, forget: IntArray, retain: IntArray, settings: OverlapSettings, seed: int) -> Record:
    """From the published estimator to single cells, one variable at a time; the global cosine of each rung.

    ``batches``: as published, the forgotten cells one batch, the retained ones in batches. ``equal_batches``: those,
    too, in batches of as many cells as are forgotten. ``single_cells``: batches of one cell, still in train mode.
    """
    some = np.sort(seeding.numpy_generator(seed, "ladder").permutation(retain)[:_LADDER_CELLS])
    parts, rungs = overlap.vae_parts(subject.model), {}
    sizes = {"batches": (len(forget), settings.batch_size), "equal_batches": (len(forget),) * 2, "single_cells": (1, 1)}
    for name, pair in sizes.items():
        one, other = (
            published.batch_fisher(
                subject.model, subject.task, cells, batch_size=size, reduction="sum", damping=0.0, seed=seed
            )
            for cells, size in zip((forget, some), pair, strict=True)
        )
        rungs[name] = overlap.diagonals(one, other, parts)["groups"]["global"]["cosine"]
    subject.model.eval()
    return rungs


def points(one: Diagonal, other: Diagonal, seed: int) -> FloatArray:
    """Of some parameters with a gradient in both: log10 F of forgotten and of retained cells, ``[n, 2]``."""
    f, r = (np.concatenate([v.double().numpy().ravel() for v in side.values()]) for side in (one, other))
    live = np.flatnonzero((f > 0) & (r > 0))
    some = seeding.numpy_generator(seed, "points").choice(live, min(_SCATTER, len(live)), replace=False)
    return np.log10(np.stack([f[some], r[some]], 1))


def _described(one: Diagonal, other: Diagonal, subject: Subject) -> Record:
    parts = overlap.vae_parts(subject.model)
    genes = overlap.per_gene(one, other)
    return {**overlap.diagonals(one, other, parts), "genes": overlap.genes_summary(genes)}


def analyse(
    subject: Subject, train: IntArray, requests: Mapping[str, Request], settings: OverlapSettings, *,
    ladder: bool, seed: int,
) -> Found:  # fmt: skip
    """Look at one model.

    Parameters
    ----------
    subject
        The model and how it is asked.
    train : ``[N]``
        All training cells, forgotten ones included.
    requests
        By name.
    ladder
        Whether to walk from the published estimator to single cells, which takes a pass over some cells one by one.

    Returns
    -------
    Found
        Numbers by request: ``exact`` (:func:`~scforget.theory.overlap.diagonals` and per-gene cosines over all cells),
        ``exact_same_size`` (the same for as many random retained cells as are forgotten against the retained ones),
        ``published`` (by the published estimator, damped parameters included) and ``ladder``. Inner products are over
        :func:`sample` of the cells.
    """
    model, task = subject.model, subject.task
    pieces = _pieces(train, list(requests.values()))
    own = overlap.exact(model, task, [cells for _, cells in pieces], settings.draws, seed)
    numbers: dict[str, Record] = {}
    scatter: dict[str, FloatArray] = {}
    for place, (name, request) in enumerate(requests.items()):
        sides = [
            overlap.pooled([
                (diagonal, len(cells)) for (inside, cells), diagonal in zip(pieces, own, strict=True)
                if inside[place] is wanted
            ])
            for wanted in (True, False)
        ]  # fmt: skip
        retain = np.setdiff1d(train, request.forget)
        some = np.sort(seeding.numpy_generator(seed, "same size", name).permutation(retain)[: len(request.forget)])
        (few,) = overlap.exact(model, task, [some], settings.draws, seeding.derive(seed, "few", name))
        batched = overlap.batch_estimator(model, task, request.forget, retain, settings, seed=seed)
        numbers[name] = {
            "forget_cells": len(request.forget), "retain_cells": len(retain),
            "exact": _described(sides[0], sides[1], subject), "exact_same_size": _described(few, sides[1], subject),
            "published": _described(batched[0], batched[1], subject),
        }  # fmt: skip
        if ladder:
            numbers[name]["ladder"] = _ladder(subject, request.forget, retain, settings, seed)
        scatter[name] = points(sides[0], sides[1], seed)
    cells = sample(train, requests, settings.cells, seed)
    return Found(numbers, overlap.vae_grams(model, task, cells, draws=settings.draws, seed=seed), scatter)

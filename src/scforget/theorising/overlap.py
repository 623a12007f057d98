"""The stage that compares the Fisher information of forgotten and retained cells."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from torch import Tensor

from scforget import artifacts, parallel, seeding
from scforget.arrays import FloatArray, IntArray
from scforget.context import Context, open_theory
from scforget.fisher import Diagonal
from scforget.models.classifiers import MLP
from scforget.models.vae import VAE
from scforget.progress import Progress
from scforget.results import Record
from scforget.schema import TheorySettings
from scforget.theorising.arena import Arena, make_all
from scforget.theory import analysis, factorisation, nets, overlap
from scforget.theory.analysis import Found, Request, Subject


class _Look(NamedTuple):
    """One model to be looked at, picklable."""

    subject: Subject
    train: IntArray
    kinds: IntArray
    requests: Mapping[str, Request]
    settings: TheorySettings
    first: bool
    seed: int


def _look(job: _Look) -> tuple[Found, dict[str, Record]]:
    subject, settings = job.subject, job.settings
    found = analysis.analyse(
        subject, job.train, job.requests, settings.overlap, ladder=job.first, seed=job.seed
    )  # fmt: skip
    factors: dict[str, Record] = {}
    if subject.name in {"nb", "zinb", "log_mse"}:
        how = settings.factorisation
        for name, request in job.requests.items():
            retain = np.setdiff1d(job.train, request.forget)
            some = np.sort(seeding.numpy_generator(job.seed, name).permutation(retain)[: how.cells])
            sides = [
                factorisation.head(subject.model, subject.task, cells, draws=how.draws, seed=job.seed)
                for cells in (request.forget, some)
            ]
            kinds = job.kinds[request.forget], job.kinds[some]
            factors[name] = {
                **factorisation.factorise(sides[0], sides[1], how, job.seed),
                "by_type": factorisation.by_type(sides[0], sides[1], kinds, how, job.seed),
            }
    return found, factors


def _compared(
    grams: Sequence[Mapping[str, FloatArray]], cells: IntArray, request: Request, context: Context, *,
    classifier: bool = False,
) -> Record:  # fmt: skip
    return overlap.compare(
        grams, np.isin(cells, request.forget), np.isin(cells, request.unrelated), context.params.theory.overlap,
        level=context.params.audit.interval_level, seed=context.params.seed, classifier=classifier,
    )  # fmt: skip


class _Net(NamedTuple):
    """What one classifier has to say."""

    facts: Record
    grams: dict[str, FloatArray]
    exact: dict[str, Record]
    points: dict[str, FloatArray]


class Classifiers:
    """The controls without a decoder: a linear probe, a deep net, and one of the VAE's size.

    Called with a kind and the place of a seed, so that worker processes can share them.
    """

    def __init__(self, arena: Arena, originals: Sequence[VAE], requests: Mapping[str, Request]) -> None:
        self._arena, self._originals, self._requests = arena, originals, requests
        self._every, self._codes = np.arange(len(arena.labels)), arena.codes
        parts = np.array_split(self._every, 8)
        self._expression = np.concatenate([arena.task.batch(part).inputs.cpu().numpy() for part in parts])
        settings, train = arena.settings.nets, arena.sets.train
        widths = nets.matched_widths(
            self._expression.shape[1], settings.deep.hidden, int(self._codes.max()) + 1,
            parameters=nets.live_parameters(originals[0]), tolerance=settings.tolerance,
        )  # fmt: skip
        matched = settings.deep.model_copy(update={"hidden": widths})
        self.kinds = {"probe": settings.probe, "deep": settings.deep, "matched": matched}
        self.cells = analysis.sample(train, requests, arena.settings.overlap.cells, arena.context.params.seed)

    def __call__(self, item: tuple[str, int]) -> _Net:
        """Train one, and look at it."""
        (kind, place), arena, codes = item, self._arena, self._codes
        train, unseen, params = arena.sets.train, arena.sets.unseen, arena.context.params
        inputs = self._expression
        if kind == "probe":
            inputs = arena.task.signals(self._originals[place], self._every).mu
        net, facts = nets.fit_classifier(
            inputs[train], codes[train], self.kinds[kind], seeding.derive(params.seed, kind, arena.seeds[place]),
            classes=int(codes.max()) + 1, held_out=(inputs[unseen], codes[unseen]), level=params.audit.interval_level,
        )  # fmt: skip
        grams = overlap.net_grams(net, partial(_net_losses, net, inputs, codes), self.cells)
        exact: dict[str, Record] = {}
        points: dict[str, FloatArray] = {}
        for name, request in self._requests.items():
            retain = np.setdiff1d(train, request.forget)
            exact[name], observed = _net_diagonals(net, inputs, codes, (request.forget, retain))
            points[name] = analysis.points(observed[0], observed[1], seed=0)
        return _Net(facts, grams, exact, points)


def _classified(
    arena: Arena, originals: Sequence[VAE], requests: Mapping[str, Request]
) -> tuple[Record, dict[str, FloatArray]]:
    """Train and compare all classifiers; the points of the picture are those of the first of each kind."""
    context, classify = arena.context, Classifiers(arena, originals, requests)
    items = [(kind, place) for kind in classify.kinds for place in range(len(originals))]
    with Progress(f"{context.item.name} classifiers", len(items)) as progress:
        made = dict(zip(items, parallel.each(classify, items, progress.advance), strict=True))
    found: Record = {}
    scatter: dict[str, FloatArray] = {}
    for kind in classify.kinds:
        own = [made[kind, place] for place in range(len(originals))]
        grams = [one.grams for one in own]
        found[kind] = {
            "facts": [one.facts for one in own],
            "requests": {
                name: {
                    "overlap": _compared(grams, classify.cells, request, context, classifier=True),
                    "models": [one.exact[name] for one in own],
                }
                for name, request in requests.items()
            },
        }
        scatter |= {f"{kind}/{name}": values for name, values in own[0].points.items()}
    return found, scatter


def _net_losses(net: MLP, inputs: FloatArray, codes: IntArray, cells: IntArray) -> Tensor:
    (batch,) = nets.observed(inputs, codes, cells)  # of cells that are a batch already
    return nets.classifier_losses(net, batch)


def _net_diagonals(
    net: MLP, inputs: FloatArray, codes: IntArray, sets: tuple[IntArray, IntArray]
) -> tuple[Record, tuple[Diagonal, Diagonal]]:
    """Exact diagonals by observed labels (empirical Fisher; returned as well) and by the net's own (the true one)."""

    def both(labels: IntArray | None) -> tuple[Diagonal, Diagonal]:
        first, second = (nets.classifier_fisher(net, inputs, labels, cells) for cells in sets)
        return first, second

    def compared(pair: tuple[Diagonal, Diagonal]) -> Record:
        return overlap.diagonals(pair[0], pair[1], overlap.classifier_parts, overlap.CLASSIFIER_GROUPS)

    observed = both(codes)
    return {"observed": compared(observed), "expected": compared(both(None))}, observed


def overlap_stage(dataset: str) -> None:
    """Compare the Fisher information of forgotten and retained cells, in originals, other VAEs and classifiers."""
    started = time.perf_counter()
    context = open_theory("overlap", dataset)
    arena = Arena(context)
    requests, tasks = arena.requests(), arena.tasks()
    originals = arena.originals()
    made = make_all(context.item.name, {name: arena.trained(name, task) for name, task in tasks.items()}, arena.seeds)
    own = arena.task.settings.likelihood
    tasks, made = {own: arena.task, **tasks}, {own: originals, **made}
    subjects = [Subject(name, seed, tasks[name], model) for name in made for seed, model in enumerate(made[name])]
    jobs = [
        _Look(subject, arena.sets.train, arena.codes, requests, arena.settings, subject.seed == 0, context.params.seed)
        for subject in subjects
    ]
    with Progress(f"{context.item.name} Fisher", len(jobs)) as progress:
        looks = parallel.each(_look, jobs, progress.advance)
    cells = analysis.sample(arena.sets.train, requests, arena.settings.overlap.cells, context.params.seed)
    variants = {
        name: _variant(name, list(zip(subjects, looks, strict=True)), cells, requests, context) for name in made
    }
    scatter = {f"vae/{name}": values for name, values in looks[0][0].scatter.items()}
    classifiers, points = _classified(arena, originals, requests)
    scatter |= points
    artifacts.write_arrays(context.theory / "scatter.npz", scatter)
    artifacts.write_json(
        context.theory / "result.json",
        {"variants": variants, "classifiers": classifiers, "cells": len(cells), "base": own,
         "unrelated": {name: str(arena.labels[request.unrelated[0]]) for name, request in requests.items()}},
    )  # fmt: skip
    artifacts.write_json(context.theory / "cost.json", {"seconds": time.perf_counter() - started})
    context.track()


def _variant(
    name: str, looked: Iterable[tuple[Subject, tuple[Found, dict[str, Record]]]], cells: IntArray,
    requests: Mapping[str, Request], context: Context,
) -> Record:  # fmt: skip
    """Everything about one kind of VAE."""
    own = [(subject, look) for subject, look in looked if subject.name == name]
    grams = [found.grams for _, (found, _) in own]
    model = own[0][0].model
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "latent": model.settings.latent, "likelihood": model.settings.likelihood, "conditions": model.conditions,
        "requests": {
            place: {
                "overlap": _compared(grams, cells, request, context),
                "models": [found.numbers[place] for _, (found, _) in own],
                "factorisation": [factors[place] for _, (_, factors) in own if factors],
            }
            for place, request in requests.items()
        },
    }  # fmt: skip

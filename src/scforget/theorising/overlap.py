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


def _classifiers(
    arena: Arena, originals: Sequence[VAE], requests: Mapping[str, Request]
) -> tuple[Record, dict[str, FloatArray]]:
    """The controls without a decoder: a linear probe, a deep net, and one of the VAE's size."""
    context, settings = arena.context, arena.settings.nets
    every = np.arange(len(arena.labels))
    expression = np.concatenate([arena.task.batch(part).inputs.cpu().numpy() for part in np.array_split(every, 8)])
    codes, train, unseen = arena.codes, arena.sets.train, arena.sets.unseen
    classes, level = int(codes.max()) + 1, context.params.audit.interval_level
    live = nets.live_parameters(originals[0])
    widths = nets.matched_widths(
        expression.shape[1], settings.deep.hidden, classes, parameters=live, tolerance=settings.tolerance
    )
    kinds = {
        "probe": settings.probe, "deep": settings.deep, "matched": settings.deep.model_copy(update={"hidden": widths})
    }  # fmt: skip
    cells = analysis.sample(train, requests, arena.settings.overlap.cells, context.params.seed)
    found: Record = {}
    scatter: dict[str, FloatArray] = {}
    with Progress(f"{context.item.name} classifiers", len(kinds) * len(originals)) as progress:
        for kind, how in kinds.items():
            grams, facts = [], []
            exact: dict[str, list[Record]] = {name: [] for name in requests}
            for seed, original in zip(arena.seeds, originals, strict=True):
                inputs = expression if kind != "probe" else arena.task.signals(original, every).mu
                net, fact = nets.fit_classifier(
                    inputs[train], codes[train], how, seeding.derive(context.params.seed, kind, seed), classes=classes,
                    held_out=(inputs[unseen], codes[unseen]), level=level,
                )  # fmt: skip
                facts.append(fact)
                grams.append(overlap.net_grams(net, partial(_net_losses, net, inputs, codes), cells))
                for name, request in requests.items():
                    exact[name].append(_net_diagonals(net, inputs, codes, request.forget, train))
                    if seed == arena.seeds[0]:
                        scatter[f"{kind}/{name}"] = _net_points(net, inputs, codes, request.forget, train)
                progress.advance()
            found[kind] = {
                "facts": facts,
                "requests": {
                    name: {"overlap": _compared(grams, cells, request, context, classifier=True), "models": exact[name]}
                    for name, request in requests.items()
                },
            }
    return found, scatter


def _net_losses(net: nets.Classifier, inputs: FloatArray, codes: IntArray, cells: IntArray) -> Tensor:
    (batch,) = nets.observed(inputs, codes, cells)
    return nets.classifier_losses(net, batch)


def _net_diagonals(
    net: nets.Classifier, inputs: FloatArray, codes: IntArray, forget: IntArray, train: IntArray
) -> Record:
    """Exact diagonals by observed labels (the empirical Fisher), and by labels that the net draws (the true one)."""
    retain, found = np.setdiff1d(train, forget), {}
    for name, labels in (("observed", codes), ("expected", None)):
        one, other = (nets.classifier_fisher(net, inputs, labels, cells) for cells in (forget, retain))
        found[name] = overlap.diagonals(one, other, overlap.classifier_parts, overlap.CLASSIFIER_GROUPS)
    return found


def _net_points(
    net: nets.Classifier, inputs: FloatArray, codes: IntArray, forget: IntArray, train: IntArray
) -> FloatArray:
    retain = np.setdiff1d(train, forget)
    one, other = (nets.classifier_fisher(net, inputs, codes, cells) for cells in (forget, retain))
    return analysis.points(one, other, seed=0)


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
    classifiers, points = _classifiers(arena, originals, requests)
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

"""One function for each DVC stage that makes something: load, call science, save, track.

Results are on disk before tracking is called, and finished models before their stage ends, so that neither an
unreachable server nor a kill loses work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from anndata import AnnData

from scforget import artifacts, populations, seeding
from scforget.context import Context, open_item
from scforget.data import class_splits, genes, images, items, sources, splits
from scforget.data import prepare as preparing
from scforget.data.splits import ForgetSets
from scforget.errors import ConfigError, ScforgetError, TooManyDivergedError, TrackingError
from scforget.families import VAES, Family

#: Shadow models of a block.
SHADOWS = 8


def prepare(dataset: str) -> None:
    """Read raw counts, filter and label cells."""
    context = open_item("prepare", dataset)
    settings = context.params.datasets[dataset].prepare
    raw = sources.read(context.workspace.raw(dataset), layer=settings.layer)
    cells, summary = preparing.prepare(raw, settings, seed=context.seed())
    artifacts.write_cells(context.work / "cells.h5ad", cells)
    artifacts.write_json(context.results / "result.json", summary)
    context.track()


def _choose_genes(
    context: Context, cells: AnnData, sets: splits.CellSets, scenarios: Sequence[splits.Scenario]
) -> dict[str, list[str]]:
    """Choose the modelled genes as ``genes_from`` says, and the markers among them."""
    dataset = context.item.keys[0]
    settings = context.params.datasets[dataset].split
    source = settings.genes_from
    if source in splits.GENE_SOURCES:
        chosen_on = splits.gene_cells(source, sets, scenarios)
        chosen = genes.select_genes(cells, chosen_on, settings.n_genes)
    else:
        listed = artifacts.read_bytes(context.workspace.raw(dataset) / source).decode(errors="replace").split()
        chosen = genes.listed_genes(cells, listed, source)
    marking = genes.choose_markers(cells, chosen, settings.markers, settings.markers_per_label)
    return {"genes": chosen, "markers": marking}


def _write_scenarios(context: Context, scenarios: Mapping[str, splits.Scenario]) -> None:
    for name, scenario in scenarios.items():
        arrays = {**vars(scenario.sets), "group": scenario.group, "controls": scenario.controls}
        artifacts.write_arrays(context.work / f"{name}.npz", arrays)


def _sizes(scenario: splits.Scenario) -> dict[str, int]:
    return {**{key: len(value) for key, value in vars(scenario.sets).items()}, "controls": len(scenario.controls)}


def split(dataset: str) -> None:
    """Deal the cells into sets, draw every scenario, choose genes and markers."""
    context = open_item("split", dataset)
    settings = context.params.datasets[dataset]
    cells = artifacts.read_cells(context.workspace.work("prepare", dataset) / "cells.h5ad")
    sets = splits.split_cells(cells.n_obs, settings.split.fractions, seeding.numpy_generator(context.seed("cells")))
    scenarios = splits.draw_scenarios(
        cells.obs, sets, settings.scenarios, lambda name: seeding.numpy_generator(context.seed("scenario", name)),
        context.params.audit.min_controls,
    )  # fmt: skip
    chosen = _choose_genes(context, cells, sets, list(scenarios.values()))
    artifacts.write_arrays(context.work / "sets.npz", vars(sets))
    _write_scenarios(context, scenarios)
    artifacts.write_json(context.work / "genes.json", chosen)
    counts = {name: _sizes(scenario) for name, scenario in scenarios.items()}
    sizes = {name: len(members) for name, members in vars(sets).items()}
    artifacts.write_json(
        context.results / "result.json", {"sets": sizes, "scenarios": counts, "genes": len(chosen["genes"])}
    )
    context.track()


def _items(context: Context, dataset: str) -> tuple[items.Items, dict[str, int]]:
    """Read what a classifier learns from, each image once; with how many images were left out."""
    raw, params = context.workspace.raw(dataset), context.params
    if params.classifiers[dataset].items.kind == "images":
        unique = images.without_duplicates(images.read(raw))
        return items.from_images(unique.images), {"repeats": unique.repeats, "disputed": unique.disputed}
    settings = params.datasets[dataset].prepare
    cells, _ = preparing.prepare(sources.read(raw, layer=settings.layer), settings, seed=context.seed())
    return items.from_cells(cells), {}


def prepare_classifier(dataset: str) -> None:
    """Read labelled cells or images, deal them into sets, draw every scenario."""
    context = open_item("prepare_classifier", dataset)
    settings = context.params.classifiers[dataset]
    found, left_out = _items(context, dataset)
    dealt = class_splits.split_items(
        found.obs, found.test, settings.split, seeding.numpy_generator(context.seed("items"))
    )
    scenarios = splits.draw_scenarios(
        found.obs, dealt.sets, settings.scenarios, lambda name: seeding.numpy_generator(context.seed("scenario", name)),
        context.params.audit_classifier.min_controls,
    )  # fmt: skip
    arrays = {name: getattr(found, name) for name in ("inputs", "labels", "classes", "names", "donors")}
    artifacts.write_arrays(context.work / "items.npz", {**arrays, "test": dealt.test})
    artifacts.write_arrays(context.work / "sets.npz", vars(dealt.sets))
    _write_scenarios(context, scenarios)
    sizes = {name: len(members) for name, members in {**vars(dealt.sets), "test": dealt.test}.items()}
    summary = {
        **left_out,
        "items": len(found.labels),
        "classes": len(found.classes),
        "shape": list(found.inputs.shape[1:]),
    }
    counts = {name: _sizes(scenario) for name, scenario in scenarios.items()}
    artifacts.write_json(context.results / "result.json", {**summary, "sets": sizes, "scenarios": counts})
    context.track()


def train(dataset: str, family: Family = VAES) -> None:
    """Train the originals on every training cell."""
    context = open_item(family.stage("train"), dataset)
    sets = family.sets(context.workspace, dataset)
    nothing_forgotten = ForgetSets(sets.train[:0], sets.train, sets.stop, sets.aside)
    task = family.task(context.workspace, context.params, dataset)
    population = populations.Population(context, task, nothing_forgotten, "train")
    populations.make(population, family.seeds(context.params, "train"))
    context.track()


def retrain(dataset: str, scenario: str, family: Family = VAES) -> None:
    """Train the target population on the retained cells, by the same recipe with new seeds."""
    context = open_item(family.stage("retrain"), dataset, scenario)
    task = family.task(context.workspace, context.params, dataset)
    sets = family.scenario(context.workspace, dataset, scenario).sets
    population = populations.Population(context, task, sets, "retain")
    populations.make(population, family.seeds(context.params, "retrain"))
    context.track()


def shadows(dataset: str, shadow_block: str, family: Family = VAES) -> None:
    """Train a block of shadow models on random halves of the training and unseen cells, and score every cell."""
    context = open_item(family.stage("shadows"), dataset, shadow_block)
    task = family.task(context.workspace, context.params, dataset)
    sets = family.sets(context.workspace, dataset)
    dealt = np.sort(np.concatenate([sets.train, sets.unseen]))
    owners = family.owners(context.params, dataset, task, dealt)
    members = splits.deal_halves(owners, SHADOWS, seeding.numpy_generator(context.seed("cells")))
    halves = ForgetSets(dealt[:0], dealt, sets.stop, sets.aside)
    populations.make(populations.Shadows(context, task, halves, "half", members), range(SHADOWS))
    scored = np.concatenate([dealt, sets.aside])
    made = sorted(int(path.stem) for path in context.work.glob("*.safetensors"))
    scores = [task.signals(family.model(task, context.work / f"{seed}.safetensors"), scored).score for seed in made]
    held = np.pad(members[made], ((0, 0), (0, len(sets.aside))))
    kept = {"cells": scored, "members": held, family.primary: np.stack(scores)}
    artifacts.write_arrays(context.work / "scores.npz", kept)
    context.track()


def unlearn(dataset: str, scenario: str, method: str | None = None, family: Family = VAES) -> None:
    """Unlearn the forget set from each original once, by every method or by one.

    A method of which too few models are left, or a tracking server that is down, fails the stage when the others are
    done.
    """
    context = open_item(family.stage("unlearn"), dataset, scenario)
    methods = family.plan(context.params).methods
    if method is not None and method not in methods:
        why = f"{method} is not part of it; it has {', '.join(methods)}"
        raise ConfigError(context.workspace.root / "params.yaml", family.methods_key, why)
    task = family.task(context.workspace, context.params, dataset)
    sets = family.scenario(context.workspace, dataset, scenario).sets
    made = artifacts.read_json(context.workspace.results(family.stage("train"), dataset) / "result.json")
    seeds = sorted(int(seed) for seed in made["seeds"])
    failed: ScforgetError | None = None
    for name in methods if method is None else [method]:
        own = context.of_method(name)
        try:
            populations.make(populations.Unlearned(own, task, sets, "retain", name), seeds, context.warm_up)
            context.track(own.inputs)
        except (TooManyDivergedError, TrackingError) as error:
            failed = failed or error
    if failed is not None:
        raise failed

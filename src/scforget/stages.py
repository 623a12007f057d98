"""One function for each DVC stage: load, call science, save, track.

Results are on disk before tracking is called, and finished models before their stage ends, so that neither an
unreachable server nor a kill loses work.
"""

from __future__ import annotations

from collections.abc import Sequence

from anndata import AnnData

from scforget import artifacts, auditing, loading, parallel, populations, scoring, seeding, tracking
from scforget.audit import assess
from scforget.context import Context, open_item
from scforget.data import genes, sources, splits
from scforget.data import prepare as preparing
from scforget.data.splits import ForgetSets
from scforget.progress import Progress


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


def split(dataset: str) -> None:
    """Deal the cells into sets, draw every scenario, choose genes and markers."""
    context = open_item("split", dataset)
    settings = context.params.datasets[dataset]
    cells = artifacts.read_cells(context.workspace.work("prepare", dataset) / "cells.h5ad")
    sets = splits.split_cells(cells.n_obs, settings.split.fractions, seeding.numpy_generator(context.seed("cells")))
    scenarios = {
        name: splits.draw_scenario(
            cells.obs, sets, scenario, seeding.numpy_generator(context.seed("scenario", name)),
            context.params.audit.min_controls,
        )
        for name, scenario in settings.scenarios.items()
    }  # fmt: skip
    chosen = _choose_genes(context, cells, sets, list(scenarios.values()))
    artifacts.write_arrays(context.work / "sets.npz", vars(sets))
    for name, scenario in scenarios.items():
        artifacts.write_arrays(
            context.work / f"{name}.npz",
            {**vars(scenario.sets), "group": scenario.group, "controls": scenario.controls},
        )
    artifacts.write_json(context.work / "genes.json", chosen)
    counts = {
        name: {**{key: len(value) for key, value in vars(s.sets).items()}, "controls": len(s.controls)}
        for name, s in scenarios.items()
    }
    sizes = {name: len(members) for name, members in vars(sets).items()}
    artifacts.write_json(
        context.results / "result.json", {"sets": sizes, "scenarios": counts, "genes": len(chosen["genes"])}
    )
    context.track()


def train(dataset: str) -> None:
    """Train the originals on every training cell."""
    context = open_item("train", dataset)
    task = loading.load_task(context.workspace, context.params.datasets[dataset].model, dataset)
    sets = loading.load_sets(context.workspace, dataset)
    nothing_forgotten = ForgetSets(sets.train[:0], sets.train, sets.stop, sets.aside)
    populations.make(populations.Population(context, task, nothing_forgotten, "train"), context.params.train.seeds)


def retrain(dataset: str, scenario: str) -> None:
    """Train the target population on the retained cells, by the same recipe with new seeds."""
    context = open_item("retrain", dataset, scenario)
    task = loading.load_task(context.workspace, context.params.datasets[dataset].model, dataset)
    sets = loading.load_scenario(context.workspace, dataset, scenario).sets
    populations.make(populations.Population(context, task, sets, "retain"), context.params.retrain.seeds)


def unlearn(dataset: str, scenario: str, method: str) -> None:
    """Unlearn the forget set from each original once."""
    context = open_item("unlearn", dataset, scenario, method)
    task = loading.load_task(context.workspace, context.params.datasets[dataset].model, dataset)
    sets = loading.load_scenario(context.workspace, dataset, scenario).sets
    made = artifacts.read_json(context.workspace.results("train", dataset) / "result.json")
    seeds = [int(seed) for seed in made["seeds"]]
    populations.make(populations.Unlearned(context, task, sets, "retain", method), sorted(seeds))


def reference(dataset: str, scenario: str) -> None:
    """Score originals and retrains: what there is to forget, the target, and the noise between retrains."""
    context = open_item("reference", dataset, scenario)
    workspace, settings = context.workspace, context.params.audit
    scorer = scoring.Scorer(workspace, context.params, dataset, scenario)
    folders = workspace.work("train", dataset), workspace.work("retrain", dataset, scenario)
    originals, retrains = scorer.populations(*folders, meanwhile=tracking.warm_up)
    groups = scorer.groups(folders[0])
    seed = context.params.seed  # not the item's: the null band of a scenario is one and the same for all methods
    target = assess.describe_target(retrains, len(originals.seeds), groups, settings, seed)
    original = assess.judge(
        "original", originals, originals=originals, target=retrains, target_attacks=target["attacks"], groups=groups,
        settings=settings, seed=seed,
    )  # fmt: skip
    records = {"original": original, "retrain": target}
    artifacts.write_json(context.results / "result.json", records)
    scores = {f"original/{name}": values for name, values in originals.scores.items()}
    scores |= {f"retrain/{name}": values for name, values in retrains.scores.items()}
    masks = {"cells": scorer.cells, "forget": groups.forget, **groups.controls}
    scores |= {"original/latent": originals.latent, "retrain/latent": retrains.latent}
    artifacts.write_arrays(context.results / "scores.npz", {**masks, "labels": scorer.labels, **scores})
    context.track()


def audit(dataset: str, scenario: str) -> None:
    """Attack every method's models, test them against the retrains, and give the verdicts."""
    context = open_item("audit", dataset, scenario)
    audits = auditing.Audits(context, scoring.Scorer(context.workspace, context.params, dataset, scenario))
    methods = context.params.pipeline.methods
    with Progress(context.item.name, len(methods)) as progress:
        made = parallel.each(audits.make, methods, progress.advance, tracking.warm_up)
    for method, folder in zip(methods, made, strict=True):
        for name in auditing.FILES:
            artifacts.copy(folder / name, context.results / method / name)
    context.track()

"""What the gene list alone says of forgotten cells: models retrained without them, on four gene lists, many splits.

Run in a project whose cells are prepared (`dvc repro prepare`), with the data set and the clusters to forget:

    python bench/preprocessing_leak.py pbmc3k B "FCGR3A+ Mono" --splits 10 --models 2

Each split deals the cells anew; all training cells of the cluster are forgotten, its unseen cells are the controls.
Every model is trained on the retained cells, by the recipe of params.yaml; only the cells on which its genes were
chosen differ. Finished models are kept under work/preprocessing_leak, so a killed run goes on where it was.
Writes docs/results/preprocessing_leak-DATASET.csv (every model) and .png, and prints the table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from scforget import artifacts, engine, loading, parallel, schema, seeding
from scforget.arrays import FloatArray
from scforget.artifacts import Workspace
from scforget.attacks.gene_list import gene_list
from scforget.audit import intervals, roc
from scforget.audit.preprocessing import preprocessing_leak
from scforget.data import genes, splits
from scforget.data.splits import CellSets, ClusterScenario, Scenario
from scforget.pipeline import dvc_md5
from scforget.progress import Progress
from scforget.report.figures import INK, SERIES, SOFT, new_figure, png_bytes, styled
from scforget.tasks import VaeTask
from scforget.training import fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# `retain` is retrain_pipeline: genes chosen on the cells that the weights may see. The others are retrain.
PIPELINE = "retain"
SOURCES = {
    "train": "training cells\n(F among them)", "retain": "retained cells\n(retrain_pipeline)", "all": "all cells",
    "unseen": "unseen cells\n(controls among them)",
}  # fmt: skip
SEED_NAME = "preprocessing_leak"

Record = dict[str, Any]


class Job(NamedTuple):
    """One gene list: cluster to forget, number of the split, cells on which genes are chosen."""

    cluster: str
    split: int
    genes_from: str


class Bench:
    """Everything the jobs share."""

    def __init__(self, root: Path, dataset: str, models: int) -> None:
        self.params = schema.load(root / "params.yaml")
        engine.start(self.params.compute, self.params.datasets[dataset].largest_product)
        self.settings, self.models = self.params.datasets[dataset], models
        path = Workspace(root).work("prepare", dataset) / "cells.h5ad"
        self.cells = artifacts.read_cells(path)
        self.counts = sparse.csr_matrix(self.cells.X)
        # What a finished model depends on besides the code; a change of any of it makes a folder of its own.
        said = {name: getattr(self.settings, name).model_dump() for name in ("split", "model", "training")}
        identity = json.dumps([said, self.params.seed, dvc_md5(path)], sort_keys=True)
        self.folder = Workspace(root).work(
            "preprocessing_leak", dataset, hashlib.sha256(identity.encode()).hexdigest()[:12]
        )

    def draw(self, job: Job) -> tuple[CellSets, Scenario]:
        """Deal the cells of a split, which all clusters and gene lists share, and draw the forget request."""
        rng = seeding.numpy_generator(self.params.seed, SEED_NAME, "cells", job.split)
        sets = splits.split_cells(self.cells.n_obs, self.settings.split.fractions, rng)
        request = ClusterScenario(kind="cluster", cluster=job.cluster)
        return sets, splits.draw_scenario(self.cells.obs, sets, request, rng, self.params.audit.min_controls)

    def choose_genes(self, job: Job, sets: CellSets, scenario: Scenario) -> list[str]:
        """Choose the modelled genes as the stage `split` does."""
        threads = torch.get_num_threads()
        chosen_on = splits.gene_cells(job.genes_from, sets, [scenario])
        chosen = genes.select_genes(self.cells, chosen_on, self.settings.split.n_genes)
        # Choosing sets torch's threads to all cores, and processes that share cores then wait for one another.
        torch.set_num_threads(threads)
        return chosen

    def gene_list_auc(self, chosen: list[str], sets: CellSets, scenario: Scenario) -> float:
        """AUC of the attack that needs no model, on the cells and the normalisation that the audit uses."""
        forget = scenario.sets.forget
        scored = np.concatenate([forget, sets.unseen, sets.aside])
        counts = self.counts[scored]
        totals = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1.0)
        expression = sparse.csr_matrix(sparse.diags(np.median(totals) / totals) @ counts).log1p()
        scores = gene_list(expression, np.isin(self.cells.var_names, chosen))
        return roc.auc(scores[: len(forget)], scores[np.isin(scored, scenario.controls)])

    def train(self, task: VaeTask, scenario: Scenario, job: Job, model: int) -> Record:
        """Train on the retained cells as a retrain is, and score; gene lists share the streams of a model."""
        seed = seeding.derive(self.params.seed, SEED_NAME, job.cluster, job.split, model)
        sets = scenario.sets
        trained = fit(task.new_model(seed), task, sets.retain, sets.stop, self.settings.training, seed=seed)
        best = max(trained.history, key=lambda row: row["stop_elbo"])
        forget, controls = (task.signals(trained.model, cells).elbo for cells in (sets.forget, scenario.controls))
        found = {"auc": roc.auc(forget, controls), "stop_elbo": best["stop_elbo"], "best_epoch": int(best["epoch"])}
        return {**found, "epochs": len(trained.history)}

    def run(self, job: Job) -> Record:
        """Make what is missing of a job; each model is on disk before the next one is begun."""
        path = self.folder / quote(job.cluster, safe="") / f"{job.split}-{job.genes_from}.json"
        found: Record = artifacts.read_json(path) if path.exists() else {"models": []}
        if len(found["models"]) < self.models:
            sets, scenario = self.draw(job)
            chosen = self.choose_genes(job, sets, scenario)
            task = loading.make_task(self.cells, chosen, self.settings.model)
            found["gene_list_auc"] = self.gene_list_auc(chosen, sets, scenario)
            found |= {"forget": len(scenario.sets.forget), "controls": len(scenario.controls)}
            for model in range(len(found["models"]), self.models):
                found["models"].append(self.train(task, scenario, job, model))
                artifacts.write_json(path, found)
        return dict(artifacts.read_json(path))  # a fresh job and one from an earlier sitting give the same columns

    def rows(self, clusters: list[str], n_splits: int) -> pd.DataFrame:
        """One row a model."""
        # Split by split, so that a run that is cut short holds whole pairs.
        jobs = [Job(cluster, split, source) for split in range(n_splits) for cluster in clusters for source in SOURCES]
        with Progress("preprocessing_leak", len(jobs) * self.models) as progress:

            def done() -> None:
                for _ in range(self.models):
                    progress.advance()

            records = parallel.each(self.run, jobs, done)
        return pd.DataFrame([
            {**job._asdict(), "model": number, **model, **{k: v for k, v in record.items() if k != "models"}}
            for job, record in zip(jobs, records, strict=True)
            for number, model in enumerate(record["models"][: self.models])
        ])  # fmt: skip


def by_split(table: pd.DataFrame, cluster: str, source: str, column: str) -> FloatArray:
    """``[S, M]``: a column's values, splits by models."""
    rows = table[(table["cluster"] == cluster) & (table["genes_from"] == source)]
    return rows.pivot_table(index="split", columns="model", values=column).to_numpy(dtype=np.float64)


def shown(mean: float, interval: intervals.Interval, sign: str = "") -> str:
    """A mean and its interval in words."""
    return f"{mean:{sign}.3f} ({interval[0]:{sign}.3f}, {interval[1]:{sign}.3f})".replace("-", "−")


def summary(table: pd.DataFrame, level: float) -> str:
    """A row for each cluster and gene list, as Markdown; intervals over splits."""
    lines = [
        "| forgotten | genes chosen on | AUC, retrained | gene_list AUC | preprocessing_leak |",
        "|---|---|---|---|---|",
    ]
    for cluster in dict.fromkeys(table["cluster"]):
        pipeline = by_split(table, cluster, PIPELINE, "auc")
        for source in SOURCES:
            aucs = by_split(table, cluster, source, "auc")
            lists = by_split(table, cluster, source, "gene_list_auc")[:, 0]
            leak = preprocessing_leak(aucs, pipeline, level=level)
            cells = [
                cluster, f"`{source}`",
                shown(leak.retrain, intervals.mean_interval(aucs.mean(axis=1), level)),
                shown(float(lists.mean()), intervals.mean_interval(lists, level)),
                "–" if source == PIPELINE else shown(leak.difference, leak.interval, "+"),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_panel(axes: Axes, table: pd.DataFrame, cluster: str, level: float) -> None:
    """Every split's AUC of one cluster, joined over gene lists; beside them mean and interval."""
    values = np.stack([by_split(table, cluster, source, "auc").mean(axis=1) for source in SOURCES])
    places = np.arange(len(SOURCES))
    axes.axhline(0.5, color=SOFT, linewidth=0.9, linestyle="--")
    axes.plot(places - 0.1, values, color=SOFT, linewidth=0.5, alpha=0.35, zorder=1)
    for place, row, colour in zip(places, values, SERIES, strict=False):
        axes.plot(np.full(row.size, place - 0.1), row, "o", color=colour, markersize=4, alpha=0.75)
        centre, (low, high) = float(row.mean()), intervals.mean_interval(row, level)
        axes.errorbar(place + 0.14, centre, yerr=[[centre - low], [high - centre]], fmt="D", color=INK, mfc=colour,
                      markersize=6, capsize=4)  # fmt: skip
        axes.annotate(f"{centre:.2f}", (place + 0.22, centre), va="center", fontsize=8)
    rows = table[table["cluster"] == cluster]
    cells = (
        f"{rows['forget'].min()}–{rows['forget'].max()} forgotten, {rows['controls'].min()}–{rows['controls'].max()}"
    )
    axes.set_title(f"{cluster}: {cells} controls", fontweight="bold")
    axes.set_xticks(places, list(SOURCES.values()), fontsize=8)
    axes.set_xlim(-0.45, len(SOURCES) - 0.45)
    axes.set_xlabel("genes chosen on")


@styled
def draw(table: pd.DataFrame, level: float) -> Figure:
    """A panel for each cluster, on one scale."""
    clusters = list(dict.fromkeys(table["cluster"]))
    title = f"Retrained without the forgotten cells: membership AUC by gene list ({table['split'].nunique()} splits)"
    figure = new_figure(5.2 * len(clusters), 4.5, title)
    panels = figure.subplots(1, len(clusters), squeeze=False, sharey=True)[0]
    for axes, cluster in zip(panels, clusters, strict=True):
        draw_panel(axes, table, cluster, level)
    panels[0].set_ylabel("AUC, forgotten against\nunseen cells of the same kind")
    figure.supxlabel(
        f"Points: a split, mean of its models; thin lines join a split. Diamonds: mean and {level:.0%} t interval over "
        "splits. Dashed: 0.5, nothing to tell.",
        x=0.01, ha="left", fontsize=8, color=SOFT,
    )  # fmt: skip
    return figure


def main() -> None:
    """Measure the clusters named on the command line."""
    parser = argparse.ArgumentParser(description="Membership AUC of retrained models by gene list, over splits.")
    parser.add_argument("dataset")
    parser.add_argument("clusters", nargs="+", metavar="CLUSTER")
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--models", type=int, default=2, help="models of each gene list and split")
    asked = parser.parse_args()
    if asked.splits < 2 or asked.models < 1:
        parser.error("at least 2 splits (one says nothing of their spread) and 1 model")
    root = Path.cwd()
    bench = Bench(root, asked.dataset, asked.models)
    table = bench.rows(list(dict.fromkeys(asked.clusters)), asked.splits)
    level = bench.params.audit.interval_level
    stem = root / "docs" / "results" / f"preprocessing_leak-{asked.dataset}"
    artifacts.write_table(stem.with_suffix(".csv"), table)
    artifacts.write_bytes(stem.with_suffix(".png"), png_bytes(draw(table, level)))
    print(summary(table, level))


if __name__ == "__main__":
    main()

"""Cost against trace: many recipes of a few methods, each from every original, judged against the retrains.

Run in a project whose pipeline has run (`dvc repro`), with the data set and the scenarios to draw:

    python bench/frontier.py pbmc68k cd56_nk dendritic_half scattered

Writes docs/results/frontier-DATASET.csv and .png. Nothing is selected: every recipe of the list below is in the file.
"""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from scforget import artifacts, engine, loading, parallel, results, schema, seeding
from scforget.arrays import FloatArray
from scforget.artifacts import Workspace
from scforget.audit import equivalence, roc, utility
from scforget.methods import METHODS
from scforget.models.mixture import Model
from scforget.progress import Progress
from scforget.report.comparisons import frontier
from scforget.report.figures import png_bytes

ALL = ["encoder", "bottleneck", "decoder", "heads"]
ONE_CYCLE = {"schedule": "one_cycle", "kl_warmup_epochs": 0, "free_bits": 0.0}


def recipes(batch: int) -> list[tuple[str, str, dict[str, Any]]]:
    """(label, method, settings that differ from params.yaml); ``batch`` is the training recipe's."""
    found: list[tuple[str, str, dict[str, Any]]] = []

    def short(epochs: int, rate: float, size: int) -> dict[str, Any]:
        return {**ONE_CYCLE, "learning_rate": rate, "batch_size": size, "max_epochs": epochs, "patience": epochs}

    for epochs in (4, 6, 8, 10, 12, 14, 16, 18, 20):
        recipe = short(epochs, 3e-3, batch // 2)
        found.append(("reset decoder", "partial_reset", {**recipe, "blocks": ["decoder", "heads"]}))
    for epochs in (8, 12, 16):
        recipe = short(epochs, 3e-3, batch // 2)
        found.append(("reset bottleneck and decoder", "partial_reset", {**recipe, "blocks": ALL[1:]}))
    for epochs in (12, 20):
        recipe = short(epochs, 3e-3, batch)
        found.append(("reset decoder, full batch size", "partial_reset", {**recipe, "blocks": ["decoder", "heads"]}))
    long = {"schedule": "constant", "learning_rate": 1e-3, "batch_size": batch, "max_epochs": 200, "patience": 10}
    found.append(
        ("reset decoder, constant rate, patience 10", "partial_reset", {**long, "blocks": ["decoder", "heads"]})
    )
    for epochs in (12, 20, 30):
        found.append(("new network, one cycle", "partial_reset", {**short(epochs, 3e-3, batch // 2), "blocks": ALL}))
    for teaching, epochs in ((2, 6), (2, 10), (2, 14), (4, 10), (8, 4)):
        recipe = {**short(epochs, 3e-3, batch // 2), "distil_epochs": teaching, "distil_learning_rate": 5e-3}
        found.append((f"distil {teaching} epochs, then train", "reset_distill", recipe))
    for lam in (0.1, 0.2, 0.4, 0.6):
        found.append((f"shrink to {lam:g}", "shrink_perturb", {**short(12, 3e-3, batch // 2), "lam": lam}))
    for rate in (1e-4, 1e-3):
        fine = {**long, "learning_rate": rate, "max_epochs": 50}
        found.append((f"fine-tune at {rate:g}", "retain_finetune", fine))
    for alpha in (2.0, 3.0, 5.0):
        found.append((f"ssd, alpha {alpha:g}", "ssd", {"alpha": alpha}))
    for alpha in (1e-8, 1e-7, 1e-6, 1e-5):
        found.append((f"fisher_scrub, alpha {alpha:g}", "fisher_scrub", {"alpha": alpha}))
    return found


class Job(NamedTuple):
    """One recipe from one original."""

    recipe: int
    seed: int


class Scores(NamedTuple):
    """What is asked of one model: ELBO of the forgotten cells ``[F]``; AUC against the controls of their kind; mean
    ELBO and marker correlation outside it."""

    forget: FloatArray
    auc: float
    elbo: float
    marker_r: float


class Bench:
    """Everything the jobs of one scenario share."""

    def __init__(self, root: Path, dataset: str, scenario: str) -> None:
        self.workspace, self.params = Workspace(root), schema.load(root / "params.yaml")
        engine.start(self.params.compute, self.params.datasets[dataset].largest_product)
        self.dataset, self.scenario = dataset, scenario
        settings = self.params.datasets[dataset]
        cells, genes, markers = loading.load_cells(self.workspace, dataset)
        self.task = loading.make_task(cells, genes, settings.model)
        self.markers = np.flatnonzero(np.isin(genes, markers))
        self.request = loading.load_scenario(self.workspace, dataset, scenario)
        unseen, group = loading.load_sets(self.workspace, dataset).unseen, self.request.group
        self.outside = unseen if group[unseen].all() else unseen[~group[unseen]]
        self.recipes = recipes(settings.training.batch_size)

    def scores(self, model: Model) -> Scores:
        """Score one model."""
        forget = self.task.signals(model, self.request.sets.forget).elbo
        controls = self.task.signals(model, self.request.controls).elbo
        expressed = self.task.batch(self.outside).inputs.double().numpy()[:, self.markers]
        decoded = self.task.decoded_means(model, self.outside, self.markers)
        elbo = float(self.task.signals(model, self.outside).elbo.mean())
        return Scores(forget, roc.auc(forget, controls), elbo, utility.marker_correlation(expressed, decoded))

    def run(self, job: Job) -> tuple[Scores, int, float]:
        """Unlearn and score; add passes over cells and seconds."""
        _, method, changes = self.recipes[job.recipe]
        section = getattr(self.params.unlearn, method).model_dump() | changes
        settings = METHODS[method].settings.model_validate(section)
        folder = self.workspace.work("train", self.dataset)
        model = loading.load_original(self.task, folder / f"{job.seed}.safetensors")
        seed, started = seeding.derive(self.params.seed, "frontier", *job), time.perf_counter()
        trained = METHODS[method].run(model, self.task, self.request.sets, settings, seed=seed)
        seconds = time.perf_counter() - started
        return self.scores(trained.model), trained.effort.passes, seconds

    def rows(self) -> list[dict[str, Any]]:
        """One row a recipe: means and 90 % Welch intervals of the differences to the retrains."""
        retrains = self.workspace.work("retrain", self.dataset, self.scenario).glob("*.safetensors")
        paths = sorted(retrains, key=lambda path: int(path.stem))
        target = [self.scores(loading.load_model(self.task, path)) for path in paths]
        base = np.stack([one.forget for one in target])
        shrinkage, margins = self.params.audit.trace_shrinkage, self.params.audit.margins
        null = equivalence.trace_leave_one_out(base, shrinkage)
        cost = results.cost(self.workspace, self.dataset, self.scenario, "retrain")
        originals = sorted(int(p.stem) for p in self.workspace.work("train", self.dataset).glob("*.safetensors"))
        jobs = [Job(recipe, seed) for recipe in range(len(self.recipes)) for seed in originals]
        with Progress(f"frontier {self.scenario}", len(jobs)) as progress:
            done = dict(zip(jobs, parallel.each(self.run, jobs, progress.advance), strict=True))
        table = []
        for index, (label, method, changes) in enumerate(self.recipes):
            found = [done[Job(index, seed)] for seed in originals]
            own = [scores for scores, _, _ in found]
            traced = equivalence.trace(np.stack([one.forget for one in own]), base, shrinkage=shrinkage)
            compared: dict[str, tuple[Any, Any, float]] = {
                "trace": (traced, null, margins.trace),
                "membership": ([one.auc for one in own], [one.auc for one in target], margins.membership),
                "elbo": ([one.elbo for one in own], [one.elbo for one in target], margins.elbo),
                "marker_r": ([one.marker_r for one in own], [one.marker_r for one in target], margins.marker_r),
            }
            row: dict[str, Any] = {
                "scenario": self.scenario, "recipe": label, "method": method, "epochs": changes.get("max_epochs"),
                "passes_ratio": np.mean([passes for _, passes, _ in found]) / cost["passes"],
                "seconds_ratio": np.mean([seconds for _, _, seconds in found]) / cost["seconds"],
            }  # fmt: skip
            for name, (ours, theirs, margin) in compared.items():
                test = equivalence.welch_equivalence(ours, theirs, margin=margin)
                row |= {name: test.difference, f"{name}_lo": test.interval[0], f"{name}_hi": test.interval[1]}
            table.append(row)
        return table


def main() -> None:
    """Draw the scenarios named on the command line."""
    root, dataset, scenarios = Path.cwd(), sys.argv[1], sys.argv[2:]
    rows = [row for scenario in scenarios for row in Bench(root, dataset, scenario).rows()]
    stem = root / "docs" / "results" / f"frontier-{dataset}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    table.to_csv(stem.with_suffix(".csv"), index=False, float_format="%.4g", quoting=csv.QUOTE_MINIMAL)
    margin = schema.load(root / "params.yaml").audit.margins.trace
    artifacts.write_bytes(stem.with_suffix(".png"), png_bytes(frontier(table, margin)))


if __name__ == "__main__":
    main()

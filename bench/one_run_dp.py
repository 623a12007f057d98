"""Audit of differentially private training from single runs with canaries, beside the accountant's ε.

Run in a project whose cells are prepared and split (`dvc repro`), with the data set:

    python bench/one_run_dp.py pbmc68k

Writes docs/results/one_run_dp-DATASET.csv, one row a run, and prints the table of docs/results/dp_one_run.md.

Steinke, Nasr & Jagielski 2023 (arXiv 2305.08846): a fair coin for each canary says whether it is trained on; the model
is published; some coins are guessed, the others abstained from; the number of right guesses bounds ε from below.
Everything below was fixed before the first run. A canary is a cell whose counts are shuffled over the genes, each by
its own permutation, so that nothing but training on it makes a model explain it (as a wrong label does an image). Its
score is the paper's for a black box: how much its ELBO has risen since the starting weights, which the auditor knows.
"""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from scforget import engine, loading, parallel, schema, seeding
from scforget.arrays import BoolArray, FloatArray, IntArray
from scforget.artifacts import Workspace
from scforget.audit import roc
from scforget.audit.epsilon import epsilon_one_run
from scforget.data.splits import ForgetSets
from scforget.methods.dp_sgd import DPSGDSettings, dp_sgd
from scforget.models.mixture import Model
from scforget.progress import Progress
from scforget.tasks import VaeTask
from scforget.training import Trained, fit

CANARIES = 200
GUESSED_IN = GUESSED_OUT = 50
LEVEL = 0.95
SEEDS = 10
PLAIN = "plain recipe"
BUDGETS = (1.0, 10.0, 50.0, math.inf)  # infinite: clipped as the others are, but without noise


class Job(NamedTuple):
    """One run: a budget of DP-SGD, or ``None`` for the plain recipe; and its seed."""

    budget: float | None
    seed: int


def scrambled(task: VaeTask, canaries: IntArray, rng: np.random.Generator) -> VaeTask:
    """The same cells, but the canaries' counts are shuffled over the genes; no library changes."""
    counts = task.counts.tolil(copy=True)
    for cell in canaries:
        counts[cell] = rng.permutation(task.counts[[cell]].toarray()[0])
    return VaeTask(counts.tocsr(), task.normaliser, task.settings, task.donors)


def right_guesses(scores: FloatArray, included: BoolArray) -> int:
    """How many are right when the highest scores are called "in" and the lowest "out"."""
    order = np.argsort(scores)
    return int(included[order[-GUESSED_IN:]].sum() + (~included[order[:GUESSED_OUT]]).sum())


class Bench:
    """Cells, splits and settings of one data set."""

    def __init__(self, root: Path, dataset: str) -> None:
        workspace, self.params = Workspace(root), schema.load(root / "params.yaml")
        engine.start(self.params.compute, self.params.datasets[dataset].largest_product)
        self.dataset = dataset
        self.task = loading.load_task(workspace, self.params.datasets[dataset].model, dataset)
        self.sets = loading.load_sets(workspace, dataset)

    def train(self, task: VaeTask, cells: IntArray, budget: float | None, seed: int) -> Trained:
        """Train on some cells: DP-SGD by its settings, or the plain recipe of the data set."""
        if budget is None:
            settings = self.params.datasets[self.dataset].training
            return fit(task.new_model(seed), task, cells, self.sets.stop, settings, seed=seed)
        section = getattr(self.params.unlearn, "dp_sgd").model_dump() | {"epsilon": budget}  # noqa: B009
        sets = ForgetSets(cells[:0], cells, self.sets.stop, self.sets.aside)
        return dp_sgd(task.new_model(seed), task, sets, DPSGDSettings.model_validate(section), seed=seed)

    def run(self, job: Job) -> dict[str, Any]:
        """Draw canaries and coins, train, score, guess, bound."""
        name = PLAIN if job.budget is None else f"{job.budget:g}"
        seed = seeding.derive(self.params.seed, "one-run", name, job.seed)
        rng = seeding.numpy_generator(seed, "canaries")
        canaries = rng.permutation(np.concatenate([self.sets.train, self.sets.unseen]))[:CANARIES]
        included = seeding.numpy_generator(seed, "coins").random(CANARIES) < 0.5
        task = scrambled(self.task, canaries, rng)
        others = self.sets.train[~np.isin(self.sets.train, canaries)]
        cells = np.sort(np.concatenate([others, canaries[included]]))
        trained = self.train(task, cells, job.budget, seed)

        def elbo(model: Model) -> FloatArray:
            return task.signals(model, canaries).elbo

        final = elbo(trained.model)
        rise = final - elbo(task.new_model(seed))
        delta = self.params.audit.delta
        right = right_guesses(rise, included)
        bound = epsilon_one_run(CANARIES, GUESSED_IN + GUESSED_OUT, right, delta=delta, level=LEVEL)
        accountant = trained.facts.get("epsilon", math.inf)
        return {
            "training": name, "seed": job.seed, "cells": len(cells), "included": int(included.sum()),
            "accountant": accountant, "right": right, "bound": bound, "auc": roc.auc(rise[included], rise[~included]),
            "auc_of_elbo": roc.auc(final[included], final[~included]), "elbo": float(final.mean()),
        }  # fmt: skip


def summary(rows: pd.DataFrame, delta: float) -> str:
    """The table in Markdown, one line a training, and what perfect guessing would have given."""
    guesses = GUESSED_IN + GUESSED_OUT
    lines = [
        f"| training | accountant's ε | AUC of the canaries | right of {guesses}: mean (range) "
        "| bound on ε: median (range) | above the accountant's |",
        "|---|---|---|---|---|---|",
    ]
    for name, own in rows.groupby("training", sort=False):
        label = {PLAIN: PLAIN, "inf": "DP-SGD, no noise"}.get(str(name), f"DP-SGD, ε = {name!s}")
        bound, above = own["bound"], int((own["bound"] > own["accountant"]).sum())
        lines.append(
            f"| {label} | {own['accountant'].max():.3g} | {own['auc'].mean():.3f} | {own['right'].mean():.1f} "
            f"({own['right'].min()} to {own['right'].max()}) | {bound.median():.2f} ({bound.min():.2f} to "
            f"{bound.max():.2f}) | {above} of {len(own)} |"
        )
    ceiling = epsilon_one_run(CANARIES, guesses, guesses, delta=delta, level=LEVEL)
    return "\n".join([*lines, "", f"All {guesses} right: {ceiling:.2f}."])


def main() -> None:
    """Run every budget and seed."""
    torch.set_num_threads(1)  # as in the pipeline
    root, dataset = Path.cwd(), sys.argv[1]
    bench = Bench(root, dataset)
    jobs = [Job(budget, seed) for budget in (None, *reversed(BUDGETS)) for seed in range(SEEDS)]
    with Progress("one-run audit", len(jobs)) as progress:
        rows = pd.DataFrame(parallel.each(bench.run, jobs, progress.advance))
    target = root / "docs" / "results" / f"one_run_dp-{dataset}.csv"
    rows.to_csv(target, index=False, float_format="%.5g", quoting=csv.QUOTE_MINIMAL)
    print(summary(rows, bench.params.audit.delta))


if __name__ == "__main__":
    main()

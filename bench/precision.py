"""Does bfloat16 reach the same held-out ELBO as float32? The same models, seed by seed, trained to convergence in both.

    python bench/precision.py COUNTS.h5ad [--seeds 6] [--out docs/results/bf16]

Cells are filtered and dealt as the pipeline deals them (70 % train, 10 % stop, 20 % held out), 2,000 genes, the
published net, Adam 1e-3, batches of 128, until 10 epochs bring no better ELBO on the stop cells. Pairs share
initialisation, batches and noise. Finished models are kept in OUT.json and not made again. The margin is fixed here,
before any model is made: 0.1 % of the held-out ELBO.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from scforget import engine, parallel, seeding, training
from scforget.data import genes, sources, splits
from scforget.data.prepare import PrepareSettings, prepare
from scforget.models.vae import VAESettings
from scforget.progress import Progress
from scforget.tasks import VaeTask
from scforget.training import TrainingSettings

MARGIN = 1e-3  # of the held-out ELBO
LEVEL = 0.9  # two one-sided tests at 5 %
RECIPE = TrainingSettings(
    learning_rate=1e-3, schedule="constant", batch_size=128, max_epochs=200, patience=10, kl_warmup_epochs=0,
    free_bits=0.0,
)  # fmt: skip
MODEL = VAESettings(hidden=[1024, 512, 128], latent=32, likelihood="nb", dispersion="gene-cell", dropout=0.1)
PREPARE = PrepareSettings(
    layer=None, min_genes=200, max_mito_fraction=0.2, mito_prefixes=["MT-"], mito_column=None, label_column="dataset",
    unlabelled=[], leiden=None, donor_column=None,
)  # fmt: skip
FRACTIONS = splits.Fractions(train=0.7, stop=0.1, aside=0.05, unseen=0.15)


@dataclass(frozen=True)
class Job:
    """Trains one model; picklable."""

    task: VaeTask
    sets: splits.CellSets

    def __call__(self, asked: tuple[str, int]) -> dict[str, Any]:
        precision, seed = asked
        engine.use(replace(engine.current(), autocast=precision))  # type: ignore[arg-type]
        held = np.concatenate([self.sets.aside, self.sets.unseen])
        trained = training.fit(self.task.new_model(seed), self.task, self.sets.train, self.sets.stop, RECIPE, seed=seed)
        elbo = training.mean_elbo(self.task, trained.model, held)
        return {"precision": precision, "seed": seed, "elbo": elbo, "epochs": len(trained.history)}


def job(path: Path) -> Job:
    """Read, filter and deal the cells; choose the genes on all of them."""
    cells, _ = prepare(sources.read(path, layer=None), PREPARE, seed=0)
    sets = splits.split_cells(cells.n_obs, FRACTIONS, seeding.numpy_generator(0, "cells"))
    chosen = genes.select_genes(cells, None, 2000)
    counts = cells[:, chosen].X.tocsr()
    return Job(VaeTask(counts, np.asarray(cells.obs["total_counts"], dtype=np.float64), MODEL), sets)


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Interval of the mean difference of pairs, and whether it lies within the margin."""
    by = {(row["precision"], row["seed"]): row for row in rows}
    seeds = sorted({seed for precision, seed in by if precision == "bf16"})
    full = np.array([by["none", seed]["elbo"] for seed in seeds])
    difference = np.array([by["bf16", seed]["elbo"] for seed in seeds]) - full
    half = stats.t.ppf((1 + LEVEL) / 2, len(seeds) - 1) * stats.sem(difference)
    low, high, margin = difference.mean() - half, difference.mean() + half, MARGIN * abs(full.mean())
    return {
        "elbo_fp32": full.mean(), "sd_between_seeds_fp32": full.std(ddof=1), "difference": difference.mean(),
        "interval": [low, high], "margin": margin, "equal": bool(-margin < low and high < margin),
    }  # fmt: skip


def main() -> None:
    """Make the models that are missing; write them and the verdict."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("counts", type=Path, help="raw counts, .h5ad")
    asked.add_argument("--seeds", type=int, default=6)
    asked.add_argument("--out", type=Path, default=Path("docs/results/bf16"))
    given = asked.parse_args()
    out = given.out.with_suffix(".json")
    rows = json.loads(out.read_text())["models"] if out.exists() else []
    done = {(row["precision"], row["seed"]) for row in rows}
    wanted = [(p, s) for s in range(given.seeds) for p in ("none", "bf16") if (p, s) not in done]
    numerics = engine.NumericsSettings(matrix_products="auto", autocast="none", device="cpu", threads=1)
    work = job(given.counts)
    largest = RECIPE.batch_size * work.task.counts.shape[1] * MODEL.hidden[0]
    engine.use(engine.choose(numerics, largest))
    with Progress("bf16", len(wanted)) as progress:
        for pair in (wanted[i : i + 2] for i in range(0, len(wanted), 2)):  # each pair is on disk before the next
            rows += parallel.each(work, pair, progress.advance)
            out.write_text(json.dumps({"models": rows}, indent=1) + "\n")
    sizes = {name: len(cells) for name, cells in vars(work.sets).items()}
    found = {"cells": sizes, "genes": work.task.counts.shape[1], "numerics": str(engine.current()),
             "models": rows, **verdict(rows)}  # fmt: skip
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "models"}, indent=1))


if __name__ == "__main__":
    main()

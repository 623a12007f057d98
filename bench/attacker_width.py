"""The learned attack on made-up cells: what a narrower network loses, how far its AUC spreads where nothing leaks.

Run from the project's root; only ``params.yaml`` is read, and no pipeline need have run:

    python bench/attacker_width.py

Writes docs/results/attacker_width.csv, one row a fit, and prints the table that docs/statistics.md quotes. Everything
below was fixed before the first run: the numbers of data sets, and the shift, from a formula (see SHIFT).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from scforget import schema, seeding
from scforget.arrays import BoolArray, FloatArray
from scforget.attacks.mlp import MlpSettings, mlp, shuffled_label_null
from scforget.audit import intervals, roc

FEATURES, SHIFTED = 69, 3
# The mean difference of 64 + 64 training cells as a linear rule has the AUC Phi(s / sqrt(2 (s + 69/32))), s = 3 shift²:
# 0.71 at 0.7.
SHIFT = 0.7
WIDTHS = (128, 256)
LEAKING = (80, 15)  # cells of either group, data sets
NULL = ((10, 200), (30, 100), (80, 100))
SHUFFLES = ((0.0, 60), (2.0, 60))  # shift of the 10 + 10 cells whose labels are shuffled, draws
LEVEL = 0.95


def draw(seed: int, cells: int, shift: float) -> tuple[FloatArray, BoolArray]:
    """Normal features ``[2 cells, 69]`` and which rows are members; three features of those are shifted."""
    rng = seeding.numpy_generator(seed, "attacker width", cells, shift)
    members = np.arange(2 * cells) < cells
    features = rng.normal(size=(2 * cells, FEATURES))
    features[:cells, :SHIFTED] += shift
    return features, members


def fit(seed: int, cells: int, shift: float, settings: MlpSettings) -> dict[str, Any]:
    """AUC of one cross-fitted attack, and the processor seconds that it took."""
    features, members = draw(seed, cells, shift)
    started = time.process_time()
    scores = mlp(features, members, ~members, settings, seed).scores
    seconds = time.process_time() - started
    found = roc.auc(scores[members], scores[~members])
    width = settings.hidden[0]
    return {"cells": cells, "shift": shift, "data_set": seed, "width": width, "auc": found, "seconds": seconds}


def losses(rows: pd.DataFrame) -> str:
    """The narrow attacker beside the wide one on the same data."""
    wide, narrow = (rows[rows["width"] == width].set_index("data_set") for width in (256, 128))
    lost = (wide["auc"] - narrow["auc"]).to_numpy()
    low, high = intervals.mean_interval(lost, LEVEL)
    times = (narrow["seconds"] / wide["seconds"]).to_numpy()
    return (
        f"AUC {wide['auc'].mean():.3f} at 256-256, {narrow['auc'].mean():.3f} at 128-128; lost {lost.mean():+.4f} "
        f"({low:+.4f}, {high:+.4f}) over {len(lost)} data sets; time ÷ 256-256: median {np.median(times):.2f}, "
        f"{times.min():.2f} to {times.max():.2f}"
    )


def null_line(cells: int, aucs: FloatArray) -> str:
    """Mean AUC, and how many times wider it spreads than the rank sum of a fixed score."""
    low, high = intervals.mean_interval(aucs, LEVEL)
    fixed = np.sqrt((2 * cells + 1) / (12 * cells**2))
    spread, freedom = aucs.std(ddof=1), len(aucs) - 1
    ends = spread * np.sqrt(freedom / stats.chi2.ppf([(1 + LEVEL) / 2, (1 - LEVEL) / 2], freedom)) / fixed
    outside = np.mean(np.abs(aucs - 0.5) > stats.norm.ppf(0.975) * fixed)
    return (
        f"{cells} + {cells} cells, {len(aucs)} data sets: mean AUC {aucs.mean():.3f} ({low:.3f}, {high:.3f}), spread "
        f"÷ a fixed score's {spread / fixed:.2f} ({ends[0]:.2f}, {ends[1]:.2f}), outside its 95 % band {outside:.3f}"
    )


def main() -> None:
    """Fit everything, one after the other on one thread, and print."""
    torch.set_num_threads(1)  # as in the pipeline
    root = Path.cwd()
    base: MlpSettings = schema.load(root / "params.yaml").audit.of("mlp")
    cells, runs = LEAKING
    by_width = {width: base.model_copy(update={"hidden": [width, width]}) for width in WIDTHS}
    rows = [fit(run, cells, SHIFT, by_width[width]) for run in range(runs) for width in WIDTHS]
    print(losses(pd.DataFrame(rows)), flush=True)
    for size, number in NULL:
        found = [fit(run, size, 0.0, by_width[128]) for run in range(number)]
        print(null_line(size, np.array([row["auc"] for row in found])), flush=True)
        rows += found
    for shift, number in SHUFFLES:
        features, members = draw(0, 10, shift)
        null = shuffled_label_null(features, members, ~members, by_width[128], 0, number)
        half = stats.t.ppf((1 + LEVEL) / 2, number - 1) * null["sd"] / np.sqrt(number)
        print(
            f"shuffled labels of one 10 + 10 data set, shift {shift:g}: mean {null['mean']:.3f} ± {half:.3f}, "
            f"sd {null['sd']:.3f}, {number} draws",
            flush=True,
        )
    target = root / "docs" / "results" / "attacker_width.csv"
    pd.DataFrame(rows).to_csv(target, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()

"""The measurements, one function a part; each returns the ratios that it found and what they were made of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.engine import facts
from bench.engine.conductor import Worker, interleave, once, ratio, summary

CELLS, GENES, TRAIN, FORGET, BATCH = 33_088, 2_000, 28_124, 30, 128
STEPS_OF_EPOCH = TRAIN / BATCH
Part = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes
    ----------
    turns, steps
        Of each variant, and optimiser steps a turn.
    scvi_cells
        Cells of scvi-tools's timed epochs, and of the long parts.
    fisher_cells
        Cells of our own Fisher diagonal; ``None``: all of a retrain's.
    growth
        Cells and genes of each data set.
    growth_steps
        Steps that an epoch is estimated from; ``None``: the whole epoch.
    """

    quick: bool
    threads: int
    turns: int
    steps: int
    scvi_cells: int
    fisher_cells: int | None
    fisher_turns: int
    ensemble_steps: int
    ensemble_turns: int
    growth: tuple[tuple[int, int], ...]
    growth_steps: int | None
    retrain_cells: int = TRAIN
    retrain_epochs: int = 14
    scvi_epochs: int = 50


def full(threads: int) -> Plan:
    """About fifteen minutes on two cores."""
    growth = ((8_000, GENES), (CELLS, GENES), (130_000, GENES), (8_000, 1_000), (8_000, 4_000))
    return Plan(False, threads, 9, 20, 10_240, None, 3, 40, 3, growth, None)


def quick(threads: int) -> Plan:
    """About two minutes: whether it works and roughly what comes out."""
    return Plan(True, threads, 3, 5, 20 * BATCH, 4096, 2, 10, 2, ((8_000, GENES), (CELLS, GENES), (8_000, 1_000)), 10,
                retrain_cells=20 * BATCH, retrain_epochs=2, scvi_epochs=2)  # fmt: skip


class Cells:
    """Simulated data sets, made when first asked for and kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, cells: int = CELLS, genes: int = GENES) -> str:
        """Where the counts are."""
        path = self._folder / f"counts-{cells}-{genes}.npz"
        if not path.exists():
            print(f"simulating {cells:,} cells x {genes:,} genes", flush=True)
        once("cells:Maker", "make", path=str(path), cells=cells, genes=genes)
        return str(path)


def training(plan: Plan, data: Cells) -> Part:
    """Steps of every variant in turns, then a profile of the first and of ours."""
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "naive": ("naive:Naive", {}),
        "naive_switched": ("naive:Naive", {"switched": True}),
        "fp32": ("ours:Ours", {"numerics": "fp32"}),
        "bf16": ("ours:Ours", {"numerics": "bf16"}),
    }
    if facts.has_scvi():
        kinds["scvi"] = ("scvi_side:Scvi", {"train": plan.scvi_cells})
        kinds["scvi_switched"] = ("scvi_side:Scvi", {"train": plan.scvi_cells, "switched": True})
        kinds["scvi_idle_counted"] = ("scvi_side:Scvi", {"train": plan.scvi_cells, "idle": True})
    path = data.path()
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(kind, path=path, threads=plan.threads, **arguments))
                   for name, (kind, arguments) in kinds.items()}  # fmt: skip

        def job(name: str, worker: Worker) -> Callable[[], float]:
            if name.startswith("scvi"):
                return lambda: float(worker.call("epoch"))
            return lambda: float(worker.call("steps", n=plan.steps))

        seconds = interleave("training", {name: job(name, worker) for name, worker in workers.items()}, plan.turns)
        known = {name: worker.call("facts") for name, worker in workers.items()}
        profiles = {name: workers[name].call("profile", n=10) for name in ("naive", "fp32", "bf16")}
    ratios: dict[str, Any] = {}
    for other in (name for name in kinds if name not in ("fp32", "bf16")):
        for own in ("fp32", "bf16"):
            ratios[f"epoch_{own}_vs_{other}"] = ratio(seconds[other], seconds[own])
    ratios["peak_mb"] = known["fp32"]["peak_mb"]
    epochs = {name: summary([value * STEPS_OF_EPOCH for value in values]) for name, values in seconds.items()}
    return {"ratios": ratios, "epoch_seconds": epochs, "variants": known, "profile": profiles}


def fisher(plan: Plan, data: Cells) -> Part:
    """The diagonal of all cells, against a backward pass a cell and Opacus's per-cell gradients on a few."""
    own = {"path": data.path(), "threads": plan.threads}
    with (
        Worker("ours:Ours", without=FORGET, **own) as ours,
        Worker("naive:Naive", **own) as loop,
        Worker("naive:OpacusSamples", dropout=0.0, **own) as opacus,
    ):
        ours.call("steps", n=20)
        jobs: dict[str, Callable[[], float]] = {
            "ours": lambda: float(ours.call("fisher", n=plan.fisher_cells)),
            "loop": lambda: float(loop.call("fisher", n=50 if plan.quick else 300)),
            "opacus": lambda: float(opacus.call("fisher", n=32 if plan.quick else 128)),
        }
        seconds = interleave("Fisher information, a cell", jobs, plan.fisher_turns)
        error = ours.call("fisher_error", n=64)
        known = {"ours": ours.call("facts"), "loop": loop.call("facts"), "opacus": opacus.call("facts")}
    ratios = {
        "fisher_vs_loop": ratio(seconds["loop"], seconds["ours"]),
        "fisher_vs_opacus": ratio(seconds["opacus"], seconds["ours"]),
        "fisher_relative_error": error["together"],
        "fisher_relative_error_worst_tensor": error["worst"],
    }
    whole = {name: summary([value * (TRAIN - FORGET) for value in values]) for name, values in seconds.items()}
    return {"ratios": ratios, "fisher_seconds": whole, "fisher_variants": known}


def private(plan: Plan, data: Cells) -> Part:
    """DP-SGD at batches of 256, σ 0.5 and clip 1, against Opacus's ghost clipping and against no privacy."""
    own = {"path": data.path(), "threads": plan.threads}
    few = max(2, plan.steps // 2)
    with (
        Worker("ours:Ours", **own) as ours,
        Worker("naive:OpacusGhost", **own) as ghost,
        Worker("naive:OpacusGhost", switched=True, **own) as switched,
    ):
        jobs: dict[str, Callable[[], float]] = {
            "private": lambda: float(ours.call("private_steps", n=few)),
            "nonprivate": lambda: float(ours.call("steps", n=few, batch=256)),
            "ghost": lambda: float(ghost.call("steps", n=few, batch=256)),
            "ghost_switched": lambda: float(switched.call("steps", n=few, batch=256)),
        }
        seconds = interleave("private steps", jobs, plan.turns)
    ratios = {
        "dp_step_vs_opacus_ghost": ratio(seconds["ghost"], seconds["private"]),
        "dp_step_vs_opacus_ghost_switched": ratio(seconds["ghost_switched"], seconds["private"]),
        "dp_step_vs_nonprivate": ratio(seconds["private"], seconds["nonprivate"]),
    }
    return {"ratios": ratios, "dp_step_seconds": {name: summary(values) for name, values in seconds.items()}}


def ensemble(plan: Plan, data: Cells) -> Part:
    """Eight models in processes of one thread, against one after another on all threads."""
    own = {"path": data.path(), "threads": plan.threads}
    with (
        Worker("ours:Ensemble", together=True, **own) as together,
        Worker("ours:Ensemble", together=False, **own) as one_by_one,
    ):
        given = {"models": 8, "steps": plan.ensemble_steps}
        jobs: dict[str, Callable[[], float]] = {
            "together": lambda: float(together.call("train", **given)),
            "one_by_one": lambda: float(one_by_one.call("train", **given)),
        }
        seconds = interleave("8 models", jobs, plan.ensemble_turns)
    found = ratio(seconds["one_by_one"], seconds["together"])
    return {
        "ratios": {"ensemble8_vs_sequential": found},
        "ensemble_seconds": {k: summary(v) for k, v in seconds.items()},
    }


def growth(plan: Plan, data: Cells) -> Part:
    """Seconds of an epoch and peak memory by cells and by genes, each in a process of its own."""
    rows = []
    for cells, genes in plan.growth:
        arguments = {"path": data.path(cells, genes), "threads": plan.threads}
        row = once("ours:Growth", "epoch", arguments, most_steps=plan.growth_steps)
        print(f"growth: {cells:,} cells x {genes:,} genes: epoch {row['epoch_seconds']:.1f} s, "
              f"peak {row['peak_mb']:.0f} MB", flush=True)  # fmt: skip
        rows.append(row)
    return {"ratios": {}, "growth": rows}


def retrain(plan: Plan, data: Cells) -> Part:
    """Seconds of a whole short cycle, and how near it comes to the best of one three times as long."""
    with Worker("ours:Ours", path=data.path(), threads=plan.threads, without=FORGET, train=plan.retrain_cells) as ours:
        short = ours.call("retrain", epochs=plan.retrain_epochs)
        long = ours.call("retrain", epochs=3 * plan.retrain_epochs)
    best = max(elbo for _, elbo, _ in long)
    seconds, reached, _ = short[-1]
    gap = (best - reached) / abs(best)
    enough = next((moment for moment, elbo, _ in long if elbo >= best - 1e-3 * abs(best)), None)
    return {"ratios": {"retrain_seconds": seconds, "retrain_gap": gap}, "retrain_curve": short, "retrain_long": long,
            "retrain_long_seconds_to_0.1_percent": enough}  # fmt: skip


def matched(plan: Plan, data: Cells) -> Part:
    """Seconds to the best held-out ELBO that scvi-tools reaches: its own over ours."""
    own = {"path": data.path(), "threads": plan.threads, "train": plan.scvi_cells}
    with Worker("scvi_side:Scvi", **own) as scvi:
        theirs, known = scvi.call("curve", epochs=plan.scvi_epochs), scvi.call("facts")
    taken, target = max(theirs, key=lambda point: point[1])
    with Worker("ours:Ours", **own) as ours:
        curve = ours.call("retrain", epochs=plan.scvi_epochs // 2)
    seconds = next((moment for moment, _, elbo in curve if elbo >= target), None)
    return {"ratios": {"time_to_scvi_elbo": taken / seconds if seconds else None}, "scvi_curve": theirs,
            "our_curve": curve, "scvi_best_elbo": target, "scvi_long_variant": known}  # fmt: skip


SHORT: dict[str, Callable[[Plan, Cells], Part]] = {
    "training": training, "fisher": fisher, "private": private, "ensemble": ensemble, "growth": growth,
}  # fmt: skip
LONG: dict[str, Callable[[Plan, Cells], Part]] = {"retrain": retrain, "matched": matched}

"""Training classifiers on this machine: K nets side by side against one by one, and the ways of computing ResNet-18.

    python -m bench.classifiers [together | resnet] [--turns 5] [--items 512]

``together``: seconds an epoch of K nets on one thread, one by one and side by side (shadows.fit_together), in turns in
one run. ``resnet``: images a second of ResNet-18 on 3 x 32 x 32, both stems, whole steps with random views, on one and
on two threads. The items are random: nothing is learned, and no time depends on that. Prints the best turn of each and
the median in brackets; a machine that others use shows it by the distance of the two.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from scforget import engine, seeding
from scforget.arrays import IntArray
from scforget.class_tasks import AugmentationSettings, ClassBatch, ClassifierTask
from scforget.class_training import (
    ClassTrainingSettings,
    SGDSettings,
    class_epoch,
    fit_classifier,
    new_optimiser,
)
from scforget.models.classifiers import MLPSettings, NetSettings, ResNet18Settings, SmallCNNSettings
from scforget.shadows import fit_together
from scforget.training import Effort

SGD = SGDSettings(kind="sgd", learning_rate=0.05, momentum=0.9, weight_decay=5e-4)
VIEWS = AugmentationSettings(crop=1, flip=False, noise=0.0)
CIFAR_VIEWS = AugmentationSettings(crop=4, flip=True, noise=0.0)
CLASSES = tuple("0123456789")
CNN = SmallCNNSettings(kind="small_cnn", widths=[16, 32], hidden=64)
SHAPES: dict[str, tuple[NetSettings, tuple[int, ...], int]] = {  # net, shape of an item, batch
    "mlp 64-32 on 64 inputs": (MLPSettings(kind="mlp", hidden=[64, 32], dropout=0.0), (64,), 64),
    "small_cnn 16-32 on 1x8x8": (CNN, (1, 8, 8), 64),
    "small_cnn 16-32 on 1x28x28": (CNN, (1, 28, 28), 64),
    "resnet18 cifar on 3x16x16": (ResNet18Settings(kind="resnet18", stem="cifar"), (3, 16, 16), 16),
}
TOGETHER = (4, 8)


class Contiguous(ClassifierTask):
    """The same pixels in the order channels, rows, columns."""

    def batch(self, cells: IntArray, noise: torch.Generator | None = None) -> ClassBatch:
        batch = super().batch(cells, noise)
        return ClassBatch(batch.inputs.contiguous(), batch.labels)


def made_up(
    items: int, shape: tuple[int, ...], net: NetSettings, kind: type[ClassifierTask] = ClassifierTask,
    views: AugmentationSettings = VIEWS,
) -> ClassifierTask:  # fmt: skip
    rng = np.random.default_rng(0)
    inputs: Any = rng.integers(0, 256, (items, *shape), dtype=np.uint8)
    if len(shape) == 1:
        inputs = rng.normal(size=(items, *shape)).astype(np.float32)
    return kind(inputs, rng.integers(0, len(CLASSES), items), CLASSES, net, views)


def in_turns(jobs: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Seconds of each job in each turn, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(turns + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def together(turns: int, items: int) -> None:
    """K nets, one epoch."""
    engine.use(engine.Numerics("mkl", "none", "cpu", 1))
    print(
        "| net, batch | K | s an epoch, one by one | side by side | one by one / side by side |\n|---|---|---|---|---|"
    )
    for name, (net, shape, size) in SHAPES.items():
        number = items if name.startswith(("mlp", "small")) else 4 * size
        task, settings = made_up(number, shape, net), ClassTrainingSettings(
            optimiser=SGD, schedule="cosine", batch_size=size, epochs=1)  # fmt: skip
        cells = np.arange(number)
        for K in TOGETHER:

            def alone(K: int = K, task: ClassifierTask = task, settings: Any = settings, cells: Any = cells) -> None:
                for k in range(K):
                    fit_classifier(task.new_model(k), task, cells, settings, seed=k)

            def beside(K: int = K, task: ClassifierTask = task, settings: Any = settings, cells: Any = cells) -> None:
                fit_together([task.new_model(k) for k in range(K)], task, [cells] * K, settings, seeds=range(K))

            found = in_turns({"alone": alone, "beside": beside}, turns)
            one, all_ = (f"{min(found[job]):.3f} ({np.median(found[job]):.3f})" for job in ("alone", "beside"))
            ratios = min(found["alone"]) / min(found["beside"])
            print(f"| {name}, {size} | {K} | {one} | {all_} | {ratios:.2f} |", flush=True)


def resnet(turns: int) -> None:
    """Images a second."""
    ways: dict[str, tuple[type[ClassifierTask], Literal["none", "bf16"]]] = {
        "float32 contiguous": (Contiguous, "none"),
        "float32 channels_last": (ClassifierTask, "none"),
        "bf16 channels_last": (ClassifierTask, "bf16"),
    }
    print(f"| stem | batch | threads | {' | '.join(ways)} |\n|---|---|---|---|---|---|")
    stems: tuple[Literal["cifar", "imagenet"], ...] = ("imagenet", "cifar")
    for stem in stems:
        for size in (256, 128):
            for threads in (1, 2):
                net = ResNet18Settings(kind="resnet18", stem=stem)
                jobs: dict[str, Callable[[], object]] = {}
                for way, (kind, autocast) in ways.items():
                    task = made_up(size, (3, 32, 32), net, kind, CIFAR_VIEWS)
                    layout = torch.contiguous_format if kind is Contiguous else torch.channels_last
                    model = task.new_model(0).to(memory_format=layout)  # type: ignore[call-overload]
                    optimiser = new_optimiser(model.parameters(), SGD)
                    numerics = engine.Numerics("mkl", autocast, "cpu", threads)

                    def job(
                        task: ClassifierTask = task, model: Any = model, optimiser: Any = optimiser,
                        numerics: engine.Numerics = numerics, size: int = size,
                    ) -> None:  # fmt: skip
                        engine.use(numerics)
                        noise = seeding.torch_generator(0)
                        class_epoch(model, task, np.arange(size), size, optimiser, noise, Effort())

                    jobs[way] = job
                found = in_turns(jobs, turns)
                cells = (f"{size / min(found[way]):.0f} ({size / np.median(found[way]):.0f})" for way in ways)
                print(f"| {stem} | {size} | {threads} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measure what is asked for; both by default."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("what", nargs="?", choices=["together", "resnet", "all"], default="all")
    asked.add_argument("--turns", type=int, default=5)
    asked.add_argument("--items", type=int, default=512)
    given = asked.parse_args()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    if given.what != "resnet":
        together(given.turns, given.items)
    if given.what != "together":
        resnet(given.turns)


if __name__ == "__main__":
    main()

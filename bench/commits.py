"""Epochs of an earlier commit's code against this one's, in turns in one run.

    python bench/commits.py 7f6273f

Three shapes (the bundled data's net; the published net on one thread and on two), simulated counts,
`training.train_epoch`. The earlier code runs as it was; this one with MKL's matrix products, with oneDNN's, and in
bfloat16, each in a process of its own. Prints median milliseconds of an epoch and the median over turns of the ratio to
the earlier code.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

#: cells, genes, batch, hidden widths, threads, epochs a turn.
SHAPES: dict[str, tuple[int, int, int, list[int], int, int]] = {
    "bundled net, one thread": (315, 500, 32, [256, 64], 1, 5),
    "published net, one thread": (1280, 2000, 128, [1024, 512, 128], 1, 1),
    "published net, two threads": (1280, 2000, 128, [1024, 512, 128], 2, 1),
}
VARIANTS = {"mkl": ("mkl", "none"), "onednn": ("onednn", "none"), "bf16": ("onednn", "bf16")}
TURNS = 9


def serve(variant: str, shape: str) -> None:
    """Train for as many epochs as a turn has for each line that comes in; answer with the seconds of one."""
    import numpy as np
    import torch
    from scipy import sparse

    from scforget import training
    from scforget.models.vae import VAESettings
    from scforget.tasks import VaeTask

    cells, genes, batch, hidden, threads, epochs = SHAPES[shape]
    rng = np.random.default_rng(0)
    rates = rng.gamma(0.15 if genes > 1000 else 0.3, 1.4, (1, genes)) * rng.gamma(1, 1, (cells, genes))
    counts = sparse.csr_matrix(rng.poisson(rates).astype(np.float32))
    settings = VAESettings(hidden=hidden, latent=16, likelihood="nb", dispersion="gene-cell", dropout=0.1)
    task = VaeTask(counts, np.asarray(counts.sum(axis=1), dtype=float).ravel(), settings)
    if variant in VARIANTS:
        from scforget import engine

        products, autocast = VARIANTS[variant]
        engine.use(engine.Numerics(products, autocast, "cpu", threads))  # type: ignore[arg-type]
    torch.set_num_threads(threads)
    recipe = training.TrainingSettings(
        learning_rate=1e-3, schedule="constant", batch_size=batch, max_epochs=1, patience=1, kl_warmup_epochs=0,
        free_bits=0.0,
    )  # fmt: skip
    model, effort, noise = task.new_model(0), training.Effort(), torch.Generator().manual_seed(0)
    optimiser = training.adam(model, 1e-3)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(epochs):
            training.train_epoch(model, task, np.arange(cells), recipe, optimiser, noise, effort)
        print((time.perf_counter() - start) / epochs, flush=True)


def compare(shape: str, sources: dict[str, Path]) -> None:
    """Give every variant its turns and print what came out."""
    here = Path(__file__).resolve()
    workers = {
        name: subprocess.Popen(
            [sys.executable, str(here), "--serve", name, shape], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(source)},
        )
        for name, source in sources.items()
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(TURNS + 1):
        for name, worker in workers.items():
            assert worker.stdin is not None
            assert worker.stdout is not None
            print("go", file=worker.stdin, flush=True)
            taken = float(worker.stdout.readline())
            if turn:
                seconds[name].append(taken)
    for worker in workers.values():
        worker.communicate()
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["before"], values, strict=True))
        print(f"{shape:28s} {name:8s} {1e3 * statistics.median(values):8.1f} ms   x {ratio:.2f}", flush=True)


def main() -> None:
    """Unpack the earlier commit and compare."""
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
        return
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("commit", help="the earlier one")
    given, root = asked.parse_args(), Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", given.commit, "src"], cwd=root, check=True, capture_output=True)
        subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
        sources = {"before": Path(folder) / "src", **dict.fromkeys(VARIANTS, root / "src")}
        for shape in SHAPES:
            compare(shape, sources)


if __name__ == "__main__":
    main()

"""Matrix products of one training step of the published net: MKL, oneDNN in float32, bfloat16, in turns.

    python bench/products.py [THREADS] [BATCH]

All layers, forward and both gradients. Prints medians of 40 turns and GFLOP/s: what no step can be shorter than.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Literal

import torch

from scforget import engine

LAYERS = [(2000, 1024), (1024, 512), (512, 128), (128, 64), (32, 128), (128, 512), (512, 1024), (1024, 4000)]
TURNS = 40


def main() -> None:
    """Time the three."""
    given = [int(value) for value in sys.argv[1:]]
    threads, batch = (given + [2, 128][len(given) :])[:2]
    step = [(torch.randn(batch, a), torch.randn(b, a), torch.randn(batch, b)) for a, b in LAYERS]
    halved = [tuple(one.bfloat16() for one in layer) for layer in step]
    flops = sum((6 if number else 4) * batch * a * b for number, (a, b) in enumerate(LAYERS))
    kinds: dict[str, Literal["mkl", "onednn"]] = {"MKL": "mkl", "oneDNN": "onednn", "bfloat16": "mkl"}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(TURNS + 1):
        for name, library in kinds.items():
            engine.use(engine.Numerics(library, "none", "cpu", threads))
            start = time.perf_counter()
            for number, (inputs, weight, gradient) in enumerate(halved if name == "bfloat16" else step):
                inputs @ weight.T
                gradient.T @ inputs
                if number:  # nothing is asked of the counts
                    gradient @ weight
            if turn:
                seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            f"{name:9s} {threads} threads, batch {batch}: {1e3 * median:6.1f} ms, {flops / median / 1e9:4.0f} GFLOP/s"
        )


if __name__ == "__main__":
    main()

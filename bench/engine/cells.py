"""The cells that everything is timed on: simulated negative-binomial counts in 14 clusters, of the published shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

SEED = 0
#: Cells x genes as published, how many of the cells are trained on, and how many a retrain goes without.
CELLS, GENES, TRAIN, FORGET = 33_088, 2_000, 28_124, 30
HIDDEN, LATENT, DROPOUT = [1024, 512, 128], 32, 0.1
BATCH, LEARNING_RATE = 128, 1e-3
#: Of the runs to convergence: one cycle up to three times that rate, and a KL weight that grows for so many epochs.
CYCLE_RATE, KL_WARM_UP = 3e-3, 8


def load(path: str) -> sparse.csr_matrix:
    """Read counts, CSR ``[N, G]`` int32."""
    return sparse.load_npz(path)


class Maker:
    """Simulates counts in a process of its own, so that no other one's peak memory holds them."""

    def make(self, path: str, cells: int, genes: int) -> dict[str, Any]:
        """Write so many cells with the clusters' published shares; keep a file that is there."""
        if not Path(path).exists():
            self._simulate(path, cells, genes)
        counts = load(path)
        return {"cells": cells, "genes": genes, "nonzeros": counts.nnz, "zeros": 1 - counts.nnz / (cells * genes)}

    @staticmethod
    def _simulate(path: str, cells: int, genes: int) -> None:
        from scforget.data.synthetic import PRESETS, simulate

        published = PRESETS["paper_shape"]
        shares = np.array(published.cluster_sizes) / published.n_cells
        sizes = np.maximum(np.round(shares * cells).astype(int), 1)
        sizes[0] += cells - sizes.sum()
        settings = published.model_copy(update={"cluster_sizes": sizes.tolist(), "n_genes": genes})
        counts = simulate(settings, seed=SEED).X.tocsr()
        unfinished = Path(path).with_suffix(".unfinished.npz")
        sparse.save_npz(unfinished, counts, compressed=False)
        unfinished.rename(path)

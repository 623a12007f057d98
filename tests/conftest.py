"""What the tests of the science rooms share: a small task on simulated counts, its cell sets, and a short recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse

from scforget import tracking
from scforget.data.splits import ForgetSets
from scforget.data.synthetic import PRESETS, simulate
from scforget.models.vae import VAESettings
from scforget.tasks import VaeTask
from servers import Postgres, postgres_programs, postgres_server

ARCHITECTURE: dict[str, Any] = {
    "hidden": [16, 8], "latent": 4, "likelihood": "nb", "dispersion": "gene-cell", "dropout": 0.1,
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "learning_rate": 1e-2, "schedule": "constant", "batch_size": 32, "max_epochs": 4, "patience": 10,
    "kl_warmup_epochs": 3, "free_bits": 0.0,
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Models are so small here that waking a second thread costs more than it saves: four times the whole run."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _stores_not_given_up() -> None:
    """A process asks a dead server once and says so once; here many tests share a process."""
    tracking._given_up.clear()
    tracking._said.clear()


@pytest.fixture(scope="session")
def tiny_counts() -> sparse.csr_matrix:
    """240 cells of 60 genes."""
    return sparse.csr_matrix(simulate(PRESETS["tiny"], seed=0).X, dtype=np.float64)


@pytest.fixture(scope="session")
def make_task(tiny_counts: sparse.csr_matrix) -> Callable[..., VaeTask]:
    """Task of a small VAE; keywords change its architecture, or its counts."""

    def make(counts: sparse.csr_matrix = tiny_counts, **changes: Any) -> VaeTask:
        # half as many counts again lie outside the modelled genes, so that the two libraries differ
        total = 1.5 * np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
        return VaeTask(counts, total, VAESettings(**{**ARCHITECTURE, **changes}))

    return make


@pytest.fixture(scope="session")
def task(make_task: Callable[..., VaeTask]) -> VaeTask:
    return make_task()


@pytest.fixture(scope="session")
def forget_sets() -> ForgetSets:
    """Cells in unsorted roles: 20 to forget, 100 to retain, 40 that decide when to stop."""
    order = np.random.default_rng(0).permutation(240).astype(np.int64)
    parts = np.split(order, [20, 120, 160, 180])
    return ForgetSets(*(np.sort(part) for part in parts[:4]))


@pytest.fixture(scope="session")
def recipe() -> Callable[..., dict[str, Any]]:
    """Values of ``TrainingSettings`` for a run of a fraction of a second; keywords change them."""

    def make(**changes: Any) -> dict[str, Any]:
        return {**RECIPE, **changes}

    return make


@pytest.fixture(scope="session")
def postgres_cluster() -> Iterator[Postgres]:
    """PostgreSQL for this test run; without it its tests are skipped, but not where they must run."""
    programs = postgres_programs()
    if programs is None:
        why = "Debian's `postgresql` is not installed (no initdb under /usr/lib/postgresql)"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    with postgres_server(programs) as server:
        yield server


@pytest.fixture
def postgres(postgres_cluster: Postgres) -> str:
    """Address of a new, empty database of PostgreSQL's; mark tests that use it ``postgres``."""
    return postgres_cluster.address(postgres_cluster.database())

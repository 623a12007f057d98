"""The same work on a Dask cluster: two worker processes, one of which is killed, against the serial run."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster

import jobs
from jobs import Logged, trained_twice
from scforget import engine, parallel
from scforget.data.splits import ForgetSets
from scforget.errors import ConfigError, NonFiniteError, WorkerError
from scforget.tasks import VaeTask
from scforget.training import TrainingSettings


def nothing() -> None:
    """Nobody counts."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A scheduler with two workers of one thread, which their nannies start again."""
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster:
        yield cluster.scheduler_address


@pytest.fixture(autouse=True)
def _one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_current", replace(engine.current(), threads=1))


@pytest.fixture
def cluster(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "scheduler", lambda: address)


def test_each_keeps_the_order_and_counts_and_works_meanwhile(cluster: None) -> None:
    done: list[int] = []
    seen: list[int] = []
    found = parallel.each(jobs.square, range(6), lambda: done.append(os.getpid()), lambda: seen.append(os.getpid()))
    assert [value for value, _ in found] == [0, 1, 4, 9, 16, 25]
    assert os.getpid() not in {process for _, process in found}
    assert done == 6 * [os.getpid()]
    assert seen == [os.getpid()]
    assert parallel.each(jobs.slow_first, range(4), nothing) == [0, 1, 2, 3]


def test_each_gives_workers_the_arithmetic_of_this_process(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parallel.each(jobs.threads, range(2), nothing) == 2 * [{1}]
    monkeypatch.setattr(engine, "_current", replace(engine.current(), threads=2))
    assert parallel.each(jobs.threads, range(2), nothing) == 2 * [{2}]


def test_each_raises_a_workers_error_with_its_values(cluster: None) -> None:
    with pytest.raises(NonFiniteError) as caught:
        parallel.each(jobs.refuse, [0, 0], nothing)
    assert (caught.value.step, caught.value.name) == (7, "the loss")
    with pytest.raises(RuntimeError, match="OddError: 0 and 2"):
        parallel.each(jobs.fail_oddly, [0, 0], nothing)


def test_trainings_are_the_serial_ones_bit_for_bit_with_one_worker_killed_half_way(
    cluster: None, tmp_path: Path, task: VaeTask, forget_sets: ForgetSets, recipe: Callable[..., dict[str, Any]]
) -> None:
    wanted, made = trained_twice(tmp_path, task, forget_sets, TrainingSettings(**recipe()))
    assert made[2]["resumed"]
    assert all(model["pid"] != os.getpid() for model in made)
    assert [(model["history"], model["weights"]) for model in made] == wanted


def test_each_gives_up_a_job_that_kills_every_worker(cluster: None, tmp_path: Path) -> None:
    job = Logged(tmp_path, {1: 99})
    with pytest.raises(WorkerError, match="give each of the cluster's workers more memory and run again"):
        parallel.each(job, range(3), nothing)
    assert len(job.attempts(1)) >= 3


def test_jobs_of_one_worker_never_overlap_whatever_its_threads() -> None:
    inside: list[int] = []

    def job(item: int) -> int:
        inside.append(item)
        threading.Event().wait(0.05)
        found = len(inside)
        inside.remove(item)
        return found

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda item: parallel._remote(job, engine.current(), item), range(8)))
    assert [pickle.loads(outcome) for outcome in outcomes] == 8 * [(True, 1)]


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense://somewhere:1"])
def test_each_says_that_no_scheduler_answers(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(engine, "scheduler", lambda: address)
    monkeypatch.setattr(parallel, "_PATIENCE", 0.5)
    with pytest.raises(ConfigError, match=rf"params\.yaml: compute\.scheduler: no Dask scheduler answers at {address}"):
        parallel.each(abs, [1], nothing)


def test_each_says_that_the_cluster_has_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalCluster(n_workers=0, dashboard_address=":0") as empty:
        monkeypatch.setattr(engine, "scheduler", lambda: empty.scheduler_address)
        monkeypatch.setattr(parallel, "_WORKERS_PATIENCE", 0.5)
        with pytest.raises(ConfigError, match=r"has no worker; start some \(dask worker .* --nthreads 1\)"):
            parallel.each(abs, [1], nothing)


def test_each_refuses_workers_that_are_not_like_this_process(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "version", lambda _: "0.0.0")
    with pytest.raises(ConfigError, match=r"compute\.scheduler: worker .* wanted .*0\.0\.0"):
        parallel.each(abs, [1], nothing)


def test_each_names_the_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "scheduler", lambda: "tcp://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r'compute\.scheduler: .*pip install "scforget\[cluster\]"'):
        parallel.each(abs, [1], nothing)


def test_each_of_nothing_asks_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "scheduler", lambda: "tcp://127.0.0.1:1")
    assert parallel.each(abs, [], nothing) == []

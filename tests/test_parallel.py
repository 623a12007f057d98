"""Independent work in processes: order, errors, killed workers, and the same results with any number of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import jobs
from jobs import Logged, trained_twice
from scforget import engine, parallel
from scforget.data.splits import ForgetSets
from scforget.errors import ArtifactError, ConfigError, DataError, NonFiniteError, ScforgetError, WorkerError
from scforget.tasks import VaeTask
from scforget.training import TrainingSettings


def nothing() -> None:
    """Nobody counts."""


def with_threads(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(engine, "_current", replace(engine.current(), threads=threads))


@pytest.fixture(autouse=True)
def _one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    with_threads(monkeypatch, 1)


@pytest.fixture(params=[1, 2])
def processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("SCFORGET_WORKERS", str(request.param))
    return int(request.param)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCFORGET_WORKERS", "2")


@pytest.fixture(params=["forked", "spawned"])
def either(request: pytest.FixtureRequest, two: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two processes of either kind."""
    monkeypatch.setattr(parallel, "_forks", lambda _: request.param == "forked")
    return str(request.param)


def test_each_keeps_the_order_of_the_items_with_any_number_of_processes(processes: int) -> None:
    calls: list[int] = []
    results = parallel.each(jobs.square, iter(range(20)), lambda: calls.append(os.getpid()))
    assert [value for value, _ in results] == [n * n for n in range(20)]
    assert calls == 20 * [os.getpid()]
    used = {process for _, process in results}
    assert (os.getpid() in used) == (processes == 1)
    assert len(used) <= processes


def test_each_of_nothing_is_nothing(processes: int) -> None:
    assert parallel.each(jobs.square, [], nothing) == []


def test_each_keeps_the_order_when_the_first_is_finished_last(two: None) -> None:
    assert parallel.each(jobs.slow_first, range(5), nothing) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("item", "kind", "values"),
    [
        (0, NonFiniteError, {"step": 7, "name": "the loss"}),
        (1, ArtifactError, {"why": "damaged"}),
        (2, DataError, {"what": "cells", "found": 2, "wanted": "others"}),
    ],
)
def test_each_raises_a_workers_error_with_its_values_and_exit_code(
    processes: int, item: int, kind: type[ScforgetError], values: dict[str, object]
) -> None:
    done: list[None] = []
    with pytest.raises(kind) as caught:
        parallel.each(jobs.refuse, [item, item], lambda: done.append(None))
    assert type(caught.value) is kind
    assert caught.value.exit_code == kind.exit_code
    assert values.items() <= vars(caught.value).items()
    assert not done


def test_each_ends_with_the_first_error_of_any_kind(processes: int) -> None:
    done: list[None] = []
    with pytest.raises(ValueError, match="3"):
        parallel.each(jobs.fail_at_once, range(5), lambda: done.append(None))
    assert len(done) < 5


def test_each_shows_where_in_the_worker_an_error_was_raised(two: None) -> None:
    with pytest.raises(ValueError, match="3") as caught:
        parallel.each(jobs.fail_at_once, range(5), nothing)
    [note] = caught.value.__notes__
    assert "in fail_at_once" in note


def test_each_tells_in_words_of_an_error_that_does_not_cross(two: None) -> None:
    with pytest.raises(RuntimeError, match="OddError: 0 and 2"):
        parallel.each(jobs.fail_oddly, [0, 0], nothing)


def test_each_ends_with_an_error_for_a_result_that_does_not_cross(two: None) -> None:
    with pytest.raises(AttributeError, match="lambda"):
        parallel.each(jobs.return_what_does_not_pickle, range(2), nothing)


def test_each_gives_every_process_one_thread_of_torch_and_of_blas(processes: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert parallel.each(jobs.threads, range(4), nothing) == 4 * [{1}]
    finally:
        torch.set_num_threads(before)


def test_each_gives_new_processes_its_arithmetic_and_its_arrays_as_files(
    two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_threads(monkeypatch, 2)
    found = parallel.each(jobs.Sum(np.ones(1000)), range(2), nothing)
    assert found == [(1000.0, True, {2}), (1001.0, True, {2})]


def test_forks_only_where_a_fork_can_compute() -> None:
    numerics = engine.current()
    assert parallel._forks(numerics) == (sys.platform == "linux")
    assert not parallel._forks(replace(numerics, threads=2))
    assert not parallel._forks(replace(numerics, device="cuda"))


def test_workers_are_at_most_the_jobs_and_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCFORGET_WORKERS", "3")
    assert [parallel.workers(jobs) for jobs in (0, 1, 2, 3, 9)] == [1, 1, 2, 3, 3]
    for asked in ("0", "two", "-1", ""):
        monkeypatch.setenv("SCFORGET_WORKERS", asked)
        with pytest.raises(ConfigError, match="SCFORGET_WORKERS"):
            parallel.workers(9)
    monkeypatch.delenv("SCFORGET_WORKERS")
    assert parallel.workers(10**6) >= 1


@pytest.mark.parametrize(("threads", "wanted"), [(1, 8), (2, 4), (3, 2), (8, 1), (9, 1)])
def test_workers_share_the_cores_by_their_threads(monkeypatch: pytest.MonkeyPatch, threads: int, wanted: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("SCFORGET_WORKERS", raising=False)
    with_threads(monkeypatch, threads)
    assert parallel.workers(100) == wanted
    monkeypatch.setenv("SCFORGET_WORKERS", "5")
    assert parallel.workers(100) == 5


def test_each_does_a_killed_workers_job_again_and_no_other(
    two: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job, done = Logged(tmp_path, {2: 1}), []
    assert parallel.each(job, range(6), lambda: done.append(None)) == [0, -1, -2, -3, -4, -5]
    assert [len(job.attempts(item)) for item in range(6)] == [1, 1, 2, 1, 1, 1]
    assert len(done) == 6
    assert capfd.readouterr().err.splitlines() == [
        "a worker process was killed, mostly for lack of memory; a new one does its job again"
    ]


def test_each_finishes_the_others_before_it_gives_a_deadly_job_up(two: None, tmp_path: Path) -> None:
    job = Logged(tmp_path, {0: 9})
    with pytest.raises(WorkerError):
        parallel.each(job, range(5), nothing)
    assert [len(job.attempts(item)) for item in range(1, 5)] == [1, 1, 1, 1]
    assert len(job.attempts(0)) >= 3


def test_each_says_in_one_line_that_workers_are_killed_again_and_again(two: None) -> None:
    with pytest.raises(WorkerError, match="set SCFORGET_WORKERS=1 and run again"):
        parallel.each(jobs.die, range(4), nothing)


def test_deaths_are_forgiven_when_a_job_is_finished_in_between() -> None:
    deaths = parallel._Deaths("close the browser")
    for _ in range(3):
        deaths.add()
        deaths.add()
        deaths.forget()
    deaths.add()
    deaths.add()
    with pytest.raises(WorkerError, match="close the browser and run again"):
        deaths.add()


@pytest.mark.parametrize("cores", ["1", "2"])
def test_each_does_something_else_meanwhile_in_this_process(monkeypatch: pytest.MonkeyPatch, cores: str) -> None:
    monkeypatch.setenv("SCFORGET_WORKERS", cores)
    seen: list[int] = []
    found = parallel.each(abs, [-1, -2, -3], nothing, lambda: seen.append(os.getpid()))
    assert found == [1, 2, 3]
    assert seen == ([os.getpid()] if cores == "2" else [])  # alone, nobody works meanwhile


def test_each_hands_out_jobs_meanwhile(two: None, tmp_path: Path) -> None:
    def wait_for_all() -> None:
        _until(lambda: len(list(tmp_path.iterdir())) == 6)

    assert parallel.each(Logged(tmp_path, {}), range(6), nothing, wait_for_all) == [0, -1, -2, -3, -4, -5]


def test_each_leaves_no_process_and_no_thread_behind(two: None) -> None:
    before = threading.active_count()
    found = parallel.each(jobs.square, range(4), nothing)
    with pytest.raises(ValueError, match="3"):
        parallel.each(jobs.fail_at_once, range(5), nothing)
    assert not any(_is_there(process) for _, process in found)
    _until(lambda: threading.active_count() == before)


def _until(true: Callable[[], bool]) -> None:
    """Wait for something that happens soon, if at all."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()  # an orphan that nobody has buried yet


_SLEEP = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
sys.path.insert(0, {tests!r})
from pathlib import Path
import jobs
from scforget import parallel
parallel._forks = lambda _: {forked}
parallel.each(jobs.Sleeper(Path({folder!r})), range(4), lambda: None)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("forked", [True, False])
def test_each_leaves_no_orphans_when_its_process_is_ended(tmp_path: Path, forked: bool, how: signal.Signals) -> None:
    code = _SLEEP.format(tests=str(Path(__file__).parent), folder=str(tmp_path), forked=forked)
    environment = {**os.environ, "SCFORGET_WORKERS": "2"}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE) as parent:
        _until(lambda: len([path for path in tmp_path.glob("*.pid") if path.read_text()]) == 2)
        started = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
        assert all(_is_there(process) for process in started)
        parent.send_signal(how)
        parent.communicate(timeout=60)
    assert parent.returncode == -how
    _until(lambda: not any(_is_there(process) for process in started))
    assert len(list(tmp_path.glob("*.pid"))) == 2  # no further job was begun


def test_trainings_are_the_serial_ones_bit_for_bit_with_one_worker_killed_half_way(
    either: str, tmp_path: Path, task: VaeTask, forget_sets: ForgetSets, recipe: Callable[..., dict[str, Any]]
) -> None:
    wanted, made = trained_twice(tmp_path, task, forget_sets, TrainingSettings(**recipe()))
    assert made[2]["resumed"]
    assert all(model["pid"] != os.getpid() for model in made)
    assert [(model["history"], model["weights"]) for model in made] == wanted

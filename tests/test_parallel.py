"""Independent work in processes: order, errors, and the same results with any number of them."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from scforget import parallel
from scforget.errors import ArtifactError, ConfigError, DataError, NonFiniteError, ScforgetError, WorkerError


def square(item: int) -> tuple[int, int]:
    return item * item, os.getpid()


def threads(_item: int) -> int:
    return torch.get_num_threads()


def refuse(item: int) -> int:
    if item == 0:
        raise NonFiniteError(7, "the loss")
    if item == 1:
        raise ArtifactError("work/model", "damaged")
    raise DataError("cells", item, "others")


def fail_at_once(item: int) -> int:
    if item == 3:
        raise ValueError(item)
    return item


@pytest.fixture(params=[1, 2])
def processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("SCFORGET_WORKERS", str(request.param))
    return int(request.param)


def test_each_keeps_the_order_of_the_items_with_any_number_of_processes(processes: int) -> None:
    calls: list[int] = []
    results = parallel.each(square, iter(range(20)), lambda: calls.append(os.getpid()))
    assert [value for value, _ in results] == [n * n for n in range(20)]
    assert calls == 20 * [os.getpid()]
    used = {process for _, process in results}
    assert (os.getpid() in used) == (processes == 1)
    assert len(used) <= processes


def test_each_of_nothing_is_nothing(processes: int) -> None:
    assert parallel.each(square, [], lambda: None) == []


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
        parallel.each(refuse, [item, item], lambda: done.append(None))
    assert type(caught.value) is kind
    assert caught.value.exit_code == kind.exit_code
    assert values.items() <= vars(caught.value).items()
    assert not done


def test_each_ends_with_the_first_error_of_any_kind(processes: int) -> None:
    done: list[None] = []
    with pytest.raises(ValueError, match="3"):
        parallel.each(fail_at_once, range(5), lambda: done.append(None))
    assert len(done) < 5


def test_each_gives_every_worker_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCFORGET_WORKERS", "2")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert parallel.each(threads, range(4), lambda: None) == [1, 1, 1, 1]
    finally:
        torch.set_num_threads(before)


def test_workers_are_at_most_the_jobs_and_at_least_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCFORGET_WORKERS", "3")
    assert [parallel.workers(jobs) for jobs in (0, 1, 2, 3, 9)] == [1, 1, 2, 3, 3]
    for asked in ("0", "two", "-1"):
        monkeypatch.setenv("SCFORGET_WORKERS", asked)
        with pytest.raises(ConfigError, match="SCFORGET_WORKERS"):
            parallel.workers(9)
    monkeypatch.delenv("SCFORGET_WORKERS")
    assert parallel.workers(10**6) >= 1


def die(_item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_each_says_in_one_line_that_a_worker_was_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCFORGET_WORKERS", "2")
    with pytest.raises(WorkerError, match="set SCFORGET_WORKERS=1 and run again"):
        parallel.each(die, range(4), lambda: None)


@pytest.mark.parametrize("cores", ["1", "2"])
def test_each_does_something_else_meanwhile_in_this_process(monkeypatch, cores):
    monkeypatch.setenv("SCFORGET_WORKERS", cores)
    seen = []
    found = parallel.each(abs, [-1, -2, -3], lambda: None, lambda: seen.append(os.getpid()))
    assert found == [1, 2, 3]
    assert seen == ([os.getpid()] if cores == "2" else [])  # alone, nobody works meanwhile

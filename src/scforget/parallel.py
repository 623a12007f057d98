"""Independent work on every core: processes of one thread each, which is faster here than threads within one model."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from scforget.errors import ConfigError, WorkerError

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_function: Callable[[Any], Any]


def workers(jobs: int) -> int:
    """How many processes to use: the cores this process may run on, or ``SCFORGET_WORKERS``, at most one a job."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("SCFORGET_WORKERS", str(cores))
    if not asked.isdecimal() or int(asked) < 1:
        raise ConfigError("environment", "SCFORGET_WORKERS", f"found {asked!r}; wanted a whole number from 1")
    return max(1, min(int(asked), jobs))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # killed with -9: an orphan would go on writing checkpoints beside the resumed run


def _start(function: Callable[[Any], Any]) -> None:
    global _function  # noqa: PLW0603  (a worker process serves one function)
    _function = function
    threading.Thread(target=_die_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _call(item: Any) -> Any:
    return _function(item)


def each(
    function: Callable[[ItemT], ResultT], items: Iterable[ItemT], done: Callable[[], None],
    meanwhile: Callable[[], None] | None = None,
) -> list[ResultT]:  # fmt: skip
    """Apply a function to every item, in processes if there are several cores.

    Parameters
    ----------
    function
        Picklable where processes are spawned (macOS); its result always is.
    items
        What to apply it to.
    done
        Called in this process whenever an item is finished.
    meanwhile
        Called once in this process while the others work: what will be needed afterwards (slow imports).

    Returns
    -------
    list
        Results in the order of the items. The first exception ends the rest and is raised here.
    """
    jobs = list(items)
    if (n := workers(len(jobs))) == 1:
        results = []
        for job in jobs:
            results.append(function(job))
            done()
        return results
    # Forking is safe while this process runs one thread of its own numerics, and saves each worker seconds of imports.
    method = "fork" if sys.platform == "linux" else "spawn"
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(n, mp_context=context, initializer=_start, initargs=(function,)) as pool:
        futures = [pool.submit(_call, job) for job in jobs]  # under fork the first one starts every worker
        try:
            if meanwhile is not None:
                meanwhile()
            for future in as_completed(futures):
                future.result()
                done()
        except BrokenProcessPool as error:
            raise WorkerError from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]

"""One long-lived process for each variant, and one conductor who gives them turns: while one works, the others wait.

Switches of torch and allocators are a process's own, so variants in one process would time each other's. The conductor
imports nothing large: Linux hands a parent's peak memory down to the processes that it starts.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import statistics
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Answer = tuple[bool, Any]


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # in the middle of an epoch if need be: nobody waits for it any more


def _serve(pipe: Connection, kind: str, arguments: dict[str, Any]) -> None:
    """Make an object and call its methods as asked, until the conductor is gone."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    module, name = kind.split(":")
    try:
        target = getattr(importlib.import_module(f"bench.engine.{module}"), name)(**arguments)
        pipe.send((True, None))
        while True:
            method, given = pipe.recv()
            pipe.send((True, getattr(target, method)(**given)))
    except (EOFError, KeyboardInterrupt):
        return
    except Exception:
        pipe.send((False, traceback.format_exc()))


class Worker:
    """An object in a process of its own.

    Parameters
    ----------
    kind
        ``module:Class`` in this folder.
    arguments
        What the class is made with.
    """

    def __init__(self, kind: str, **arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._kind = kind
        self._process = context.Process(target=_serve, args=(far, kind, arguments))
        self._process.start()
        far.close()
        self._answer()

    def _answer(self) -> Any:
        try:
            fine, value = self._pipe.recv()
        except EOFError:
            fine, value = False, "its process was killed, mostly for lack of memory"
        if not fine:
            raise RuntimeError(f"{self._kind}: {value}")
        return value

    def call(self, method: str, **arguments: Any) -> Any:
        """Call a method and wait for what it returns."""
        self._pipe.send((method, arguments))
        return self._answer()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()


def once(kind: str, method: str, arguments: dict[str, Any] | None = None, **given: Any) -> Any:
    """Call one method in a process that lives for it alone."""
    with Worker(kind, **(arguments or {})) as worker:
        return worker.call(method, **given)


def interleave(what: str, jobs: dict[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """Run A B C A B C …; return what each job answered in each turn, without a first turn of warming up."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(turns + 1):
        line = []
        for name, job in jobs.items():
            value = job()
            line.append(f"{name} {value:.3g}")
            if turn:
                found[name].append(value)
        print(f"{what}: {f'turn {turn} of {turns}' if turn else 'warm-up'} (s): {', '.join(line)}", flush=True)
    return found


def summary(values: list[float]) -> dict[str, float]:
    """Median, quartiles and number of some values."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high, "n": len(values)}


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Summary of turn-by-turn ratios: what drifts slowly is the same in both of a turn."""
    return summary([a / b for a, b in zip(above, below, strict=True)])

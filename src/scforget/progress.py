"""Progress of long work: a bar on a terminal, one line a model elsewhere (DVC's logs, CI)."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Progress:
    """Counts finished models, or other work, of a stage item.

    Parameters
    ----------
    name
        Of the stage item.
    total
        Number of models.
    what
        What is counted, if not models.
    """

    def __init__(self, name: str, total: int, what: str = "models") -> None:
        self._name, self._total, self._what, self._done = name, total, what, 0
        self._started = time.perf_counter()
        console = Console(stderr=True)
        self._bar: Bar | None = None
        if console.is_terminal:
            columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
            self._bar = Bar(*columns, TimeElapsedColumn(), console=console)
            self._task = self._bar.add_task(name, total=total)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            seconds = time.perf_counter() - self._started
            print(f"{self._name}: {self._done} of {self._total} {self._what} in {seconds:.1f} s", file=sys.stderr)

    def advance(self) -> None:
        """Count a finished model."""
        self._done += 1
        if self._bar:
            self._bar.advance(self._task)

"""The errors a person can cause or meet, each with the values that explain it.

Every class carries the exit code that the command line ends with, so that a shell script or DVC can tell a mistake
in ``params.yaml`` (2) from unusable data or files (3), a diverged model (4) and an unreachable tracking server (5).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def _rebuild(kind: type[ScforgetError], message: str, values: dict[str, Any]) -> ScforgetError:
    error = kind.__new__(kind, message)
    error.args = (message,)
    error.__dict__.update(values)
    return error


class ScforgetError(Exception):
    """Base of all expected errors; ``str(error)`` is the one line that a person reads."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild from the message and the values, so that an error crosses from a worker process unharmed."""
        return _rebuild, (type(self), str(self), self.__dict__)


class ConfigError(ScforgetError):
    """A setting is missing, unknown or of the wrong type."""

    exit_code = 2

    def __init__(self, path: Path | str, key: str, why: str) -> None:
        self.path, self.key, self.why = Path(path), key, why
        super().__init__(f"{path}: {key}: {why}" if key else f"{path}: {why}")


class DataError(ScforgetError):
    """Data are not what they must be: what they are about, what was found, what was wanted."""

    exit_code = 3

    def __init__(self, what: str, found: object, wanted: str) -> None:
        self.what, self.found, self.wanted = what, found, wanted
        super().__init__(f"{what}: found {found}; wanted {wanted}")


class EmptyGroupError(DataError):
    """A group of cells (a cluster, a forget set, the controls) has too few members for its purpose."""


class NonFiniteError(ScforgetError):
    """Training met a NaN or an infinity: in which optimiser step, and in which quantity."""

    exit_code = 4

    def __init__(self, step: int, name: str) -> None:
        self.step, self.name = step, name
        super().__init__(
            f"training: {name} became NaN or infinite at step {step}; "
            "lower the learning rate, or look for cells with extreme counts"
        )


class TooManyDivergedError(NonFiniteError):
    """Fewer than two models of a stage are left."""

    def __init__(self, item: str, how_many: str, why: str) -> None:
        left = "and at least 2 must be left to know how much models differ"
        ScforgetError.__init__(self, f"{item}: {how_many} models diverged, {left}; the first: {why}")
        self.item, self.how_many, self.why = item, how_many, why


class WorkerError(ScforgetError):
    """Worker processes are killed from outside whatever is done; ``advice`` says what leaves more memory to each."""

    exit_code = 3

    def __init__(self, advice: str = "set SCFORGET_WORKERS=1") -> None:
        why = "a worker process was killed, and so were those that replaced it, mostly for lack of memory"
        super().__init__(f"{why}; {advice} and run again: finished models are kept")


class ArtifactError(ScforgetError):
    """A file under ``work/``, ``results/`` or ``report/`` cannot be read or written."""

    exit_code = 3

    def __init__(self, path: Path | str, why: str) -> None:
        self.path, self.why = Path(path), why
        super().__init__(f"{path}: {why}")


class TrackingError(ScforgetError):
    """The MLflow store does not answer; results are on disk all the same. ``advice`` says how to go on."""

    exit_code = 5

    def __init__(
        self, uri: str, why: str, advice: str = "results are on disk, run `scforget track` when it answers"
    ) -> None:
        self.uri, self.why = uri, why
        super().__init__(f"MLflow at {uri}: {why}; {advice}")


class StudyError(ScforgetError):
    """The storage of a study cannot be reached or read."""

    exit_code = 3

    def __init__(self, address: str, why: str) -> None:
        self.address, self.why = address, why
        super().__init__(f"study storage {address}: {why}; finished trials are safe: run the same command again")

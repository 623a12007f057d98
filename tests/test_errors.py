"""Errors: what they say, what they carry, how the command line ends, and their way out of a worker process."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from scforget import errors
from scforget.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    EmptyGroupError,
    NonFiniteError,
    ScforgetError,
    StudyError,
    TooManyDivergedError,
    TrackingError,
    WorkerError,
)

EXAMPLES: list[tuple[ScforgetError, int, dict[str, object], str]] = [
    (ScforgetError("nothing in particular"), 1, {}, "nothing in particular"),
    (
        ConfigError("params.yaml", "train.seeds", "missing"), 2,
        {"path": Path("params.yaml"), "key": "train.seeds", "why": "missing"}, "params.yaml: train.seeds: missing",
    ),
    (DataError("counts", -1, "integers >= 0"), 3,
     {"what": "counts", "found": -1, "wanted": "integers >= 0"}, "counts: found -1; wanted integers >= 0"),
    (EmptyGroupError("cluster 'x'", (0, "cells"), "1"), 3,
     {"what": "cluster 'x'", "found": (0, "cells"), "wanted": "1"}, "cluster 'x': found (0, 'cells'); wanted 1"),
    (NonFiniteError(17, "the loss"), 4, {"step": 17, "name": "the loss"}, "the loss became NaN or infinite at step 17"),
    (
        TooManyDivergedError("train@x", "3 of 4", "the loss"), 4,
        {"item": "train@x", "how_many": "3 of 4", "why": "the loss"}, "train@x: 3 of 4 models diverged",
    ),
    (WorkerError(), 3, {}, "a worker process was killed"),
    (ArtifactError(Path("work/a"), "damaged"), 3, {"path": Path("work/a"), "why": "damaged"}, "work/a: damaged"),
    (StudyError("db", "refused"), 3, {"address": "db", "why": "refused"}, "study storage db: refused"),
    (TrackingError("http://h", "refused"), 5, {"uri": "http://h", "why": "refused"}, "MLflow at http://h: refused"),
]  # fmt: skip
KINDS = [type(error).__name__ for error, *_ in EXAMPLES]


def test_examples_are_of_every_error() -> None:
    defined = {n for n, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, ScforgetError)}
    assert set(KINDS) == defined


@pytest.mark.parametrize(("error", "code", "values", "text"), EXAMPLES, ids=KINDS)
def test_error_carries_its_values_its_line_and_its_exit_code(
    error: ScforgetError, code: int, values: dict[str, object], text: str
) -> None:
    assert text in str(error)
    assert "\n" not in str(error)
    assert error.exit_code == code
    assert vars(error) == values


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("error", [error for error, *_ in EXAMPLES], ids=KINDS)
def test_error_survives_pickling(error: ScforgetError, protocol: int) -> None:
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is type(error)
    assert (str(again), vars(again), again.args) == (str(error), vars(error), error.args)
    assert again.exit_code == error.exit_code


def test_config_error_without_a_key_names_the_file_alone() -> None:
    assert str(ConfigError("params.yaml", "", "no such file")) == "params.yaml: no such file"


def test_errors_are_caught_by_their_families() -> None:
    assert issubclass(EmptyGroupError, DataError)
    assert issubclass(TooManyDivergedError, NonFiniteError)
    assert not issubclass(DataError, ValueError | OSError)

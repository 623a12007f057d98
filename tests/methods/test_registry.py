"""Adding a method is a file, a section of params.yaml and a line in the registry: none of them without the others."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from scforget import methods
from scforget.config import read_yaml
from scforget.methods import CLASSIFIER_METHODS, METHODS
from scforget.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sections() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read_yaml(ROOT / "params.yaml")["unlearn"]
    return found


@pytest.fixture(params=list(METHODS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_registry_names_every_file_and_every_section(sections: dict[str, dict[str, Any]]) -> None:
    files = {path.stem for path in Path(methods.__file__).parent.glob("*.py")} - {"__init__"}
    assert set(METHODS) == set(sections)
    assert {*METHODS, *CLASSIFIER_METHODS} == files


def test_registry_gives_the_function_of_that_name(name: str) -> None:
    method = METHODS[name]
    assert method.run is getattr(getattr(methods, name), name)
    assert issubclass(method.settings, Settings)
    assert method.settings.__module__ == method.run.__module__ == f"scforget.methods.{name}"
    assert method.settings.__name__.lower() == f"{name.replace('_', '')}settings"
    parameters = inspect.signature(method.run).parameters
    assert list(parameters) == ["model", "task", "sets", "settings", "seed", "checkpoint"]
    assert [p.kind is p.KEYWORD_ONLY for p in parameters.values()] == 4 * [False] + 2 * [True]


def test_settings_accept_their_section_of_params_and_refuse_all_else(
    name: str, sections: dict[str, dict[str, Any]]
) -> None:
    settings, section = METHODS[name].settings, sections[name]
    assert settings.model_validate(section).model_dump() == section
    for wrong in _spoiled(section):
        with pytest.raises(ValidationError):
            settings.model_validate(wrong)


def _spoiled(section: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {**section, "unknown": 1}
    for key, right in section.items():
        yield {other: value for other, value in section.items() if other != key}
        yield from ({**section, key: wrong} for wrong in (None, "many", {"a": 1}, -1) if wrong != right)


def test_settings_cannot_be_changed(name: str, sections: dict[str, dict[str, Any]]) -> None:
    settings = METHODS[name].settings.model_validate(sections[name])
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings, next(iter(sections[name])), 1)

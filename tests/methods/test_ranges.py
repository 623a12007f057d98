"""Every canonical method says what a sweep may change of it; what params.yaml and the profiles set lies inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scforget.config import read_yaml
from scforget.methods import METHODS
from scforget.search import Choice, Follows, Range, fill, space
from scforget.settings import Settings

ROOT = Path(__file__).parents[2]
CANONICAL = [name for name in METHODS if not name.endswith("_published")]
FILES = [ROOT / "params.yaml", *sorted((ROOT / "profiles").glob("*.yaml"))]


def section(path: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = read_yaml(path).get("unlearn", {}).get(name, {})
    return found


@pytest.fixture(params=CANONICAL)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def settings(name: str) -> Settings:
    return METHODS[name].settings.model_validate(section(ROOT / "params.yaml", name))


def at(content: Any, key: str) -> Any:
    """What stands at a dotted key; ``None`` where nothing does."""
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def test_every_canonical_method_has_ranges_and_no_published_one_has() -> None:
    assert {name for name, method in METHODS.items() if space(method.settings)} == set(CANONICAL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_ranges_hold_what_the_file_sets(name: str, path: Path) -> None:
    content = section(path, name)
    for key, mark in space(METHODS[name].settings).items():
        value = at(content, key)
        if value is None:
            assert path.name != "params.yaml", key
            continue
        assert value in mark, (key, value)


def test_ranges_end_in_values_that_the_method_accepts(name: str, settings: Settings) -> None:
    for key, mark in space(type(settings)).items():
        for value in mark.values if isinstance(mark, Choice) else (mark.low, mark.high):
            assert at(fill(settings, {key: value}).model_dump(), key) == value


def test_ranges_are_whole_numbers_where_the_setting_is(name: str, settings: Settings) -> None:
    for key, mark in space(type(settings)).items():
        if isinstance(mark, Range):
            assert mark.whole == isinstance(at(settings.model_dump(), key), int), key


def test_fill_with_the_values_of_params_changes_nothing(name: str, settings: Settings) -> None:
    same = {key: at(settings.model_dump(), key) for key in space(type(settings))}
    assert fill(settings, same) == settings


def test_followers_follow_a_range_of_the_same_class(name: str) -> None:
    schema = METHODS[name].settings
    for field in schema.model_fields.values():
        followed = {mark.field for mark in field.metadata if isinstance(mark, Follows)}
        assert followed <= set(space(schema))


@pytest.mark.parametrize("reset", ["partial_reset", "reset_distill", "shrink_perturb"])
def test_patience_of_the_reset_family_follows_the_epochs(reset: str) -> None:
    settings = METHODS[reset].settings.model_validate(section(ROOT / "params.yaml", reset))
    content = fill(settings, {"max_epochs": 9}).model_dump()
    assert content == {**settings.model_dump(), "max_epochs": 9, "patience": 9}


def test_fill_lets_a_check_across_settings_speak() -> None:
    ssd = METHODS["ssd"].settings.model_validate(section(ROOT / "params.yaml", "ssd"))
    with pytest.raises(ValueError, match="alpha must be > 0 to dampen"):
        fill(ssd, {"alpha": 0.0})


def test_settings_say_where_their_ranges_come_from(name: str) -> None:
    described = [base.__doc__ or "" for base in METHODS[name].settings.__mro__ if issubclass(base, Settings)]
    assert any("Ranges: " in text for text in described)


def test_a_redeclared_field_keeps_the_bounds_of_the_one_it_replaces() -> None:
    """A field that a subclass writes again, to add a range, must not lose what the base refuses."""
    for name in CANONICAL:
        schema = METHODS[name].settings
        for base in schema.__mro__[1:]:
            if issubclass(base, Settings) and base is not Settings:
                for field, was in base.model_fields.items():
                    now = schema.model_fields[field]
                    assert now.annotation is was.annotation
                    kept = [m for m in was.metadata if not isinstance(m, Range | Choice | Follows)]
                    assert [m for m in now.metadata if not isinstance(m, Range | Choice | Follows)] == kept

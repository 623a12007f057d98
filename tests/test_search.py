"""Ranges beside settings: what stands where, copies checked as the file is, and what params.yaml may replace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from scforget import config
from scforget.errors import ConfigError
from scforget.search import (
    LARGEST,
    Choice,
    ChoiceSettings,
    Follows,
    Range,
    RangeSettings,
    SearchSettings,
    fill,
    overridden,
    space,
)
from scforget.settings import Settings


class Inner(Settings):
    rate: Annotated[float, Field(gt=0), Range(1e-4, 1e-2, log=True)]
    epochs: Annotated[int, Field(ge=0), Range(1, 9)]
    patience: Annotated[int, Field(gt=0), Follows("epochs")]


class Middle(Settings):
    inner: Inner
    depth: int


class Outer(Settings):
    rate: Annotated[float, Field(gt=0)]
    middle: Middle
    kind: Annotated[Literal["a", "b"], Choice("a", "b")]
    fixed: list[str]
    least: Annotated[float, Range(0.0, 1.0)]

    @model_validator(mode="after")
    def _fits_together(self) -> Outer:
        if self.kind == "b" and self.least > 0.5:
            raise ValueError("least must be at most 0.5 for b")
        return self


class Redeclared(Outer):
    rate: Annotated[float, Field(gt=0), Range(1.0, 2.0)]


class Searched(Settings):
    ranges: dict[str, SearchSettings]


CONTENT: dict[str, Any] = {
    "rate": 1.5,
    "middle": {"inner": {"rate": 1e-3, "epochs": 5, "patience": 7}, "depth": 2},
    "kind": "a",
    "fixed": ["x"],
    "least": 0.25,
}


@pytest.fixture
def outer() -> Outer:
    return Outer.model_validate(CONTENT)


def read(**ranges: Any) -> dict[str, RangeSettings | ChoiceSettings]:
    return config.validate(Path("params.yaml"), {"ranges": ranges}, Searched).ranges


# what a range is


@pytest.mark.parametrize(
    ("mark", "inside", "outside"),
    [
        (Range(1, 4), [1, 3, 4], [0, 5, 2.0, 2.5, True, "2", None]),
        (Range(1.0, 4.0), [1, 1.0, 2.5, 4, np.float64(3.0)], [0.99, 4.01, float("nan"), True, "2"]),
        (Range(1, 4.0), [1, 2.5], [4.5]),
        (Choice("a", 1, 2.5), ["a", 1, 2.5], ["b", 1.0, True, None]),
    ],
)
def test_contains_tells_whole_numbers_from_others(mark: Range | Choice, inside: list[Any], outside: list[Any]) -> None:
    assert [value for value in inside if value not in mark] == []
    assert [value for value in outside if value in mark] == []


@pytest.mark.parametrize(
    ("low", "high", "log", "words"),
    [
        (2, 1, False, "low must be below high"),
        (2.0, 2.0, False, "low must be below high"),
        (float("nan"), 1.0, False, "low must be below high"),
        (0.0, float("inf"), False, "2\\*\\*53"),
        (1, 10**400, False, "2\\*\\*53"),
        (0, 1, True, "log needs low > 0, found 0"),
        (-1.0, 1.0, True, "log needs low > 0, found -1.0"),
    ],
)
def test_range_refuses_what_cannot_be_drawn_from(low: float, high: float, log: bool, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Range(low, high, log)


def test_range_takes_the_largest_whole_numbers_that_are_floats() -> None:
    assert int(float(Range(-LARGEST, LARGEST).high)) == LARGEST
    with pytest.raises(ValueError, match="2\\*\\*53"):
        Range(1, LARGEST + 1)


@pytest.mark.parametrize("values", [(), ("a", "a"), (1, 2, 1)])
def test_choice_refuses_none_and_the_same_twice(values: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="at least one, and differ"):
        Choice(*values)


def test_marks_are_equal_by_value_and_cannot_be_changed() -> None:
    assert Choice("a", 1) == Choice("a", 1) != Choice(1, "a")
    assert Range(1, 2) != Range(1, 2, log=True)
    with pytest.raises(AttributeError):
        Choice("a").values = ("b",)  # type: ignore[misc]


# what stands beside the settings


def test_space_names_nested_fields_in_the_order_of_the_class() -> None:
    assert list(space(Outer).items()) == [
        ("middle.inner.rate", Range(1e-4, 1e-2, log=True)),
        ("middle.inner.epochs", Range(1, 9)),
        ("kind", Choice("a", "b")),
        ("least", Range(0.0, 1.0)),
    ]


def test_space_of_a_subclass_has_the_range_that_it_adds_where_the_field_stands() -> None:
    assert list(space(Redeclared)) == ["rate", *space(Outer)]


def test_space_of_settings_without_ranges_is_empty() -> None:
    assert space(Settings) == space(Searched) == {}


# copies


def test_fill_replaces_dotted_keys_and_leaves_the_rest(outer: Outer) -> None:
    found = fill(outer, {"middle.inner.rate": 5e-3, "kind": "b", "middle.depth": 3})
    assert type(found) is Outer
    wanted = {
        **CONTENT, "kind": "b", "middle": {"inner": {"rate": 5e-3, "epochs": 5, "patience": 7}, "depth": 3},
    }  # fmt: skip
    assert found.model_dump() == wanted
    assert outer.model_dump() == CONTENT


def test_fill_of_nothing_is_an_equal_copy(outer: Outer) -> None:
    assert fill(outer, {}) == outer
    assert fill(outer, {}) is not outer


@given(st.integers(1, 9), st.floats(1e-4, 1e-2))
def test_fill_holds_every_value_of_a_range(epochs: int, rate: float) -> None:
    inner = Inner(rate=1.0, epochs=0, patience=1)
    found = fill(inner, {"epochs": epochs, "rate": rate})
    assert (found.epochs, found.rate, found.patience) == (epochs, rate, epochs)


def test_fill_sets_followers_only_where_what_they_follow_is_changed(outer: Outer) -> None:
    assert fill(outer, {"middle.inner.epochs": 3}).middle.inner.patience == 3
    assert fill(outer, {"middle.inner.rate": 1e-3}).middle.inner.patience == 7
    assert fill(outer, {"middle.inner.epochs": 3, "middle.inner.patience": 2}).middle.inner.patience == 2


@pytest.mark.parametrize(
    ("values", "place", "kind"),
    [
        ({"rates": 1.0}, ("rates",), "extra_forbidden"),
        ({"middle.inner.rates": 1.0}, ("middle", "inner", "rates"), "extra_forbidden"),
        ({"muddle.inner": 1.0}, ("muddle",), "extra_forbidden"),
        ({"rate.inner": 1.0}, ("rate",), "float_type"),
        ({"middle.inner.epochs": 2.5}, ("middle", "inner", "epochs"), "int_type"),
        ({"middle.inner.rate": 0.0}, ("middle", "inner", "rate"), "greater_than"),
        ({"least": "0.5"}, ("least",), "float_type"),
        ({"kind": "c"}, ("kind",), "literal_error"),
        ({"": 1}, ("",), "extra_forbidden"),
        ({"middle.inner.epochs": 0}, ("middle", "inner", "patience"), "greater_than"),
        ({"kind": "b", "least": 0.75}, (), "value_error"),
    ],
)
def test_fill_checks_as_strictly_as_the_file_is_checked(
    outer: Outer, values: dict[str, Any], place: tuple[str, ...], kind: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        fill(outer, values)
    first = caught.value.errors()[0]
    assert (first["loc"], first["type"]) == (place, kind)


# what params.yaml may say instead


def test_search_settings_keep_whole_numbers_whole() -> None:
    found = read(a={"low": 1, "high": 8, "log": True}, b={"low": 1.0, "high": 8, "log": False}, c={"values": ["R", 1]})
    marks = {key: settings.mark() for key, settings in found.items()}
    assert marks == {"a": Range(1, 8, log=True), "b": Range(1.0, 8), "c": Choice("R", 1)}
    assert [marks["a"].whole, marks["b"].whole] == [True, False]  # type: ignore[union-attr]
    again = Searched.model_validate(Searched(ranges=found).model_dump(mode="json")).ranges
    assert [type(again["a"].low), type(again["b"].low)] == [int, float]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("value", "key", "why"),
    [
        ({"low": 1, "high": 3}, ".log", "missing"),
        ({}, ".low", "missing"),
        ({"low": 0, "high": 3.0, "log": True}, "", "log needs low > 0, found 0"),
        ({"low": 3, "high": 3, "log": False}, "", "low must be below high"),
        ({"low": 1, "high": float("inf"), "log": False}, "", "neither beyond 2**53"),
        ({"low": 1, "high": 10**400, "log": True}, "", "neither beyond 2**53"),
        ({"low": True, "high": 3, "log": False}, ".low", "must be a number, found True (bool)"),
        ({"low": 1, "high": "3", "log": False}, ".high", "must be a number, found '3' (str)"),
        ({"low": 1, "high": 3, "log": 1}, ".log", "valid boolean"),
        ({"low": 1, "high": 3, "log": False, "step": 1}, ".step", "unknown key"),
        ({"values": [1], "low": 2}, ".low", "unknown key"),
        ({"values": []}, ".values", "at least 1 item"),
        ({"values": ["a", "a"]}, "", "differ"),
        ({"values": "ab"}, ".values", "valid list"),
        (3, "", "found 3 (int)"),
        (None, "", "found None"),
    ],
)
def test_search_settings_name_the_key_that_is_wrong(value: Any, key: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(alpha=value)
    assert caught.value.key == f"ranges.alpha{key}"
    assert why in caught.value.why
    assert "\n" not in str(caught.value)


def test_overridden_replaces_in_place_and_adds_at_the_end() -> None:
    pinned = {"middle.inner.epochs": {"values": [4]}}
    found = overridden(space(Outer), read(extra={"low": 1, "high": 3, "log": False}, **pinned))
    assert list(found) == [*space(Outer), "extra"]
    assert (found["middle.inner.epochs"], found["extra"], found["kind"]) == (Choice(4), Range(1, 3), Choice("a", "b"))
    assert overridden(space(Outer), {}) == space(Outer)


@pytest.mark.parametrize(("key", "kind"), [("least", float), ("middle.inner.rate", float), ("middle.depth", int)])
def test_overridden_keeps_rates_from_becoming_whole_numbers(key: str, kind: Callable[[Any], Any]) -> None:
    mark = overridden(space(Outer), read(**{key: {"low": 1, "high": 3, "log": True}}))[key]
    assert mark == Range(1, 3, log=True)
    assert [type(mark.low), type(mark.high)] == [kind, kind]  # type: ignore[union-attr]

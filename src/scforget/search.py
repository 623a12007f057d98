"""What a sweep may change: ranges that stand beside the settings they are of, or in ``params.yaml`` in their stead.

A range is metadata of a field, e.g. ``alpha: Annotated[float, Field(ge=0), Range(0.1, 100.0, log=True)]``; validation
takes no notice of it. Nothing here draws a value, and nothing here knows what does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from scforget.settings import Settings

SettingsT = TypeVar("SettingsT", bound=Settings)

#: What a choice is among.
Value = str | int | float | bool
#: Whole numbers up to here are floats as well, so that no sampler rounds an end away.
LARGEST = 2**53


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included; whole numbers only where both ends are ``int``.

    Parameters
    ----------
    low, high
        ``low < high``, neither beyond :data:`LARGEST` on either side, in the unit of the setting.
    log
        Drawn evenly on a logarithmic scale, for a setting whose magnitude is what matters; needs ``low > 0``.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not -LARGEST <= self.low < self.high <= LARGEST:  # also false of a NaN
            raise ValueError(f"low must be below high, neither beyond 2**53; found {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low > 0, found {self.low}; take a small positive low, or log: false")

    @property
    def whole(self) -> bool:
        """Whether it holds whole numbers only."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def __contains__(self, value: object) -> bool:
        number = isinstance(value, int if self.whole else int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high  # type: ignore[operator]


@dataclass(frozen=True, init=False)
class Choice:
    """One of some values, of which at least one is given; none is nearer to another than the rest."""

    values: tuple[Value, ...]

    def __init__(self, *values: Value) -> None:
        if not values or len({(type(value), value) for value in values}) < len(values):
            raise ValueError(f"values must be at least one, and differ; found {list(values)}")
        object.__setattr__(self, "values", values)

    def __contains__(self, value: object) -> bool:
        return any(type(value) is type(one) and value == one for one in self.values)


@dataclass(frozen=True)
class Follows:
    """No freedom of its own: takes the value of a searched ``field`` of the same class wherever that one is changed."""

    field: str


def _marks(schema: type[Settings], prefix: str = "") -> Iterator[tuple[str, str, Range | Choice | Follows]]:
    """Give the dotted prefix, the name and the mark of every marked field, nested classes included, in their order."""
    for name, field in schema.model_fields.items():
        for mark in field.metadata:
            if isinstance(mark, Range | Choice | Follows):
                yield prefix, name, mark
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from _marks(field.annotation, f"{prefix}{name}.")


def space(schema: type[Settings]) -> dict[str, Range | Choice]:
    """Return what may be searched of a settings class, by dotted key (``finetune.learning_rate``), in its order."""
    return {prefix + name: mark for prefix, name, mark in _marks(schema) if not isinstance(mark, Follows)}


def fill(settings: SettingsT, values: Mapping[str, Any]) -> SettingsT:
    """Return a copy with other values, checked as strictly as ``params.yaml`` is.

    Parameters
    ----------
    settings
        Stays as it is.
    values
        By dotted key. A field that follows one of them takes its value, unless it is given one itself.

    Raises
    ------
    pydantic.ValidationError
        If a key is unknown, or a value has the wrong type, is out of bounds or does not go with the others. The
        caller knows the file and the section that the key is in, and makes a ``ConfigError`` of it.
    """
    schema = type(settings)
    wanted = dict(values)
    for prefix, name, mark in _marks(schema):
        if isinstance(mark, Follows) and prefix + mark.field in values:
            wanted.setdefault(prefix + name, values[prefix + mark.field])
    content = settings.model_dump()
    for key, value in wanted.items():
        place, (*sections, last) = content, key.split(".")
        for section in sections:
            if not isinstance(place.get(section), dict):
                place[section] = {}  # no such section: validation says so
            place = place[section]
        place[last] = value
    return schema.model_validate(content)


def _number(value: object) -> object:
    """Say in one line what the union, which keeps 1 and 1.0 apart, would say in two."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"must be a number, found {value!r} ({type(value).__name__})")
    return value


Number = Annotated[int | float, BeforeValidator(_number)]


class RangeSettings(Settings):
    """A :class:`Range` as it stands in ``params.yaml``: ``{low: 0.1, high: 100.0, log: true}``."""

    low: Number
    high: Number
    log: bool

    @model_validator(mode="after")
    def _is_a_range(self) -> RangeSettings:
        self.mark()
        return self

    def mark(self) -> Range:
        """Return the range."""
        return Range(self.low, self.high, self.log)


class ChoiceSettings(Settings):
    """A :class:`Choice` as it stands in ``params.yaml``: ``{values: [D, R]}``; one value alone fixes a setting."""

    values: Annotated[list[Value], Field(min_length=1)]

    @model_validator(mode="after")
    def _is_a_choice(self) -> ChoiceSettings:
        self.mark()
        return self

    def mark(self) -> Choice:
        """Return the choice."""
        return Choice(*self.values)


def _either(content: object) -> RangeSettings | ChoiceSettings:
    """Tell the two apart by their keys, so that a complaint is about the one that was meant."""
    if isinstance(content, RangeSettings | ChoiceSettings):
        return content
    schema = ChoiceSettings if isinstance(content, dict) and "values" in content else RangeSettings
    return schema.model_validate(content)


#: What stands under ``sweep.ranges.METHOD.KEY``.
SearchSettings = Annotated[RangeSettings | ChoiceSettings, BeforeValidator(_either)]


def overridden(
    declared: Mapping[str, Range | Choice], overrides: Mapping[str, RangeSettings | ChoiceSettings]
) -> dict[str, Range | Choice]:
    """Replace ranges by those of ``params.yaml``, and add those of settings that have none; old keys keep their order.

    Where a range of any numbers is replaced, the new one is too, so that ``low: 1`` for a rate does not mean whole
    numbers. Whether a new key exists, and whether its values fit, :func:`fill` says.
    """
    merged = dict(declared)
    for key, settings in overrides.items():
        mark, before = settings.mark(), merged.get(key)
        if isinstance(mark, Range) and isinstance(before, Range) and not before.whole:
            mark = Range(float(mark.low), float(mark.high), mark.log)
        merged[key] = mark
    return merged

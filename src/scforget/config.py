"""``params.yaml`` → frozen, strict settings: the only place that knows the file.

The schema is the caller's: this module knows nothing of methods or attacks. YAML is read as version 1.2, as DVC reads
it, so ``1e-4`` is a number here although YAML 1.1 readers take it for text.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from scforget.errors import ConfigError
from scforget.settings import Settings

SettingsT = TypeVar("SettingsT", bound=Settings)


def read_yaml(path: Path) -> Any:
    """Read a YAML 1.2 file into plain types.

    Raises
    ------
    ConfigError
        If it is missing or not YAML (duplicate keys included).
    """
    try:
        return YAML(typ="safe", pure=True).load(path)
    except FileNotFoundError as error:
        raise ConfigError(path, "", "no such file; run from the project's root") from error
    except (YAMLError, OSError, ValueError) as error:  # ValueError: a date that is none, say
        raise ConfigError(path, "", f"not readable as YAML: {' '.join(str(error).split())[:200]}") from error


def _key(location: tuple[int | str, ...], content: Any) -> str:
    """Dotted key of what pydantic complains of, without the kinds that it names where a section is one of several."""
    place, here = [], content
    for number, part in enumerate(location, 1):
        there = part in here if isinstance(here, dict) else isinstance(here, list)
        if there or number == len(location):  # a missing key is the last part
            place.append(str(part))
            here = here[part] if there else None
    return ".".join(place)


def _explain(path: Path, error: ValidationError, content: Any) -> ConfigError:
    """Turn pydantic's first complaint into one line about one key."""
    first, count = error.errors()[0], error.error_count()
    key = _key(first["loc"], content)
    found = "" if first["type"] == "missing" else f", found {first['input']!r} ({type(first['input']).__name__})"
    why = {
        "missing": "missing; every setting stands in the file, so that DVC sees it",
        "extra_forbidden": "unknown key; check its spelling and its place",
        "value_error": first["msg"].removeprefix("Value error, "),  # ours: it says what was found
    }.get(first["type"], first["msg"][0].lower() + first["msg"][1:] + found)
    more = f" (and {count - 1} more)" if count > 1 else ""
    return ConfigError(path, key, why + more)


def validate(path: Path, content: Any, schema: type[SettingsT]) -> SettingsT:
    """Check content read from ``path`` against a schema; raises :class:`ConfigError` naming the first bad key."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise _explain(path, error, content) from error


def load(path: Path, schema: type[SettingsT]) -> SettingsT:
    """Read and check a params file.

    Raises
    ------
    ConfigError
        If the file or a key is missing, a key is unknown, or a value has the wrong type or range.
    """
    return validate(path, read_yaml(path), schema)


def dump_yaml(content: Any) -> str:
    """Write plain types as YAML 1.2, keys in their order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width = False, 120
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.representer.ignore_aliases = lambda *_: True  # two rows that are alike are written twice, to be read
    buffer = io.StringIO()
    yaml.dump(content, buffer)
    return buffer.getvalue()


def _merge(target: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Merge mappings key by key; anything else (lists too) replaces what was there."""
    for key, value in overrides.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value


def _round_trip() -> YAML:
    """Return a reader and writer that keeps comments, order and the style of lists."""
    yaml = YAML()
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(type(None), lambda to, _: to.represent_scalar("tag:yaml.org,2002:null", "null"))
    return yaml


def _edit(path: Path, changes: dict[str, Any], source: Path, schema: type[Settings]) -> None:
    """Merge changes into a YAML file, keeping comments and order; checked before it replaces the file."""
    if not isinstance(read_yaml(path), dict):
        raise ConfigError(path, "", "not a mapping of keys to values; restore it (git checkout)")
    yaml = _round_trip()
    content = yaml.load(path)
    _merge(content, changes)
    temporary = path.with_suffix(".tmp")
    try:
        yaml.dump(content, temporary)
        load(temporary, schema)
        temporary.replace(path)
    except ConfigError as error:
        raise ConfigError(source, error.key, error.why) from error
    except OSError as error:
        raise ConfigError(path, "", f"cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def apply_overrides(path: Path, overrides: Path, schema: type[Settings]) -> None:
    """Write the values of one YAML file into another; a bad profile changes nothing."""
    if not isinstance(read_yaml(overrides), dict):
        raise ConfigError(overrides, "", "a profile is a mapping of keys to values")
    _edit(path, _round_trip().load(overrides), overrides, schema)


def set_value(path: Path, key: tuple[str, ...], value: object, schema: type[Settings]) -> None:
    """Write one value at a nested key of a YAML file."""
    changes: Any = value
    for part in reversed(key):
        changes = {part: changes}
    _edit(path, changes, path, schema)

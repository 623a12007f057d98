"""Write what a sweep has chosen into ``params.yaml``: a change that a person looks at and commits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from scforget import config, schema, search
from scforget.errors import ArtifactError, ConfigError, DataError
from scforget.results import Record


def _records(root: Path, method: str, dataset: str | None, scenario: str | None) -> dict[Path, Record]:
    """What was found by the pipeline's sweeps and by those of one's own; of the same request, the longer study."""
    longest: dict[tuple[str, str], tuple[Path, Record]] = {}
    for folder in ("results/sweep", "studies"):
        for path in sorted((root / folder).glob(f"{dataset or '*'}/{scenario or '*'}/{method}/best.yaml")):
            record = config.read_yaml(path)
            try:
                key, trials = (record["study"]["dataset"], record["study"]["scenario"]), int(record["study"]["trials"])
            except (KeyError, TypeError, ValueError) as error:
                raise ArtifactError(path, "not a sweep's record; delete it and run the sweep again") from error
            if key not in longest or longest[key][1]["study"]["trials"] < trials:
                longest[key] = path, record
    return dict(longest.values())


def promote(root: Path, method: str, dataset: str | None, scenario: str | None) -> list[str]:
    """Write the settings that a sweep chose into ``params.yaml``; returns the changes in words.

    Raises
    ------
    DataError
        If no sweep, or more than one, fits, or none of its trials kept utility.
    ConfigError
        If params.yaml does not take the settings; it stays as it was.
    """
    found = _records(root, method, dataset, scenario)
    if len(found) != 1:
        names = [f"{one['study']['dataset']} {one['study']['scenario']}" for one in found.values()]
        wanted = (
            "one of them: name it with --dataset and --scenario" if names else f"run `scforget sweep {method}` first"
        )
        raise DataError(f"sweeps of {method}", ", ".join(names) or "none", wanted)
    ((path, record),) = found.items()
    if "tuned" not in record:
        wanted = "one: widen the ranges, make more trials, or leave the method as it is"
        raise DataError(str(path.relative_to(root)), "no trial that kept utility inside its margins", wanted)
    params_path = root / "params.yaml"
    before = getattr(schema.load(params_path).unlearn, method)
    try:
        after = search.fill(before, record["tuned"]["settings"])
    except ValidationError as error:
        why = f"does not take what {path} has: {error.errors()[0]['msg']}; run the sweep again"
        raise ConfigError(params_path, f"unlearn.{method}", why) from error
    changes = _differences(before.model_dump(), after.model_dump())
    if changes:  # all at once: one of them alone may not go with the others' old values
        tuned = _nested({key: new for key, (_, new) in changes.items()})
        config.set_value(params_path, ("unlearn", method), tuned, schema.Params)
    lines = [f"unlearn.{method}.{key}: {old} -> {new}" for key, (old, new) in changes.items()]
    return [*lines, f"from trial {record['tuned']['trial']} of {path.relative_to(root)}"]


def _nested(dotted: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in dotted.items():
        place, (*sections, last) = found, key.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return found


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for key, old in before.items():
        if isinstance(old, dict):
            found |= _differences(old, after[key], f"{prefix}{key}.")
        elif old != after[key]:
            found[prefix + key] = old, after[key]
    return found

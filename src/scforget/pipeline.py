"""The pipeline as DVC sees it: which items each stage has, what each depends on, and so what identifies a run.

``dvc.yaml`` says what a stage item depends on (files, code, params); ``dvc.lock`` records the hashes of the last run.
A run's fingerprint is a hash over both, so the same inputs find the same run, whether it was computed, resumed, or
restored from DVC's cache. This is the only module that reads the two files.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scforget.config import read_yaml
from scforget.errors import ArtifactError, ConfigError

_IGNORED = {"__pycache__"}  # as .dvcignore has it
#: The folder of the second pipeline, which has a lock of its own.
THEORY = Path("pipelines") / "theory"
_INTERPOLATION = re.compile(r"\$\{([^}]+)\}")


@dataclass(frozen=True)
class Item:
    """One unit of work: a stage and the values of its axes, e.g. ``retrain`` for a data set and a scenario.

    Of an item that treats every method (``unlearn``, ``audit``), one method's part is named by a further key.
    """

    stage: str
    keys: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name in DVC, e.g. ``retrain@pbmc68k-cd56_nk``."""
        return f"{self.stage}@{'-'.join(self.keys)}" if self.keys else self.stage


@dataclass(frozen=True)
class Inputs:
    """What an item depends on: DVC's md5 of each file or folder, and the tracked params."""

    item: Item
    deps: dict[str, str]
    params: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Identity of the item's run."""
        return self._digest(self.deps, self.params)

    def model_fingerprint(self, seed: int, narrowed: dict[str, str]) -> str:
        """Identity of one model of the item.

        Parameters
        ----------
        seed
            Which model.
        narrowed
            Hashes that stand for a dependency when only part of it matters to this model (its own original, say).

        Notes
        -----
        The list of seeds is left out, so that a longer list keeps the models that exist.
        """
        params = {key: value for key, value in self.params.items() if not key.endswith(".seeds")}
        return self._digest({**self.deps, **narrowed}, {**params, "model": seed})

    def study_fingerprint(self, numerics: str) -> str:
        """Identity of a study of the item: its number of trials is left out, so that a longer one goes on."""
        params = {key: value for key, value in self.params.items() if not key.endswith(".trials")}
        return self._digest({**self.deps, "numerics": numerics}, params)

    def of_method(self, method: str, narrowed: dict[str, str]) -> Inputs:
        """What one method of an item that treats them all depends on, so that a further method leaves it as it is.

        Parameters
        ----------
        method
            One of ``pipeline.methods``.
        narrowed
            Hash of the method's own part of a dependency, in place of the whole: ``src/scforget/methods/ssd.py`` for
            ``src/scforget/methods``.
        """
        wider = {path for path in self.deps for own in narrowed if own.startswith(f"{path}/")}
        deps = {path: digest for path, digest in self.deps.items() if path not in wider}
        params = {key: value for key, value in self.params.items() if not key.endswith(".methods")}
        for section in ("unlearn", "unlearn_classifier"):
            if section in params:
                params[f"{section}.{method}"] = params.pop(section)[method]
        return Inputs(Item(self.item.stage, (*self.item.keys, method)), {**deps, **narrowed}, params)

    def _digest(self, deps: dict[str, str], params: dict[str, Any]) -> str:
        content = [self.item.stage, self.item.keys, deps, params]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _lookup(content: Any, dotted: str, path: Path) -> Any:
    for key in dotted.split("."):
        if not isinstance(content, dict) or key not in content:
            raise ConfigError(path, dotted, "missing; a stage of dvc.yaml tracks it")
        content = content[key]
    return content


def _stages(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("stages"), dict):
        raise ConfigError(path, "stages", "missing; restore the file (git checkout)")
    return dict(content["stages"])


def _fill(text: str, values: dict[str, str]) -> str:
    return _INTERPOLATION.sub(lambda match: values[match.group(1).removeprefix("item.")], text)


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def dvc_md5(path: Path) -> str:
    """Hash a file or a folder as DVC does: of a folder, the md5 of the sorted JSON list of its files' md5s.

    Raises
    ------
    ArtifactError
        If there is nothing at the path.
    """
    if path.is_dir():
        found = (p for p in path.rglob("*") if p.is_file() and not _IGNORED.intersection(p.parts))
        files = sorted(found, key=lambda p: p.relative_to(path).as_posix())
        listing = [{"md5": _md5(p.read_bytes()), "relpath": p.relative_to(path).as_posix()} for p in files]
        return _md5(json.dumps(listing, sort_keys=True).encode()) + ".dir"
    if not path.exists():
        raise ArtifactError(path, "no such file, and a stage depends on it; run `dvc repro` (data: `dvc pull`)")
    return _md5(path.read_bytes())


class Pipeline:
    """``dvc.yaml``, ``params.yaml`` and ``dvc.lock`` of a project, read once.

    Parameters
    ----------
    root
        The project's folder.
    folder
        Where in it ``dvc.yaml`` and ``dvc.lock`` lie; the stages' paths start at the project's folder all the same.
    """

    def __init__(self, root: Path, folder: Path = Path()) -> None:
        self._root, self._folder = root, root / folder
        self._params_path = root / "params.yaml"
        self.params = read_yaml(self._params_path)
        self._stages = _stages(self._folder / "dvc.yaml")

    def _axes(self, stage: str) -> dict[str, list[str]]:
        axes = self._stages[stage].get("matrix", {})
        resolved = {}
        for axis, value in axes.items():
            match = _INTERPOLATION.fullmatch(value) if isinstance(value, str) else None
            resolved[axis] = _lookup(self.params, match.group(1), self._params_path) if match else value
        return resolved

    def items(self, stage: str | None = None) -> list[Item]:
        """All items, in the order of dvc.yaml, or those of one stage."""
        names = [stage] if stage else list(self._stages)
        return [
            Item(name, tuple(map(str, keys)))
            for name in names
            for keys in itertools.product(*self._axes(name).values())
        ]

    def _described(self, item: Item) -> tuple[dict[str, Any], dict[str, str]]:
        return self._stages[item.stage], dict(zip(self._axes(item.stage), item.keys, strict=True))

    def param_keys(self, item: Item) -> list[str]:
        """Dotted keys of params.yaml that the item depends on."""
        stage, values = self._described(item)
        return [_fill(key, values) for key in stage.get("params", [])]

    def inputs(self, item: Item) -> Inputs:
        """What the item depends on now, hashed from the files in place."""
        stage, values = self._described(item)
        deps = [_fill(dep, values) for dep in stage.get("deps", [])]
        params = {key: _lookup(self.params, key, self._params_path) for key in self.param_keys(item)}
        return Inputs(item, {dep: dvc_md5(self._root / dep) for dep in deps}, params)

    def _entries(self) -> dict[Item, dict[str, Any]]:
        lock_path = self._folder / "dvc.lock"
        lock = _stages(lock_path) if lock_path.exists() else {}
        return {item: lock[item.name] for item in self.items() if item.name in lock}

    def recorded(self) -> dict[Item, Inputs]:
        """What each finished item depended on when it ran, as ``dvc.lock`` has it; empty before the first run."""
        return {
            item: Inputs(
                item,
                {dep["path"]: dep["md5"] for dep in entry.get("deps", [])},
                dict(entry.get("params", {}).get("params.yaml", {})),
            )
            for item, entry in self._entries().items()
        }

    def astray(self) -> dict[Item, str]:
        """Small outs that are not as ``dvc.lock`` has them (not pulled, cut off, made by hand), one for each item."""
        found = {}
        for item, entry in self._entries().items():
            for out in entry.get("outs", []):
                path = self._root / out["path"]
                small = out["path"].startswith(("results/", "report/"))
                if small and (not path.exists() or dvc_md5(path) != out["md5"]):
                    found[item] = str(out["path"])
        return found

"""One item of the pipeline being run: its settings, what it depends on, its seeds, its folders, and its tracking."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from scforget import engine, families, parallel, schema, seeding, tracking
from scforget.artifacts import Workspace
from scforget.errors import ConfigError, TrackingError
from scforget.methods import METHODS
from scforget.pipeline import THEORY, Inputs, Item, Pipeline, dvc_md5
from scforget.tracking import Store

_METHODS = "src/scforget/methods"
_SIBLING = re.compile(r"^from scforget\.methods\.(\w+) import", re.MULTILINE)


@dataclass(frozen=True)
class Context:
    """One stage item being run: its project, settings and inputs."""

    workspace: Workspace
    params: schema.Params
    inputs: Inputs

    @property
    def item(self) -> Item:
        """Which item."""
        return self.inputs.item

    def seed(self, *names: object) -> int:
        """Seed of a named stream of this item."""
        return seeding.derive(self.params.seed, self.item.stage, *self.item.keys, *names)

    @property
    def work(self) -> Path:
        """Folder of the item's large outs."""
        return self.workspace.work(self.item.stage, *self.item.keys)

    @property
    def results(self) -> Path:
        """Folder of the item's small outs."""
        return self.workspace.results(self.item.stage, *self.item.keys)

    @property
    def theory(self) -> Path:
        """Folder of the outs of an item of the theory pipeline."""
        return self.workspace.theory(self.item.stage, *self.item.keys)

    def of_method(self, method: str) -> Context:
        """One method's part of an item that treats them all: of the folder of methods it depends on its own file.

        And on those of its siblings that the file imports.
        """
        inputs = self.inputs.of_method(method, sources(self.workspace.root, method))
        return replace(self, inputs=inputs)

    @cached_property
    def _store(self) -> Store:
        return Store(self.workspace.root)

    def warm_up(self) -> None:
        """Open MLflow's store and load what draws: seconds that a stage has while its models are made."""
        import matplotlib.backends.backend_agg  # noqa: F401

        from scforget import replay  # noqa: F401

        with suppress(TrackingError):  # `track` will say so, when the results are on disk
            _ = self._store

    def track(self, part: Inputs | None = None, study: Path | None = None) -> None:
        """Log what the stage, or a part of it, or a study in a folder of its own, left on disk.

        Under DVC a failure is a line, no error: DVC would delete the results.
        """
        from scforget import replay

        try:
            inputs = part or self.inputs
            found = replay.studies(self.workspace, inputs, study) if study else replay.runs(self.workspace, inputs)
            if len(found) > 1:  # pictures of many methods: on all cores
                drawn = parallel.each(_contents, [run.artifacts for run in found], lambda: None)
                found = [replace(run, artifacts=made.copy) for run, made in zip(found, drawn, strict=True)]
            for run in found:
                self._store.log(run, "live")
        except TrackingError as error:
            if "DVC_STAGE" not in os.environ:
                raise
            tracking.say(error)


def _contents(make: Callable[[], Mapping[str, bytes]]) -> dict[str, bytes]:
    return dict(make())


def sources(root: Path, method: str) -> dict[str, str]:
    """Hash of a method's file, and of each file beside it that it imports, by its path in the project."""
    found: dict[str, str] = {}
    waiting = [method]
    while waiting:
        path = f"{_METHODS}/{waiting.pop()}.py"
        if path not in found:
            found[path] = dvc_md5(root / path)
            waiting += _SIBLING.findall((root / path).read_text(encoding="utf-8"))
    return found


def open_item(stage: str, *keys: str) -> Context:
    """Check settings and names; hash what the item depends on."""
    return _open(Item(stage, keys), Path())


def open_theory(stage: str, *keys: str) -> Context:
    """Open an item of the theory pipeline likewise."""
    return _open(Item(stage, keys), THEORY)


def _open(item: Item, folder: Path) -> Context:
    stage, keys = item.stage, item.keys
    root, params, pipeline = _project(folder)
    if item not in (known := pipeline.items(stage)):
        names = ", ".join(" ".join(other.keys) for other in known)
        why = f"{stage} {' '.join(keys)} is not part of it; it has {names}"
        raise ConfigError(root / "params.yaml", "pipeline", why)
    return _opened(root, params, pipeline, item)


def open_sweep(method: str, dataset: str | None, scenario: str) -> Context:
    """Open a sweep, which may be of any method, for a request of the pipeline."""
    root, params, pipeline = _project()
    path, datasets = root / "params.yaml", params.pipeline.datasets
    if dataset is None and len(datasets) > 1:
        raise ConfigError(path, "pipeline.datasets", f"there are {', '.join(datasets)}; say which with --dataset")
    dataset = dataset or datasets[0]
    for name, known in ((method, METHODS), (dataset, params.datasets)):
        if name not in known:
            raise ConfigError(path, name, f"not known; there are {', '.join(known)}")
    if dataset not in datasets or scenario not in params.pipeline.scenarios:
        why = f"{dataset} {scenario} is not in it, and a sweep is judged by its retrained models; add it, `dvc repro`"
        raise ConfigError(path, "pipeline", why)
    return _opened(root, params, pipeline, Item("sweep", (dataset, scenario, method)))


def _project(folder: Path = Path()) -> tuple[Path, schema.Params, Pipeline]:
    root = Path.cwd()
    return root, schema.load(root / "params.yaml"), Pipeline(root, folder)


def _opened(root: Path, params: schema.Params, pipeline: Pipeline, item: Item) -> Context:
    # classifiers leave the library to torch: most of their work is convolutions, or too small to choose
    cells = params.datasets.get(item.keys[0]) if item.keys and families.of(item.stage) is families.VAES else None
    engine.start(params.compute, cells.largest_product if cells else 0)
    return Context(Workspace(root), params, pipeline.inputs(item))

"""One item of the pipeline being run: its settings, what it depends on, its seeds, its folders, and its tracking."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from scforget import engine, schema, seeding
from scforget.artifacts import Workspace
from scforget.errors import ConfigError, TrackingError
from scforget.pipeline import Inputs, Item, Pipeline, dvc_md5
from scforget.tracking import Store


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

    def of_method(self, method: str, own: str) -> Context:
        """One method's part of an item that treats them all; ``own`` is its part of a folder the item depends on."""
        inputs = self.inputs.of_method(method, {own: dvc_md5(self.workspace.root / own)})
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

    def track(self, part: Inputs | None = None) -> None:
        """Log what the stage, or a part of it, left on disk.

        Under DVC a failure is a line, no error: DVC would delete the results.
        """
        from scforget import replay

        try:
            for run in replay.runs(self.workspace, part or self.inputs):
                self._store.log(run, "live")
        except TrackingError as error:
            if "DVC_STAGE" not in os.environ:
                raise
            print(f"scforget: {error}", file=sys.stderr)


def open_item(stage: str, *keys: str) -> Context:
    """Check settings and names; hash what the item depends on."""
    root = Path.cwd()
    params = schema.load(root / "params.yaml")
    pipeline = Pipeline(root)
    item = Item(stage, keys)
    if item not in (known := pipeline.items(stage)):
        names = ", ".join(" ".join(other.keys) for other in known)
        why = f"{stage} {' '.join(keys)} is not part of it; it has {names}"
        raise ConfigError(root / "params.yaml", "pipeline", why)
    engine.start(params.compute, params.datasets[keys[0]].largest_product)
    return Context(Workspace(root), params, pipeline.inputs(item))

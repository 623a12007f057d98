"""Data sets around the pipeline: public ones into ``downloads/``, a person's own into ``data/`` and under DVC."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from scforget import artifacts, config, schema
from scforget.data import public, sources
from scforget.errors import ArtifactError, ConfigError, DataError


def fetch(root: Path, name: str) -> None:
    """Download a public set, check it against the hash in params.yaml, and record the hash there if it has none."""
    params = schema.load(root / "params.yaml")
    if name not in public.PUBLIC:
        raise DataError("public set", repr(name), f"one of {', '.join(sorted(public.PUBLIC))}")
    recorded = params.downloads.get(name)
    found = public.fetch(name, root / "downloads", sha256=recorded)
    if recorded is None:
        config.set_value(root / "params.yaml", ("downloads", name), found.sha256, schema.Params)
        print(f"params.yaml: downloads.{name} = {found.sha256}", file=sys.stderr)
    print(f"downloads/{name}: {public.PUBLIC[name].citation}", file=sys.stderr)
    print(f"next: scforget data add downloads/{name} --name {name}", file=sys.stderr)


def _place(root: Path, path: Path, target: Path) -> None:
    """Copy one set to its place; several matrices of a public set are joined into one h5ad."""
    downloads = root / "downloads"
    if path.resolve().parent == downloads.resolve() and path.name in public.PUBLIC:
        found = public.fetch(path.name, downloads, sha256=None)  # on disk already: only says where its parts are
        artifacts.write_cells(target / f"{path.name}.h5ad", sources.join(found.paths))
    elif path.is_dir():
        shutil.copytree(path, target)
    else:
        target.mkdir(parents=True)
        shutil.copyfile(path, target / path.name)


def add(root: Path, path: Path, name: str, layer: str | None) -> None:
    """Check a data set, copy it to ``data/NAME``, and put ``data/`` under DVC.

    Raises
    ------
    DataError
        If its counts cannot be used.
    ConfigError
        If the name is not one, or taken.
    ArtifactError
        If the disk or DVC refuses; nothing half-copied is left.
    """
    if not re.fullmatch(schema.NAME, name):
        raise ConfigError(root / "params.yaml", f"datasets.{name}", "a name has letters, digits and '_' only")
    target = root / "data" / name
    if target.exists():
        raise ConfigError(target, "", "exists already; choose another --name or delete it first")
    if not (path.is_dir() and path.name in public.PUBLIC):
        sources.read(path, layer=layer)
    temporary = root / "data" / f".{name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _place(root, path, temporary)
        temporary.rename(target)
    except OSError as error:
        raise ArtifactError(target, f"cannot copy {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "add", "-q", "data"], cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["dvc add failed"])[-1]
        raise ArtifactError("data.dvc", f"copied to data/{name}, but `dvc add data` failed: {why}")
    print(f"copied to data/{name}; `dvc add data` done: commit data.dvc to record it", file=sys.stderr)
    print(
        f"next: give it a section datasets.{name} in params.yaml, or run `scforget profile {name}` if there is one",
        file=sys.stderr,
    )

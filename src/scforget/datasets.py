"""Data sets around the pipeline: public ones into ``downloads/``, a person's own into ``data/`` and under DVC."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from scforget import artifacts, config, schema, seeding
from scforget.data import images, public, sources, synthetic
from scforget.errors import ArtifactError, ConfigError, DataError
from scforget.pipeline import dvc_md5


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


def _is_download(root: Path, path: Path) -> bool:
    """Whether this is the folder of a public set that ``fetch`` made."""
    return path.resolve().parent == (root / "downloads").resolve() and path.name in public.PUBLIC


def _fetched(root: Path, name: str) -> tuple[Path, ...]:
    """What a public set consists of, checked against the hash recorded in params.yaml."""
    recorded = schema.load(root / "params.yaml").downloads.get(name)
    return public.fetch(name, root / "downloads", sha256=recorded).paths


def _check_data(root: Path) -> None:
    """Refuse to touch ``data/`` unless it is what ``data.dvc`` records: `dvc add` would forget what is missing."""
    if not (root / "data.dvc").exists():
        return
    recorded = config.read_yaml(root / "data.dvc")["outs"][0]["md5"]
    if not (root / "data").exists() or dvc_md5(root / "data") != recorded:
        why = "is not as data.dvc records it; `dvc pull -r bundled data.dvc`, or `dvc add data` if you changed it"
        raise ArtifactError(root / "data", why)


def _free_place(root: Path, name: str) -> Path:
    """``data/NAME``, if the name is one and nothing is there."""
    if not re.fullmatch(schema.NAME, name):
        raise ConfigError(root / "params.yaml", f"datasets.{name}", "a name has letters, digits and '_' only")
    target = root / "data" / name
    if target.exists():
        raise ConfigError(target, "", "exists already; choose another --name or delete it first")
    _check_data(root)
    return target


def _keep(root: Path, target: Path, write: Callable[[Path], None], section: str = "datasets") -> None:
    """Write a set to its place, whole or not at all, and put ``data/`` under DVC; ``section`` will describe it."""
    name = target.name
    temporary = target.with_name(f".{name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        write(temporary)
        temporary.rename(target)
    except OSError as error:
        raise ArtifactError(target, f"cannot write: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "add", "-q", "data"], cwd=root, capture_output=True, text=True, check=False
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["dvc add failed"])[-1]
        raise ArtifactError("data.dvc", f"written to data/{name}, but `dvc add data` failed: {why}")
    print(f"data/{name} is there; `dvc add data` done: commit data.dvc to record it", file=sys.stderr)
    print(f"next: describe it under {section}.{name} in params.yaml (profiles/ has an example)", file=sys.stderr)


def bundled(root: Path) -> None:
    """Make the bundled sets that are not there: ``data/pbmc68k`` and ``data/digits``."""
    for name, write in (("pbmc68k", sources.write_bundled), ("digits", images.write_digits)):
        if not (root / "data" / name).exists():
            write(root / "data" / name)


def _copy(path: Path, folder: Path) -> None:
    if path.is_dir():
        shutil.copytree(path, folder)
    else:
        folder.mkdir(parents=True)
        shutil.copyfile(path, folder / path.name)


def add(root: Path, path: Path, name: str, layer: str | None) -> None:
    """Check a data set, of cells or of images, copy it to ``data/NAME``, and put ``data/`` under DVC.

    Raises
    ------
    DataError
        If its counts or images cannot be used.
    ConfigError
        If the name is not one, or taken.
    ArtifactError
        If the disk or DVC refuses, or ``data/`` is not what ``data.dvc`` records; nothing half-copied is left.
    """
    target = _free_place(root, name)
    if _is_download(root, path):
        parts = _fetched(root, path.name)
        if path.name not in public.IMAGE_SETS:
            cells = sources.join(parts)
            _keep(root, target, lambda folder: artifacts.write_cells(folder / f"{name}.h5ad", cells))
            return
        (path,) = parts
    if not images.recognises(path):
        sources.read(path, layer=layer)
        _keep(root, target, lambda folder: _copy(path, folder))
        return
    if layer is not None:
        raise DataError(f"--layer {layer}", "an image set", "no layer; images have none")
    found = images.without_duplicates(images.read(path))
    if dropped := found.repeats + found.disputed:
        why = f"{found.repeats} repetitions, {found.disputed} images of more than one person"
        print(f"{dropped} of the images will not be used: {why}", file=sys.stderr)
    _keep(root, target, lambda folder: _copy(path, folder), "classifiers")


def simulate(root: Path, preset: str, name: str) -> None:
    """Write a simulated set to ``data/NAME``, drawn with the seed of params.yaml, and put ``data/`` under DVC."""
    if preset not in synthetic.PRESETS:
        raise DataError("preset", repr(preset), f"one of {', '.join(sorted(synthetic.PRESETS))}")
    target = _free_place(root, name)
    seed = seeding.derive(schema.load(root / "params.yaml").seed, "simulate", preset)
    cells = synthetic.simulate(synthetic.PRESETS[preset], seed=seed)
    _keep(root, target, lambda folder: artifacts.write_cells(folder / f"{name}.h5ad", cells))

"""What was measured, where and when; and whether an earlier measurement still speaks of the same code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_PACKAGES = ["torch", "numpy", "scipy", "numba", "opacus", "scvi-tools", "lightning"]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def has_scvi() -> bool:
    """Whether scvi-tools is installed (it is not imported)."""
    return importlib.util.find_spec("scvi") is not None


def versions() -> dict[str, str | None]:
    """Of Python and of what computes."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _line(path: str, key: str) -> str | None:
    if not Path(path).exists():
        return None
    values = (line.split(":", 1) for line in Path(path).read_text().splitlines() if ":" in line)
    return next((value.strip() for name, value in values if name.strip() == key), None)


def _processor() -> str:
    """Name, and on Linux family and model: clouds rent out several generations by one name."""
    name = _line("/proc/cpuinfo", "model name") or platform.processor()
    family, model = (_line("/proc/cpuinfo", key) for key in ("cpu family", "model"))
    return f"{name} (family {family}, model {model})" if family and model else name


def hardware(threads: int) -> dict[str, Any]:
    """Processor, cores, memory, threads of each process."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _line("/proc/meminfo", "MemTotal"),
        "torch_threads": threads,
        "system": platform.platform(),
    }


def stamp() -> dict[str, Any]:
    """Commit, whether files differ from it, date, and how busy the machine was."""
    load = [round(value, 2) for value in os.getloadavg()]
    changed = bool(_git("status", "--porcelain", "--untracked-files=no"))
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"commit": _git("rev-parse", "HEAD"), "uncommitted_changes": changed, "date": date, "load_average": load}


def fingerprint() -> str:
    """Of the product's sources: what was measured with other sources is measured again."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "src").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]

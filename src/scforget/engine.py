"""How arithmetic is done in this process: matrix products, precision, device and threads.

What is decided here once is handed to every worker process and is part of a model's identity, as it changes the last
digits of every result. Nothing is decided by a stopwatch: a choice must not differ between workers or after a resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from scforget.errors import ConfigError
from scforget.settings import Settings

_Library = Literal["mkl", "onednn"]
# A float32 product of these sizes is right to 3e-7 of its norm, one of operands rounded to bfloat16 to 2e-3.
_LARGEST_ERROR = 2e-6
# Below this many multiplications oneDNN's preparations cost more than it saves (docs/performance.md).
_LARGE = 2**26
# Processors that multiply bfloat16 numbers themselves; on others the conversions cost more than they save: ResNet-18
# is 1.5 times as fast as in float32 with avx512_bf16, 0.6 times where oneDNN may not use it (ONEDNN_MAX_CPU_ISA).
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
_CHECKED = ((32, 512, 256), (128, 2000, 1024), (512, 1024, 2000))


class NumericsSettings(Settings):
    """How a model's arithmetic is done; part of its recipe.

    Attributes
    ----------
    matrix_products
        Library for float32 products: ``mkl`` (torch's own choice), ``onednn``, or ``auto``: oneDNN for large products
        on processors with AVX-512 on which MKL does without it (AMD), if it is found to be as accurate there.
    autocast
        ``bf16``: training runs its layers in bfloat16 (weights, losses and everything but training stay float32);
        ``auto``: where the device multiplies bfloat16 numbers itself.
    device
        ``cpu`` or ``cuda``.
    threads
        Of each model; models share the cores.
    """

    matrix_products: Literal["auto", "mkl", "onednn"]
    autocast: Literal["none", "bf16", "auto"]
    device: Literal["cpu", "cuda"]
    threads: Annotated[int, Field(ge=1)]


class ComputeSettings(Settings):
    """How models are made, and where.

    Attributes
    ----------
    numerics
        What results depend on.
    scheduler
        Address of a Dask scheduler (``tcp://host:port``) that gets the models to make; ``None``: this machine.
    """

    numerics: NumericsSettings
    scheduler: Annotated[str, Field(pattern=r"^[a-z+]+://.+")] | None


@dataclass(frozen=True)
class Numerics:
    """What results depend on besides seeds and settings: :class:`NumericsSettings`, decided."""

    matrix_products: _Library
    autocast: Literal["none", "bf16"]
    device: Literal["cpu", "cuda"]
    threads: int

    def __str__(self) -> str:
        """One line for tags and fingerprints."""
        return ", ".join(f"{key} {value}" for key, value in asdict(self).items())


_current = Numerics("mkl", "none", "cpu", torch.get_num_threads())
_scheduler: str | None = None


def _flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, frozenset[str]]:
    """Vendor of the processor and what it can do; nothing where the system does not say."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    found = {key.strip(): value.strip() for key, value in found.items()}
    return found.get("vendor_id", ""), frozenset(found.get("flags", "").split())


def _set(library: _Library) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if library == "onednn" else "none"  # type: ignore[attr-defined]


@cache
def product_error(library: _Library) -> float:
    """Largest relative error, by norm, of float32 products of fixed matrices as a library computes them.

    Notes
    -----
    ``fp32_precision = "bf16"`` allows oneDNN to round operands to bfloat16. Where it has no such kernel it computes in
    float32, with AVX-512; where it has one (AMX) the error is 2e-3.
    """
    generator = torch.Generator().manual_seed(0)
    before, worst = _current.matrix_products, 0.0
    for rows, inner, columns in _CHECKED:
        a, b = torch.randn(rows, inner, generator=generator), torch.randn(columns, inner, generator=generator)
        upstream = torch.randn(rows, columns, generator=generator)
        for left, right in ((a, b.T), (upstream.T, a), (upstream, b)):
            _set(library)
            found = left @ right
            _set(before)
            exact = left.double() @ right.double()
            worst = max(worst, float((found.double() - exact).norm() / exact.norm()))
    return worst


def _profits(vendor: str, flags: frozenset[str]) -> bool:
    return vendor == "AuthenticAMD" and "avx512f" in flags and torch.backends.mkldnn.is_available()


def _halves(device: Literal["cpu", "cuda"]) -> bool:
    """Whether a device has instructions for bfloat16."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(_flags()[1] & _BF16_FLAGS)


def choose(settings: NumericsSettings, multiplications: int) -> Numerics:
    """Decide what is to be decided, from the processor and the accuracy of its products; never by a stopwatch.

    Parameters
    ----------
    multiplications
        Of the largest matrix product of a training step: cells of a batch × inputs × outputs of a layer.

    Raises
    ------
    ConfigError
        If this machine cannot do what is asked.
    """
    library = settings.matrix_products
    if library == "auto":
        wanted = multiplications >= _LARGE and _profits(*_flags()) and product_error("onednn") <= _LARGEST_ERROR
        library = "onednn" if wanted else "mkl"
    autocast = settings.autocast
    if autocast == "auto":
        autocast = "bf16" if _halves(settings.device) else "none"
    found = Numerics(library, autocast, settings.device, settings.threads)
    _check(found)
    return found


def _check(numerics: Numerics) -> None:
    where = Path("params.yaml")
    if numerics.matrix_products == "onednn" and (error := product_error("onednn")) > _LARGEST_ERROR:
        why = f"onednn rounds to bfloat16 on this processor (relative error {error:.0e}); use mkl"
        raise ConfigError(where, "compute.numerics.matrix_products", why)
    if numerics.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(where, "compute.numerics.device", "no CUDA device is here; use cpu")


def use(numerics: Numerics) -> None:
    """Compute in this process as described; cheap when nothing changes."""
    global _current  # noqa: PLW0603  (the switches are the process's own)
    if numerics != _current:
        _check(numerics)
        _current = numerics
    _set(numerics.matrix_products)
    if torch.get_num_threads() != numerics.threads:
        torch.set_num_threads(numerics.threads)


def current() -> Numerics:
    """What :func:`use` has set."""
    return _current


def start(settings: ComputeSettings, multiplications: int) -> None:
    """Decide for a whole run of a stage; see :func:`choose`."""
    global _scheduler  # noqa: PLW0603
    _scheduler = settings.scheduler
    use(choose(settings.numerics, multiplications))


def scheduler() -> str | None:
    """Address of the Dask scheduler, or ``None`` for processes of this machine."""
    return _scheduler


def device() -> torch.device:
    """Where models and batches live: the processor, or the first CUDA device that the process may see."""
    return torch.device("cuda:0" if _current.device == "cuda" else "cpu")


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal numbers on the device, drawn on the CPU: a stream is the same everywhere."""
    return torch.randn(*shape, generator=generator).to(device())


def autocast() -> AbstractContextManager[object]:
    """Run a training step's layers in bfloat16, if so set."""
    if _current.autocast == "none":
        return nullcontext()
    return torch.autocast(_current.device, torch.bfloat16)

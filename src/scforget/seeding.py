"""Every random stream of the product: derived from one seed and the names of what it is for.

No other module seeds anything. A stream depends only on its names, so adding a stage, a model or an epoch never shifts
the stream of another, and a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, *names: object) -> int:
    """Derive the seed of a named stream.

    Parameters
    ----------
    seed
        The global seed of ``params.yaml``, or one derived before; any integer.
    names
        What the stream is for, outermost first; each is turned into text.

    Returns
    -------
    int
        In [0, 2**63); equal for equal arguments on every machine and Python version.
    """
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(seed: int, *names: object) -> np.random.Generator:
    """Return the NumPy generator of a named stream."""
    return np.random.default_rng(derive(seed, *names))


def torch_generator(seed: int, *names: object) -> torch.Generator:
    """Return the torch CPU generator of a named stream."""
    return torch.Generator().manual_seed(derive(seed, *names))


@contextmanager
def scope(seed: int, *names: object) -> Iterator[torch.Generator]:
    """Fork torch's global stream (dropout draws from it), seed it by name, and restore it afterwards.

    Yields
    ------
    torch.Generator
        A second, explicit stream of the same name, for permutations and latent noise.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, *names, "global"))
        yield torch_generator(seed, *names)

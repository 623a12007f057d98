"""A checkpoint in memory whose process dies when it is told to, for tests of resuming."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor


class KilledError(Exception):
    """A kill."""


class MemoryCheckpoint:
    """Keeps copies of what is saved; the process dies after the k-th save."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.kept: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self.saves, self.dies_at = 0, dies_at

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return copy.deepcopy(self.kept)

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.kept = copy.deepcopy(({name: value.clone() for name, value in tensors.items()}, state))
        self.saves += 1
        if self.saves == self.dies_at:
            raise KilledError

    def restart_clock(self) -> None:
        """Time is not counted here."""

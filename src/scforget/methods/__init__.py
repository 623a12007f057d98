"""Unlearning methods: one file each, with its settings and one function; this registry names them all.

A method gets a copy of the original that is its own to change, the task, the cell sets of the request, its settings,
a seed and a checkpoint, and returns a :class:`~scforget.training.Trained`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from scforget.methods import partial_reset, retain_finetune, ssd
from scforget.settings import Settings
from scforget.training import Trained

__all__ = ["METHODS", "Method"]


class Method(NamedTuple):
    """A method's settings class and its function ``(model, task, sets, settings, *, seed, checkpoint)``."""

    settings: type[Settings]
    run: Callable[..., Trained]


METHODS: dict[str, Method] = {
    "retain_finetune": Method(retain_finetune.RetainFinetuneSettings, retain_finetune.retain_finetune),
    "partial_reset": Method(partial_reset.PartialResetSettings, partial_reset.partial_reset),
    "ssd": Method(ssd.SSDSettings, ssd.ssd),
}

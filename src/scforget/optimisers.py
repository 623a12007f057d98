"""Torch's optimisers, without the two seconds in which the first one of a process imports torch's compiler."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# The steps as they are written, without the wrapper that imports torch._dynamo to tell it where a graph ends.
_ADAM_STEP = inspect.unwrap(torch.optim.Adam.step)
_SGD_STEP = inspect.unwrap(torch.optim.SGD.step)


def _spare_compiler() -> None:
    """Tell the methods that torch keeps out of compiled code to call themselves: nothing here is ever compiled.

    Torch wraps them so that their first call imports ``torch._dynamo`` and asks it for a version of the method that the
    compiler leaves alone; the answer is remembered on the method. Here the method itself is remembered as the answer.
    Where a later torch does it otherwise, this changes nothing but the time.
    """
    for method in vars(Optimizer).values():
        inner = getattr(method, "__wrapped__", None)
        if inner is not None and not hasattr(inner, "__dynamo_disable"):
            setattr(inner, "__dynamo_disable", inner)


_spare_compiler()


class Adam(torch.optim.Adam):
    """Adam with torch's defaults, fused (Kingma & Ba 2015)."""

    def __init__(self, parameters: Iterable[Tensor], learning_rate: float, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter from its gradient."""
        return _ADAM_STEP(self, closure)


class SGD(torch.optim.SGD):
    """Plain gradient descent."""

    def __init__(self, parameters: Iterable[Tensor], learning_rate: float) -> None:
        super().__init__(parameters, lr=learning_rate)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter from its gradient."""
        return _SGD_STEP(self, closure)

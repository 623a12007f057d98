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
    """Adam with torch's defaults, fused (Kingma & Ba 2015).

    After the first step, which torch takes, the fused kernel is called directly: torch's own checks and profiler hooks
    around it are a tenth of a small model's training step.
    """

    def __init__(self, parameters: Iterable[Tensor], learning_rate: float, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter from its gradient."""
        groups = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        if closure is not None or not all("exp_avg" in self.state.get(p, ()) for group in groups for p in group):
            return _ADAM_STEP(self, closure)
        for group, parameters in zip(self.param_groups, groups, strict=True):
            if not parameters:
                continue
            states = [self.state[parameter] for parameter in parameters]
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            beta1, beta2 = group["betas"]
            torch._fused_adam_(
                parameters, [parameter.grad for parameter in parameters],
                [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [], steps,
                lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"], eps=group["eps"],
                amsgrad=False, maximize=False,
            )  # fmt: skip
        return None


class SGD(torch.optim.SGD):
    """Gradient descent, with heavy-ball momentum and weight decay (added to the gradient) where asked."""

    def __init__(
        self, parameters: Iterable[Tensor], learning_rate: float, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, lr=learning_rate, momentum=momentum, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter from its gradient."""
        return _SGD_STEP(self, closure)

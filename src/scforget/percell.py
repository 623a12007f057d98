"""Gradients of single examples, summed, squared or measured without ever being stored: one pass over a whole batch.

A layer's input and the gradient of its output hold all there is to know: a Linear layer's gradient for one example is
the outer product of the two, so its square and its norm have closed forms. Nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.functional import layer_norm, pad, unfold
from torch.nn.grad import conv2d_weight
from torch.nn.modules.batchnorm import _BatchNorm

from scforget.models.vae import PerGene

# Gradients of single examples of a convolution that may be in memory at once.
_CONVOLUTION_ENTRIES = 2**24
#: Tensors by the name of a layer's own parameter: ``weight``, ``bias``.
Tensors = dict[str, Tensor]


class Rule(Protocol):
    """What a type of layer makes of its ``inputs [B, …]`` and its output's ``gradient [B, …]``."""

    def squares(self, module: Any, inputs: Tensor, gradient: Tensor) -> Tensors:
        """Sum over examples of the squared gradient, of each parameter's shape."""

    def squared_norms(self, module: Any, inputs: Tensor, gradient: Tensor) -> Tensors:
        """Squared norm of each example's gradient, ``[B]`` by parameter."""

    def sums(self, module: Any, inputs: Tensor, gradient: Tensor) -> Tensors:
        """Sum over examples of the gradient, of each parameter's shape."""


def _sum_over(value: Tensor, dimensions: range) -> Tensor:
    return value.sum(tuple(dimensions)) if dimensions else value  # torch takes no dimensions for all of them


def _layer_norm_rows(module: nn.LayerNorm, inputs: Tensor, gradient: Tensor) -> Tensors:
    normalised = layer_norm(inputs, module.normalized_shape, None, None, module.eps)
    between = range(1, gradient.ndim - len(module.normalized_shape))
    return {"weight": _sum_over(gradient * normalised, between), "bias": _sum_over(gradient, between)}


def _batch_norm_rows(module: nn.BatchNorm1d | nn.BatchNorm2d, inputs: Tensor, gradient: Tensor) -> Tensors:
    assert module.running_mean is not None  # others are refused
    assert module.running_var is not None
    shape = (-1, *[1] * (inputs.ndim - 2))
    scale = (module.running_var + module.eps).rsqrt()
    normalised = (inputs - module.running_mean.view(shape)) * scale.view(shape)
    places = range(2, inputs.ndim)
    return {"weight": _sum_over(gradient * normalised, places), "bias": _sum_over(gradient, places)}


def _per_gene_rows(_module: PerGene, _inputs: Tensor, gradient: Tensor) -> Tensors:
    return {"bias": gradient}


class _Rows:
    """A layer with so few parameters that each example's gradient, ``[B, …]``, can be written down."""

    def __init__(self, rows: Callable[[Any, Tensor, Tensor], Tensors]) -> None:
        self._rows = rows

    def squares(self, module: nn.Module, inputs: Tensor, gradient: Tensor) -> Tensors:
        return {name: row.square().sum(0) for name, row in self._rows(module, inputs, gradient).items()}

    def squared_norms(self, module: nn.Module, inputs: Tensor, gradient: Tensor) -> Tensors:
        rows = self._rows(module, inputs, gradient)
        return {name: row.flatten(1).square().sum(1) for name, row in rows.items()}

    def sums(self, module: nn.Module, inputs: Tensor, gradient: Tensor) -> Tensors:
        return {name: row.sum(0) for name, row in self._rows(module, inputs, gradient).items()}


class _Linear:
    """The weight's gradient for one example is the outer product g aᵀ: its square g² (a²)ᵀ, its norm ‖g‖·‖a‖."""

    def squares(self, _module: nn.Linear, inputs: Tensor, gradient: Tensor) -> Tensors:
        squared = gradient.square()
        return {"weight": squared.T @ inputs.square(), "bias": squared.sum(0)}

    def squared_norms(self, _module: nn.Linear, inputs: Tensor, gradient: Tensor) -> Tensors:
        squared = gradient.square().sum(1)
        return {"weight": squared * inputs.square().sum(1), "bias": squared}

    def sums(self, _module: nn.Linear, inputs: Tensor, gradient: Tensor) -> Tensors:
        return {"weight": gradient.T @ inputs, "bias": gradient.sum(0)}


class _Conv2d:
    """The weight's gradient for one example is a sum over places, to be taken before it is squared."""

    @staticmethod
    def _padded(module: nn.Conv2d, inputs: Tensor) -> Tensor:
        # torch keeps the padding of every mode, ``same`` included, in the form that pad takes
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return pad(inputs, module._reversed_padding_repeated_twice, mode=mode)

    def _rows(self, module: nn.Conv2d, inputs: Tensor, gradient: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Each example's gradient of the weight, ``[b, O, I/groups, k, k]``, some examples at a time."""
        patch = module.in_channels * module.weight[0, 0].numel()
        largest = max(module.weight.numel(), patch * gradient.shape[2:].numel(), 1)
        size = max(1, _CONVOLUTION_ENTRIES // largest)
        for start in range(0, len(inputs), size):
            part = slice(start, start + size)
            padded = self._padded(module, inputs[part])
            patches = unfold(padded, module.kernel_size, dilation=module.dilation, stride=module.stride)
            outputs = gradient[part].flatten(2).unflatten(1, (module.groups, -1))
            rows = outputs @ patches.unflatten(1, (module.groups, -1)).mT
            yield part, rows.reshape(len(rows), *module.weight.shape)

    def squares(self, module: nn.Conv2d, inputs: Tensor, gradient: Tensor) -> Tensors:
        weight = torch.zeros_like(module.weight)
        for _, rows in self._rows(module, inputs, gradient):
            weight += rows.square().sum(0)
        return {"weight": weight, "bias": gradient.sum((2, 3)).square().sum(0)}

    def squared_norms(self, module: nn.Conv2d, inputs: Tensor, gradient: Tensor) -> Tensors:
        weight = gradient.new_zeros(len(gradient))
        for part, rows in self._rows(module, inputs, gradient):
            weight[part] = rows.flatten(1).square().sum(1)
        return {"weight": weight, "bias": gradient.sum((2, 3)).square().sum(1)}

    def sums(self, module: nn.Conv2d, inputs: Tensor, gradient: Tensor) -> Tensors:
        padded, shape = self._padded(module, inputs), module.weight.shape
        weight = conv2d_weight(padded, shape, gradient, module.stride, 0, module.dilation, module.groups)
        return {"weight": weight, "bias": gradient.sum((0, 2, 3))}


#: Layers whose parameters can be differentiated example by example. A subclass may compute something else, so that it
#: needs an entry of its own.
RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _Linear(),
    nn.LayerNorm: _Rows(_layer_norm_rows),
    nn.BatchNorm1d: _Rows(_batch_norm_rows),
    nn.BatchNorm2d: _Rows(_batch_norm_rows),
    nn.Conv2d: _Conv2d(),
    PerGene: _Rows(_per_gene_rows),
}

#: Dimensions of the input, examples included, where a rule is for that number alone.
_DIMENSIONS: dict[type[nn.Module], int] = {nn.Linear: 2, nn.Conv2d: 4, nn.BatchNorm2d: 4, PerGene: 2}


class Trace(NamedTuple):
    """One layer in one pass.

    Attributes
    ----------
    name, module
        The layer.
    parameters
        Its own parameters that are asked for, by their names in the layer.
    inputs : ``[B, …]``
        What came in.
    gradient : ``[B, …]``
        Of the sum of the losses in what went out; row i is that of example i's loss.
    """

    name: str
    module: nn.Module
    parameters: frozenset[str]
    inputs: Tensor
    gradient: Tensor

    def _named(self, values: Tensors) -> Tensors:
        return {_join(self.name, name): value for name, value in values.items() if name in self.parameters}

    def squares(self) -> Tensors:
        """Sum over examples of each parameter's squared gradient, of its shape, by its name in the model."""
        return self._named(RULES[type(self.module)].squares(self.module, self.inputs, self.gradient))

    def squared_norms(self) -> Tensor:
        """Squared norm of each example's gradient in this layer's parameters, ``[B]``."""
        found = RULES[type(self.module)].squared_norms(self.module, self.inputs, self.gradient)
        return torch.stack([value for name, value in found.items() if name in self.parameters]).sum(0)

    def sums(self, factors: Tensor | None = None) -> Tensors:
        """Sum over examples of each parameter's gradient, scaled by ``factors [B]``, by its name in the model."""
        gradient = self.gradient
        if factors is not None:  # an example's gradient is linear in its output gradients
            gradient = gradient * factors.view(-1, *[1] * (gradient.ndim - 1))
        return self._named(RULES[type(self.module)].sums(self.module, self.inputs, gradient))


class _Call(NamedTuple):
    """A layer's input, how often that had been written to, and where autograd will deliver the output's gradient."""

    inputs: Tensor
    version: int
    edge: GradientEdge


def _join(layer: str, parameter: str) -> str:
    return f"{layer}.{parameter}" if layer else parameter


def _plan(model: nn.Module, parameters: Collection[str] | None) -> dict[str, frozenset[str]]:
    """Own parameters of each layer to be watched.

    Raises
    ------
    TypeError
        If they cannot be differentiated example by example.
    ValueError
        If a normalisation makes examples depend on one another.
    """
    known = dict(model.named_parameters())
    if unknown := set(parameters or ()) - known.keys():
        raise TypeError(f"no such parameters: {sorted(unknown)}")
    asked = {name for name, value in known.items() if value.requires_grad} if parameters is None else parameters
    # by identity: a parameter of two layers has but one name
    wanted = {id(known[name]) for name in asked}
    plan: dict[str, frozenset[str]] = {}
    owner: dict[int, str] = {}
    for layer, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(f"{layer}: normalisation by the batch makes examples depend on one another; use eval mode")
        own = {n: value for n, value in module.named_parameters(recurse=False) if id(value) in wanted}
        if own and type(module) not in RULES:
            names = sorted(_join(layer, name) for name in own)
            raise TypeError(f"no rule for {type(module).__name__}, nor for parameters outside known layers: {names}")
        for name, value in own.items():
            if (other := owner.setdefault(id(value), layer)) != layer:
                raise TypeError(f"{layer} and {other} share a parameter: {name}")
            if not value.requires_grad:
                raise TypeError(f"a frozen parameter has no gradient: {_join(layer, name)}")
        if own:
            plan[layer] = frozenset(own)
    return plan


@contextmanager
def _watched(model: nn.Module, layers: Collection[str]) -> Iterator[dict[str, _Call]]:
    """Note what goes through some layers."""
    calls: dict[str, _Call] = {}

    def watch(layer: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
            inputs = arguments[0].detach()
            if layer in calls:
                raise TypeError(f"{layer} is used more than once, so that its gradient is a sum over uses")
            if (wanted := _DIMENSIONS.get(type(module), inputs.ndim)) != inputs.ndim:
                raise TypeError(f"{layer}: input of {inputs.ndim} dimensions, wanted {wanted}, examples first")
            # the edge stays right where a later layer writes over the output
            calls[layer] = _Call(inputs, inputs._version, get_gradient_edge(output))

        return hook

    handles = [model.get_submodule(layer).register_forward_hook(watch(layer)) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def trace(
    model: nn.Module, losses: Callable[[], Tensor], parameters: Collection[str] | None = None
) -> tuple[list[Trace], Tensor]:
    """Run a batch once and its gradients back to every layer's output.

    Parameters
    ----------
    losses
        Runs the model, each layer at most once, and returns every example's loss, ``[B]``; no example's may depend
        on another's.
    parameters
        Those to differentiate in, by name; without them all that are not frozen.

    Returns
    -------
    tuple
        One trace for each layer that a gradient arrives at, and the losses, ``[B]``, detached. A parameter that no
        trace speaks of has a gradient of 0.

    Raises
    ------
    TypeError
        If a layer is of an unknown type and has parameters, is used more than once or outside its own call, or shares
        a parameter with another.
    ValueError
        If a normalisation makes examples depend on one another, or a layer's input was written over.
    """
    plan = _plan(model, parameters)
    with _watched(model, plan) as calls:
        total = losses()
    for layer, call in calls.items():
        if call.inputs._version != call.version:
            raise ValueError(f"{layer}: its input was written over after it was used")
    idle = [model.get_submodule(layer).get_parameter(n) for layer in plan.keys() - calls.keys() for n in plan[layer]]
    edges = [*(call.edge for call in calls.values()), *map(get_gradient_edge, idle)]
    found = torch.autograd.grad(total.sum(), edges, allow_unused=True) if edges else ()
    if any(gradient is not None for gradient in found[len(calls) :]):
        raise TypeError("a layer's parameters are used outside its own call")
    traces = []
    for (layer, call), gradient in zip(calls.items(), found, strict=False):
        if gradient is None:
            continue
        if not len(total) == len(call.inputs) == len(gradient):
            raise TypeError(f"{layer}: rows {len(call.inputs)} in, {len(gradient)} out, for {len(total)} losses")
        module = model.get_submodule(layer)
        precision = next(module.parameters(recurse=False)).dtype  # autocast has layers compute in a lower one
        traces.append(Trace(layer, module, plan[layer], call.inputs.to(precision), gradient.to(precision)))
    return traces, total.detach()


def squared_norms(traces: Collection[Trace], losses: Tensor) -> Tensor:
    """Squared norm of each example's gradient over all layers, ``[B]``; ``losses [B]`` are those of the traces."""
    return torch.stack([torch.zeros_like(losses), *(one.squared_norms() for one in traces)]).sum(0)


def gradient_norms(
    model: nn.Module, losses: Callable[[], Tensor], parameters: Collection[str] | None = None
) -> Tensor:  # fmt: skip
    """L2 norm of each example's gradient, ``[B]``, in one pass; arguments as of :func:`trace`."""
    return squared_norms(*trace(model, losses, parameters)).sqrt()

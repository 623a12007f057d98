"""Closed forms of single examples' gradients against one backward pass for each example, in double precision."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from scforget import percell
from scforget.models.vae import PerGene

SIDE = 7  # of the images


class Heads(nn.Module):
    """Two answers of one hidden layer, one of them the same for every example, and a layer that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.scale, self.shift = nn.Linear(6, 5), nn.Linear(5, 4), PerGene(4)
        self.idle = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.hidden(inputs).tanh()
        return self.scale(hidden) * self.shift(hidden).exp()


class Residual(nn.Module):
    """Every layer sees what another one has left, and the rectifiers write over their inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm, self.second = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.relu, self.last = nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        first = self.relu(self.first(inputs))
        return self.last((first + self.relu(self.norm(self.second(first)))).mean((2, 3)))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5, bias=False), nn.LayerNorm(5, bias=False),
        nn.LayerNorm(5, elementwise_affine=False), nn.BatchNorm1d(5), nn.Linear(5, 3),
    )  # fmt: skip


def cnn(**options: Any) -> nn.Module:
    channels = {"in_channels": 3, "out_channels": 4, **options}
    return nn.Sequential(
        nn.Conv2d(**channels, kernel_size=3, stride=2, padding=1), nn.BatchNorm2d(channels["out_channels"]),
        nn.ReLU(inplace=True), nn.Conv2d(channels["out_channels"], 2, 2, stride=(1, 2), dilation=(2, 1)), nn.Tanh(),
        nn.LayerNorm((2, 2)), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6,)),
    "heads": (Heads, (6,)),
    "cnn": (cnn, (3, SIDE, SIDE)),
    "grouped": (lambda: cnn(in_channels=4, out_channels=6, groups=2, bias=False), (4, SIDE, SIDE)),
    "residual": (Residual, (3, SIDE, SIDE)),
}


def prepared(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """In eval mode, with statistics and scales that are not those of a new model."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval().to(dtype)


def losses(model: nn.Module, inputs: Tensor) -> Tensor:
    return (model(inputs).flatten(1) - 1).square().sum(1)


def per_example(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """``[B, …]`` by parameter, float64: each example alone, through a copy of the model that is twice as precise."""
    model, inputs = deepcopy(model).double(), inputs.double()
    found = {name: [value.new_zeros(0, *value.shape)] for name, value in model.named_parameters()}
    for index in range(len(inputs)):
        gradients = torch.autograd.grad(
            losses(model, inputs[index : index + 1]).sum(),
            list(model.parameters()),
            allow_unused=True,
            materialize_grads=True,
        )
        for name, gradient in zip(found, gradients, strict=True):
            found[name].append(gradient[None])
    return {name: torch.cat(values) for name, values in found.items()}


def assert_close(found: Tensor, wanted: Tensor, terms: Tensor | None = None) -> None:
    """Relative to the tensor's norm, or to that of the sum of its terms' sizes where they cancel."""
    bound = 1e-10 if found.dtype == torch.float64 else 1e-5
    assert found.shape == wanted.shape
    scale = wanted if terms is None else terms.abs().sum(0)
    assert float((found.double() - wanted).norm()) <= bound * float(scale.norm())


def assert_equals_a_loop(model: nn.Module, inputs: Tensor) -> None:
    """Squares, sums, rescaled sums and norms, against each example's own gradient."""
    each = per_example(model, inputs)
    norms = torch.stack([rows.flatten(1).square().sum(1) for rows in each.values()]).sum(0)
    factors = torch.linspace(0.1, 2.0, len(inputs), dtype=inputs.dtype)
    traces, total = percell.trace(model, lambda: losses(model, inputs))
    squares = {name: value for one in traces for name, value in one.squares().items()}
    sums = {name: value for one in traces for name, value in one.sums(factors).items()}
    plain = {name: value for one in traces for name, value in one.sums().items()}
    assert total.shape == (len(inputs),)
    assert squares.keys() == sums.keys() == plain.keys()
    assert not any(each[name].any() for name in each.keys() - squares.keys())
    for name, value in squares.items():
        assert_close(value, each[name].square().sum(0))
        assert_close(sums[name], torch.einsum("b,b...->...", factors.double(), each[name]), each[name])
        assert_close(plain[name], each[name].sum(0), each[name])
    assert_close(percell.squared_norms(traces, total), norms)
    assert_close(percell.gradient_norms(model, lambda: losses(model, inputs)), norms.sqrt())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(list(MODELS)), st.integers(0, 4), st.integers(0, 2**31))
def test_trace_equals_a_loop_over_examples(name: str, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    make, shape = MODELS[name]
    assert_equals_a_loop(prepared(make()), torch.randn(size, *shape, dtype=torch.float64))


@pytest.mark.parametrize("name", MODELS)
def test_trace_in_single_precision_is_right_to_five_digits(name: str) -> None:
    torch.manual_seed(1)
    make, shape = MODELS[name]
    assert_equals_a_loop(prepared(make(), torch.float32), torch.randn(64, *shape))


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.sampled_from([1, 2, 3]))
    kernel, dilation = draw(st.sampled_from([1, 2, 3, (3, 2)])), draw(st.sampled_from([1, 2, (1, 2)]))
    padding = draw(st.sampled_from([0, 1, (2, 1), "same", "valid"]))
    return {
        "in_channels": groups * draw(st.integers(1, 2)), "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": kernel, "dilation": dilation, "padding": padding, "groups": groups,
        "stride": 1 if padding == "same" else draw(st.sampled_from([1, 2, (2, 1), 3])),
        "bias": draw(st.booleans()), "padding_mode": draw(st.sampled_from(["zeros", "reflect", "circular"])),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@settings(max_examples=80, deadline=None, derandomize=True)
@given(convolutions(), st.integers(0, 3), st.integers(0, 2**31), st.booleans())
def test_trace_of_any_convolution_equals_a_loop(options: dict[str, Any], size: int, seed: int, piecewise: bool) -> None:
    torch.manual_seed(seed)
    model = prepared(nn.Sequential(nn.Conv2d(**options), nn.Tanh()))
    with pytest.MonkeyPatch.context() as patch:
        if piecewise:  # one example at a time
            patch.setattr(percell, "_CONVOLUTION_ENTRIES", 1)
        assert_equals_a_loop(model, torch.randn(size, options["in_channels"], SIDE, SIDE, dtype=torch.float64))


def test_trace_of_a_convolution_sums_over_places_before_it_squares() -> None:
    torch.manual_seed(0)
    model, inputs = prepared(nn.Conv2d(2, 3, 3)), torch.randn(4, 2, SIDE, SIDE, dtype=torch.float64)
    (one,), _ = percell.trace(model, lambda: losses(model, inputs))
    patches = nn.functional.unfold(inputs, 3)
    outputs = one.gradient.flatten(2)
    placewise = torch.einsum("bop,bip->oi", outputs.square(), patches.square()).view(3, 2, 3, 3)
    assert not torch.allclose(one.squares()["weight"], placewise, rtol=0.05)


def test_trace_is_of_the_parameters_that_are_asked_for() -> None:
    torch.manual_seed(0)
    model, inputs = prepared(mlp()), torch.randn(5, 6, dtype=torch.float64)
    each = per_example(model, inputs)
    asked = ["0.bias", "1.weight", "7.weight"]
    wanted = torch.stack([each[name].flatten(1).square().sum(1) for name in asked]).sum(0)
    assert_close(percell.gradient_norms(model, lambda: losses(model, inputs), asked), wanted.sqrt())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in asked)
    traces, _ = percell.trace(model, lambda: losses(model, inputs))
    assert {name for one in traces for name in one.sums()} == set(asked)
    with pytest.raises(TypeError, match=r"frozen parameter has no gradient: 0\.weight"):
        percell.trace(model, lambda: losses(model, inputs), ["0.weight"])


def test_trace_leaves_no_trace() -> None:
    model = prepared(mlp())
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def broken() -> Tensor:
        losses(model, torch.zeros(2, 6, dtype=torch.float64))
        raise RuntimeError("broken")

    percell.gradient_norms(model, lambda: losses(model, torch.zeros(2, 6, dtype=torch.float64)))
    with pytest.raises(RuntimeError, match="broken"):
        percell.trace(model, broken)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_trace_under_autocast_sums_in_the_parameters_precision() -> None:
    torch.manual_seed(0)
    model, inputs = prepared(mlp(), torch.float32), torch.randn(5, 6)

    def half() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return losses(model, inputs).float()

    traces, _ = percell.trace(model, half)
    assert {value.dtype for one in traces for value in one.squares().values()} == {torch.float32}
    wanted = percell.gradient_norms(model, lambda: losses(model, inputs))
    torch.testing.assert_close(percell.gradient_norms(model, half), wanted, rtol=0.1, atol=0)


class Doubled(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return 2 * super().forward(inputs)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.ones(6))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.extra


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    return model


def shared() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer)


def statistics_free() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, affine=False, track_running_stats=False))


class Overwriting(nn.Sequential):
    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self[0](inputs)
        answer = self[1](hidden)
        hidden.detach().mul_(2)
        return answer


class Functional(nn.Sequential):
    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(self[0](inputs), self[1].weight)


class Flattening(nn.Sequential):
    def forward(self, inputs: Tensor) -> Tensor:
        return self[1](self[0](inputs).view(-1, 3)).view(len(inputs), -1)


@pytest.mark.parametrize(
    ("make", "error", "why"),
    [
        (shared, TypeError, "0 is used more than once"),
        (tied, TypeError, "2 and 0 share a parameter: weight"),
        (lambda: nn.Sequential(nn.Linear(6, 6), Doubled(6, 6)), TypeError, r"no rule for Doubled.*'1\.bias'"),
        (lambda: nn.Sequential(nn.Linear(6, 6), Bare()), TypeError, r"no rule for Bare.*'1\.extra'"),
        (lambda: mlp().train(), ValueError, "6: normalisation by the batch .* eval mode"),
        (lambda: statistics_free().eval(), ValueError, "1: normalisation by the batch"),
        (lambda: Overwriting(nn.Linear(6, 6), nn.Linear(6, 6)), ValueError, "1: its input was written over"),
        (lambda: Functional(nn.Linear(6, 6), nn.Linear(6, 6)), TypeError, "outside its own call"),
        (lambda: Flattening(nn.Linear(6, 6), nn.Linear(3, 3)), TypeError, "1: rows 10 in, 10 out, for 5 losses"),
        (lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 3)), TypeError, "1: input of 3 dimensions"),
    ],
)  # fmt: skip
def test_trace_refuses_what_it_cannot_take_apart(
    make: Callable[[], nn.Module], error: type[Exception], why: str
) -> None:
    model = make()
    for names in (None, [name for name, _ in model.named_parameters()]):
        with pytest.raises(error, match=why):
            percell.trace(model, lambda: losses(model, torch.ones(5, 6)), names)


def test_trace_refuses_a_name_of_no_parameter() -> None:
    model = nn.Linear(6, 6)
    with pytest.raises(TypeError, match=r"no such parameters: \['scale'\]"):
        percell.trace(model, lambda: losses(model, torch.ones(5, 6)), ["weight", "scale"])

"""Optimisers are torch's own, and do not drag its compiler in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from scforget import optimisers, seeding

Learner = tuple[nn.Module, torch.optim.Optimizer]

CHECK = """
import sys, torch
from scforget import optimisers
p = torch.nn.Parameter(torch.ones(3))
for made in (optimisers.Adam([p], 0.1), optimisers.SGD([p], 0.1)):
    made.zero_grad()
    (p ** 2).sum().backward()
    made.step()
    made.load_state_dict(made.state_dict())
    made.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
print("torch._dynamo" in sys.modules)
"""


def test_optimisers_do_not_import_the_compiler() -> None:
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", CHECK], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_optimisers_step_as_torch_says() -> None:
    for made, plain in (
        (lambda p: optimisers.Adam([p], 0.1, 0.01), lambda p: torch.optim.Adam([p], lr=0.1, weight_decay=0.01)),
        (lambda p: optimisers.SGD([p], 0.1), lambda p: torch.optim.SGD([p], lr=0.1)),
    ):
        results = []
        for make in (made, plain):
            parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
            optimiser = make(parameter)
            for _ in range(3):
                optimiser.zero_grad()
                (parameter**4).sum().backward()
                optimiser.step()
            results.append(parameter.detach())
        torch.testing.assert_close(results[0], results[1])


def network() -> nn.Module:
    """Layers of odd sizes, one of which never gets a gradient."""
    with seeding.scope(0, "network"):
        used = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 1))
        return nn.ModuleDict({"used": used, "idle": nn.Linear(3, 5)})


def rounds(model: nn.Module, optimiser: torch.optim.Optimizer, steps: int, first: int = 0) -> Iterator[int]:
    """Take steps on losses that differ from step to step."""
    for step in range(first, first + steps):
        optimiser.zero_grad()
        inputs = torch.randn(5, 7, generator=torch.Generator().manual_seed(step))
        model["used"](inputs).square().sum().backward()
        optimiser.step()
        yield step


def pair(weight_decay: float = 0.0) -> list[Learner]:
    """Equal networks with the product's Adam and with torch's fused one."""
    first, second = network(), network()
    return [
        (first, optimisers.Adam(first.parameters(), 1e-2, weight_decay)),
        (second, torch.optim.Adam(second.parameters(), lr=1e-2, weight_decay=weight_decay, fused=True)),
    ]


def assert_equal(ours: Learner, torchs: Learner) -> None:
    """Bit for bit: parameters and everything that is remembered of them."""
    for one, other in zip(ours[0].parameters(), torchs[0].parameters(), strict=True):
        assert torch.equal(one, other)
    states = [optimiser.state_dict()["state"] for _, optimiser in (ours, torchs)]
    assert states[0].keys() == states[1].keys()
    for key, slots in states[0].items():
        assert slots.keys() == states[1][key].keys()
        assert all(torch.equal(value, states[1][key][name]) for name, value in slots.items())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_is_torchs_bit_for_bit(weight_decay: float) -> None:
    """Also where the learning rate changes between steps, and a layer never gets a gradient."""
    ours, torchs = pair(weight_decay=weight_decay)
    for one, other in zip(rounds(*ours, 12), rounds(*torchs, 12), strict=True):
        assert one == other
        assert_equal(ours, torchs)
        for _, optimiser in (ours, torchs):
            optimiser.param_groups[0]["lr"] *= 0.7
    idle = list(network()["idle"].parameters())
    assert all(torch.equal(p, q) for p, q in zip(ours[0]["idle"].parameters(), idle, strict=True))
    assert len(ours[1].state) == 4


def test_adam_is_torchs_when_a_parameter_joins_late_or_pauses() -> None:
    ours, torchs = pair()
    for model, optimiser in (ours, torchs):
        list(rounds(model, optimiser, 3))
        optimiser.zero_grad()
        model["idle"](torch.ones(2, 3)).square().sum().backward()  # the others have no gradient now
        optimiser.step()
        list(rounds(model, optimiser, 2, first=3))
        optimiser.zero_grad()
        (model["idle"](torch.ones(2, 3)).square().sum() + model["used"](torch.ones(2, 7)).sum()).backward()
        optimiser.step()
    assert_equal(ours, torchs)
    steps = [int(ours[1].state[parameter]["step"]) for parameter in ours[0].parameters()]
    assert sorted(steps) == [2, 2, 6, 6, 6, 6]


def test_adam_is_torchs_with_several_groups() -> None:
    ours, torchs = pair()
    for model, optimiser in (ours, torchs):
        extra = nn.Linear(7, 2)
        with torch.no_grad():
            extra.weight.fill_(0.3)
        optimiser.add_param_group({"params": [extra.weight], "lr": 0.5, "weight_decay": 0.2})
        for step in range(5):
            extra.weight.grad = torch.full((2, 7), float(step + 1))
            model["used"](torch.full((1, 7), 0.1 * step)).sum().backward()
            optimiser.step()
        model.register_parameter("extra", extra.weight)
    assert_equal(ours, torchs)


def test_adam_goes_on_bit_for_bit_from_a_saved_state() -> None:
    """From its own and from torch's, into a new optimiser on the same weights."""
    whole = pair()[0]
    list(rounds(*whole, 8))
    for model, optimiser in pair():
        list(rounds(model, optimiser, 4))
        copied = network()
        copied.load_state_dict(model.state_dict())
        resumed = optimisers.Adam(copied.parameters(), 1e-2)
        resumed.load_state_dict(optimiser.state_dict())
        list(rounds(copied, resumed, 4, first=4))
        assert_equal((copied, resumed), whole)


def test_adam_returns_the_loss_of_a_closure() -> None:
    ours, torchs = pair()
    found = []
    for model, optimiser in (ours, torchs):
        list(rounds(model, optimiser, 2))

        def closure(model: nn.Module = model, optimiser: torch.optim.Optimizer = optimiser) -> torch.Tensor:
            optimiser.zero_grad()
            loss = model["used"](torch.ones(2, 7)).square().sum()
            loss.backward()
            return loss

        found.append(float(optimiser.step(closure).detach()))
    assert found[0] == found[1]
    assert_equal(ours, torchs)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_adam_forgets_gradients_as_it_is_told(set_to_none: bool) -> None:
    model, optimiser = pair()[0]
    model["used"](torch.ones(2, 7)).sum().backward()
    optimiser.zero_grad(set_to_none=set_to_none)
    gradients = [parameter.grad for parameter in model["used"].parameters()]
    if set_to_none:
        assert gradients == [None] * 4
    else:
        assert all(gradient is not None and not gradient.any() for gradient in gradients)
    assert all(parameter.grad is None for parameter in model["idle"].parameters())


def test_adam_without_any_gradient_changes_nothing() -> None:
    model, optimiser = pair()[0]
    list(rounds(model, optimiser, 2))
    before = [parameter.clone() for parameter in model.parameters()]
    optimiser.zero_grad()
    optimiser.step()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))

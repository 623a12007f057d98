"""Optimisers are torch's own, and do not drag its compiler in."""

from __future__ import annotations

import subprocess
import sys

import torch

from scforget import optimisers

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

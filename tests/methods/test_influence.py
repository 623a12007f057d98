from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import sparse
from torch import Tensor

from killing import KilledError, MemoryCheckpoint
from scforget import seeding
from scforget.artifacts import FileCheckpoint
from scforget.curvature import GaussNewton, flatten
from scforget.data.splits import ForgetSets
from scforget.errors import NonFiniteError
from scforget.methods.influence import InfluenceSettings, influence
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.training import Effort, Trained

Original = Callable[[], VAE]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
Run = Callable[..., Trained]
SETTINGS: dict[str, Any] = {"damping": 10.0, "draws": 2, "iterations": 6, "tolerance": 1e-6}


@pytest.fixture
def run(task: VaeTask, forget_sets: ForgetSets, original: Original) -> Run:
    def unlearn(seed: int = 0, checkpoint: Any = None, on: VaeTask = task, **changes: Any) -> Trained:
        settings = InfluenceSettings.model_validate({**SETTINGS, **changes})
        return influence(original(), on, forget_sets, settings, seed=seed, checkpoint=checkpoint)

    return unlearn


def loss(task: VaeTask, model: VAE, forget_sets: ForgetSets, seed: int) -> float:
    """The mean loss of the retained cells at the method's own draws."""
    noise, batch = seeding.torch_generator(seed, "gauss-newton"), task.batch(forget_sets.retain)
    with torch.no_grad():
        return float(torch.stack([task.loss(model, batch, noise).total.double().mean() for _ in range(2)]).mean())


@pytest.mark.parametrize("nothing", [{"damping": float("inf")}, {"iterations": 0}])
def test_influence_without_a_step_is_the_original_bit_for_bit(
    run: Run, original: Original, same_bytes: Same, nothing: dict[str, Any]
) -> None:
    unlearned = run(**nothing)
    assert same_bytes(unlearned.model.state_dict(), original().state_dict())
    assert (unlearned.effort.passes, unlearned.history, unlearned.facts) == (0, [], {})
    assert not unlearned.model.training


def test_influence_solves_the_damped_system(
    run: Run, task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    """(G + d·I)(θ0 − θ) = ∇L_R, up to the tolerance and the rounding of float32."""
    unlearned = run(seed=5, iterations=200, tolerance=1e-4)
    newton = GaussNewton(original(), task, forget_sets.retain, draws=2, seed=5, effort=Effort())
    step = flatten(original().parameters()) - flatten(unlearned.model.parameters())
    gradient = newton.gradient()
    residual = float((newton.product(step) + 10.0 * step - gradient).norm() / gradient.norm())
    assert residual < 1e-3
    assert float(unlearned.facts["residual"]) <= 1e-4
    assert unlearned.facts["step_norm"] == pytest.approx(float(step.norm()), rel=1e-4)
    iterations = unlearned.facts["iterations"]
    assert iterations == len(unlearned.history)
    assert 6 < float(iterations) < 200
    assert unlearned.history[-1]["residual"] == unlearned.facts["residual"]


def test_influence_lowers_the_loss_of_the_retained_cells(
    run: Run, task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    before, after = (loss(task, model, forget_sets, 5) for model in (original(), run(seed=5).model))
    assert after < before - 0.1


def test_influence_of_a_large_damping_is_a_small_gradient_step(
    run: Run, task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    newton = GaussNewton(original(), task, forget_sets.retain, draws=2, seed=5, effort=Effort())
    step = flatten(original().parameters()) - flatten(run(seed=5, damping=1e5).model.parameters())
    wanted = newton.gradient() / 1e5
    assert 0 < float((step - wanted).norm()) < 0.05 * float(wanted.norm())


def test_influence_gives_the_same_bytes_for_the_same_seed_only(run: Run, same_bytes: Same) -> None:
    first = run()
    torch.manual_seed(99)
    again, other = run(), run(seed=1)
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert (first.history, first.facts) == (again.history, again.facts)
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("save", [1, 3, 6])
def test_influence_resumes_bit_for_bit(run: Run, save: int, same_bytes: Same) -> None:
    whole, dying, survivor = run(), MemoryCheckpoint(dies_at=save), MemoryCheckpoint()
    with pytest.raises(KilledError):
        run(checkpoint=dying)
    survivor.kept = dying.kept
    resumed = run(checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort, resumed.facts) == (whole.history, whole.effort, whole.facts)
    assert survivor.saves == 6 - save


def test_influence_resumes_from_a_file(run: Run, tmp_path: Path, same_bytes: Same) -> None:
    run(checkpoint=FileCheckpoint(tmp_path, every=0), iterations=3)
    resumed, whole = run(checkpoint=FileCheckpoint(tmp_path, every=0)), run()
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort, resumed.facts) == (whole.history, whole.effort, whole.facts)


def test_influence_counts_its_effort(run: Run) -> None:
    """The gradient, and for each product two forward passes and a backward one; each cell and draw."""
    effort = run().effort
    assert effort.forward == {"retain": 200 + 6 * 2 * 200, "stop": 40}
    assert effort.backward == {"retain": 200 + 6 * 200}
    assert effort.steps == 1


def test_influence_never_reads_the_forgotten_cells(run: Run, poisoned: VaeTask, same_bytes: Same) -> None:
    clean, other = run(), run(on=poisoned)
    assert same_bytes(clean.model.state_dict(), other.model.state_dict())
    assert clean.history == other.history


@pytest.mark.parametrize("likelihood", ["zinb", "log_mse"])
def test_influence_serves_every_likelihood(
    make_task: Callable[..., VaeTask], forget_sets: ForgetSets, likelihood: str
) -> None:
    task = make_task(likelihood=likelihood)
    settings = InfluenceSettings.model_validate({**SETTINGS, "damping": 100.0})
    before = task.new_model(0)
    model = influence(task.new_model(0), task, forget_sets, settings, seed=0).model
    still = {name for name, value in model.state_dict().items() if torch.equal(value, before.state_dict()[name])}
    assert still == ({"dispersion.weight", "dispersion.bias"} if likelihood == "log_mse" else set())
    assert loss(task, model, forget_sets, 0) < loss(task, before, forget_sets, 0)


@pytest.mark.parametrize(("part", "name"), [("retain", "the gradient"), ("stop", "the ELBO of the stop cells")])
def test_influence_names_what_is_not_finite(
    run: Run, make_task: Callable[..., VaeTask], tiny_counts: sparse.csr_matrix, forget_sets: ForgetSets,
    part: str, name: str,
) -> None:  # fmt: skip
    counts = tiny_counts.tolil()
    counts[getattr(forget_sets, part)[3], 0] = np.nan
    with pytest.raises(NonFiniteError, match=name):
        run(on=make_task(counts=counts.tocsr()))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("damping", 0.0), ("damping", float("nan")), ("draws", 0), ("iterations", -1), ("tolerance", 0.0),
        ("tolerance", 1.0),
    ],
)  # fmt: skip
def test_influence_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        InfluenceSettings.model_validate({**SETTINGS, key: value})

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from scforget import fisher
from scforget.data.splits import ForgetSets
from scforget.methods.ssd import SSDSettings, dampen, ssd
from scforget.models.vae import VAE
from scforget.tasks import VaeTask

Original = Callable[[], VAE]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
SETTINGS: dict[str, Any] = {"alpha": 1.2, "lam": 0.9, "reference": "D", "draws": 2}


def settings(**changes: Any) -> SSDSettings:
    return SSDSettings(**{**SETTINGS, **changes})


def by_foster(
    theta: Tensor, forget: Tensor, reference: Tensor, alpha: float, lam: float
) -> tuple[list[float], int]:  # fmt: skip
    """Eq. 3–4 of Foster et al. (2024), one parameter at a time; and how many were selected."""
    found, selected = [], 0
    values = (tensor.double().ravel().tolist() for tensor in (theta, forget, reference))
    for value, importance, other in zip(*values, strict=True):
        if importance > alpha * other:
            found.append(value * min(lam * other / importance, 1))
            selected += 1
        else:
            found.append(value)
    return found, selected


@pytest.mark.parametrize(("alpha", "lam"), [(1.0, 1.0), (1.0, 0.2), (3.0, 5.0), (0.1, 0.0)])
def test_dampen_equals_fosters_rule_parameter_by_parameter(
    original: Original, alpha: float, lam: float, same_bytes: Same
) -> None:
    model, generator = original(), torch.Generator().manual_seed(0)
    before = {name: value.clone() for name, value in model.named_parameters()}
    forget, reference = (
        {name: torch.rand(value.shape, generator=generator).square() for name, value in before.items()}
        for _ in range(2)
    )
    for name in ("dispersion.weight", "mu.bias"):  # where no gradient arrives there is nothing to compare
        forget[name].zero_(), reference[name].zero_()
    reference["mu.weight"].zero_()  # and what matters to the forgotten cells alone goes
    dampen(model, forget, reference, alpha, lam)
    for name, value in model.named_parameters():
        wanted, selected = by_foster(before[name].detach(), forget[name], reference[name], alpha, lam)
        np.testing.assert_allclose(value.detach().ravel(), wanted, rtol=1e-6)
        still = forget[name] <= alpha * reference[name]
        assert torch.equal(value[still], before[name][still])
        assert int((~still).sum()) == selected
        assert (value.abs() <= before[name].abs()).all()
    assert not model.mu.weight.any()
    assert torch.equal(model.mu.bias, before["mu.bias"])


@pytest.mark.parametrize("reference", ["D", "R"])
def test_ssd_compares_with_all_training_cells_or_with_the_retained_ones(
    task: VaeTask, forget_sets: ForgetSets, original: Original, reference: str
) -> None:
    sets = {"D": np.concatenate([forget_sets.forget, forget_sets.retain]), "R": forget_sets.retain}
    wanted = original()
    with torch.no_grad():  # without noise in z the sets' information is the same however they are drawn
        for model in (wanted, unlearned := original()):
            model.log_var.weight.zero_()
            model.log_var.bias.fill_(-60)
    pair = (fisher.diagonal(wanted, task, cells, draws=1, seed=0) for cells in (forget_sets.forget, sets[reference]))
    before = {name: value.clone() for name, value in wanted.state_dict().items()}
    dampen(wanted, *pair, 1.2, 0.9)
    trained = ssd(unlearned, task, forget_sets, settings(reference=reference), seed=5)
    moved = 0
    for name, value in trained.model.state_dict().items():
        torch.testing.assert_close(value, wanted.state_dict()[name], rtol=1e-4, atol=1e-6)
        moved += int((value != before[name]).sum())
    assert 100 < moved < sum(value.numel() for value in before.values()) - 100


def test_ssd_references_differ(task: VaeTask, forget_sets: ForgetSets, original: Original, same_bytes: Same) -> None:
    d, r = (ssd(original(), task, forget_sets, settings(reference=kind), seed=5).model for kind in ("D", "R"))
    assert not same_bytes(d.state_dict(), r.state_dict())


def test_ssd_with_infinite_alpha_is_the_original_bit_for_bit(
    task: VaeTask, forget_sets: ForgetSets, original: Original, same_bytes: Same
) -> None:
    unlearned = ssd(original(), task, forget_sets, settings(alpha=float("inf")), seed=0)
    assert same_bytes(unlearned.model.state_dict(), original().state_dict())
    assert not unlearned.model.training


def test_ssd_takes_its_draws_from_its_seed_alone(
    task: VaeTask, forget_sets: ForgetSets, original: Original, same_bytes: Same
) -> None:
    first, again, other = (ssd(original(), task, forget_sets, settings(), seed=seed).model for seed in (5, 5, 6))
    assert same_bytes(first.state_dict(), again.state_dict())
    assert not same_bytes(first.state_dict(), other.state_dict())


def test_ssd_explains_the_forgotten_cells_worse(task: VaeTask, forget_sets: ForgetSets, original: Original) -> None:
    unlearned = ssd(original(), task, forget_sets, settings(alpha=1.0, lam=0.1), seed=0).model
    before, after = (task.signals(model, forget_sets.forget).elbo.mean() for model in (original(), unlearned))
    assert after < before - 1


def test_ssd_counts_a_pass_for_each_cell_and_draw(task: VaeTask, forget_sets: ForgetSets, original: Original) -> None:
    effort = ssd(original(), task, forget_sets, settings(draws=3), seed=0).effort
    assert effort.forward == effort.backward == {"forget": 60, "retain": 300}
    assert effort.steps == 0


@pytest.mark.parametrize(("key", "value"), [("alpha", 0.0), ("lam", -0.1), ("reference", "F"), ("draws", 0)])
def test_ssd_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        settings(**{key: value})

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import sparse
from torch import Tensor, nn

from scforget import fisher
from scforget.data.splits import ForgetSets
from scforget.errors import NonFiniteError
from scforget.methods.ssd import SSDSettings, dampen, dampen_by_share, prune, shares, ssd
from scforget.models.vae import VAE
from scforget.tasks import VaeTask

Original = Callable[[], VAE]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
SETTINGS: dict[str, Any] = {
    "variant": "selective", "action": "dampen", "alpha": 1.2, "lam": 0.9, "reference": "D", "draws": 2,
}  # fmt: skip


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


def test_ssd_against_all_cells_selects_none_beyond_the_inverse_share_of_the_forgotten(
    task: VaeTask, forget_sets: ForgetSets, original: Original, same_bytes: Same
) -> None:
    """I_D >= share·I_F, with 20 of 120 cells forgotten; against the retained cells there is no such bound."""
    unlearned = ssd(original(), task, forget_sets, settings(alpha=6.01), seed=0)
    assert same_bytes(unlearned.model.state_dict(), original().state_dict())
    other = ssd(original(), task, forget_sets, settings(alpha=6.01, reference="R"), seed=0)
    assert not same_bytes(other.model.state_dict(), original().state_dict())


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


class Pair(nn.Module):
    """Two parameters (2, −1), and a loss ½·(θ1 − x)² + ½·(θ2 − y)² of each cell (x, y)."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.tensor([2.0, -1.0]))

    def information(self, cells: list[tuple[float, float]]) -> fisher.Diagonal:
        squares = []
        for cell in cells:
            loss = 0.5 * (self.both - torch.tensor(cell)).square().sum()
            squares.append(torch.autograd.grad(loss, self.both)[0].square())
        return {"both": torch.stack(squares).mean(0)}


def test_rules_on_a_quadratic_are_the_closed_form() -> None:
    """I_F = ((1 + 9)/2, (4 + 0)/2) = (5, 2) and I_ref = (1, 4), so that I is (5, ½) and its shares (1, 1/10)."""
    rules: list[tuple[Callable[..., None], tuple[float, ...], list[float]]] = [
        (dampen, (2.0, 3.0), [2 * 3 / 5, -1.0]),  # the first is selected and multiplied by λ·1/5
        (dampen, (0.4, 1.5), [2 * 1.5 / 5, -1.0]),  # both are, but the second by min(1.5·4/2, 1)
        (dampen, (6.0, 1.0), [2.0, -1.0]),
        (prune, (2.0,), [0.0, -1.0]),
        (prune, (0.4,), [0.0, 0.0]),
        (prune, (5.0,), [2.0, -1.0]),  # more than, not as much as
        (dampen_by_share, (0.5,), [2 * 0.5, -1 * 0.95]),
        (dampen_by_share, (3.0,), [2 * -2.0, -1 * 0.7]),
        (dampen_by_share, (0.0,), [2.0, -1.0]),
    ]
    for rule, strength, wanted in rules:
        model = Pair()
        forget, reference = model.information([(1, 1), (-1, -1)]), model.information([(1, 1), (3, -3)])
        assert (forget["both"].tolist(), reference["both"].tolist()) == ([5.0, 2.0], [1.0, 4.0])
        rule(model, forget, reference, *strength)
        assert model.both.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("forget", "reference", "wanted"),
    [
        ([4.0, 1.0, 0.0], [2.0, 1.0, 3.0], [1.0, 0.5, 0.0]),
        ([4.0, 0.0, 1.0], [2.0, 0.0, 2.0], [1.0, 0.0, 0.25]),  # 0/0 is 0
        ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]),
        ([0.0, 0.0], [1.0, 2.0], [0.0, 0.0]),
        ([4.0, 1e-9, 0.0], [2.0, 0.0, 0.0], [0.0, 1.0, 0.0]),  # what the others say nothing of at all
    ],
)
def test_shares_are_of_the_largest_ratio(forget: list[float], reference: list[float], wanted: list[float]) -> None:
    assert shares(torch.tensor(forget), torch.tensor(reference)).tolist() == wanted


def test_ssd_zero_with_alpha_0_empties_what_the_forgotten_cells_use(
    make_task: Callable[..., VaeTask], forget_sets: ForgetSets
) -> None:
    """With squared error only the dispersion is not used by any cell."""
    task = make_task(likelihood="log_mse")
    before = task.new_model(0).state_dict()
    model = ssd(task.new_model(0), task, forget_sets, settings(action="zero", alpha=0.0), seed=0).model
    for name, value in model.state_dict().items():
        if name.startswith("dispersion."):
            assert torch.equal(value, before[name])
        elif name in {"mu.bias", "log_var.bias", "scale.bias"}:
            assert not value.any()


def test_ssd_zero_empties_what_dampening_selects(
    task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:  # fmt: skip
    dampened = ssd(original(), task, forget_sets, settings(lam=0.5), seed=5).model.state_dict()
    zeroed = ssd(original(), task, forget_sets, settings(action="zero"), seed=5).model.state_dict()
    emptied = 0
    for name, value in original().state_dict().items():
        moved = (dampened[name] != value) & (value != 0)
        assert torch.equal(zeroed[name], torch.where(moved, 0.0, value))
        emptied += int(moved.sum())
    assert emptied > 100


def test_ssd_max_normalised_moves_every_parameter_by_its_share(
    task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    chosen = settings(variant="max_normalised", alpha=0.6, reference="R")
    found = ssd(original(), task, forget_sets, chosen, seed=5).model.state_dict()
    parts = (forget_sets.forget, forget_sets.retain)
    forget, retain = (fisher.diagonal(original(), task, cells, draws=2, seed=5) for cells in parts)
    for name, value in original().state_dict().items():
        with np.errstate(invalid="ignore"):  # a gene that no cell has: 0/0
            ratio = np.nan_to_num(forget[name].double().numpy() / retain[name].double().numpy())
        wanted = value.double().numpy() * (1 - 0.6 * ratio / ratio.max())
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=1e-7)


def test_ssd_max_normalised_with_alpha_0_is_the_original_bit_for_bit(
    task: VaeTask, forget_sets: ForgetSets, original: Original, same_bytes: Same
) -> None:
    unlearned = ssd(original(), task, forget_sets, settings(variant="max_normalised", alpha=0.0), seed=0)
    assert same_bytes(unlearned.model.state_dict(), original().state_dict())


@pytest.mark.parametrize("part", ["forget", "retain"])
def test_ssd_refuses_an_information_that_is_not_finite(
    make_task: Callable[..., VaeTask], tiny_counts: sparse.csr_matrix, forget_sets: ForgetSets, original: Original,
    part: str,
) -> None:  # fmt: skip
    counts = tiny_counts.tolil()
    counts[getattr(forget_sets, part)[3], 0] = np.nan
    with pytest.raises(NonFiniteError, match="the Fisher information"):
        ssd(original(), make_task(counts=counts.tocsr()), forget_sets, settings(), seed=0)


@pytest.mark.parametrize(
    "values",
    [
        {"alpha": 0.0}, {"variant": "max_normalised", "alpha": float("inf")},
        {"variant": "max_normalised", "action": "zero"},
    ],
)  # fmt: skip
def test_ssd_settings_refuse_what_does_not_go_together(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"alpha|action"):
        settings(**values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha", -0.1), ("alpha", float("nan")), ("lam", -0.1), ("lam", float("inf")), ("reference", "F"),
        ("draws", 0), ("variant", "published"), ("action", "keep"),
    ],
)  # fmt: skip
def test_ssd_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        settings(**{key: value})

"""The factorisation at the decoder's head against the exact Fisher, its own entries written out, and known designs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from scforget import fisher
from scforget.arrays import FloatArray, IntArray
from scforget.errors import EmptyGroupError
from scforget.tasks import VaeTask
from scforget.theory import factorisation
from scforget.theory.corollary import cosine
from scforget.theory.factorisation import (
    FactorisationSettings,
    Head,
    Squares,
    by_type,
    factorise,
    head,
    inner_products,
    profiles,
    singular,
)

MakeTask = Callable[..., VaeTask]
SETTINGS = FactorisationSettings(draws=2, cells=50, resamples=200, level=0.95, shuffles=5)
CELLS: IntArray = np.array([5, 230, 71, 8, 9, 10, 150], dtype=np.int64)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_head(seed: int, cells: int, draws: int = 2) -> Head:
    rows = cells * draws
    scale = normal(seed, 6).exp()
    uncoupled, residual = normal(seed + 3, 2, rows, 6)
    return Head(scale * normal(seed + 1, rows, 6), normal(seed + 2, rows, 4), uncoupled, residual, draws)


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "log_mse"])
def test_head_squares_to_the_exact_fisher(
    make_task: MakeTask, likelihood: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factorisation, "_BATCH", 4)
    monkeypatch.setattr(fisher, "_BATCH", 4)
    task = make_task(likelihood=likelihood)
    model = task.new_model(3)
    found = head(model, task, CELLS, draws=3, seed=11)
    assert {len(part) for part in found[:4]} == {21}
    wanted = fisher.diagonal(model, task, CELLS, draws=3, seed=11)["scale.weight"]
    squared = found.gradient.square().T @ found.inputs.square() / 21
    torch.testing.assert_close(squared, wanted, rtol=1e-5, atol=1e-7 * float(wanted.max()))


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "log_mse"])
@pytest.mark.parametrize("dispersion", ["gene-cell", "gene"])
def test_head_gradient_is_the_uncoupled_one_through_the_softmax(
    make_task: MakeTask, likelihood: str, dispersion: str
) -> None:
    task = make_task(likelihood=likelihood, dispersion=dispersion)
    model = task.new_model(3)
    found = head(model, task, CELLS, draws=1, seed=2)
    with torch.no_grad():
        p = model.scale(found.inputs).softmax(-1)
    coupled = found.uncoupled - p * found.uncoupled.sum(-1, keepdim=True)
    torch.testing.assert_close(found.gradient, coupled, rtol=1e-4, atol=1e-4)
    batch = task.batch(CELLS)
    if likelihood == "log_mse":
        size = batch.inputs.sum(-1, keepdim=True)
        torch.testing.assert_close(found.residual, batch.inputs - size * p, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.uncoupled, -2 * size * p * found.residual, rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(found.residual, batch.counts - batch.library * p, rtol=1e-5, atol=1e-4)
    if likelihood == "nb":
        with torch.no_grad():
            r = model.dispersion(found.inputs).exp()
        m = r * found.residual / (r + batch.library * p)
        torch.testing.assert_close(found.uncoupled, -m, rtol=1e-4, atol=1e-4)


def test_head_keeps_the_draws_of_a_cell_together(task: VaeTask) -> None:
    model = task.new_model(3)
    found = head(model, task, CELLS, draws=3, seed=2)
    with torch.no_grad():
        p = model.scale(found.inputs).softmax(-1)
    batch = task.batch(CELLS)
    counts = found.residual + batch.library.repeat_interleave(3, 0) * p
    torch.testing.assert_close(counts, batch.counts.repeat_interleave(3, 0), rtol=1e-4, atol=1e-3)
    assert not torch.equal(found.inputs[0], found.inputs[1])


def test_head_refuses_no_cells(task: VaeTask) -> None:
    with pytest.raises(EmptyGroupError):
        head(task.new_model(0), task, CELLS[:0], draws=1, seed=0)
    with pytest.raises(EmptyGroupError):
        factorise(random_head(0, 1), random_head(1, 5), SETTINGS, 0)


def entries(one: Squares) -> FloatArray:
    """``[N, G·H]``: every cell's squared gradient written out."""
    rows = torch.einsum("ng,nh->ngh", one.outer, one.inner)
    return np.asarray(rows.view(-1, one.draws, one.outer.shape[1] * one.inner.shape[1]).mean(1).numpy())


def test_inner_products_equals_every_entry_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factorisation, "_ENTRIES", 70)  # several blocks, the last one smaller
    one = random_head(0, 7, 3)
    squares = Squares.of(one.gradient, one.inputs, 3)
    each = entries(squares)
    np.testing.assert_allclose(inner_products(squares), each @ each.T, rtol=1e-12)
    np.testing.assert_allclose(squares.fisher().ravel(), each.mean(0), rtol=1e-12)


def test_factorise_equals_the_fishers_written_out() -> None:
    forget, retain = random_head(0, 6), random_head(10, 9)
    found = factorise(forget, retain, SETTINGS, 1)
    assert [row["variant"] for row in found["variants"]] == ["likelihood", "permuted", "uncoupled", "residual"]
    row = found["variants"][0]
    sets = [Squares.of(one.gradient, one.inputs, 2) for one in (forget, retain)]
    each = [entries(one) for one in sets]
    fishers = [one.mean(0) for one in each]
    assert row["measured"]["value"] == pytest.approx(cosine(*fishers), rel=1e-10)
    norms = [np.mean([a @ b for i, a in enumerate(one) for j, b in enumerate(one) if i != j]) for one in each]
    assert row["measured"]["unbiased"] == pytest.approx(fishers[0] @ fishers[1] / np.sqrt(np.prod(norms)), rel=1e-10)
    one, other = profiles(forget), profiles(retain)
    assert row["cos_sigma"]["value"] == pytest.approx(cosine(one["sigma"], other["sigma"]), rel=1e-10)
    assert row["cos_nu"]["value"] == pytest.approx(cosine(one["nu"], other["nu"]), rel=1e-10)
    assert row["product"]["value"] == pytest.approx(row["cos_sigma"]["value"] * row["cos_nu"]["value"])
    assert row["ratio"]["value"] == pytest.approx(row["product"]["value"] / row["measured"]["value"])
    gap = row["inner_ratio"] * row["norm_ratio_forget"] * row["norm_ratio_retain"]
    assert gap == pytest.approx(1 / row["ratio"]["value"], rel=1e-10)
    published = cosine(one["residual"], other["residual"]) * row["cos_nu"]["value"]
    assert found["published"]["product"]["value"] == pytest.approx(published, rel=1e-10)
    assert found["published"]["ratio"]["value"] == pytest.approx(published / row["measured"]["value"], rel=1e-10)
    assert found == factorise(forget, retain, SETTINGS, 1)


def product_head(seed: int, draws: int = 2) -> Head:
    """Every gradient with every input, in float64."""
    gradient, inputs = normal(seed, 8, 6) * normal(seed + 1, 6).exp(), normal(seed + 2, 10, 4)
    rows = gradient.repeat_interleave(10, 0), inputs.repeat(8, 1)
    return Head(rows[0], rows[1], rows[0], rows[0], draws)


def test_factorise_finds_no_gap_where_factors_are_independent() -> None:
    found = factorise(product_head(0), product_head(10), SETTINGS, 1)
    row = found["variants"][0]
    assert row["ratio"]["value"] == pytest.approx(1, rel=1e-10)
    assert row["covariance_share_forget"] < 1e-10
    assert row["covariance_share_retain"] < 1e-10
    assert found["svd"]["rank_one_forget"] == pytest.approx(1, rel=1e-10)
    assert found["svd"]["ratio"] == pytest.approx(1, rel=1e-10)
    assert found["svd"]["sigma_to_data_retain"] == pytest.approx(1, rel=1e-10)


def test_factorise_has_a_control_that_breaks_the_dependence() -> None:
    def dependent(seed: int, order: list[int]) -> Head:
        state = torch.arange(400) // 2 % 2  # of a cell, in both of its draws
        large = 1 + 3 * torch.eye(6, dtype=torch.float64)
        gradient = normal(seed, 400, 6) * large[state]
        inputs = normal(seed + 1, 400, 4) * large[torch.tensor(order)[state], :4]
        return Head(gradient, inputs, gradient, gradient, 2)

    found = factorise(dependent(0, [0, 1]), dependent(50, [1, 0]), SETTINGS, 1)
    rows = {row["variant"]: row for row in found["variants"]}
    assert rows["likelihood"]["ratio"]["low"] > 1.5
    assert rows["permuted"]["ratio"]["low"] < 1 < rows["permuted"]["ratio"]["high"]
    assert rows["permuted"]["covariance_share_forget"] < rows["likelihood"]["covariance_share_forget"]
    assert rows["permuted"]["cos_nu"]["value"] == pytest.approx(rows["likelihood"]["cos_nu"]["value"])


def test_factorise_interval_covers_the_populations_cosine() -> None:
    """Gradients and inputs independent and normal, so that the populations' σ and ν are known."""
    scales = [(0.5 * normal(seed, 40)).exp() for seed in (1, 2)]
    wanted = cosine(scales[0].square().numpy(), scales[1].square().numpy())  # inputs alike: cos ν = 1
    covered, errors = 0, []
    for repeat in range(50):
        heads = []
        for k, scale in enumerate(scales):
            gradient = scale * normal(10 * repeat + k, 30, 40)
            heads.append(Head(gradient, normal(10 * repeat + k + 5, 30, 10), gradient, gradient, 1))
        measured = factorise(heads[0], heads[1], SETTINGS, repeat)["variants"][0]["measured"]
        covered += measured["low"] < wanted < measured["high"]
        errors.append([measured["value"] - wanted, measured["unbiased"] - wanted])
    assert covered >= 42  # of 50 at 95 %
    plain, unbiased = np.abs(np.mean(errors, axis=0))
    assert unbiased < plain / 5


def test_factorise_does_not_cut_off_what_ratios_are_made_of() -> None:
    one = random_head(0, 6)
    row = factorise(one, one, SETTINGS, 1)["variants"][0]  # equal sets: without self-pairs the norms are too short
    assert row["measured"]["value"] == pytest.approx(1, rel=1e-10)
    assert row["measured"]["unbiased"] > 1.05
    assert row["ratio"]["unbiased"] != 1


def test_by_type_explains_a_mixture_of_independent_types() -> None:
    """Two types, each a full product of its gradients and inputs, so that nothing is left within them."""
    one, two = product_head(0, 1), product_head(20, 1)
    gradient, inputs = torch.cat([one.gradient, two.gradient]), torch.cat([one.inputs, two.inputs])
    retain, forget = Head(gradient, inputs, gradient, gradient, 1), one
    types = np.zeros(80, dtype=np.int64), np.repeat(np.arange(2), 80)
    found = by_type(forget, retain, types, SETTINGS, 0)
    assert found["within_share_retain"] < 1e-10
    assert found["within_share_forget"] < 1e-10
    assert found["covariance_share_retain"] > 0.1
    assert found["shuffled_within_share_retain"] > 0.5 * found["covariance_share_retain"]
    assert found["mixture"] == pytest.approx(found["measured"], rel=1e-10)
    assert abs(found["product"] / found["measured"] - 1) > 0.01
    assert abs(found["shuffled"]["value"] - found["product"]) < abs(found["shuffled"]["value"] - found["measured"])
    each = by_type(forget, retain, (np.arange(80), np.arange(160)), SETTINGS, 0)
    assert each["shuffled"]["value"] == pytest.approx(found["measured"], rel=1e-10)  # a type of its own for each cell


def test_singular_equals_a_full_decomposition() -> None:
    heads = random_head(0, 6), random_head(10, 9)
    sets = [Squares.of(one.gradient, one.inputs, 2) for one in heads]
    found = singular(*sets)
    parts = [np.linalg.svd(one.fisher()) for one in sets]
    for name, (_, values, _) in zip(("forget", "retain"), parts, strict=True):
        assert found[f"rank_one_{name}"] == pytest.approx(values[0] ** 2 / (values**2).sum(), rel=1e-10)
    sigma, nu = (abs(parts[0][0][:, 0] @ parts[1][0][:, 0]), abs(parts[0][2][0] @ parts[1][2][0]))
    assert found["cos_sigma"] == pytest.approx(sigma, rel=1e-9)
    assert found["cos_nu"] == pytest.approx(nu, rel=1e-9)
    assert found["product"] == pytest.approx(sigma * nu, rel=1e-9)
    assert found["nu_to_data_forget"] == pytest.approx(
        cosine(np.abs(parts[0][2][0]), profiles(heads[0])["nu"]), rel=1e-9
    )


def test_residual_profile_is_not_the_fishers_under_squared_error(make_task: MakeTask) -> None:
    """By autograd: −2 l p_d (e_d − Σ_g p_g e_g), not −2 e_d."""
    task = make_task(likelihood="log_mse")
    model = task.new_model(0)
    found = head(model, task, CELLS, draws=1, seed=2)
    batch = task.batch(CELLS)
    logits = model.scale(found.inputs).detach().requires_grad_()
    (wanted,) = torch.autograd.grad(
        (batch.inputs - logits.softmax(-1) * batch.inputs.sum(-1, keepdim=True)).square().sum(), logits
    )
    torch.testing.assert_close(found.gradient, wanted, rtol=1e-4, atol=1e-5)
    one = profiles(found)
    assert cosine(one["sigma"], one["residual"]) < 0.99

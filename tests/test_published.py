"""What the published variants share: the loss scales, the batch estimator and the fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from killing import KilledError, MemoryCheckpoint
from scforget import fisher, published, seeding
from scforget.arrays import IntArray
from scforget.data.splits import ForgetSets
from scforget.errors import NonFiniteError
from scforget.models.vae import VAE
from scforget.published import FinetuneSettings, batch_fisher, finetune, mean_loss
from scforget.tasks import VaeTask
from scforget.training import Loop, Trained

MakeTask = Callable[..., VaeTask]
CELLS: IntArray = np.array([5, 230, 71, 8, 9, 10, 150], dtype=np.int64)
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-2, "batch_size": 32, "max_epochs": 4, "patience": 10, "validation_cells": 8,
}  # fmt: skip


@pytest.fixture
def run(task: VaeTask, forget_sets: ForgetSets) -> Callable[..., Trained]:
    def unlearn(
        seed: int = 0, checkpoint: MemoryCheckpoint | None = None, on: VaeTask = task,
        scale: published.Scale = "sum", **changes: Any,
    ) -> Trained:  # fmt: skip
        settings, model = FinetuneSettings(**{**SETTINGS, **changes}), task.new_model(1)
        loop = Loop(model, seed=seed, checkpoint=checkpoint)
        return finetune(model, on, forget_sets, settings, seed=seed, loop=loop, scale=scale)

    return unlearn


def same(one: VAE, other: VAE) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return all(first[name].numpy().tobytes() == second[name].numpy().tobytes() for name in first)


@pytest.mark.parametrize("likelihood", ["nb", "log_mse"])
def test_loss_is_the_negative_elbo_with_its_terms_as_sums_or_means(make_task: MakeTask, likelihood: str) -> None:
    task = make_task(likelihood=likelihood)
    model, batch = task.new_model(3).eval(), task.batch(CELLS)
    mu, log_var = model.encode(batch.inputs)
    kl = 0.5 * (mu**2 + log_var.exp() - 1 - log_var)
    log_prob = model.log_prob(batch, model.decode(mu))
    wanted = {
        "sum": kl.sum(1) - log_prob.sum(1),
        "mean_genes": kl.sum(1) - log_prob.mean(1),
        "mean": kl.mean(1) - log_prob.mean(1),
    }
    scales: tuple[published.Scale, ...] = ("sum", "mean_genes", "mean")
    for scale in scales:
        torch.testing.assert_close(published.loss(task, model, batch, None, scale), wanted[scale], rtol=1e-5, atol=1e-5)
        found = mean_loss(task, model.train(), CELLS, scale)  # which turns to eval mode, so dropout is out
        assert found == pytest.approx(float(wanted[scale].detach().mean()), rel=1e-5)
        assert not model.training


def test_mean_loss_weighs_all_cells_alike(task: VaeTask) -> None:
    """More cells than fit into one batch, in pieces of unequal size."""
    model, cells = task.new_model(3), np.resize(np.arange(240), 2050)
    counts = np.bincount(cells, minlength=240)
    each = published.loss(task, model.eval(), task.batch(np.arange(240)), None, "sum").detach().double().numpy()
    assert mean_loss(task, model, cells, "sum") == pytest.approx(float(counts @ each / 2050), rel=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("batch_size", [3, 7, 100])
def test_batch_fisher_equals_a_slow_loop(task: VaeTask, reduction: Any, batch_size: int) -> None:
    """Each cell's gradient by itself, summed or averaged over its batch, squared; dropout off to take cells apart."""
    model = task.new_model(3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = batch_fisher(model, task, CELLS, batch_size=batch_size, reduction=reduction, damping=0.25, seed=11)
    total = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    noise = seeding.torch_generator(11, "batch fisher")
    for start in range(0, 7, batch_size):
        part = CELLS[start : start + batch_size]
        eps, summed = torch.randn(len(part), 4, generator=noise), dict.fromkeys(total, torch.zeros(()))
        for index in range(len(part)):
            batch = task.batch(part[index : index + 1])
            mu, log_var = model.encode(batch.inputs)
            decoded = model.decode(mu + (log_var / 2).exp() * eps[index])
            kl = 0.5 * (mu**2 + log_var.exp() - 1 - log_var).sum()
            each = torch.autograd.grad(kl - model.reconstruction(batch, decoded).sum(), list(model.parameters()))
            summed = {name: old + new for (name, old), new in zip(summed.items(), each, strict=True)}
        for name, value in summed.items():
            total[name] += (value / (len(part) if reduction == "mean" else 1)).square()
    for name, value in total.items():
        wanted = value / 7 + 0.25
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-5 * float(wanted.max()), msg=name)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batch_fisher_is_no_fisher_information(task: VaeTask) -> None:
    """Cross terms between cells: over one batch the estimate exceeds the exact diagonal many times."""
    model, cells = task.new_model(3), np.arange(100)
    exact = fisher.diagonal(model, task, cells, draws=1, seed=0)["scale.bias"].sum()
    found = batch_fisher(model, task, cells, batch_size=100, reduction="sum", damping=0.0, seed=0)["scale.bias"].sum()
    assert float(found) > 3 * float(exact)


def test_batch_fisher_depends_on_its_seed_alone(task: VaeTask) -> None:
    model = task.new_model(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def estimate(seed: int) -> Tensor:
        options: dict[str, Any] = {"batch_size": 3, "reduction": "sum", "damping": 0.1}
        return batch_fisher(model, task, CELLS, seed=seed, **options)["mu.weight"]

    first = estimate(0)
    torch.rand(1)
    assert torch.equal(first, estimate(0))
    assert not torch.equal(first, estimate(1))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_batch_fisher_of_a_dead_head_is_the_damping(make_task: MakeTask) -> None:
    task = make_task(likelihood="log_mse")
    found = batch_fisher(task.new_model(0), task, CELLS, batch_size=7, reduction="mean", damping=1e-5, seed=0)
    dead = {name for name, value in found.items() if torch.equal(value, torch.full_like(value, 1e-5))}
    assert dead == {"dispersion.weight", "dispersion.bias"}


def test_finetune_keeps_the_epoch_that_is_best_on_its_own_validation_cells(
    run: Callable[..., Trained], task: VaeTask, forget_sets: ForgetSets
) -> None:
    """At a rate so high that the loss soon rises again."""
    options: dict[str, Any] = {"learning_rate": 0.5, "max_epochs": 12, "patience": 20}
    trained = run(**options)
    scores = [row["stop_elbo"] for row in trained.history]
    best = int(np.argmax(scores)) + 1
    assert 1 < best < 12
    generator = seeding.numpy_generator(0, "validation")
    validation = generator.choice(forget_sets.retain, 8, replace=False)
    assert -mean_loss(task, trained.model, validation, "sum") == scores[best - 1]
    shorter = run(**{**options, "max_epochs": best})
    assert same(trained.model, shorter.model)
    assert not trained.model.training


def test_finetune_stops_when_its_patience_ends(run: Callable[..., Trained]) -> None:
    options: dict[str, Any] = {"learning_rate": 0.5, "max_epochs": 60, "patience": 3}
    scores = [row["stop_elbo"] for row in run(**options).history]
    assert len(scores) == int(np.argmax(scores)) + 1 + 3 < 60


def test_finetune_validates_on_a_tenth_of_the_retained_cells_at_most(run: Callable[..., Trained]) -> None:
    effort = run(validation_cells=1000, max_epochs=2).effort
    assert effort.forward == {"retain": 2 * (100 + 10)}


def test_finetune_counts_its_effort(run: Callable[..., Trained]) -> None:
    effort = run(max_epochs=3).effort
    assert effort.forward == {"retain": 3 * (100 + 8)}
    assert effort.backward == {"retain": 3 * 100}
    assert effort.steps == 3 * 4


@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_finetune_resumes_bit_for_bit(run: Callable[..., Trained], epoch: int) -> None:
    whole, dying, survivor = run(), MemoryCheckpoint(dies_at=epoch), MemoryCheckpoint()
    with pytest.raises(KilledError):
        run(checkpoint=dying)
    survivor.kept = dying.kept
    resumed = run(checkpoint=survivor)
    assert same(resumed.model, whole.model)
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)
    assert survivor.saves == 4 - epoch


def test_finetune_gives_the_same_bytes_for_the_same_seed_only(run: Callable[..., Trained]) -> None:
    first = run()
    torch.manual_seed(99)
    assert same(first.model, run().model)
    assert not same(first.model, run(seed=1).model)


def test_finetune_of_no_epoch_is_the_model_as_it_came(run: Callable[..., Trained], task: VaeTask) -> None:
    trained = run(max_epochs=0)
    assert same(trained.model, task.new_model(1))
    assert (trained.history, trained.effort.passes) == ([], 0)


def test_finetune_on_the_mean_over_genes_collapses_the_posterior(
    run: Callable[..., Trained], task: VaeTask, forget_sets: ForgetSets
) -> None:
    """The KL weighs 60 times as much there: what the published fine-tuning suffers from."""
    kl = {}
    scales: tuple[published.Scale, ...] = ("sum", "mean_genes")
    for scale in scales:
        model = run(scale=scale, max_epochs=20).model
        kl[scale] = float(task.signals(model, forget_sets.retain).kl.mean())
    assert kl["mean_genes"] < 0.2 * kl["sum"]


def test_finetune_never_reads_the_forgotten_cells(
    run: Callable[..., Trained], make_task: MakeTask, tiny_counts: Any, forget_sets: ForgetSets
) -> None:
    counts = tiny_counts.toarray()
    counts[forget_sets.forget] = np.nan
    assert same(run().model, run(on=make_task(counts=type(tiny_counts)(counts))).model)


def test_finetune_stops_at_a_huge_learning_rate(run: Callable[..., Trained]) -> None:
    with pytest.raises(NonFiniteError):
        run(learning_rate=1e30)


@pytest.mark.parametrize(
    ("key", "value"),
    [("learning_rate", 0.0), ("batch_size", 0), ("max_epochs", -1), ("patience", 0), ("validation_cells", 0)],
)
def test_finetune_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        FinetuneSettings.model_validate({**SETTINGS, key: value})

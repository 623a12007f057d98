from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy, kl_div

from killing import KilledError, MemoryCheckpoint
from methods import class_cases as cases
from scforget import seeding
from scforget.class_tasks import AugmentationSettings
from scforget.errors import DataError, EmptyGroupError, NonFiniteError
from scforget.methods.contrastive_finetune import (
    ContrastiveFinetuneSettings,
    augmented_loss,
    contrastive_finetune,
    equal_loss,
    uniform_loss,
)
from scforget.training import Trained

Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
SGD = cases.optimiser(kind="sgd", momentum=0.9)
SETTINGS: dict[str, Any] = {
    "uniform_optimiser": SGD, "forget_optimiser": cases.optimiser(kind="sgd", learning_rate=3e-3, momentum=0.9),
    "retain_optimiser": cases.optimiser(kind="sgd", learning_rate=1e-3, momentum=0.9, weight_decay=1e-2),
    "uniform_epochs": 1, "uniform_loss": "winner", "epochs": 2, "forget_loss": "equal", "tau": 1.15, "batch_size": 16,
}  # fmt: skip
LOSSES = ("equal", "augmented")


def run(
    kind: str, seed: int = 0, checkpoint: MemoryCheckpoint | None = None, sets: Any = None, **changes: Any
) -> Trained:
    settings = ContrastiveFinetuneSettings(**{**SETTINGS, **changes})
    one, sets = cases.original(kind), sets or cases.sets()
    return contrastive_finetune(one, cases.task(kind), sets, settings, seed=seed, checkpoint=checkpoint)


@pytest.fixture(params=cases.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def logits(seed: int, rows: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, 3)))


def test_contrastive_finetune_of_no_epoch_is_the_original_bit_for_bit(kind: str, same_bytes: Same) -> None:
    unlearned = run(kind, uniform_epochs=0, epochs=0)
    assert same_bytes(unlearned.model.state_dict(), cases.original(kind).state_dict())
    assert (unlearned.effort.passes, unlearned.history) == (0, [])
    assert not unlearned.model.training


def test_augmented_views_of_a_data_set_without_augmentation_are_refused() -> None:
    task = cases.task("vectors")
    task.augmentation = AugmentationSettings(crop=0, flip=False, noise=0.0)
    settings = ContrastiveFinetuneSettings(**{**SETTINGS, "forget_loss": "augmented"})
    with pytest.raises(DataError, match=r"augmented: found views .* the same; wanted crop"):
        contrastive_finetune(cases.original("vectors"), task, cases.sets(), settings, seed=0)


def test_uniform_loss_is_torchs_kl_from_the_uniform_distribution() -> None:
    x = logits(0, 5)
    wanted = kl_div(x.log_softmax(1), torch.full((5, 3), 1 / 3, dtype=torch.float64), reduction="none").sum(1)
    torch.testing.assert_close(uniform_loss(x, "winner"), wanted)
    assert uniform_loss(torch.full((2, 3), 7.0), "winner").abs().max() < 1e-6


def test_printed_uniform_loss_is_what_the_entropy_lacks() -> None:
    x = logits(0, 5)
    torch.testing.assert_close(uniform_loss(x, "printed"), math.log(3) - Categorical(logits=x).entropy())


def test_printed_uniform_loss_hardly_moves_a_sure_model() -> None:
    x = torch.tensor([[30.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    uniform_loss(x, "printed").sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() < 1e-10


def test_uniform_loss_pulls_where_the_model_is_sure() -> None:
    """Its gradient is p − 1/C; that of the other direction is p(log p + H), which is next to nothing there."""
    x = torch.tensor([[30.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    uniform_loss(x, "winner").sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), [[2 / 3, -1 / 3, -1 / 3]], atol=1e-9)


def test_equal_loss_is_that_of_slow_loops() -> None:
    forget, retain, tau = logits(1, 4), logits(2, 6), 0.7
    found = equal_loss(forget, retain, tau)
    for i, x in enumerate(forget.tolist()):
        similar = [sum(a * b for a, b in zip(x, y, strict=True)) / tau for y in retain.tolist()]
        total = sum(math.exp(s) for s in similar)
        assert found[i].item() == pytest.approx(-sum(math.log(math.exp(s) / total) for s in similar) / 6)


def test_equal_loss_is_least_where_all_retained_items_are_equally_like() -> None:
    retain = logits(3, 6)
    assert equal_loss(torch.zeros(1, 3).double(), retain, 1.0).item() == pytest.approx(math.log(6))
    assert equal_loss(logits(4, 20), retain, 1.0).min().item() > math.log(6)


def test_augmented_loss_is_that_of_slow_loops() -> None:
    forget, views, retain, tau = logits(5, 4), logits(6, 4), logits(7, 6), 0.7
    found = augmented_loss(forget, views, retain, tau)
    for i, (x, view) in enumerate(zip(forget.tolist(), views.tolist(), strict=True)):

        def similar(other: list[float], x: list[float] = x) -> float:
            return math.exp(sum(a * b for a, b in zip(x, other, strict=True)) / tau)

        assert found[i].item() == pytest.approx(-math.log(similar(view) / sum(similar(y) for y in retain.tolist())))


def test_augmented_loss_has_no_floor() -> None:
    """As printed: the positive pair is not in the denominator."""
    forget, retain = logits(8, 1), logits(9, 6)
    falling = [augmented_loss(scale * forget, scale * forget, retain, 1.0).item() for scale in (1.0, 10.0, 100.0)]
    assert falling[0] > falling[1] > falling[2]
    assert falling[2] < -1000


@pytest.mark.parametrize("forget_loss", LOSSES)
def test_contrastive_finetune_is_that_written_out(forget_loss: str) -> None:
    """All items of a kind in one batch: a step of the first stage, then two rounds of either kind, the rate halved."""
    task, sets, model = cases.task("images"), cases.sets(), cases.original("images").train()
    uniform = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    forgetting = torch.optim.SGD(model.parameters(), lr=3e-3, momentum=0.9)
    retaining = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-2)

    def step(optimiser: torch.optim.Optimizer, losses: Tensor) -> float:
        model.zero_grad()
        losses.mean().backward()
        optimiser.step()
        return losses.mean().item()

    def shuffled(items: Any, noise: torch.Generator) -> Any:
        return items[torch.randperm(len(items), generator=noise).numpy()]

    with seeding.scope(5, "flatten", "epoch", 1) as noise:
        batch = task.batch(shuffled(sets.forget, noise), noise)
        flat = step(uniform, -model(batch.inputs).log_softmax(1).mean(1) - math.log(3))
    rows = []
    for number, rate in ((1, 3e-3), (2, 1e-6 + (3e-3 - 1e-6) / 2)):
        with seeding.scope(5, "contrast", "epoch", number) as noise:
            forget, retain = shuffled(sets.forget, noise), shuffled(sets.retain, noise)
            fixed = model(task.batch(retain, noise).inputs).detach()
            forgetting.param_groups[0]["lr"] = rate
            if forget_loss == "equal":
                losses = equal_loss(model(task.batch(forget, noise).inputs), fixed, 1.15)
            else:
                both = model(torch.cat([task.batch(forget).inputs, task.batch(forget, noise).inputs]))
                losses = augmented_loss(both[:8], both[8:], fixed, 1.15)
            rows.append([step(forgetting, losses)])
            batch = task.batch(shuffled(sets.retain, noise), noise)
            rows[-1].append(step(retaining, cross_entropy(model(batch.inputs), batch.labels, reduction="none")))
    unlearned = run("images", seed=5, batch_size=40, forget_loss=forget_loss)
    for name, value in unlearned.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=1e-5)
    first, *others = unlearned.history
    assert first["uniform_divergence"] == pytest.approx(flat, rel=1e-4)
    for row, wanted in zip(others, rows, strict=True):
        assert [row["forget_loss"], row["train_loss"]] == pytest.approx(wanted, rel=1e-3)


def test_contrastive_finetune_lowers_the_confidence_of_forgotten_items_more(kind: str) -> None:
    task, sets = cases.task(kind), cases.sets()
    model, original = run(kind, uniform_epochs=4, epochs=8).model, cases.original(kind)
    fall = {
        name: float((task.signals(original, items).score - task.signals(model, items).score).mean())
        for name, items in (("forget", sets.forget), ("retain", sets.retain))
    }
    assert fall["forget"] > 0.5
    assert fall["forget"] > fall["retain"]


def test_first_stage_flattens_the_answers_on_forgotten_items(kind: str) -> None:
    history = run(kind, uniform_epochs=8, epochs=0).history
    assert history[-1]["uniform_divergence"] < 0.5 * history[0]["uniform_divergence"]


@pytest.mark.parametrize("forget_loss", LOSSES)
def test_contrastive_finetune_counts_its_effort(kind: str, forget_loss: str) -> None:
    """Batches of 5: 8 forgotten items make 2, which meet 10 of the 40 retained ones."""
    effort = run(kind, batch_size=5, uniform_epochs=1, epochs=2, forget_loss=forget_loss).effort
    views = 2 if forget_loss == "augmented" else 1
    assert effort.steps == 2 + 2 * (2 + 8)
    assert effort.forward == {"forget": 8 + 2 * views * 8, "retain": 2 * (10 + 40)}
    assert effort.backward == {"forget": 8 + 2 * views * 8, "retain": 2 * 40}


def test_contrastive_finetune_ends_a_forget_round_with_the_shorter_pass() -> None:
    sets = replace(cases.sets(), retain=cases.sets().retain[:4])
    effort = run("vectors", sets=sets, batch_size=4, uniform_epochs=0, epochs=1).effort
    assert effort.steps == 1 + 1
    assert effort.forward == {"forget": 4, "retain": 4 + 4}


@pytest.mark.parametrize("forget_loss", LOSSES)
def test_contrastive_finetune_gives_the_same_bytes_for_the_same_seed_only(forget_loss: str, same_bytes: Same) -> None:
    first, again, other = (run("images", seed=seed, forget_loss=forget_loss) for seed in (0, 0, 1))
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert first.history == again.history
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("save", [1, 2, 3])
def test_contrastive_finetune_resumes_bit_for_bit_in_either_stage(kind: str, save: int, same_bytes: Same) -> None:
    changes = {"uniform_epochs": 2}
    whole, dying, survivor = run(kind, **changes), MemoryCheckpoint(dies_at=save), MemoryCheckpoint()
    with pytest.raises(KilledError):
        run(kind, checkpoint=dying, **changes)
    survivor.kept = dying.kept
    resumed = run(kind, checkpoint=survivor, **changes)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)
    assert survivor.saves == 4 - save


@pytest.mark.parametrize("name", ["forget", "retain"])
def test_contrastive_finetune_refuses_an_empty_set(name: str) -> None:
    with pytest.raises(EmptyGroupError, match=f"{name} items"):
        run("vectors", sets=replace(cases.sets(), **{name: cases.sets().forget[:0]}))


@pytest.mark.parametrize("which", ["uniform_optimiser", "forget_optimiser", "retain_optimiser"])
def test_contrastive_finetune_stops_when_a_loss_runs_away(which: str) -> None:
    with pytest.raises(NonFiniteError):
        run(
            "images",
            epochs=3,
            uniform_epochs=3,
            batch_size=4,
            **{which: cases.optimiser(kind="sgd", learning_rate=1e30)},
        )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", -1),
        ("uniform_epochs", -1),
        ("tau", 0.0),
        ("forget_loss", "cosine"),
        ("uniform_loss", "other"),
        ("batch_size", 0),
    ],
)
def test_contrastive_finetune_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        run("vectors", **{key: value})

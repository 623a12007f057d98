from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import cross_entropy

from methods import class_cases as cases
from scforget import seeding
from scforget.class_tasks import ClassifierTask
from scforget.errors import EmptyGroupError, NonFiniteError
from scforget.methods.adv_neg_grad import AdvNegGradSettings, adv_neg_grad
from scforget.methods.retain_finetune import ClassFinetuneSettings, class_finetune
from scforget.training import Trained

Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]


def unlearn(
    kind: str = "images", seed: int = 0, checkpoint: Any = None, task: ClassifierTask | None = None, **changes: Any
) -> Trained:  # fmt: skip
    settings = AdvNegGradSettings(
        **{"optimiser": cases.optimiser(), "batch_size": 16, "epochs": 2, "lam": 0.1, **changes}
    )
    return adv_neg_grad(
        cases.original(kind), task or cases.task(kind), cases.sets(), settings, seed=seed, checkpoint=checkpoint
    )  # fmt: skip


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_adv_neg_grad_of_no_epoch_is_the_original_bit_for_bit(kind: str, lam: float, same_bytes: Same) -> None:
    unlearned = unlearn(kind, epochs=0, lam=lam)
    assert same_bytes(unlearned.model.state_dict(), cases.original(kind).state_dict())
    assert (unlearned.effort.passes, unlearned.history) == (0, [])
    assert not unlearned.model.training


@pytest.mark.parametrize("kind", cases.KINDS)
def test_adv_neg_grad_without_weight_is_plain_finetuning_bit_for_bit(kind: str, same_bytes: Same) -> None:
    plain = class_finetune(
        cases.original(kind), cases.task(kind), cases.sets(), ClassFinetuneSettings(**cases.recipe()), seed=4
    )  # fmt: skip
    unlearned = unlearn(kind, seed=4, lam=0.0)
    assert same_bytes(unlearned.model.state_dict(), plain.model.state_dict())
    assert (unlearned.history, unlearned.effort) == (plain.history, plain.effort)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_adv_neg_grad_epoch_is_that_written_out(kind: str) -> None:
    """Three batches of R, of 16, 16 and 8, beside F whole, each time in a new order."""
    model, task, sets = cases.original(kind).train(), cases.task(kind), cases.sets()
    optimiser, sums = torch.optim.SGD(model.parameters(), lr=0.01), np.zeros(2)
    with seeding.scope(3, "fit", "epoch", 1) as noise:
        order = sets.retain[torch.randperm(40, generator=noise).numpy()]
        for start in (0, 16, 32):
            forget = sets.forget[torch.randperm(8, generator=noise).numpy()]
            kept = task.batch(order[start : start + 16], noise)
            keep = cross_entropy(model(kept.inputs), kept.labels)
            gone = task.batch(forget, noise)
            lose = cross_entropy(model(gone.inputs), gone.labels)
            optimiser.zero_grad()
            (keep - 0.7 * lose).backward()
            optimiser.step()
            sums += [keep.item() * len(kept.labels), lose.item() * 8]
    unlearned = unlearn(kind, seed=3, epochs=1, lam=0.7, optimiser=cases.optimiser(kind="sgd"))
    for name, value in unlearned.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-6)
    means = {"train_loss": pytest.approx(sums[0] / 40, rel=1e-5), "forget_loss": pytest.approx(sums[1] / 24, rel=1e-5)}
    assert unlearned.history == [{"epoch": 1, **means}]


def test_adv_neg_grad_starts_over_when_the_forgotten_items_are_through(monkeypatch: pytest.MonkeyPatch) -> None:
    task, seen = cases.task("images"), []
    batch = task.batch

    def watched(cells: Any, noise: Any = None) -> Any:
        seen.append(list(cells))
        return batch(cells, noise)

    monkeypatch.setattr(task, "batch", watched)
    unlearn(task=task, batch_size=5, epochs=1)
    forgotten, retained = seen[1::2], seen[::2]
    assert [len(cells) for cells in forgotten] == [5, 3, 5, 3, 5, 3, 5, 3]
    passes = [[*forgotten[i], *forgotten[i + 1]] for i in range(0, 8, 2)]
    assert all(sorted(cells) == cases.sets().forget.tolist() for cells in passes)
    assert len({tuple(cells) for cells in passes}) > 1
    assert sorted(cell for cells in retained for cell in cells) == cases.sets().retain.tolist()


@pytest.mark.parametrize("kind", cases.KINDS)
def test_adv_neg_grad_worsens_the_forgotten_items_the_more_the_larger_lam(kind: str) -> None:
    task, sets = cases.task(kind), cases.sets()
    models = [unlearn(kind, epochs=4, lam=lam).model for lam in (0.0, 0.1, 0.5)]
    none, some, much = (task.error(model, sets.forget) for model in models)
    assert much > some > none
    assert much > task.error(cases.original(kind), sets.forget) + 0.2
    assert task.error(models[2], sets.retain) < 0.5 * much


@pytest.mark.parametrize("save", [1, 2])
@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_adv_neg_grad_resumes_bit_for_bit(save: int, lam: float, same_bytes: Same) -> None:
    run = functools.partial(unlearn, epochs=3, lam=lam)
    whole, again = run(), cases.resumed(run, save)
    assert same_bytes(again.model.state_dict(), whole.model.state_dict())
    assert (again.history, again.effort) == (whole.history, whole.effort)


def test_adv_neg_grad_counts_its_effort() -> None:
    effort = unlearn(batch_size=10, epochs=2).effort
    assert effort.steps == 2 * 4
    assert effort.forward == effort.backward == {"forget": 64, "retain": 80}


def test_adv_neg_grad_says_so_when_it_runs_away() -> None:
    with pytest.raises(NonFiniteError):
        unlearn("vectors", optimiser=cases.optimiser(kind="sgd", learning_rate=1e38))


def test_adv_neg_grad_refuses_to_wait_for_an_empty_forget_set() -> None:
    sets = cases.sets()
    nothing = type(sets)(sets.forget[:0], sets.retain, sets.stop, sets.aside)
    settings = AdvNegGradSettings(optimiser=cases.optimiser(), batch_size=16, epochs=1, lam=0.1)
    with pytest.raises(EmptyGroupError, match="items to forget: found none"):
        adv_neg_grad(cases.original("images"), cases.task("images"), nothing, settings, seed=0)


@pytest.mark.parametrize(
    ("key", "value"), [("epochs", -1), ("lam", -0.1), ("lam", float("inf")), ("batch_size", 0)]
)  # fmt: skip
def test_adv_neg_grad_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        unlearn(**{key: value})

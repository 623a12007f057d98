from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError
from torch import Tensor, nn

from methods import class_cases as cases
from scforget.errors import DataError, NonFiniteError
from scforget.methods.cf_k import CFkSettings, cf_k, frozen
from scforget.methods.retain_finetune import ClassFinetuneSettings, class_finetune
from scforget.models.classifiers import Classifier
from scforget.training import Trained

Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
BLOCKS = {"vectors": 3, "images": 4}
EACH_K = [(kind, k) for kind, blocks in BLOCKS.items() for k in range(1, blocks)]


def unlearn(
    kind: str = "images", seed: int = 0, checkpoint: Any = None, model: Classifier | None = None, **changes: Any
) -> Trained:  # fmt: skip
    settings = CFkSettings(**cases.recipe(**{"k": 1, **changes}))
    return cf_k(
        model or cases.original(kind), cases.task(kind), cases.sets(), settings, seed=seed, checkpoint=checkpoint
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "k"), EACH_K)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_cf_k_moves_all_that_is_behind_the_frozen_blocks_and_nothing_of_them(
    kind: str, k: int, decay: float, same_bytes: Same
) -> None:
    unlearned = unlearn(kind, k=k, optimiser=cases.optimiser(weight_decay=decay)).model
    pairs = list(zip(unlearned.blocks(), cases.original(kind).blocks(), strict=True))
    assert len(pairs) == BLOCKS[kind]
    for number, (block, before) in enumerate(pairs):
        if number < k:  # running statistics and the count of their batches included
            assert same_bytes(block.state_dict(), before.state_dict())
        else:
            others = before.state_dict()
            assert all((value != others[name]).any() for name, value in block.state_dict().items())


@pytest.mark.parametrize("kind", cases.KINDS)
def test_cf_k_with_all_blocks_frozen_is_the_original_bit_for_bit(kind: str, same_bytes: Same) -> None:
    unlearned = unlearn(kind, k=BLOCKS[kind])
    assert same_bytes(unlearned.model.state_dict(), cases.original(kind).state_dict())
    assert (unlearned.effort.passes, unlearned.history) == (0, [])
    assert not unlearned.model.training


@pytest.mark.parametrize("kind", cases.KINDS)
def test_cf_k_of_no_epoch_is_the_original_bit_for_bit(kind: str, same_bytes: Same) -> None:
    unlearned = unlearn(kind, k=1, epochs=0)
    assert same_bytes(unlearned.model.state_dict(), cases.original(kind).state_dict())
    assert (unlearned.effort.passes, unlearned.history) == (0, [])
    assert not unlearned.model.training


@pytest.mark.parametrize("kind", cases.KINDS)
def test_cf_k_of_no_block_is_plain_finetuning_bit_for_bit(kind: str, same_bytes: Same) -> None:
    settings = ClassFinetuneSettings(**cases.recipe(schedule="cosine"))
    plain = class_finetune(cases.original(kind), cases.task(kind), cases.sets(), settings, seed=4)
    unlearned = unlearn(kind, seed=4, k=0, schedule="cosine")
    assert same_bytes(unlearned.model.state_dict(), plain.model.state_dict())
    assert (unlearned.history, unlearned.effort) == (plain.history, plain.effort)


@pytest.mark.parametrize(("kind", "k"), [("vectors", 4), ("images", 5), ("images", 100)])
def test_cf_k_refuses_more_blocks_than_there_are(kind: str, k: int) -> None:
    net = {"vectors": "MLP", "images": "SmallCNN"}[kind]
    with pytest.raises(DataError, match=f"k = {k}; wanted at most {BLOCKS[kind]}, as many as this {net} has blocks"):
        unlearn(kind, k=k)


def test_cf_k_leaves_the_model_as_trainable_as_it_was(same_bytes: Same) -> None:
    model = cases.original("images")
    first, second = list(model.parameters())[:2]
    first.requires_grad_(False)
    unlearn(model=model, k=2)
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, *[True] * 9]
    assert second.grad is None
    stays = model.blocks()[0].train()
    model.train()(cases.task("images").batch(cases.sets().retain).inputs)  # no hook puts the blocks back any more
    assert stays.training


def test_frozen_lets_go_when_training_fails() -> None:
    model = cases.original("vectors")
    with pytest.raises(NonFiniteError):
        unlearn("vectors", model=model, k=1, epochs=5, optimiser=cases.optimiser(kind="sgd", learning_rate=1e38))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model._forward_pre_hooks


def test_frozen_parts_run_in_eval_mode_whatever_the_model_does() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.BatchNorm1d(2))
    batch = cases.task("vectors").batch(cases.sets().retain).inputs[:, :2]
    with frozen(model, [model[0], model[1]]):
        model.train()(batch)
        assert [part.training for part in model] == [False, False, True]
    assert [int(model[i].num_batches_tracked) for i in (0, 2)] == [0, 1]  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("kind", cases.KINDS)
def test_cf_k_learns_the_retained_items(kind: str) -> None:
    task, retain = cases.task(kind), cases.sets().retain
    unlearned = unlearn(kind, k=1, epochs=5).model
    assert task.error(unlearned, retain) < task.error(cases.original(kind), retain)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_cf_k_resumes_bit_for_bit(kind: str, same_bytes: Same) -> None:
    run = functools.partial(unlearn, kind, k=2, epochs=3)
    whole, again = run(), cases.resumed(run, 1)
    assert same_bytes(again.model.state_dict(), whole.model.state_dict())
    assert (again.history, again.effort) == (whole.history, whole.effort)


def test_cf_k_counts_its_effort() -> None:
    effort = unlearn(k=2, epochs=3).effort
    assert effort.steps == 3 * 3
    assert effort.forward == effort.backward == {"retain": 120}


@pytest.mark.parametrize(("key", "value"), [("k", -1), ("k", 1.0), ("epochs", -1)])
def test_cf_k_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        unlearn(**{key: value})

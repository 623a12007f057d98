from __future__ import annotations

from collections.abc import Callable
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from scforget.data.splits import ForgetSets
from scforget.methods.partial_reset import PartialResetSettings, partial_reset
from scforget.models.vae import BLOCKS, VAE, block_of
from scforget.tasks import VaeTask
from scforget.training import TrainingSettings, fit

Original = Callable[[], VAE]
Recipe = Callable[..., dict[str, Any]]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]


def test_partial_reset_of_no_block_is_the_original_bit_for_bit(
    task: VaeTask, forget_sets: ForgetSets, original: Original, recipe: Recipe, same_bytes: Same
) -> None:
    settings = PartialResetSettings(**recipe(), blocks=[])
    unlearned = partial_reset(original(), task, forget_sets, settings, seed=0)
    assert same_bytes(unlearned.model.state_dict(), original().state_dict())
    assert unlearned.effort.passes == 0


@pytest.mark.parametrize("blocks", list(chain.from_iterable(combinations(BLOCKS, n) for n in range(1, 5))))
def test_partial_reset_gives_fresh_values_to_the_named_blocks_only(
    task: VaeTask, forget_sets: ForgetSets, original: Original, recipe: Recipe, blocks: tuple[str, ...]
) -> None:
    settings = PartialResetSettings(**recipe(max_epochs=0), blocks=list(blocks))
    found = partial_reset(original(), task, forget_sets, settings, seed=9).model.state_dict()
    before, fresh = original().state_dict(), task.new_model(9).state_dict()
    for name, value in found.items():
        reset = block_of(name) in blocks
        assert torch.equal(value, fresh[name] if reset else before[name])
        assert torch.equal(value, before[name]) != reset


def test_partial_reset_then_trains_on_the_retained_cells(
    task: VaeTask, forget_sets: ForgetSets, original: Original, recipe: Recipe, same_bytes: Same
) -> None:
    settings = PartialResetSettings(**recipe(), blocks=["decoder", "heads"])
    untrained = PartialResetSettings(**recipe(max_epochs=0), blocks=["decoder", "heads"])
    unlearned = partial_reset(original(), task, forget_sets, settings, seed=9)
    start = partial_reset(original(), task, forget_sets, untrained, seed=9).model
    wanted = fit(start, task, forget_sets.retain, forget_sets.stop, TrainingSettings(**recipe()), seed=9)
    assert same_bytes(unlearned.model.state_dict(), wanted.model.state_dict())
    assert unlearned.history == wanted.history
    assert set(unlearned.effort.forward) == {"retain", "stop"}


def test_partial_reset_of_every_block_is_a_retrain(
    task: VaeTask, forget_sets: ForgetSets, original: Original, recipe: Recipe, same_bytes: Same
) -> None:
    """Nothing of the original is left: the result is that of training a new model of the same seed."""
    settings = PartialResetSettings(**recipe(), blocks=["encoder", "bottleneck", "decoder", "heads"])
    unlearned = partial_reset(original(), task, forget_sets, settings, seed=9)
    sets = forget_sets
    wanted = fit(task.new_model(9), task, sets.retain, sets.stop, TrainingSettings(**recipe()), seed=9)
    assert same_bytes(unlearned.model.state_dict(), wanted.model.state_dict())


def test_partial_reset_never_reads_the_forgotten_cells(
    task: VaeTask, poisoned: VaeTask, forget_sets: ForgetSets, original: Original, recipe: Recipe, same_bytes: Same
) -> None:
    settings = PartialResetSettings(**recipe(), blocks=["decoder", "heads"])
    clean, other = (partial_reset(original(), t, forget_sets, settings, seed=3) for t in (task, poisoned))
    assert same_bytes(clean.model.state_dict(), other.model.state_dict())
    assert clean.history == other.history


def test_partial_reset_settings_refuse_a_block_that_is_none(recipe: Recipe) -> None:
    with pytest.raises(ValidationError, match="blocks"):
        PartialResetSettings(**recipe(), blocks=["mu"])

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from scforget.data.splits import ForgetSets
from scforget.methods.retain_finetune import RetainFinetuneSettings, retain_finetune
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.training import TrainingSettings, fit, mean_elbo

Original = Callable[[], VAE]
Recipe = Callable[..., dict[str, Any]]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]


def test_retain_finetune_of_no_epoch_is_the_original_bit_for_bit(
    task: VaeTask, forget_sets: ForgetSets, original: Original, recipe: Recipe, same_bytes: Same
) -> None:
    settings = RetainFinetuneSettings(**recipe(max_epochs=0))
    unlearned = retain_finetune(original(), task, forget_sets, settings, seed=0)
    assert same_bytes(unlearned.model.state_dict(), original().state_dict())
    assert unlearned.effort.passes == 0


def test_retain_finetune_is_training_on_the_retained_cells(
    task: VaeTask, forget_sets: ForgetSets, original: Original, recipe: Recipe, same_bytes: Same
) -> None:
    settings = recipe(kl_warmup_epochs=0)
    unlearned = retain_finetune(original(), task, forget_sets, RetainFinetuneSettings(**settings), seed=3)
    wanted = fit(original(), task, forget_sets.retain, forget_sets.stop, TrainingSettings(**settings), seed=3)
    assert same_bytes(unlearned.model.state_dict(), wanted.model.state_dict())
    assert unlearned.history == wanted.history
    assert set(unlearned.effort.forward) == {"retain", "stop"}
    gained = mean_elbo(task, unlearned.model, forget_sets.stop) - mean_elbo(task, original(), forget_sets.stop)
    assert gained > 0


def test_retain_finetune_never_reads_the_forgotten_cells(
    task: VaeTask, poisoned: VaeTask, forget_sets: ForgetSets, original: Original, recipe: Recipe, same_bytes: Same
) -> None:
    settings = RetainFinetuneSettings(**recipe())
    clean, other = (retain_finetune(original(), t, forget_sets, settings, seed=3) for t in (task, poisoned))
    assert same_bytes(clean.model.state_dict(), other.model.state_dict())
    assert clean.history == other.history

"""CF-k: freeze the first k blocks of a classifier and fine-tune the others on the retained items."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from scforget.class_tasks import ClassifierTask
from scforget.class_training import ClassTrainingSettings, fit_classifier
from scforget.data.splits import ForgetSets
from scforget.errors import DataError
from scforget.models.classifiers import Classifier
from scforget.search import Range
from scforget.training import Checkpoint, Trained


class CFkSettings(ClassTrainingSettings):
    """The training recipe of what is not frozen; ``epochs: 0`` returns the original bit for bit.

    Attributes
    ----------
    k
        Blocks to freeze, from the input side, at most as many as the net has (then the original comes back bit for
        bit); 0 is plain fine-tuning.

    Ranges: from the first block alone to all but the output layer of the smallest nets here; up to twice the ten epochs
    of UnGAN's comparison.
    """

    epochs: Annotated[int, Field(ge=0), Range(1, 20, log=True)]
    k: Annotated[int, Field(ge=0), Range(1, 3)]


@contextmanager
def frozen(model: nn.Module, parts: Sequence[nn.Module]) -> Iterator[None]:
    """Keep some parts of a model as they are while the rest is trained, BatchNorm's running statistics included.

    Their parameters get no gradient, and they run in eval mode (so without dropout too) whatever the model's mode is.
    """
    before = [(parameter, parameter.requires_grad) for part in parts for parameter in part.parameters()]

    def keep_still(*_arguments: Any) -> None:
        for part in parts:
            part.eval()

    # an epoch puts the whole model in train mode; a frozen part goes back before each pass
    hook = model.register_forward_pre_hook(keep_still)
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        hook.remove()
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


def cf_k(
    model: Classifier, task: ClassifierTask, sets: ForgetSets, settings: CFkSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Minimise the retained items' cross-entropy over the parameters behind the first k blocks.

    Raises
    ------
    DataError
        If the net has fewer than k blocks.
    NonFiniteError
        If a loss is NaN or infinite.

    Notes
    -----
    Goel et al. 2022 (catastrophic forgetting of the last k layers; the UnGAN paper's k counts the frozen ones). What
    the frozen blocks remember of F stays.
    """
    blocks = model.blocks()
    if settings.k > len(blocks):
        net = type(model).__name__
        raise DataError("cf_k", f"k = {settings.k}", f"at most {len(blocks)}, as many as this {net} has blocks")
    if settings.k == len(blocks):
        return Trained(model.eval())
    with frozen(model, blocks[: settings.k]):
        return fit_classifier(model, task, sets.retain, settings, seed=seed, checkpoint=checkpoint)

"""Partial reset: give some blocks fresh parameters, then train on the retained cells."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from scforget.data.splits import ForgetSets
from scforget.models.vae import VAE, block_of
from scforget.search import Follows, Range
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Trained, TrainingSettings, fit


class PartialResetSettings(TrainingSettings):
    """Which blocks are re-initialised, and the recipe of the training that follows.

    Attributes
    ----------
    blocks
        Among ``encoder``, ``bottleneck``, ``decoder``, ``heads``; with none the original comes back bit for bit.

    Ranges: the rate from the recipe's own 1e-3 to ten times that, the epochs from an unfinished decoder to a third
    of a retrain's cost (``docs/results/frontier.md``); one cycle has no use for patience.
    """

    learning_rate: Annotated[float, Field(gt=0), Range(1e-3, 1e-2, log=True)]
    max_epochs: Annotated[int, Field(ge=0), Range(4, 30)]
    patience: Annotated[int, Field(gt=0), Follows("max_epochs")]
    blocks: list[Literal["encoder", "bottleneck", "decoder", "heads"]]


def partial_reset(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: PartialResetSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Re-initialise blocks, then minimise the loss on the retained cells; the forgotten cells are never touched.

    Notes
    -----
    Rests on a finding, not a theorem: single cells are remembered in the decoder, whose parameters are replaced,
    while the encoder keeps what it knows of kinds of cells. Without a block to reset there is nothing to undo.
    """
    if not settings.blocks:
        return Trained(model)
    fresh = task.new_model(seed).state_dict()
    model.load_state_dict({n: fresh[n] if block_of(n) in settings.blocks else v for n, v in model.state_dict().items()})
    return fit(model, task, sets.retain, sets.stop, settings, seed=seed, checkpoint=checkpoint)

"""Reset and distil: a fresh network learns what the original says of the retained cells, then trains on them."""

from __future__ import annotations

import copy
from typing import Annotated

import torch
from pydantic import Field

from scforget.data.splits import ForgetSets
from scforget.models.vae import VAE
from scforget.search import Follows, Range
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Epoch, Loop, Trained, TrainingSettings, adam, batches, descend, fit


class ResetDistillSettings(TrainingSettings):
    """How long and how fast the original is distilled, and the recipe of the training that follows.

    Attributes
    ----------
    distil_epochs
        Passes over the retained cells with the original as the teacher.
    distil_learning_rate
        Adam's rate there; matching a teacher bears a higher one than training does.

    Ranges: as for the partial reset; up to 6 epochs of distillation, as after eight more than four times the trace was
    left that two leave (``docs/results/frontier.md``).
    """

    learning_rate: Annotated[float, Field(gt=0), Range(1e-3, 1e-2, log=True)]
    max_epochs: Annotated[int, Field(ge=0), Range(4, 30)]
    patience: Annotated[int, Field(gt=0), Follows("max_epochs")]
    distil_epochs: Annotated[int, Field(ge=0), Range(1, 6)]
    distil_learning_rate: Annotated[float, Field(gt=0), Range(1e-3, 1e-2, log=True)]


def reset_distill(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: ResetDistillSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Re-initialise everything, distil the original on the retained cells only, then minimise the loss on them.

    Notes
    -----
    θ ← argmin over fresh θ of the mean over R of KL(q_θ0 ‖ q_θ) + the decoder's divergence
    (:meth:`~scforget.tasks.VaeTask.divergence`; both decoders read the same draw of the teacher's posterior), then
    argmin L_R(θ). The forgotten cells are never touched; what the original remembers of them can pass only through
    its answers on other cells. Without distillation it is a retrain.
    """
    teacher = copy.deepcopy(model).eval()
    model.load_state_dict(task.new_model(seed).state_dict())
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    optimiser, effort = adam(model, settings.distil_learning_rate), loop.effort

    def epoch(_number: int, noise: torch.Generator) -> Epoch:
        model.train()
        total = 0.0
        for part in batches(sets.retain, settings.batch_size, noise):
            divergence = task.divergence(model, teacher, task.batch(part), noise).total
            descend(optimiser, divergence.mean(), effort)
            effort.count("retain", len(part), forward=2)  # the teacher's pass and the student's
            total += float(divergence.detach().double().sum())
        return {"divergence": total / len(sets.retain)}

    loop.run("distil", epoch, settings.distil_epochs, parts={"adam": optimiser})
    return fit(model, task, sets.retain, sets.stop, settings, seed=seed, loop=loop)

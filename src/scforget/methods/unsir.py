"""UNSIR: learn noise that the model errs on, impair the model with it, and repair on the retained items."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from scforget import engine, optimisers, seeding
from scforget.arrays import IntArray
from scforget.class_tasks import ClassifierTask
from scforget.class_training import (
    ClassTrainingSettings,
    class_batches,
    class_rates,
    fit_classifier,
    new_optimiser,
)
from scforget.curvature import require_finite
from scforget.data.splits import ForgetSets
from scforget.methods.cf_k import frozen
from scforget.models.classifiers import Classifier
from scforget.search import Range
from scforget.settings import Settings
from scforget.training import Checkpoint, Epoch, Loop, Trained, descend


class UnsirSettings(Settings):
    """Settings of UNSIR.

    Attributes
    ----------
    noise_items
        Items of noise for each forgotten class.
    noise_steps, noise_learning_rate
        Of Adam on them.
    penalty
        Weight of their squared norm, which keeps the noise from growing without end.
    copies
        How often each item of noise is among the items of an impairing epoch.
    impair
        Training recipe on noise and retained items; one epoch in the source.
    repair
        Training recipe on retained items; one epoch in the source. With 0 epochs of both the original comes back bit
        for bit.

    Ranges: about the release's 0.1 and up to its 20 copies.
    """

    noise_items: Annotated[int, Field(gt=0)]
    noise_steps: Annotated[int, Field(ge=0)]
    noise_learning_rate: Annotated[float, Field(gt=0)]
    penalty: Annotated[float, Field(ge=0, allow_inf_nan=False), Range(0.01, 1.0, log=True)]
    copies: Annotated[int, Field(gt=0), Range(1, 20, log=True)]
    impair: ClassTrainingSettings
    repair: ClassTrainingSettings


class Noise(nn.Module):
    """Inputs of a net, some for each of some classes, that are themselves the parameters.

    Parameters
    ----------
    classes : ``[L]``
        Codes of the classes.
    items
        n, for each of them.
    shape
        Of one input.
    generator
        Of their standard normal start.
    """

    def __init__(self, classes: IntArray, items: int, shape: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.items = nn.ParameterList(engine.normal((items, *shape), generator) for _ in classes)
        self.labels = torch.from_numpy(np.repeat(classes, items)).to(engine.device())

    def inputs(self) -> Tensor:
        """All items in the order of ``labels``, ``[L n, …]``, detached."""
        return torch.cat([part.detach() for part in self.items])


def noise_loss(model: Classifier, task: ClassifierTask, inputs: Tensor, labels: Tensor, penalty: float) -> Tensor:
    """−CE of noise ``[B, …]`` under its labels ``[B]`` plus a penalty times its mean squared norm; a scalar.

    Notes
    -----
    Tarun et al. 2023: argmin over the noise N of −L(f(N), y) + λ‖N‖; the norm squared, as their release has it.
    """
    return penalty * inputs.flatten(1).square().sum(1).mean() - task.cross_entropy(model(inputs), labels).mean()


def _learn(model: Classifier, task: ClassifierTask, noise: Noise, settings: UnsirSettings, loop: Loop) -> None:
    """Learn the noise of each class in turn against the model as it is, all as one epoch of the loop."""
    labels = noise.labels.view(len(noise.items), -1)

    def epoch(_number: int, _stream: torch.Generator) -> Epoch:
        model.eval()
        last = []
        for inputs, wanted in zip(noise.items, labels, strict=True):
            optimiser = optimisers.Adam([inputs], settings.noise_learning_rate)
            for _ in range(settings.noise_steps):
                with engine.autocast():
                    loss = noise_loss(model, task, inputs, wanted, settings.penalty)
                descend(optimiser, loss, loop.effort)
                loop.effort.count("noise", len(inputs))
            last.append(float(loss.detach()))
        return {"noise_loss": float(np.mean(last))}

    with frozen(model, [model]):
        loop.run("noise", epoch, min(settings.noise_steps, 1), parts={"noise": noise})


def _impair(  # noqa: PLR0917
    model: Classifier, task: ClassifierTask, retain: IntArray, noise: Noise, settings: UnsirSettings, loop: Loop
) -> None:  # fmt: skip
    """Train on noise and retained items, mixed at random."""
    recipe, first = settings.impair, len(task.labels)
    rows = np.tile(np.arange(len(noise.labels)), settings.copies)
    mixed = np.concatenate([retain, first + rows])  # what lies beyond the task's items is noise
    optimiser = new_optimiser(model.parameters(), recipe.optimiser)

    def epoch(number: int, stream: torch.Generator) -> Epoch:
        model.train()
        inputs, total = noise.inputs(), 0.0
        rates = class_rates(recipe, len(mixed), number)
        for rate, part in zip(rates, class_batches(mixed, recipe.batch_size, stream), strict=True):
            optimiser.param_groups[0]["lr"] = rate
            own, drawn = part[part < first], torch.from_numpy(part[part >= first] - first).to(inputs.device)
            batch = task.batch(own, stream)
            with engine.autocast():
                logits = model(torch.cat([batch.inputs, inputs[drawn]]))
            losses = task.cross_entropy(logits, torch.cat([batch.labels, noise.labels[drawn]]))
            descend(optimiser, losses.mean(), loop.effort)
            loop.effort.count("retain", len(own))
            loop.effort.count("noise", len(drawn))
            total += float(losses.detach().double().sum())
        return {"train_loss": total / len(mixed)}

    # the noise is what this phase needs of the one before, so a killed run must find it again
    loop.run("impair", epoch, recipe.epochs, parts={"optimiser": optimiser, "noise": noise})


def unsir(
    model: Classifier, task: ClassifierTask, sets: ForgetSets, settings: UnsirSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Learn noise for every class that has a forgotten item, then impair and repair.

    Raises
    ------
    NonFiniteError
        If a loss or a parameter is NaN or infinite.

    Notes
    -----
    Tarun et al. 2023. The noise lives where the net's inputs do: vectors as they are, images centred and scaled. It
    maximises the error of θ0 under a forgotten class's label; training on it under that very label drives the weights
    away from what they knew of the class. The source forgets whole classes, and retains none of them. Where F is
    scattered over the classes, noise is learnt for all of them, and nothing that follows tells a forgotten item from a
    retained one of its class: every class is impaired, and R repairs it. What fades of F then is what fades in training
    on R after damage. The items of F themselves are never read, but for their labels.
    """
    if not settings.impair.epochs and not settings.repair.epochs:
        return Trained(model.eval())
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    classes = np.unique(task.labels[sets.forget])
    stream = seeding.torch_generator(seed, "unsir noise")
    noise = Noise(classes, settings.noise_items, task.inputs.shape[1:], stream)
    if settings.impair.epochs:
        _learn(model, task, noise, settings, loop)
        _impair(model, task, sets.retain, noise, settings, loop)
    trained = fit_classifier(model, task, sets.retain, settings.repair, seed=seed, loop=loop, phase="repair")
    require_finite(model.parameters(), loop.effort.steps, "a parameter")
    return trained

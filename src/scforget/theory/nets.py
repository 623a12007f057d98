"""Classifiers of cell types, the control of the Fisher analysis: a linear probe, a deep net and one of the VAE's size.

P0 sets the VAE's Fisher overlap against that of a linear probe with a fifteen-thousandth of its parameters. Here the
nets between the two are there as well, of the VAE's own blocks, so that size, depth and task can be told apart; and
their Fisher information is to be had for labels as observed (empirical) and as the model itself would draw them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from scforget import optimisers, seeding
from scforget.arrays import FloatArray, IntArray
from scforget.audit.intervals import clopper_pearson
from scforget.errors import DataError, EmptyGroupError, NonFiniteError
from scforget.fisher import Diagonal, mean_squares
from scforget.models.classifiers import MLP
from scforget.models.vae import VAE
from scforget.settings import Settings

Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
_BATCH = 512
_BISECTIONS = 60


class ClassifierSettings(Settings):
    """A classifier and its training.

    Attributes
    ----------
    hidden
        Widths of the hidden layers, input side first; empty for a linear probe.
    dropout
        Probability in every hidden block.
    learning_rate, weight_decay
        Of Adam; the decay is added to the gradient (L2).
    batch_size
        Cells in a batch; ``None`` for all of them.
    max_epochs
        Passes over the cells, at most.
    stop_accuracy
        Training stops after the epoch in which the accuracy on the training cells, in eval mode, reaches this;
        ``None`` for never.
    """

    hidden: list[Count]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    batch_size: Count | None
    max_epochs: Count
    stop_accuracy: Annotated[float, Field(gt=0, le=1)] | None


class NetsSettings(Settings):
    """The classifiers of the Fisher analysis.

    Attributes
    ----------
    probe
        On latent means, ``[N, Z]``; linear in P0.
    deep
        On log-normalised expression, ``[N, G]``. The size-matched one is trained alike, its widths scaled.
    tolerance
        Relative error of the size-matched one's number of parameters that is allowed.
    level
        Coverage of the accuracies' intervals.
    """

    probe: ClassifierSettings
    deep: ClassifierSettings
    tolerance: Share
    level: Share


class Labelled(NamedTuple):
    """Some cells: ``inputs [B, F]``, class codes ``labels [B]`` and ``weights [B]`` of their losses."""

    inputs: Tensor
    labels: Tensor
    weights: Tensor


def parameter_count(features: int, hidden: Sequence[int], classes: int) -> int:
    """P of an :class:`MLP`, without building it."""
    widths = [features, *hidden]
    blocks = sum((inputs + 3) * outputs for inputs, outputs in pairwise(widths))  # weights, bias and LayerNorm's two
    return blocks + (widths[-1] + 1) * classes


def live_parameters(model: VAE) -> int:
    """P of a VAE without what its loss never reaches: the dispersion head under ``log_mse``."""
    idle = model.dispersion.parameters() if model.settings.likelihood == "log_mse" else ()
    return sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in idle)


def matched_widths(
    features: int, hidden: Sequence[int], classes: int, *, parameters: int, tolerance: float
) -> list[int]:
    """Hidden widths in the proportions of ``hidden`` that give a classifier a number of parameters.

    Parameters
    ----------
    features, classes
        F and C.
    hidden
        Widths of a classifier of the same family, at least one.
    parameters
        Number wanted.
    tolerance
        Relative error that is allowed, in (0, 1).

    Raises
    ------
    DataError
        If no widths come near enough: the net is so small that one unit more is too much.
    """

    def scaled(factor: float) -> list[int]:
        return [max(1, round(factor * width)) for width in hidden]

    def size(factor: float) -> int:
        return parameter_count(features, scaled(factor), classes)

    low, high = 0.0, 1.0
    while hidden and size(high) < parameters:
        low, high = high, 2 * high
    for _ in range(_BISECTIONS):  # the size grows with the factor, in steps
        middle = (low + high) / 2
        low, high = (middle, high) if size(middle) < parameters else (low, middle)
    best = min(low, high, key=lambda factor: abs(size(factor) - parameters))
    found = size(best)
    if abs(found - parameters) > tolerance * parameters:
        raise DataError("parameters of a size-matched classifier", found, f"{parameters} within {tolerance:.1%}")
    return scaled(best)


def _tensors(inputs: FloatArray, labels: IntArray) -> tuple[Tensor, Tensor]:
    if len(inputs) != len(labels):
        raise DataError("cells of a classifier", f"{len(inputs)} inputs, {len(labels)} labels", "as many of each")
    if not len(inputs):
        raise EmptyGroupError("cells of a classifier", 0, "at least one")
    return torch.as_tensor(inputs, dtype=torch.float32), torch.as_tensor(labels, dtype=torch.int64)


@torch.no_grad()
def logits_of(model: MLP, inputs: FloatArray) -> Tensor:
    """Logits ``[N, C]`` of cells ``[N, F]``, in eval mode."""
    model.eval()
    parts = torch.as_tensor(inputs, dtype=torch.float32).split(_BATCH)
    return torch.cat([model(part) for part in parts])


def accuracy(model: MLP, inputs: FloatArray, labels: IntArray, level: float) -> dict[str, Any]:
    """How well a classifier does on some cells.

    Returns
    -------
    dict
        ``cells`` N, ``accuracy``, its Clopper-Pearson ``interval`` (of cells, the model being given) and the mean
        cross-entropy ``loss`` (nats per cell).

    Raises
    ------
    EmptyGroupError, DataError
        Without cells, or with other than one label for each.
    """
    _, codes = _tensors(inputs, labels)
    logits = logits_of(model, inputs)
    right = int((logits.argmax(1) == codes).sum())
    return {
        "cells": len(codes),
        "accuracy": right / len(codes),
        "interval": list(clopper_pearson(right, len(codes), level)),
        "loss": float(cross_entropy(logits, codes)),
    }


def fit_classifier(
    inputs: FloatArray, labels: IntArray, settings: ClassifierSettings, seed: int, *, classes: int,
    held_out: tuple[FloatArray, IntArray], level: float,
) -> tuple[MLP, dict[str, Any]]:  # fmt: skip
    """Train a classifier by Adam on cross-entropy.

    Parameters
    ----------
    inputs : ``[N, F]``
        Forget and retain cells: P0's classifiers are trained on both.
    labels : ``[N]``
        Class codes 0, …, C − 1.
    seed, classes
        Names the streams of initial weights, order and dropout; C, where there may be classes without a cell.
    held_out : ``[M, F]``, ``[M]``
        Cells that are only looked at when training is over.
    level
        Coverage of the accuracies' intervals.

    Returns
    -------
    MLP, dict
        In eval mode; ``parameters`` P, ``epochs`` taken, ``stopped`` (whether the accuracy was reached), and ``train``
        and ``held_out`` as :func:`accuracy` has them.

    Raises
    ------
    EmptyGroupError, DataError
        Without cells, or with other than one label for each, or codes beyond C.
    NonFiniteError
        If a loss is NaN or infinite.
    """
    cells, codes = _tensors(inputs, labels)
    if int(codes.min()) < 0 or int(codes.max()) >= classes:
        raise DataError("class codes", f"{int(codes.min())} to {int(codes.max())}", f"0 to {classes - 1}")
    steps, epochs, stopped = 0, 0, False
    with seeding.scope(seed, "classifier") as order:
        model = MLP(cells.shape[1], settings.hidden, classes, settings.dropout)
        optimiser = optimisers.Adam(model.parameters(), settings.learning_rate, settings.weight_decay)
        while epochs < settings.max_epochs and not stopped:
            model.train()
            for part in torch.randperm(len(cells), generator=order).split(settings.batch_size or len(cells)):
                loss = cross_entropy(model(cells[part]), codes[part])
                if not torch.isfinite(loss):
                    raise NonFiniteError(steps, "the classifier's loss")
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                steps += 1
            epochs += 1
            if settings.stop_accuracy is not None:
                stopped = accuracy(model, inputs, labels, level)["accuracy"] >= settings.stop_accuracy
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": epochs,
        "stopped": stopped,
        "train": accuracy(model, inputs, labels, level),
        "held_out": accuracy(model, *held_out, level),
    }
    return model.eval(), facts


def classifier_losses(model: MLP, batch: Labelled) -> Tensor:
    """Each cell's weighted cross-entropy, nats, ``[B]``; what percell and fisher differentiate, in eval mode."""
    return cross_entropy(model(batch.inputs), batch.labels, reduction="none") * batch.weights


def observed(inputs: FloatArray, labels: IntArray, cells: IntArray) -> Iterator[Labelled]:
    """Yield batches of ``cells`` (indices) with their own labels: one loss for each cell, of weight 1.

    Parameters
    ----------
    inputs, labels : ``[N, F]``, ``[N]``
        Of all cells. With labels that the model drew (:func:`true_fisher_labels`) the squares are the true Fisher's.
    cells
        Of set S, > 0.
    """
    every, codes = _tensors(inputs[cells], labels[cells])
    for x, y in zip(every.split(_BATCH), codes.split(_BATCH), strict=True):
        yield Labelled(x, y, torch.ones(len(x)))


def expected(model: MLP, inputs: FloatArray, cells: IntArray) -> Iterator[Labelled]:
    """Yield batches of ``cells``, each with each of the C classes as its label and weight √p(class | cell).

    The gradient of √p·ℓ, p held fixed, squares to p·(∂ℓ)²: summed over a cell's C rows that is the expectation over
    labels that the model draws, without drawing. Rows are in order of cells, then of classes: ``[N·C]``.
    """
    classes = model.output.out_features
    for some in np.array_split(cells, -(-len(cells) * classes // _BATCH)):
        if len(some):
            x = torch.as_tensor(inputs[some], dtype=torch.float32).repeat_interleave(classes, 0)
            weights = logits_of(model, inputs[some]).softmax(1).sqrt().reshape(-1)
            yield Labelled(x, torch.arange(classes).repeat(len(some)), weights)


def true_fisher_labels(model: MLP, inputs: FloatArray, seed: int) -> IntArray:
    """One label for each cell, drawn from the model's softmax, ``[N]``.

    Notes
    -----
    Squared gradients at observed labels are the empirical Fisher, at labels that the model draws the true one; they
    differ wherever the model does not hold (Kunstner et al. 2019).
    """
    cumulated = logits_of(model, inputs).double().softmax(1).cumsum(1).numpy()
    draws = seeding.numpy_generator(seed, "true_fisher_labels").random((len(cumulated), 1))
    # the last of the cumulated shares may fall short of 1 by rounding
    return np.minimum((cumulated <= draws).sum(1), cumulated.shape[1] - 1).astype(np.int64)


def classifier_fisher(model: MLP, inputs: FloatArray, labels: IntArray | None, cells: IntArray) -> Diagonal:
    """Exact diagonal of a classifier's Fisher information over some cells.

    Parameters
    ----------
    inputs : ``[N, F]``
        Of all cells.
    labels : ``[N]``, or None
        As observed (the empirical Fisher) or drawn; ``None`` for the expectation over labels that the model draws
        (the true Fisher).
    cells
        Set S, > 0.

    Returns
    -------
    dict
        For every parameter name a tensor of its shape, >= 0.

    Raises
    ------
    EmptyGroupError
        If ``cells`` is empty.

    Notes
    -----
    I_S[k] = mean over x in S of (∂ℓ(θ; x, y)/∂θ_k)², eval mode, ℓ the cross-entropy.
    """
    if not len(cells):
        raise EmptyGroupError("Fisher information", "0 cells", "at least one")
    rows = model.output.out_features if labels is None else 1  # of each cell
    batches = expected(model, inputs, cells) if labels is None else observed(inputs, labels, cells)
    found = mean_squares(model.eval(), partial(classifier_losses, model), batches)
    return {name: value * rows for name, value in found.items()}

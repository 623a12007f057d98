"""A tiny labelled data set and an original that has learnt its training items by heart, for tests of classifiers.

Two kinds of everything: ``vectors`` (an MLP with dropout) and ``images`` (a small convolutional net with BatchNorm).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from killing import KilledError, MemoryCheckpoint
from scforget.arrays import FloatArray, IntArray
from scforget.class_tasks import AugmentationSettings, ClassifierTask
from scforget.class_training import ClassTrainingSettings, OptimiserSettings, fit_classifier
from scforget.data.splits import ForgetSets
from scforget.models.classifiers import Classifier, NetSettings
from scforget.training import Trained

KINDS = ("vectors", "images")
CLASSES = ("ant", "bee", "cow")
ADAM = {"kind": "adam", "learning_rate": 3e-3, "weight_decay": 0.0}
SGD = {"kind": "sgd", "learning_rate": 1e-2, "momentum": 0.0, "weight_decay": 0.0}
#: 8 to forget, 40 to retain, 12 aside; the last 12 are unseen.
PARTS = (8, 40, 12, 12)
_NETS: dict[str, dict[str, Any]] = {
    "vectors": {"kind": "mlp", "hidden": [24, 16], "dropout": 0.1},
    "images": {"kind": "small_cnn", "widths": [8, 12], "hidden": 24},
}
_EPOCHS = {"vectors": 30, "images": 60}
_VIEWS: dict[str, dict[str, Any]] = {
    "vectors": {"crop": 0, "flip": False, "noise": 0.1},
    "images": {"crop": 1, "flip": False, "noise": 0.0},
}


def optimiser(**values: Any) -> OptimiserSettings:
    """Adam's settings, or with ``kind="sgd"`` plain gradient descent's; keywords change them."""
    base = SGD if values.get("kind") == "sgd" else ADAM
    found: OptimiserSettings = TypeAdapter(OptimiserSettings).validate_python({**base, **values})
    return found


def recipe(**changes: Any) -> dict[str, Any]:
    """Values of ``ClassTrainingSettings`` for a run of a fraction of a second; keywords change them."""
    return {"optimiser": optimiser(), "schedule": "constant", "batch_size": 16, "epochs": 2, **changes}


@cache
def _items() -> tuple[FloatArray, IntArray]:
    """Points about three centres, so wide apart within a class that a net must remember some of them: ``[72, 64]``."""
    rng = np.random.default_rng(5)
    labels = rng.permutation(np.repeat(np.arange(3), 24)).astype(np.int64)
    return rng.normal(size=(3, 64))[labels] * 0.4 + rng.normal(size=(72, 64)), labels


def task(kind: str, *, weights: FloatArray | None = None, **changes: Any) -> ClassifierTask:
    """72 items of three classes: 8×8 pictures in one channel, or vectors of 64; keywords change the random views."""
    values, labels = _items()
    inputs: Any = values.astype(np.float32)
    if kind == "images":
        inputs = np.clip(127.5 + 50 * values, 0, 255).astype(np.uint8).reshape(72, 1, 8, 8)
    net: NetSettings = TypeAdapter(NetSettings).validate_python(_NETS[kind])
    views = AugmentationSettings(**{**_VIEWS[kind], **changes})
    return ClassifierTask(inputs, labels, CLASSES, net, views, weights)


@cache
def sets() -> ForgetSets:
    """What methods may see: 8 items to forget, 40 to retain, no ``stop``, 12 aside; all classes in each."""
    order = np.random.default_rng(6).permutation(72).astype(np.int64)
    forget, retain, aside, _ = (np.sort(part) for part in np.split(order, np.cumsum(PARTS)[:-1]))
    return ForgetSets(forget, retain, np.zeros(0, dtype=np.int64), aside)


def unseen() -> IntArray:
    """The 12 items that no method is given."""
    return np.setdiff1d(np.arange(72), np.concatenate([sets().forget, sets().retain, sets().aside]))


@cache
def _original(kind: str) -> Classifier:
    one, train = task(kind), np.union1d(sets().forget, sets().retain)
    settings = ClassTrainingSettings(**recipe(epochs=_EPOCHS[kind]))
    model = fit_classifier(one.new_model(1), one, train, settings, seed=1, cell_set="train").model
    assert isinstance(model, Classifier)
    return model


def original(kind: str) -> Classifier:
    """A copy of the trained original, in eval mode, that a method may change."""
    return copy.deepcopy(_original(kind)).eval()


def resumed(run: Callable[..., Trained], save: int) -> Trained:
    """What a run gives that is killed after a save and taken up again; ``run`` takes a ``checkpoint``."""
    dying, survivor = MemoryCheckpoint(dies_at=save), MemoryCheckpoint()
    with pytest.raises(KilledError):
        run(checkpoint=dying)
    survivor.kept = dying.kept
    found = run(checkpoint=survivor)
    assert survivor.saves == len(found.history) - save
    return found

"""Classifiers trained side by side: each is what it would be alone, whatever the others are, also after a kill."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from killing import KilledError, MemoryCheckpoint
from scforget import engine
from scforget.arrays import IntArray
from scforget.artifacts import FileCheckpoint
from scforget.class_tasks import AugmentationSettings, ClassBatch, ClassifierTask
from scforget.class_training import AdamSettings, ClassTrainingSettings, SGDSettings, fit_classifier
from scforget.errors import DataError, EmptyGroupError, NonFiniteError
from scforget.models.classifiers import MLP, Classifier, MLPSettings, ResNet18, ResNet18Settings, SmallCNNSettings
from scforget.shadows import fit_together
from scforget.training import Checkpoint, Trained

VIEWS = AugmentationSettings(crop=1, flip=True, noise=0.1)
NETS: dict[str, Any] = {
    "mlp": MLPSettings(kind="mlp", hidden=[8, 6], dropout=0.0),
    "probe": MLPSettings(kind="mlp", hidden=[], dropout=0.0),
    "small_cnn": SmallCNNSettings(kind="small_cnn", widths=[4, 6], hidden=5),
    "resnet18": ResNet18Settings(kind="resnet18", stem="cifar"),
}
OPTIMISERS: dict[str, Any] = {
    "adam": AdamSettings(kind="adam", learning_rate=0.01, weight_decay=0.01),
    "sgd": SGDSettings(kind="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.01),
}
CLASSES = ("a", "b", "c")
ITEMS, SEEDS = 60, (5, 0, 9)


class Doubled(ClassifierTask):
    """The same in float64: in float32 a rounding may turn a rectifier or a maximum over, and the nets part."""

    def new_model(self, seed: int) -> Classifier:
        if isinstance(self.settings, ResNet18Settings):
            torch.manual_seed(seed)
            return ResNet18(self.inputs.shape[1:], len(self.classes), "cifar", width=2).double()
        return super().new_model(seed).double()

    def batch(self, cells: IntArray, noise: torch.Generator | None = None) -> ClassBatch:
        batch = super().batch(cells, noise)
        return ClassBatch(batch.inputs.double(), batch.labels)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = cross_entropy(logits, labels, reduction="none")
        return losses if self.weights is None else losses * self.weights.double()[labels]


def new_task(net: str, kind: type[ClassifierTask] = ClassifierTask, **given: Any) -> ClassifierTask:
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 256, (ITEMS, 2, 8, 8), dtype=np.uint8)
    if net in {"mlp", "probe"}:
        inputs = rng.normal(size=(ITEMS, 7)).astype(np.float32)
    return kind(inputs, rng.integers(0, 3, ITEMS), CLASSES, NETS[net], VIEWS, **given)


def recipe(optimiser: str = "adam", **changes: Any) -> ClassTrainingSettings:
    own = {"optimiser": OPTIMISERS[optimiser], "schedule": "cosine", "batch_size": 8, "epochs": 2}
    return ClassTrainingSettings(**{**own, **changes})


def lists(sizes: Sequence[int]) -> list[IntArray]:
    """Items of each net, unsorted, overlapping."""
    return [np.random.default_rng(k).permutation(ITEMS)[:size] for k, size in enumerate(sizes)]


def together(
    task: ClassifierTask, settings: ClassTrainingSettings, sizes: Sequence[int], checkpoint: Checkpoint | None = None,
    **given: Any,
) -> list[Trained]:  # fmt: skip
    models, seeds = [task.new_model(seed) for seed in SEEDS[: len(sizes)]], SEEDS[: len(sizes)]
    return fit_together(models, task, lists(sizes), settings, seeds=seeds, checkpoint=checkpoint, **given)


def alone(task: ClassifierTask, settings: ClassTrainingSettings, sizes: Sequence[int]) -> list[Trained]:
    return [fit_classifier(task.new_model(seed), task, own, settings, seed=seed)
            for seed, own in zip(SEEDS, lists(sizes), strict=False)]  # fmt: skip


def state(trained: Trained) -> dict[str, Tensor]:
    return dict(trained.model.state_dict())


def bits(trained: Sequence[Trained]) -> bytes:
    return b"".join(value.contiguous().numpy().tobytes() for one in trained for value in state(one).values())


def assert_alike(found: Sequence[Trained], wanted: Sequence[Trained], rtol: float) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.effort == other.effort
        assert not one.model.training
        assert [set(row) for row in one.history] == [set(row) for row in other.history]
        for row, expected in zip(one.history, other.history, strict=True):
            assert row == pytest.approx(expected, rel=rtol)
        for name, value in state(other).items():
            scale = float(value.double().abs().max()) + 1e-3
            assert float((state(one)[name] - value).double().abs().max()) <= rtol * scale, name


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = engine.current()
    yield
    engine.use(before)


# 33 and 41 leave one item over, which joins the batch before it; 34, 40 and 41 make five steps of 8, 32 and 33 four.
@pytest.mark.parametrize("sizes", [[32, 32, 32], [33, 32, 33], [35, 40, 41], [32, 34, 40], [19, 5, 60], [1, 2], [12]])
@pytest.mark.parametrize("net", ["mlp", "small_cnn"])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_fit_together_makes_of_each_net_what_it_is_alone(net: str, optimiser: str, sizes: list[int]) -> None:
    """Weights, running statistics, losses and counts; lists of the same length and of others."""
    task, settings = new_task(net, Doubled), recipe(optimiser)
    assert_alike(together(task, settings, sizes), alone(task, settings, sizes), 1e-9)


@pytest.mark.parametrize(("net", "sizes"), [("probe", [20, 20]), ("resnet18", [16, 16]), ("resnet18", [12, 11])])
@pytest.mark.parametrize("schedule", ["constant", "one_cycle"])
def test_fit_together_of_other_nets_and_schedules_is_each_alone(net: str, sizes: list[int], schedule: str) -> None:
    task = new_task(net, Doubled, weights=np.array([0.5, 1.0, 3.0]))
    settings = recipe(schedule=schedule)
    assert_alike(together(task, settings, sizes), alone(task, settings, sizes), 1e-9)


@pytest.mark.parametrize("net", ["mlp", "small_cnn"])
def test_fit_together_in_float32_differs_by_rounding(net: str) -> None:
    task, settings = new_task(net), recipe("sgd", epochs=1)
    assert_alike(together(task, settings, [32, 32, 30]), alone(task, settings, [32, 32, 30]), 1e-4)


def test_fit_together_in_half_precision_differs_by_rounding() -> None:
    task, settings = new_task("mlp"), recipe("sgd", epochs=1)
    plain = alone(task, settings, [32, 32, 30])
    engine.use(engine.Numerics("mkl", "bf16", "cpu", 1))
    found, wanted = together(task, settings, [32, 32, 30]), alone(task, settings, [32, 32, 30])
    for one, other, full in zip(found, wanted, plain, strict=True):
        vectors = [
            torch.cat([p.detach().ravel() for p in trained.model.parameters()]) for trained in (one, other, full)
        ]
        assert vectors[0].dtype == torch.float32
        assert torch.linalg.norm(vectors[0] - vectors[1]) < 0.01 * torch.linalg.norm(vectors[1])
        assert torch.linalg.norm(vectors[0] - vectors[2]) > 1e-4 * torch.linalg.norm(vectors[2])


@pytest.mark.parametrize(
    ("sizes", "passes"),
    [
        ([32, 32, 32], 4),
        ([33, 32, 33], 3 + 3),  # the last step, in which batches differ, net by net
        ([32, 32, 40], 4 + 5),  # two that take four steps, one that takes five
    ],
)
def test_fit_together_asks_the_nets_at_once(monkeypatch: pytest.MonkeyPatch, sizes: list[int], passes: int) -> None:
    calls, forward = [], MLP.forward

    def counted(model: MLP, inputs: Tensor) -> Tensor:
        calls.append(model)
        return forward(model, inputs)

    monkeypatch.setattr(MLP, "forward", counted)
    together(new_task("mlp"), recipe(epochs=1), sizes)
    assert len(calls) == passes


def test_fit_together_leaves_the_global_stream_and_the_streams_of_others() -> None:
    """A net is the same beside any others; here one that learns from other items, by another seed."""
    task, settings = new_task("small_cnn", Doubled), recipe()
    before = torch.get_rng_state()
    three = together(task, settings, [32, 32, 32])
    assert torch.equal(torch.get_rng_state(), before)
    models, cells = [task.new_model(seed) for seed in (9, 77)], lists([32, 32, 32])[2]
    two = fit_together(models, task, [cells, np.arange(32)], settings, seeds=[9, 77])
    assert_alike(two[:1], three[2:], 1e-9)
    assert bits(two[1:]) != bits(two[:1])


def checkpoints(folder: Path, kind: str) -> Callable[[], Checkpoint]:
    kept = MemoryCheckpoint()
    return (lambda: kept) if kind == "memory" else (lambda: FileCheckpoint(folder, every=0.0))


@pytest.mark.parametrize("kind", ["memory", "file"])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("dies_at", [1, 3, 4])
def test_fit_together_goes_on_after_a_kill_bit_for_bit(tmp_path: Path, kind: str, optimiser: str, dies_at: int) -> None:
    task, settings, sizes = new_task("small_cnn"), recipe(optimiser, epochs=4), [16, 24, 17]
    opened = checkpoints(tmp_path, kind)
    seen: list[float] = []

    def die(rows: list[dict[str, float]]) -> None:
        seen.append(rows[0]["epoch"])
        if len(seen) == dies_at:
            raise KilledError

    with pytest.raises(KilledError):
        together(task, settings, sizes, opened(), on_epoch=die)
    resumed = together(task, settings, sizes, opened(), on_epoch=lambda rows: seen.append(rows[0]["epoch"]))
    whole = together(task, settings, sizes)
    assert seen == [1, 2, 3, 4]  # none again
    assert bits(resumed) == bits(whole)
    assert [one.history for one in resumed] == [one.history for one in whole]
    assert [one.effort for one in resumed] == [one.effort for one in whole]


def test_fit_together_counts_under_the_name_of_the_cell_set() -> None:
    one, other = together(new_task("mlp"), recipe(epochs=3), [9, 20], cell_set="train")
    assert one.effort.to_dict() == {"steps": 3, "forward": {"train": 27}, "backward": {"train": 27}, "passes": 54}
    assert other.effort.to_dict() == {"steps": 9, "forward": {"train": 60}, "backward": {"train": 60}, "passes": 120}


def test_fit_together_tells_of_each_epoch_of_each_net() -> None:
    told: list[list[dict[str, float]]] = []
    trained = together(new_task("mlp"), recipe(), [9, 20], on_epoch=told.append)
    assert [list(rows) for rows in zip(*told, strict=True)] == [one.history for one in trained]
    assert [row["epoch"] for row in trained[1].history] == [1, 2]


def test_fit_together_of_no_epochs_returns_the_nets_as_they_came() -> None:
    task = new_task("small_cnn")
    trained = together(task, recipe(epochs=0), [8, 8])
    for one, seed in zip(trained, SEEDS, strict=False):
        assert all(torch.equal(state(one)[name], value) for name, value in task.new_model(seed).state_dict().items())
        assert (one.history, one.effort.passes, one.model.training) == ([], 0, False)


def test_fit_together_takes_nets_in_whatever_mode_they_are() -> None:
    task, settings, cells = new_task("small_cnn"), recipe(), lists([16, 16])
    models = [task.new_model(seed) for seed in SEEDS[:2]]
    models[0].eval()
    found = fit_together(models, task, cells, settings, seeds=SEEDS[:2])
    assert bits(found) == bits(together(task, settings, [16, 16]))


def test_fit_together_says_when_a_loss_is_not_finite() -> None:
    task = new_task("mlp")
    models = [task.new_model(seed) for seed in (0, 1)]
    with torch.no_grad():
        models[1].output.bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match="the loss became NaN or infinite at step 0"):
        fit_together(models, task, lists([16, 16]), recipe(), seeds=(0, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": (0,)}, "found 2 nets, 2 lists of items, 1 seeds; wanted as many of each, at least 1"),
        ({"cells_of_each": []}, "found 2 nets, 0 lists of items, 2 seeds; wanted as many of each"),
        ({"models": [], "cells_of_each": [], "seeds": ()}, "found 0 nets, .* at least 1"),
        ({"cells_of_each": lists([8, 0])}, "items of net 1: found 0; wanted at least 1"),
    ],
)
def test_fit_together_refuses_numbers_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    task = new_task("mlp")
    given = {"models": [task.new_model(0), task.new_model(1)], "cells_of_each": lists([8, 8]), "seeds": (0, 1)}
    with pytest.raises(DataError, match=message) as caught:
        fit_together(**{**given, **change}, task=task, settings=recipe())
    assert isinstance(caught.value, EmptyGroupError) == message.startswith("items")


def test_fit_together_refuses_nets_that_differ_dropout_and_one_net_twice() -> None:
    task = new_task("mlp")
    net, wider = task.new_model(0), MLP(7, [9, 6], 3, 0.0)
    masked = MLP(7, [8, 6], 3, 0.25)
    for models, message in (
        ([net, wider], "found several architectures; wanted one"),
        ([net, new_task("small_cnn").new_model(0)], "found several architectures; wanted one"),
        ([masked, copy.deepcopy(masked)], r"found dropout 0\.25; wanted no dropout, .* one by one \(together: 1\)"),
        ([net, net], "found one of them twice"),
    ):
        with pytest.raises(DataError, match=message):
            fit_together(models, task, lists([8, 8]), recipe(), seeds=(0, 1))

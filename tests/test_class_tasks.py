from __future__ import annotations

import math
import pickle
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import kl_div

from methods import class_cases as cases
from scforget import class_tasks
from scforget.class_tasks import AugmentationSettings, ClassBatch, ClassifierTask, ClassSignals, class_kl

SOME = np.array([3, 70, 3, 11, 25, 40, 41], dtype=np.int64)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(**views: Any) -> ClassifierTask:
    """Twelve pictures of 2 channels, 5 by 4 pixels, every pixel another number."""
    inputs = np.arange(12 * 2 * 5 * 4, dtype=np.int64).reshape(12, 2, 5, 4) % 251 + 1
    labels = (np.arange(12) % 3).astype(np.int64)
    settings = AugmentationSettings(**{"crop": 0, "flip": False, "noise": 0.0, **views})
    return ClassifierTask(inputs.astype(np.uint8), labels, cases.CLASSES, cases.task("images").settings, settings)


def signals_of(logits: Any, labels: Any) -> ClassSignals:
    values = np.asarray(logits, dtype=np.float64)
    return ClassSignals(np.arange(len(values)), np.asarray(labels, dtype=np.int64), values, np.zeros((len(values), 2)))


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batch_without_a_stream_is_the_items_as_they_are() -> None:
    vectors, images = cases.task("vectors"), cases.task("images")
    batch = vectors.batch(SOME)
    assert_array_equal(batch.inputs.numpy(), vectors.inputs[SOME])
    assert batch.labels.tolist() == [int(vectors.labels[i]) for i in SOME]
    batch = images.batch(SOME)
    assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
    assert batch.inputs.dtype == torch.float32
    assert_array_equal(batch.inputs.numpy(), (images.inputs[SOME].astype(np.float32) - 127.5) / 63.75)
    assert (images.is_image, vectors.is_image) == (True, False)


def test_batch_scales_black_to_minus_two_and_white_to_two() -> None:
    task = pictures()
    task.inputs[0, 0, 0, 0], task.inputs[0, 0, 0, 1] = 0, 255
    assert task.batch(np.array([0])).inputs[0, 0, 0, :2].tolist() == [-2.0, 2.0]


@pytest.mark.parametrize("crop", [0, 1, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_views_of_images_are_the_windows_of_a_slow_loop(crop: int, flip: bool) -> None:
    task, cells = pictures(crop=crop, flip=flip), np.array([5, 0, 7, 11, 2, 5], dtype=np.int64)
    noise = stream(4)
    moves = torch.randint(2 * crop + 1, (2, 6), generator=noise).tolist() if crop else [[0] * 6, [0] * 6]
    turned = (torch.rand(6, generator=noise) < 0.5).tolist() if flip else [False] * 6
    wanted = np.zeros((6, 2, 5, 4))
    for b, cell in enumerate(cells):
        for c in range(2):
            for i in range(5):
                for j in range(4):
                    row, column = i + moves[0][b] - crop, (3 - j if turned[b] else j) + moves[1][b] - crop
                    inside = 0 <= row < 5 and 0 <= column < 4
                    pixel = int(task.inputs[cell, c, row, column]) if inside else 0
                    wanted[b, c, i, j] = (pixel - 127.5) / 63.75
    found = task.batch(cells, stream(4)).inputs
    assert found.shape == (6, 2, 5, 4)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_allclose(found.numpy(), wanted, rtol=1e-6)
    assert not flip or 0 < sum(turned) < 6
    assert not crop or len(set(moves[0])) > 1


def test_views_take_every_window_and_both_sides_equally_often() -> None:
    task = pictures(crop=1, flip=True)
    views = task.batch(np.zeros(9000, dtype=np.int64), stream()).inputs
    kinds, counts = np.unique(views.flatten(1).numpy(), axis=0, return_counts=True)
    assert len(kinds) == 3 * 3 * 2
    # five standard deviations of a binomial of 9,000 with p = 1/18
    assert (np.abs(counts - 500) <= 5 * math.sqrt(500 * 17 / 18)).all()


@pytest.mark.parametrize("kind", cases.KINDS)
def test_views_with_noise_add_it_to_the_nets_input(kind: str) -> None:
    task = cases.task(kind, crop=0, noise=0.5)
    found, plain = task.batch(SOME, stream(3)).inputs, task.batch(SOME).inputs
    torch.testing.assert_close(found, plain + 0.5 * torch.randn(*plain.shape, generator=stream(3)))


@pytest.mark.parametrize("kind", cases.KINDS)
def test_views_that_nothing_changes_are_the_items_and_draw_nothing(kind: str) -> None:
    task, noise = cases.task(kind, crop=0, flip=False, noise=0.0), stream()
    assert torch.equal(task.batch(SOME, noise).inputs, task.batch(SOME).inputs)
    assert torch.equal(noise.get_state(), stream().get_state())


@pytest.mark.parametrize("kind", cases.KINDS)
def test_views_are_those_of_their_stream_alone_and_leave_the_items_alone(kind: str) -> None:
    task = cases.task(kind)
    before, state = task.inputs.copy(), torch.random.get_rng_state()
    first, again, other = (task.batch(SOME, stream(seed)).inputs for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert_array_equal(task.inputs, before)
    assert torch.equal(task.batch(SOME).inputs, cases.task(kind).batch(SOME).inputs)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_batch_of_no_item_is_empty(kind: str) -> None:
    task = cases.task(kind)
    for noise in (None, stream()):
        batch = task.batch(SOME[:0], noise)
        assert batch.inputs.shape == (0, *task.inputs.shape[1:])
        assert batch.labels.shape == (0,)


@pytest.mark.parametrize(("key", "value"), [("crop", -1), ("crop", 1.5), ("flip", 1), ("noise", -0.1)])
def test_augmentation_settings_refuse_what_is_out_of_range(key: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=key):
        pictures(**{key: value})


# --- signals ---------------------------------------------------------------------------------------------------------

LOGITS = [[0.3, -1.2, 2.0], [40.0, -3.0, 0.5], [-700.0, 800.0, 1.0], [5.0, 5.0, 5.0], [0.0, 1e-9, 0.0]]


@pytest.mark.parametrize("label", [0, 1, 2])
def test_confidence_and_log_prob_are_those_of_a_thousand_digits(label: int) -> None:
    """Probabilities come within e⁻¹⁵⁰⁰ of 0 and of 1."""
    found = signals_of(LOGITS, [label] * len(LOGITS))
    with localcontext(prec=1000):
        for row, confidence, log_prob in zip(LOGITS, found.confidence, found.log_prob, strict=True):
            powers = [Decimal(value).exp() for value in row]
            p = powers[label] / sum(powers)
            assert confidence == pytest.approx(float(p.ln() - (1 - p).ln()), rel=1e-13, abs=1e-13)
            assert log_prob == pytest.approx(float(p.ln()), rel=1e-13, abs=1e-15)


def test_confidence_is_finite_for_any_finite_logits() -> None:
    for label, wanted in ((0, 1e300), (1, -1e300), (2, -1e300)):
        assert signals_of([[1e300, 1e-300, 0.0]], [label]).confidence.tolist() == [wanted]


def test_confidence_of_two_classes_is_the_difference_of_the_logits() -> None:
    logits = np.random.default_rng(0).normal(size=(50, 2)) * 30
    found = signals_of(logits, np.zeros(50))
    assert_allclose(found.confidence, logits[:, 0] - logits[:, 1], rtol=1e-14)


def test_confidence_leaves_the_logits_alone_and_rises_with_the_true_one() -> None:
    found = signals_of(LOGITS, [0] * 5)
    before = found.logits.copy()
    first, second = found.confidence, found.confidence
    assert_array_equal(first, second)
    assert_array_equal(found.logits, before)
    higher = signals_of(before + np.array([1.0, 0.0, 0.0]), [0] * 5)
    assert (higher.confidence > first).all()
    assert (found.score == first).all()
    assert found.latent is found.features


@pytest.mark.parametrize("kind", cases.KINDS)
def test_signals_are_the_nets_answers_in_eval_mode_batch_by_batch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task, model = cases.task(kind), cases.original(kind)
    with torch.no_grad():
        batch = task.batch(SOME)
        logits, features = model(batch.inputs), model.features(batch.inputs)
    model.train()
    whole = task.signals(model, SOME)
    assert not model.training
    assert_array_equal(whole.cells, SOME)
    assert_array_equal(whole.labels, task.labels[SOME])
    assert_allclose(whole.logits, logits.double().numpy(), rtol=1e-5, atol=1e-5)
    assert_allclose(whole.features, features.double().numpy(), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(class_tasks, "_SCORING_BATCH", 3)
    parts = task.signals(model, SOME)
    assert_allclose(parts.logits, whole.logits, rtol=1e-5, atol=1e-5)
    assert_allclose(parts.features, whole.features, rtol=1e-5, atol=1e-5)


def test_signals_of_no_item_are_empty() -> None:
    found = cases.task("images").signals(cases.original("images"), SOME[:0])
    assert (found.logits.shape, found.confidence.shape, found.log_prob.shape) == ((0, 3), (0,), (0,))
    assert len(found.latent) == 0


class Fixed(nn.Module):
    """Gives out its input."""

    def features(self, inputs: Tensor) -> Tensor:
        return inputs

    def output(self, features: Tensor) -> Tensor:
        return features


def test_error_and_accuracy_are_means_over_items() -> None:
    other, model = cases.task("vectors"), Fixed()
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.4, 0.5, 0.1], [0.25, 0.25, 0.5]]))
    labels, views = np.array([0, 1, 1, 0], dtype=np.int64), cases.task("vectors").augmentation
    task = ClassifierTask(
        logits.astype(np.float32), labels, other.classes, other.settings, views, np.array([9.0, 1.0, 1.0])
    )  # fmt: skip
    wanted = -sum(math.log(p) for p in (0.5, 0.2, 0.5, 0.25)) / 4  # weights do not count here
    assert task.error(model, np.arange(4)) == pytest.approx(wanted, rel=1e-6)  # type: ignore[arg-type]
    assert task.accuracy(model, np.arange(4)) == 0.5  # type: ignore[arg-type]


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, np.array([0.2, 1.0, 3.5])])
def test_loss_is_each_items_cross_entropy_times_the_weight_of_its_class(weights: Any) -> None:
    task, model = cases.task("vectors", weights=weights), cases.original("vectors")
    batch = task.batch(SOME)
    with torch.no_grad():
        found, logits = task.loss(model, batch).total, model(batch.inputs).double()
    for value, row, label in zip(found.tolist(), logits.tolist(), batch.labels.tolist(), strict=True):
        p = math.exp(row[label]) / sum(math.exp(one) for one in row)
        wanted = -math.log(p) * (1.0 if weights is None else weights[label])
        assert value == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_loss_draws_nothing() -> None:
    task, model, noise = cases.task("vectors"), cases.original("vectors"), stream()
    batch = task.batch(SOME)
    assert torch.equal(task.loss(model, batch, noise).total, task.loss(model, batch).total)
    assert torch.equal(noise.get_state(), stream().get_state())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_class_kl_is_torchs_of_softened_probabilities_times_the_squared_temperature(temperature: float) -> None:
    wanted, found = (torch.randn(6, 4, generator=stream(seed), dtype=torch.float64) * 5 for seed in (0, 1))
    pair = [(logits / temperature).log_softmax(-1) for logits in (found, wanted)]
    torchs = temperature**2 * kl_div(*pair, reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(class_kl(wanted, found, temperature), torchs)
    assert (class_kl(wanted, found, temperature) > 0).all()
    assert torch.equal(class_kl(wanted, wanted, temperature), torch.zeros(6, dtype=torch.float64))


def test_class_kl_of_two_coins_is_that_worked_out_by_hand() -> None:
    """KL((¾, ¼) ‖ (½, ½)) = ¾ ln(3/2) + ¼ ln(1/2)."""
    coins = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    assert class_kl(*coins).item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2), rel=1e-6)
    # the logits of a coin of √3 : 1, and four times its divergence
    p = math.sqrt(3) / (1 + math.sqrt(3))
    wanted = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert class_kl(*coins, 2.0).item() == pytest.approx(wanted, rel=1e-5)


def test_divergence_is_from_the_teacher_to_the_student_and_differentiates_the_student_only() -> None:
    task, student, teacher = cases.task("vectors"), cases.original("vectors"), cases.task("vectors").new_model(5).eval()
    batch = task.batch(SOME)
    one, soft = (each.divergence(student, teacher, batch).total for each in (task, task.softened(2.0)))
    with torch.no_grad():
        logits = teacher(batch.inputs), student(batch.inputs)
        torch.testing.assert_close(one, class_kl(*logits))
        torch.testing.assert_close(soft, class_kl(*logits, 2.0))
        assert not torch.allclose(one, class_kl(*logits[::-1]))
    soft.sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert task.temperature == 1.0


def test_divergence_of_a_model_from_itself_is_zero_and_flat() -> None:
    task, student, teacher = cases.task("images"), cases.original("images"), cases.original("images")
    apart = task.softened(2.0).divergence(student, teacher, task.batch(SOME)).total
    assert_allclose(apart.detach().numpy(), 0, atol=1e-6)
    apart.sum().backward()
    assert max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None) < 1e-5


def test_softened_shares_all_but_the_temperature() -> None:
    task = cases.task("images", weights=np.array([1.0, 2.0, 3.0]))
    other = task.softened(3.0)
    assert (other.temperature, task.temperature) == (3.0, 1.0)
    assert other.inputs is task.inputs
    assert other.weights is task.weights


def test_outputs_are_the_logits_and_the_labels_one_hot() -> None:
    task, model = cases.task("images"), cases.original("images")
    batch = task.batch(SOME)
    found = task.outputs(model, batch)
    assert found.shape == (7, 6)
    assert torch.equal(found[:, :3], model(batch.inputs))
    for row, label in zip(found[:, 3:].tolist(), batch.labels.tolist(), strict=True):
        assert row == [float(code == label) for code in range(3)]
    found.sum().backward()
    assert model.output.weight.grad is not None


# --- the task itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", cases.KINDS)
def test_new_model_is_that_of_its_seed_and_leaves_torchs_stream_alone(kind: str) -> None:
    task, state = cases.task(kind), torch.random.get_rng_state()
    first, again, other = (task.new_model(seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())
    assert task.new_model(0)(task.batch(SOME).inputs).shape == (7, 3)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_tasks_travel_without_what_they_put_on_the_device(kind: str) -> None:
    task = cases.task(kind, weights=np.array([1.0, 2.0, 3.0]))
    before = task.batch(SOME)
    assert "_stored" in vars(task)
    other: ClassifierTask = pickle.loads(pickle.dumps(task))
    assert "_stored" not in vars(other)
    after: ClassBatch = other.batch(SOME)
    assert torch.equal(before.inputs, after.inputs)
    assert torch.equal(before.labels, after.labels)
    assert other.weights is not None
    assert other.weights.tolist() == [1.0, 2.0, 3.0]

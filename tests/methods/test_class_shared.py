"""SSD and SCRUB on classifiers: the VAE's own functions, asked of another task."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from methods import class_cases as cases
from scforget.arrays import IntArray
from scforget.methods.scrub import ClassScrubSettings, class_scrub, reference_cells, rewound_to
from scforget.methods.ssd import SSDSettings, ssd
from scforget.models.classifiers import Classifier
from scforget.training import Trained

Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
SCRUB: dict[str, Any] = {
    "batch_size": 16, "epochs": 4, "max_epochs": 2, "alpha_f": 1.0, "alpha_r": 0.5, "rewind": False, "neighbours": 2,
    "temperature": 2.0,
}  # fmt: skip


def fisher_by_hand(model: Classifier, kind: str, items: IntArray) -> dict[str, Tensor]:
    """Mean of squared gradients, one item after the other."""
    task = cases.task(kind)
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for item in items:
        batch = task.batch(np.array([item]))
        model.zero_grad()
        cross_entropy(model(batch.inputs), batch.labels).backward()
        for name, parameter in model.named_parameters():
            total[name] += parameter.grad.square()
    return {name: value / len(items) for name, value in total.items()}


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("reference", ["D", "R"])
def test_ssd_of_a_classifier_follows_the_rule_parameter_by_parameter(kind: str, reference: str) -> None:
    alpha, lam = 1.3, 0.7
    settings = SSDSettings(variant="selective", action="dampen", alpha=alpha, lam=lam, reference=reference, draws=1)
    before, sets = cases.original(kind), cases.sets()
    forgotten, retained = (fisher_by_hand(before, kind, items) for items in (sets.forget, sets.retain))
    share = len(sets.forget) / (len(sets.forget) + len(sets.retain))
    after = ssd(cases.original(kind), cases.task(kind), sets, settings, seed=0).model
    moved = checked = 0
    for name, parameter in after.named_parameters():
        columns = before.get_parameter(name), parameter, forgotten[name], retained[name]
        for old, new, of_forget, of_retain in zip(*(one.detach().flatten().tolist() for one in columns), strict=True):
            base = of_retain if reference == "R" else share * of_forget + (1 - share) * of_retain
            if abs(of_forget - alpha * base) < 1e-4 * of_forget:  # rounding decides
                continue
            factor = min(lam * base / of_forget, 1.0) if of_forget > alpha * base else 1.0
            assert new == pytest.approx(old * factor, rel=1e-3, abs=1e-9)
            moved, checked = moved + (factor != 1), checked + 1
    assert moved > 20
    assert checked - moved > 20


@pytest.mark.parametrize("kind", cases.KINDS)
def test_ssd_of_a_classifier_that_selects_nothing_is_the_original_bit_for_bit(kind: str, same_bytes: Same) -> None:
    settings = SSDSettings(variant="selective", action="dampen", alpha=math.inf, lam=1.0, reference="R", draws=1)
    found = ssd(cases.original(kind), cases.task(kind), cases.sets(), settings, seed=0)
    assert same_bytes(found.model.state_dict(), cases.original(kind).state_dict())
    assert found.effort.forward == {"forget": len(cases.sets().forget), "retain": len(cases.sets().retain)}


def unlearn(kind: str, checkpoint: Any = None, **changes: Any) -> Trained:
    settings = ClassScrubSettings(optimiser=cases.optimiser(learning_rate=1e-2), **{**SCRUB, **changes})
    return class_scrub(
        cases.original(kind), cases.task(kind), cases.sets(), settings, seed=0, checkpoint=checkpoint
    )  # fmt: skip


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("rewind", [False, True])
def test_scrub_of_a_classifier_of_no_epoch_is_the_original(kind: str, rewind: bool, same_bytes: Same) -> None:
    found = unlearn(kind, epochs=0, rewind=rewind)
    assert same_bytes(found.model.state_dict(), cases.original(kind).state_dict())


@pytest.mark.parametrize("kind", cases.KINDS)
def test_scrub_of_a_classifier_raises_the_error_of_the_forgotten_items_and_keeps_the_others(kind: str) -> None:
    task, sets, before = cases.task(kind), cases.sets(), cases.original(kind)
    after = unlearn(kind, epochs=6, max_epochs=3).model
    assert task.error(after, sets.forget) > task.error(before, sets.forget) + 0.2
    assert task.accuracy(after, sets.retain) > 0.85


@pytest.mark.parametrize("kind", cases.KINDS)
def test_scrub_of_a_classifier_rewinds_to_the_epoch_nearest_to_its_reference(kind: str) -> None:
    found = unlearn(kind, rewind=True, epochs=5, max_epochs=3)
    first = found.history[:5]
    chosen = rewound_to(first)
    assert found.facts["rewound_to"] == chosen
    task, sets = cases.task(kind), cases.sets()
    assert task.error(found.model, sets.forget) == pytest.approx(first[chosen - 1]["forget_error"], rel=1e-5)
    like = reference_cells(cases.original(kind), task, sets, 2)
    assert found.facts["reference_cells"] == len(like)
    assert np.isin(like, sets.aside).all()


@pytest.mark.parametrize("save", [1, 3])
def test_scrub_of_a_classifier_resumes_bit_for_bit(save: int, same_bytes: Same) -> None:
    whole = unlearn("images", rewind=True)
    again = cases.resumed(functools.partial(unlearn, "images", rewind=True), save)
    assert same_bytes(again.model.state_dict(), whole.model.state_dict())
    assert again.history == whole.history


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_divergence_is_torch_s_of_softened_logits_times_the_square_of_the_temperature(temperature: float) -> None:
    task, batch = cases.task("images").softened(temperature), cases.task("images").batch(cases.sets().retain)
    teacher, student = cases.original("images"), cases.task("images").new_model(9).eval()
    found = task.divergence(student, teacher, batch).total
    logits = [model(batch.inputs).div(temperature).log_softmax(1) for model in (student, teacher)]
    wanted = kl_div(*logits, reduction="none", log_target=True).sum(1) * temperature**2
    torch.testing.assert_close(found, wanted)
    assert cases.task("images").temperature == 1

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from methods import class_cases as cases
from scforget import fisher
from scforget.class_tasks import ClassifierTask
from scforget.data.splits import ForgetSets
from scforget.errors import EmptyGroupError, NonFiniteError
from scforget.methods.gisa import GisaSettings, gisa, joint_loss, rate_factors
from scforget.training import Trained

Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
SETTINGS: dict[str, Any] = {"optimiser": cases.optimiser(), "batch_size": 16, "epochs": 2, "eps": 1e-8}


def unlearn(kind: str = "images", seed: int = 0, checkpoint: Any = None, **changes: Any) -> Trained:
    settings, task = GisaSettings(**{**SETTINGS, **changes}), cases.task(kind)
    return gisa(cases.original(kind), task, cases.sets(), settings, seed=seed, checkpoint=checkpoint)


class Logistic(nn.Module):
    """Two parameters, logits (0, w x + b), so that p = P(class 1) = 1/(1 + exp(−w x − b))."""

    def __init__(self, w: float, b: float) -> None:
        super().__init__()
        self.line = nn.Linear(1, 1)
        nn.init.constant_(self.line.weight, w)
        nn.init.constant_(self.line.bias, b)

    def forward(self, inputs: Tensor) -> Tensor:
        line = self.line(inputs)
        return torch.cat([torch.zeros_like(line), line], 1)


def test_gisa_step_of_two_parameters_is_that_worked_out_by_hand() -> None:
    """w = ln 3/2 and b = 0; one item of class 1 to retain at x = 2, one to forget at x = −4; η = 0.1 and ε = 1/4.

    Retained: w x + b = ln 3, p = 3/4, so L_R = ln(4/3) = 0.28768207. ∂L_R/∂(w x + b) = p − 1 = −1/4, so that
    ∇L_R = (−1/4·2, −1/4) = (−1/2, −1/4) and I_R = (1/4, 1/16).
    Forgotten: w x + b = −2 ln 3, p = 1/10, so L_F = ln 10 = 2.30258509. ∂L_F/∂(w x + b) = −9/10, so that
    ∇L_F = (−9/10·(−4), −9/10) = (18/5, −9/10) and I_F = (324/25, 81/100) = (12.96, 0.81).
    Rates: 1 + ln(12.96/(0.25 + 0.25)) = 1 + ln 25.92 = 4.25501487 and
    1 + ln(0.81/(0.0625 + 0.25)) = 1 + ln 2.592 = 1.95242978, times 0.1.
    Loss: a = L_R/(L_F + ε) = 0.28768207/2.55258509 = 0.11270225, a² = 0.01270180; the gradient is 2a·∇L_R − a²·∇L_F:
    0.22540449·(−0.5) − 0.01270180·3.6 = −0.11270225 − 0.04572647 = −0.15842871 in w,
    0.22540449·(−0.25) − 0.01270180·(−0.9) = −0.05635112 + 0.01143162 = −0.04491951 in b.
    Step: w = 0.54930614 + 0.42550149·0.15842871 = 0.61671780, b = 0 + 0.19524298·0.04491951 = 0.00877022.
    """
    model: Any = Logistic(math.log(3) / 2, 0.0)
    other = cases.task("vectors")
    task = ClassifierTask(
        np.array([[2.0], [-4.0]], dtype=np.float32), np.array([1, 1], dtype=np.int64), ("no", "yes"), other.settings,
        cases.task("vectors", noise=0.0).augmentation,
    )  # fmt: skip
    none = np.zeros(0, dtype=np.int64)
    sets = ForgetSets(forget=np.array([1]), retain=np.array([0]), stop=none, aside=none)
    plain = cases.optimiser(kind="sgd", learning_rate=0.1)
    trained = gisa(model, task, sets, GisaSettings(optimiser=plain, batch_size=4, epochs=1, eps=0.25), seed=0)
    assert model.line.weight.item() == pytest.approx(0.61671780, abs=2e-7)
    assert model.line.bias.item() == pytest.approx(0.00877022, abs=2e-8)
    assert trained.facts == {
        "lowest_factor": pytest.approx(1.95242978, rel=1e-6), "highest_factor": pytest.approx(4.25501487, rel=1e-6)
    }  # fmt: skip
    (row,) = trained.history
    assert row["train_loss"] == pytest.approx(0.28768207, rel=1e-6)
    assert row["forget_loss"] == pytest.approx(2.30258509, rel=1e-6)


def test_rate_factors_are_those_of_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    pair = [{name: rng.exponential(size=shape) ** 4 for name, shape in (("a", (3, 4)), ("b", (5,)))} for _ in range(2)]
    pair[0]["a"][0, 0] = pair[1]["a"][1, 1] = pair[0]["b"][2] = pair[1]["b"][2] = 0.0
    forget, retain = ({name: torch.from_numpy(value) for name, value in one.items()} for one in pair)
    found = rate_factors(forget, retain, 1e-3)
    for name in ("a", "b"):
        terms = []
        for important, other in zip(pair[0][name].ravel(), pair[1][name].ravel(), strict=True):
            terms.append(max(math.log(important / (other + 1e-3)), 0) if important else 0.0)
        assert found[name] == pytest.approx(1 + sum(terms) / len(terms), rel=1e-12)
        assert found[name] > 1


def test_rate_factors_are_one_where_nothing_matters_more_to_the_forgotten_items() -> None:
    forget = {"equal": torch.full((3,), 2.0), "less": torch.tensor([0.1, 1.9]), "none": torch.zeros(2)}
    retain = {"equal": torch.full((3,), 2.0), "less": torch.full((2,), 2.0), "none": torch.zeros(2)}
    assert rate_factors(forget, retain, 1e-8) == {"equal": 1.0, "less": 1.0, "none": 1.0}


def test_joint_loss_has_the_gradient_of_the_quotient() -> None:
    losses = torch.tensor([0.7, 0.2], dtype=torch.float64, requires_grad=True)
    joint_loss(losses[0], losses[1], 0.05).backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == pytest.approx([2 * 0.7 / 0.25, -((0.7 / 0.25) ** 2)])


@pytest.mark.parametrize("kind", cases.KINDS)
def test_gisa_gives_each_tensor_its_own_rate_under_adam(kind: str) -> None:
    """Adam's first step is η_i times the sign of the gradient, wherever that is not tiny."""
    original, sets, task = cases.original(kind), cases.sets(), cases.task(kind)
    information = [fisher.diagonal(original, task, cells, draws=1, seed=0) for cells in (sets.forget, sets.retain)]
    factors = rate_factors(*information, 1e-8)
    assert len({round(value, 6) for value in factors.values()}) > 4
    unlearned = unlearn(kind, batch_size=64, epochs=1)
    before = dict(original.named_parameters())
    for name, value in unlearned.model.named_parameters():
        moved = float((value - before[name]).detach().abs().max())
        assert moved == pytest.approx(3e-3 * factors[name], rel=1e-3)
    facts = {"lowest_factor": min(factors.values()), "highest_factor": max(factors.values())}
    assert unlearned.facts == facts


@pytest.mark.parametrize("kind", cases.KINDS)
def test_gisa_worsens_the_forgotten_items_and_keeps_the_others(kind: str) -> None:
    task, sets = cases.task(kind), cases.sets()
    before, after = cases.original(kind), unlearn(kind, epochs=3).model
    assert task.error(after, sets.forget) > task.error(before, sets.forget) + 0.2
    assert task.accuracy(after, sets.retain) > 0.9


@pytest.mark.parametrize("kind", cases.KINDS)
def test_gisa_of_no_epoch_is_the_original_bit_for_bit(kind: str, same_bytes: Same) -> None:
    unlearned = unlearn(kind, epochs=0)
    assert same_bytes(unlearned.model.state_dict(), cases.original(kind).state_dict())
    assert (unlearned.effort.passes, unlearned.history) == (0, [])
    assert not unlearned.model.training


@pytest.mark.parametrize("optimiser", [cases.optimiser(), cases.optimiser(kind="sgd", momentum=0.9)])
@pytest.mark.parametrize("save", [1, 2])
def test_gisa_resumes_bit_for_bit(optimiser: Any, save: int, same_bytes: Same) -> None:
    run = functools.partial(unlearn, epochs=3, optimiser=optimiser)
    whole, again = run(), cases.resumed(run, save)
    assert same_bytes(again.model.state_dict(), whole.model.state_dict())
    assert (again.history, again.effort, again.facts) == (whole.history, whole.effort, whole.facts)


def test_gisa_counts_its_effort() -> None:
    effort = unlearn(batch_size=10, epochs=2).effort
    assert effort.steps == 2 * 4
    # the information, then F whole beside each batch of R
    assert effort.forward == effort.backward == {"forget": 8 + 64, "retain": 40 + 80}


def test_gisa_says_so_when_it_runs_away() -> None:
    with pytest.raises(NonFiniteError):
        unlearn("vectors", optimiser=cases.optimiser(kind="sgd", learning_rate=1e38))
    model = cases.original("vectors")
    with torch.no_grad():
        model.output.bias.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="the Fisher information"):
        gisa(model, cases.task("vectors"), cases.sets(), GisaSettings(**SETTINGS), seed=0)


def test_gisa_refuses_an_empty_forget_set() -> None:
    sets = cases.sets()
    nothing = ForgetSets(sets.forget[:0], sets.retain, sets.stop, sets.aside)
    with pytest.raises(EmptyGroupError, match="Fisher information"):
        gisa(cases.original("images"), cases.task("images"), nothing, GisaSettings(**SETTINGS), seed=0)


@pytest.mark.parametrize(("key", "value"), [("epochs", -1), ("eps", 0.0), ("eps", float("inf")), ("batch_size", 0)])
def test_gisa_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        unlearn(**{key: value})

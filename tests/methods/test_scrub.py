from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from killing import KilledError, MemoryCheckpoint
from scforget import seeding
from scforget.data.splits import ForgetSets
from scforget.errors import EmptyGroupError, NonFiniteError
from scforget.methods.scrub import ScrubSettings, reference_cells, rewound_to, scrub
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.training import Trained, mean_elbo

Original = Callable[[], VAE]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
Run = Callable[..., Trained]
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3, "batch_size": 32, "epochs": 5, "max_epochs": 2, "alpha_f": 1.0, "alpha_r": 1.0,
    "rewind": False, "neighbours": 2,
}  # fmt: skip


@pytest.fixture
def run(task: VaeTask, forget_sets: ForgetSets, original: Original) -> Run:
    def unlearn(seed: int = 0, checkpoint: MemoryCheckpoint | None = None, **changes: Any) -> Trained:
        settings = ScrubSettings(**{**SETTINGS, **changes})
        return scrub(original(), task, forget_sets, settings, seed=seed, checkpoint=checkpoint)

    return unlearn


@pytest.fixture
def rewinding() -> dict[str, Any]:
    """Settings under which an epoch in the middle is chosen (which the tests check).

    Max passes end after the third epoch, so that the forget error rises and falls again.
    """
    return {"rewind": True, "learning_rate": 1e-2, "epochs": 5, "max_epochs": 3, "alpha_f": 100.0, "alpha_r": 10.0}


def divergence(task: VaeTask, model: VAE, teacher: VAE, cells: Any) -> float:
    with torch.no_grad():
        return float(task.divergence(model.eval(), teacher, task.batch(cells)).total.mean())


@pytest.mark.parametrize("rewind", [False, True])
def test_scrub_of_no_epoch_is_the_original_bit_for_bit(
    run: Run, original: Original, rewind: bool, same_bytes: Same
) -> None:
    unlearned = run(epochs=0, rewind=rewind)
    assert same_bytes(unlearned.model.state_dict(), original().state_dict())
    assert (unlearned.effort.passes, unlearned.history) == (0, [])
    assert not unlearned.model.training


def test_scrub_epoch_is_that_written_out(run: Run, task: VaeTask, forget_sets: ForgetSets, original: Original) -> None:
    """One Adam for both kinds of passes; batches of whole sets."""
    model, teacher, sets = original().train(), original(), forget_sets
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    with seeding.scope(5, "scrub and rewind", 1) as noise:
        forget = task.batch(sets.forget[torch.randperm(20, generator=noise).numpy()])
        (-0.7 * task.divergence(model, teacher, forget).total.mean()).backward()
        optimiser.step()
        optimiser.zero_grad()
        retain = task.batch(sets.retain[torch.randperm(100, generator=noise).numpy()])
        apart = task.divergence(model, teacher, retain).total.mean()
        loss = task.loss(model, retain, noise).total.mean()
        (2.0 * apart + loss).backward()
        optimiser.step()
    unlearned = run(seed=5, alpha_f=0.7, alpha_r=2.0, batch_size=100, epochs=1)
    for name, value in unlearned.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert unlearned.history[0]["retain_divergence"] == pytest.approx(apart.item(), rel=1e-4)
    assert unlearned.history[0]["train_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_scrub_disobeys_the_more_the_larger_alpha_f(
    run: Run, task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    """Unlike with an Adam for each kind of passes."""
    values = {"learning_rate": 3e-3, "batch_size": 8}
    models = [run(max_epochs=n, alpha_f=a, **values).model for n, a in ((5, 100.0), (5, 1.0), (0, 100.0))]
    loud, mild, still = (divergence(task, model, original(), forget_sets.forget) for model in models)
    assert loud > 5 * mild
    assert loud > 5 * still > 0


def test_scrub_raises_the_divergence_in_the_first_epochs_only(run: Run) -> None:
    history = run(max_epochs=2).history
    assert ["forget_divergence" in row for row in history] == [True, True, False, False, False]


def test_reference_cells_are_the_nearest_aside_cells_in_the_originals_means(
    task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    mu = {name: task.signals(original(), getattr(forget_sets, name)).mu for name in ("forget", "aside")}
    wanted = set()
    for place in mu["forget"]:
        distances = [float(np.sqrt(((place - other) ** 2).sum())) for other in mu["aside"]]
        wanted |= {int(forget_sets.aside[i]) for i in sorted(range(len(distances)), key=distances.__getitem__)[:2]}
    found = reference_cells(original(), task, forget_sets, 2)
    assert found.tolist() == sorted(wanted)
    assert 2 <= len(found) < len(forget_sets.aside)
    with pytest.raises(EmptyGroupError, match="20 unseen cells"):
        reference_cells(original(), task, forget_sets, 21)


@pytest.mark.parametrize(
    ("forget", "reference", "chosen"),
    [([1, 2, 3], [9, 9, 2.2], 2), ([1, 2, 3], [1, 1, 3.1], 3), ([5, 4, 3], [0, 0, 9], 1), ([7], [0], 1)],
)
def test_rewound_to_compares_with_the_error_at_the_end_of_training(
    forget: list[float], reference: list[float], chosen: int
) -> None:
    pairs = zip(forget, reference, strict=True)
    assert rewound_to([{"forget_error": f, "reference_error": r} for f, r in pairs]) == chosen


def test_scrub_returns_the_very_model_of_the_epoch_that_it_rewinds_to(
    run: Run, task: VaeTask, forget_sets: ForgetSets, original: Original, rewinding: dict[str, Any], same_bytes: Same
) -> None:
    rewound = run(**rewinding)
    chosen = int(rewound.facts["rewound_to"])
    assert 1 < chosen < 5
    stopped, last = (run(**{**rewinding, "rewind": False, "epochs": n}) for n in (chosen, 5))
    assert same_bytes(rewound.model.state_dict(), stopped.model.state_dict())
    assert not rewound.model.training
    first, second = rewound.history[:5], rewound.history[5:]
    assert [row["epoch"] for row in rewound.history] == list(range(1, 6 + chosen))
    assert [{**row, "epoch": 0} for row in second] == [{**row, "epoch": 0} for row in first[:chosen]]
    reference = reference_cells(original(), task, forget_sets, 2)
    assert rewound.facts["reference_cells"] == len(reference)
    assert rewound.facts["reference_error"] == -mean_elbo(task, last.model, reference)
    assert rewound.facts["forget_error"] == -mean_elbo(task, rewound.model, forget_sets.forget)
    gaps = [abs(row["forget_error"] - float(rewound.facts["reference_error"])) for row in first]
    assert chosen == 1 + int(np.argmin(gaps))


def test_scrub_that_need_not_rewind_returns_the_last_epoch(run: Run, same_bytes: Same) -> None:
    values = {"epochs": 1, "max_epochs": 1}
    rewound, last = run(rewind=True, **values), run(**values)
    assert (rewound.facts["rewound_to"], len(rewound.history)) == (1, 1)
    assert same_bytes(rewound.model.state_dict(), last.model.state_dict())
    assert last.facts == {}


def test_scrub_gives_the_same_bytes_for_the_same_seed_only(
    run: Run, rewinding: dict[str, Any], same_bytes: Same
) -> None:
    first, again, other = (run(seed=seed, **rewinding) for seed in (0, 0, 1))
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert (first.history, first.facts) == (again.history, again.facts)
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("save", [1, 4, 5, 6, 7])
def test_scrub_resumes_bit_for_bit_before_and_after_it_rewinds(
    run: Run, rewinding: dict[str, Any], save: int, same_bytes: Same
) -> None:
    whole, dying, survivor = run(**rewinding), MemoryCheckpoint(dies_at=save), MemoryCheckpoint()
    assert len(whole.history) >= 7
    with pytest.raises(KilledError):
        run(checkpoint=dying, **rewinding)
    survivor.kept = dying.kept
    resumed = run(checkpoint=survivor, **rewinding)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort, resumed.facts) == (whole.history, whole.effort, whole.facts)
    assert survivor.saves == len(whole.history) - save


def test_scrub_counts_its_effort(run: Run) -> None:
    effort = run(epochs=3, max_epochs=2).effort
    assert effort.steps == 2 * 1 + 3 * 4
    assert effort.forward == {"forget": 2 * 2 * 20, "retain": 3 * 3 * 100}
    assert effort.backward == {"forget": 2 * 20, "retain": 3 * 2 * 100}


def test_scrub_counts_the_effort_of_rewinding(run: Run, rewinding: dict[str, Any]) -> None:
    trained = run(**rewinding)
    epochs, reference = len(trained.history), int(trained.facts["reference_cells"])
    assert epochs > 5
    with_max = 3 + min(3, int(trained.facts["rewound_to"]))  # of the run, and of what is run again
    assert trained.effort.steps == with_max * 1 + epochs * 4
    # all epochs end with both errors; before them the neighbours are looked up
    assert trained.effort.forward == {
        "forget": 20 + with_max * 40 + epochs * 20, "retain": epochs * 300, "aside": 20 + epochs * reference,
    }  # fmt: skip
    assert trained.effort.backward == {"forget": with_max * 20, "retain": epochs * 200}


@pytest.mark.parametrize("rewind", [False, True])
def test_scrub_stops_when_the_divergence_runs_away(run: Run, rewind: bool) -> None:
    with pytest.raises(NonFiniteError):
        run(learning_rate=1e30, rewind=rewind)


def test_scrub_refuses_an_error_that_is_not_finite(run: Run, task: VaeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(task), "error", lambda *_: float("nan"))
    with pytest.raises(NonFiniteError, match="error of the forgotten cells"):
        run(rewind=True)


@pytest.mark.parametrize(
    ("key", "value"), [("epochs", -1), ("max_epochs", -1), ("alpha_f", 0.0), ("rewind", 1), ("neighbours", 0)]
)
def test_scrub_settings_refuse_what_is_out_of_range(run: Run, key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        run(**{key: value})

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
from scforget.errors import NonFiniteError
from scforget.methods.contrastive_latent import ContrastiveLatentSettings, contrastive_latent, drift
from scforget.models.vae import VAE, block_of
from scforget.tasks import VaeTask
from scforget.training import Trained, TrainingSettings, fit

Original = Callable[[], VAE]
Recipe = Callable[..., dict[str, Any]]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
Run = Callable[..., Trained]


@pytest.fixture(scope="module")
def original_state(task: VaeTask, forget_sets: ForgetSets, recipe: Recipe) -> dict[str, Tensor]:
    """An original whose posterior holds more than a nat: under the plain short recipe hardly any is left to take."""
    train = np.union1d(forget_sets.forget, forget_sets.retain)
    settings = TrainingSettings(**recipe(free_bits=1.0))
    return fit(task.new_model(1), task, train, forget_sets.stop, settings, seed=1).model.state_dict()


@pytest.fixture
def run(task: VaeTask, forget_sets: ForgetSets, original: Original, recipe: Recipe) -> Run:
    """Unlearn; ``finetune`` is the number of its epochs, other keywords are settings."""

    def unlearn(
        seed: int = 0, checkpoint: MemoryCheckpoint | None = None, finetune: int = 0, **changes: Any
    ) -> Trained:
        values = {"gamma": 1.0, "lam": 1.0, "learning_rate": 1e-3, "batch_size": 32, "epochs": 2, **changes}
        settings = ContrastiveLatentSettings(**values, finetune=recipe(max_epochs=finetune, kl_warmup_epochs=0))
        return contrastive_latent(original(), task, forget_sets, settings, seed=seed, checkpoint=checkpoint)

    return unlearn


def test_drift_is_summed_over_dimensions() -> None:
    parts = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mu, log_var, other_mu, other_log_var = parts.numpy()
    wanted = [
        sum((mu[i, z] - other_mu[i, z]) ** 2 + 0.1 * (log_var[i, z] - other_log_var[i, z]) ** 2 for z in range(5))
        for i in range(3)
    ]
    np.testing.assert_allclose(drift(*parts), wanted, rtol=1e-12)


def test_contrastive_latent_of_no_epoch_is_the_original_bit_for_bit(
    run: Run, original: Original, same_bytes: Same
) -> None:
    unlearned = run(epochs=0)
    assert same_bytes(unlearned.model.state_dict(), original().state_dict())
    assert (unlearned.effort.passes, unlearned.history) == (0, [])
    assert not unlearned.model.training


def test_contrastive_latent_step_is_adams_on_the_written_out_loss(
    run: Run, task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    model, teacher, sets = original().train(), original(), forget_sets
    with seeding.scope(7, "contrast", "epoch", 1) as noise:
        retain = task.batch(sets.retain[torch.randperm(100, generator=noise).numpy()]).inputs
        forget = task.batch(sets.forget[torch.randperm(20, generator=noise).numpy()]).inputs
        mu, log_var = model.encode(forget)
        kl = 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum() / 20
        (mu, log_var), (other_mu, other_log_var) = model.encode(retain), teacher.encode(retain)
        moved = ((mu - other_mu) ** 2).sum() / 100 + 0.1 * ((log_var - other_log_var) ** 2).sum() / 100
        (0.7 * kl + 2.5 * moved).backward()
    torch.optim.Adam([p for p in model.parameters() if p.grad is not None], lr=0.003).step()
    unlearned = run(seed=7, gamma=0.7, lam=2.5, learning_rate=0.003, batch_size=100, epochs=1)
    for name, value in unlearned.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-7)
    (row,) = unlearned.history
    assert row == pytest.approx({"epoch": 1, "forget_kl": kl.item(), "drift": moved.item()}, rel=1e-5)


def test_contrastive_latent_first_changes_the_encoder_only(run: Run, original: Original) -> None:
    before = original().state_dict()
    for name, value in run().model.state_dict().items():
        assert torch.equal(value, before[name]) == (block_of(name) in {"decoder", "heads"})
    for name, value in run(finetune=1).model.state_dict().items():
        assert not torch.equal(value, before[name])


def test_contrastive_latent_sends_forgotten_cells_to_the_prior_and_holds_the_others(
    run: Run, task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    before, held, loose = (
        model for model in (original(), *(run(epochs=40, lam=lam, learning_rate=3e-3).model for lam in (1.0, 0.01)))
    )
    kl = [task.signals(model, forget_sets.forget).kl.mean() for model in (before, held, loose)]
    assert kl[0] > 1
    place = [task.signals(model, forget_sets.retain).mu for model in (before, held, loose)]
    moved = [float(((mu - place[0]) ** 2).sum(1).mean()) for mu in place]
    assert kl[2] < kl[1] < kl[0] - 0.1
    assert 0 < moved[1] < 0.5 * moved[2]


def test_contrastive_latent_gives_the_same_bytes_for_the_same_seed_only(run: Run, same_bytes: Same) -> None:
    first, again, other = (run(seed=seed, finetune=1) for seed in (0, 0, 1))
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert first.history == again.history
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("save", [1, 2, 3, 4])
def test_contrastive_latent_resumes_bit_for_bit(run: Run, save: int, same_bytes: Same) -> None:
    whole, dying, survivor = run(finetune=2), MemoryCheckpoint(dies_at=save), MemoryCheckpoint()
    with pytest.raises(KilledError):
        run(finetune=2, checkpoint=dying)
    survivor.kept = dying.kept
    resumed = run(finetune=2, checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)
    assert survivor.saves == 4 - save


def test_contrastive_latent_counts_its_effort(run: Run) -> None:
    effort = run(epochs=3, finetune=2, batch_size=8).effort
    # 13 steps an epoch; 20 cells in batches of 8, 8, 4 that start over: 4 whole passes and a batch
    assert effort.steps == 3 * 13 + 2 * 4
    assert effort.forward == {"forget": 3 * 88, "retain": 3 * 200 + 2 * 100, "stop": 2 * 40}
    assert effort.backward == {"forget": 3 * 88, "retain": 3 * 100 + 2 * 100}


def test_contrastive_latent_stops_at_a_huge_learning_rate(run: Run) -> None:
    with pytest.raises(NonFiniteError):
        run(learning_rate=1e30)


@pytest.mark.parametrize(("key", "value"), [("gamma", 0.0), ("lam", -1.0), ("epochs", -1), ("batch_size", 0)])
def test_contrastive_latent_settings_refuse_what_is_out_of_range(run: Run, key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        run(**{key: value})

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import sparse
from torch import Tensor, nn

from killing import KilledError, MemoryCheckpoint
from scforget import seeding
from scforget.data.splits import ForgetSets
from scforget.errors import NonFiniteError
from scforget.methods.fisher_scrub import FisherScrubSettings, climb, diffuse, fisher_scrub
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.training import Trained, TrainingSettings, fit
from test_fisher import gradients

Original = Callable[[], VAE]
Recipe = Callable[..., dict[str, Any]]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
Run = Callable[..., Trained]
SETTINGS: dict[str, Any] = {
    "variant": "noise", "alpha": 1e-8, "damping": 0.1, "draws": 2, "steps": 3, "clamp": 1e-3,
}  # fmt: skip


@pytest.fixture
def run(task: VaeTask, forget_sets: ForgetSets, original: Original, recipe: Recipe) -> Run:
    """Unlearn; ``finetune`` is the number of its epochs, other keywords are settings."""

    def unlearn(
        seed: int = 0, checkpoint: MemoryCheckpoint | None = None, finetune: int = 0, on: VaeTask = task, **changes: Any
    ) -> Trained:
        values = {**SETTINGS, **changes, "finetune": recipe(max_epochs=finetune)}
        settings = FisherScrubSettings.model_validate(values)
        return fisher_scrub(original(), on, forget_sets, settings, seed=seed, checkpoint=checkpoint)

    return unlearn


class Pair(nn.Module):
    """Two parameters (2, −1), and a loss ½·(a θ1 − x)² + ½·(b θ2 − y)² of each cell (a, x, b, y)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.tensor([value])) for value in (2.0, -1.0))

    def loss(self, cell: tuple[float, float, float, float]) -> Tensor:
        a, x, b, y = cell
        return 0.5 * (a * self.first - x).square() + 0.5 * (b * self.second - y).square()


def test_climb_on_a_quadratic_is_the_closed_form() -> None:
    """Of L_F the gradient is (1·(2−1) + 2·(4−1), 3·(−3−0)) = (7, −9); F_R is ((1 + 9)/2, (4 + 0)/2)."""
    model = Pair()
    retained = [(1.0, 1.0, 1.0, 1.0), (1.0, -1.0, 1.0, -1.0)]
    squares = []
    for cell in retained:
        each = torch.autograd.grad(model.loss(cell).sum(), [model.first, model.second])
        squares.append(torch.stack(each).square())
    information = dict(zip(("first", "second"), torch.stack(squares).mean(0), strict=True))
    assert [float(value) for value in information.values()] == [5.0, 2.0]
    for cell in [(1.0, 1.0, 3.0, 0.0), (2.0, 1.0, 0.0, 5.0)]:
        model.loss(cell).sum().backward()
    climb(model, information, 0.5, 2.0, 0.75)
    assert model.first.item() == pytest.approx(2 + 0.5 * 7 / (5 + 2))
    assert model.second.item() == pytest.approx(-1 - 0.75)  # 0.5 · 9/(2 + 2) is more than the clamp


def test_diffuse_has_the_variance_of_the_closed_form() -> None:
    """Where F + d is 16 the spread is (α/16)^¼ = α^¼/2, and the noise is that of its stream."""
    layer = nn.Linear(200, 300)
    before = {name: value.detach().clone() for name, value in layer.named_parameters()}
    information = {name: torch.full_like(value, 15.0) for name, value in before.items()}
    information["weight"][:100] = 0.0
    diffuse(layer, information, 0.0081, 1.0, torch.Generator().manual_seed(0))
    moved = layer.weight.detach() - before["weight"]
    assert float(moved[100:].std()) == pytest.approx(0.3 / 2, rel=0.02)
    assert float(moved[:100].std()) == pytest.approx(0.3, rel=0.02)
    assert abs(float(moved.mean())) < 0.01
    eps = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved[100:], 0.15 * eps[100:], rtol=1e-5, atol=1e-6)


def test_fisher_scrub_noise_is_that_of_a_loop_over_cells(
    run: Run, task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    wanted = original()
    each = gradients(wanted, task, forget_sets.retain, 1, 5)
    with seeding.scope(5, "scrub", "epoch", 1) as noise:
        eps = {name: torch.randn(value.shape, generator=noise) for name, value in wanted.named_parameters()}
    found = dict(run(seed=5, draws=1, alpha=1e-6).model.named_parameters())
    for name, value in wanted.named_parameters():
        spread = (1e-6 / (each[name].square().mean((0, 1)) + 0.1)) ** 0.25
        torch.testing.assert_close(found[name].double(), value + spread * eps[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(found[name], value)


def test_fisher_scrub_ascent_is_that_of_a_loop_over_cells(
    run: Run, task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    """The information once, at the original; the sum over forgotten cells; equal draws in every step."""
    wanted, sets = original(), forget_sets
    each = gradients(wanted, task, sets.retain, 2, 5)
    information = {name: value.square().mean((0, 1)) for name, value in each.items()}
    stream = seeding.torch_generator(5, "ascent")
    draws = [torch.randn(len(sets.forget), 4, generator=stream) for _ in range(2)]
    clamped = total = 0
    for _ in range(3):
        loss = torch.zeros(())
        for eps in draws:
            for index in range(len(sets.forget)):
                batch = task.batch(sets.forget[index : index + 1])
                mu, log_var = wanted.encode(batch.inputs)
                decoded = wanted.decode(mu + (log_var / 2).exp() * eps[index])
                kl = 0.5 * (mu**2 + log_var.exp() - 1 - log_var).sum()
                loss = loss + (kl - wanted.reconstruction(batch, decoded).sum()) / 2
        parameters = dict(wanted.named_parameters())
        steps = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            for (name, value), step in zip(parameters.items(), steps, strict=True):
                change = 1e-3 * step / (information[name].float() + 0.1)
                value.add_(change.clamp(-0.01, 0.01))
                clamped, total = clamped + int((change.abs() > 0.01).sum()), total + change.numel()
    assert 0.01 < clamped / total < 0.99
    found = run(variant="ascent", seed=5, alpha=1e-3, clamp=0.01).model
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-4, atol=1e-4)


def test_fisher_scrub_without_strength_is_the_original_bit_for_bit(
    run: Run, original: Original, same_bytes: Same
) -> None:
    for nothing in ({"alpha": 0.0}, {"variant": "ascent", "steps": 0}, {"variant": "ascent", "alpha": 0.0}):
        unlearned = run(**nothing)
        assert same_bytes(unlearned.model.state_dict(), original().state_dict())
        assert (unlearned.effort.passes, unlearned.history) == (0, [])
        assert not unlearned.model.training


@pytest.mark.parametrize("variant", ["noise", "ascent"])
def test_fisher_scrub_gives_the_same_bytes_for_the_same_seed_only(run: Run, variant: str, same_bytes: Same) -> None:
    first = run(variant=variant, finetune=1)
    torch.manual_seed(99)
    again, other = run(variant=variant, finetune=1), run(variant=variant, finetune=1, seed=1)
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert first.history == again.history
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("variant", ["noise", "ascent"])
@pytest.mark.parametrize("save", [1, 2, 3])
def test_fisher_scrub_resumes_bit_for_bit(run: Run, variant: str, save: int, same_bytes: Same) -> None:
    """Killed after the scrubbing, and after the epochs of the training that follows."""
    whole, dying, survivor = run(variant=variant, finetune=3), MemoryCheckpoint(dies_at=save), MemoryCheckpoint()
    with pytest.raises(KilledError):
        run(variant=variant, finetune=3, checkpoint=dying)
    survivor.kept = dying.kept
    resumed = run(variant=variant, finetune=3, checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)
    assert survivor.saves == 4 - save


def test_fisher_scrub_counts_its_effort(run: Run) -> None:
    noise = run(finetune=2).effort
    assert noise.forward == {"retain": 2 * 100 + 2 * 100, "stop": 2 * 40}
    assert noise.backward == {"retain": 2 * 100 + 2 * 100}
    assert noise.steps == 2 * 4
    ascent = run(variant="ascent").effort
    assert ascent.forward == ascent.backward == {"retain": 2 * 100, "forget": 3 * 2 * 20}
    assert ascent.steps == 3


def test_fisher_scrub_then_trains_on_the_retained_cells(
    run: Run, task: VaeTask, forget_sets: ForgetSets, recipe: Recipe, same_bytes: Same
) -> None:
    start = run(seed=9).model
    wanted = fit(start, task, forget_sets.retain, forget_sets.stop, TrainingSettings(**recipe(max_epochs=3)), seed=9)
    assert same_bytes(run(seed=9, finetune=3).model.state_dict(), wanted.model.state_dict())


def test_fisher_scrub_noise_never_reads_the_forgotten_cells(run: Run, poisoned: VaeTask, same_bytes: Same) -> None:
    clean, other = run(finetune=2), run(finetune=2, on=poisoned)
    assert same_bytes(clean.model.state_dict(), other.model.state_dict())
    assert clean.history == other.history


def test_fisher_scrub_ascent_names_a_loss_that_is_not_finite(
    run: Run, make_task: Callable[..., VaeTask], tiny_counts: sparse.csr_matrix, forget_sets: ForgetSets
) -> None:
    counts = tiny_counts.tolil()
    counts[forget_sets.forget[3], 0] = np.nan
    with pytest.raises(NonFiniteError, match=r"the loss .* at step 0;"):
        run(variant="ascent", on=make_task(counts=counts.tocsr()))


def test_fisher_scrub_refuses_parameters_that_overflow(run: Run) -> None:
    with pytest.raises(NonFiniteError, match="a parameter"):
        run(alpha=1e300, damping=1e-30)


def test_fisher_scrub_ascent_explains_the_forgotten_cells_worse(
    run: Run, task: VaeTask, forget_sets: ForgetSets, original: Original
) -> None:
    model = run(variant="ascent", alpha=1e-2, steps=20).model
    fallen = {}
    for name, cells in (("forget", forget_sets.forget), ("retain", forget_sets.retain)):
        before, after = (task.signals(each, cells).elbo.mean() for each in (original(), model))
        fallen[name] = before - after
    assert fallen["forget"] > 1
    assert fallen["forget"] > fallen["retain"]


@pytest.mark.parametrize("dispersion", ["gene-cell", "gene"])
def test_fisher_scrub_gives_the_dead_dispersion_the_noise_of_the_damping_alone(
    make_task: Callable[..., VaeTask], forget_sets: ForgetSets, recipe: Recipe, dispersion: str
) -> None:
    task = make_task(likelihood="log_mse", dispersion=dispersion)
    moved = {}
    for variant in ("noise", "ascent"):
        values = {**SETTINGS, "variant": variant, "alpha": 1e-5, "finetune": recipe(max_epochs=0)}
        settings = FisherScrubSettings.model_validate(values)
        model = fisher_scrub(task.new_model(0), task, forget_sets, settings, seed=0).model
        before = task.new_model(0).state_dict()
        moved[variant] = torch.cat(
            [(v - before[n]).ravel() for n, v in model.state_dict().items() if n.startswith("dispersion.")]
        )
    assert not moved["ascent"].any()
    assert float(moved["noise"].std()) == pytest.approx((1e-5 / 0.1) ** 0.25, rel=0.25)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("variant", "both"), ("alpha", -1e-3), ("alpha", float("inf")), ("damping", 0.0), ("draws", 0), ("steps", -1),
        ("clamp", 0.0), ("finetune", None), ("finetune", {"max_epochs": 3}),
    ],
)  # fmt: skip
def test_fisher_scrub_settings_refuse_what_is_out_of_range(recipe: Recipe, key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        FisherScrubSettings.model_validate({**SETTINGS, "finetune": recipe(), key: value})

"""Inner products of cells' squared gradients against gradients taken cell by cell, and what is made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scforget import fisher, seeding
from scforget.arrays import FloatArray
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.theory import grams, overlap

CELLS = np.array([3, 8, 20, 41, 77, 110])
SETTINGS = overlap.OverlapSettings(
    draws=1, cells=100, bootstrap_draws=300, random_sets=40, batch_size=8, damping=1e-8
)  # fmt: skip


def by_hand(model: VAE, task: VaeTask, *, draws: int, seed: int) -> dict[str, FloatArray]:
    """Mean over draws of each cell's squared gradient, ``[n, P of the part]``, by autograd, one cell at a time."""
    model.eval()
    parts, found = overlap.vae_parts(model), {}
    noise = seeding.torch_generator(seed, "grams")
    total: list[dict[str, FloatArray]] = [{} for _ in CELLS]
    for _ in range(draws):
        eps = torch.randn((len(CELLS), task.settings.latent), generator=noise)
        for index, cell in enumerate(CELLS):
            batch = task.batch(np.array([cell]))
            mu, log_var = model.encode(batch.inputs)
            decoded = model.decode(mu + (log_var / 2).exp() * eps[index], batch.condition)
            kl = 0.5 * (mu.square() + log_var.exp() - 1 - log_var).sum()
            model.zero_grad()
            (kl - model.reconstruction(batch, decoded).sum()).backward()
            for name, parameter in model.named_parameters():
                square = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.double() ** 2
                for part, columns in parts(name.rsplit(".", 1)[0]).items():
                    if name.endswith("bias") and columns.start not in {None, 0}:
                        continue
                    own = square[:, columns] if square.ndim > 1 else square
                    rows = total[index]
                    rows[f"{part}/{name}"] = rows.get(f"{part}/{name}", 0) + own.numpy().ravel() / draws
    for part in {key.split("/")[0] for key in total[0]}:
        keys = [key for key in total[0] if key.startswith(f"{part}/")]
        found[part] = np.stack([np.concatenate([rows[key] for key in keys]) for rows in total])
    return found


@pytest.mark.parametrize("dispersion", ["gene-cell", "gene"])
def test_grams_are_inner_products_of_squared_gradients_of_single_cells(task: VaeTask, dispersion: str) -> None:
    groups = np.arange(task.counts.shape[0]) % 3
    settings = task.settings.model_copy(update={"dispersion": dispersion})
    told = VaeTask(task.counts, task.normaliser, settings, conditions=groups)
    model = told.new_model(1)
    found = overlap.vae_grams(model, told, CELLS, draws=2, seed=5)
    rows = by_hand(model, told, draws=2, seed=5)
    assert found.keys() == rows.keys() == {"encoder", "bottleneck", "decoder", "scale", "condition", "dispersion"}
    for part, gram in found.items():
        np.testing.assert_allclose(gram, rows[part] @ rows[part].T, rtol=2e-4)


def test_moments_are_those_of_the_reweighted_means() -> None:
    generator = np.random.default_rng(0)
    rows = generator.exponential(size=(9, 40))
    first, second = np.zeros((2, 9)), np.zeros((2, 9))
    first[:, :3], second[:, 3:] = [[1 / 3] * 3, [2 / 3, 1 / 3, 0]], 1 / 6
    found = grams.moments(rows @ rows.T, first, second)
    for index in range(2):
        f, r = first[index] @ rows, second[index] @ rows
        assert found.cosine[index] == pytest.approx(f @ r / np.linalg.norm(f) / np.linalg.norm(r))
    pairs = [rows[i] @ rows[j] for i in range(3) for j in range(3) if i != j]
    assert found.first_unbiased[0] == pytest.approx(np.mean(pairs))
    assert found.first_unbiased[1] == pytest.approx(rows[0] @ rows[1])


def test_unbiased_cosine_is_near_the_populations_with_few_cells_and_the_plain_one_is_not() -> None:
    generator = np.random.default_rng(1)
    means = generator.exponential(size=(2, 300))
    truth = means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1])
    few, many = np.arange(10), np.arange(10, 90)
    plain, unbiased = [], []
    for _ in range(200):
        spread = generator.exponential(size=(90, 300)) ** 2 / 2
        rows = spread * means[(np.arange(90) >= 10).astype(int)]
        found = grams.moments(rows @ rows.T, grams.equal_weights(few, 90), grams.equal_weights(many, 90))
        plain.append(found.cosine[0])
        unbiased.append(found.unbiased_cosine[0])
    assert np.mean(unbiased) == pytest.approx(truth, abs=0.02)
    assert np.mean(plain) < truth - 0.08


def test_interval_of_the_overlap_covers_the_populations_cosine() -> None:
    generator = np.random.default_rng(2)
    means = generator.exponential(size=(2, 50))
    truth = means[0] @ means[1] / np.linalg.norm(means[0]) / np.linalg.norm(means[1])
    forget = np.arange(90) < 30
    held = 0
    for seed in range(100):
        rows = np.concatenate(
            [means[0] * generator.exponential(size=(30, 50)), means[1] * generator.exponential(size=(60, 50))]
        )
        model = {"encoder": rows @ rows.T}
        found = overlap.compare([model], forget, ~forget, SETTINGS, level=0.9, seed=seed)["encoder"]
        held += found["interval"][0] <= truth <= found["interval"][1]
    assert 80 <= held <= 98  # 90 expected; a bootstrap of 30 cells is a little short


def test_resampled_weights_are_resamples_with_two_cells_at_least() -> None:
    weights = grams.resampled_weights(np.array([1, 4]), 6, 200, np.random.default_rng(0))
    assert np.allclose(weights.sum(1), 1)
    assert (weights[:, [1, 4]] == 0.5).all()


def test_diagonals_leave_out_and_count_what_gets_no_gradient(task: VaeTask) -> None:
    settings = task.settings.model_copy(update={"likelihood": "log_mse"})
    plain = VaeTask(task.counts, task.normaliser, settings)
    model = plain.new_model(0)
    one, other = (fisher.diagonal(model, plain, cells, draws=2, seed=0) for cells in (CELLS[:3], CELLS[3:]))
    found = overlap.diagonals(one, other, overlap.vae_parts(model))
    unused = model.dispersion.weight.numel() + model.dispersion.bias.numel()
    assert "dispersion" not in found["groups"]
    output = found["groups"]["decoder_output"]
    assert unused <= output["without_gradient"] < output["parameters"]
    f, r = (np.concatenate([v.double().numpy().ravel() for v in side.values()]) for side in (one, other))
    assert found["groups"]["global"]["cosine"] == pytest.approx(f @ r / np.linalg.norm(f) / np.linalg.norm(r))
    f, r = f[(f > 0) | (r > 0)], r[(f > 0) | (r > 0)]
    assert found["effective_rank"]["forget"]["participation"] == pytest.approx(f.sum() ** 2 / (f**2).sum())
    count = int(0.1 * len(f))
    top = set(np.argsort(f)[-count:]) & set(np.argsort(r)[-count:])
    assert found["top_10_percent"] == pytest.approx(len(top) / count)
    assert found["log_correlation"] == pytest.approx(
        np.corrcoef(np.log(f[(f > 0) & (r > 0)]), np.log(r[(f > 0) & (r > 0)]))[0, 1]
    )


def test_pooled_is_the_diagonal_of_the_sets_together(task: VaeTask) -> None:
    model = task.new_model(0)
    with torch.no_grad():
        model.log_var.bias.fill_(-30)  # all draws are the mean, so that the order of the cells does not matter
    parts = overlap.exact(model, task, [CELLS[:2], CELLS[2:], CELLS[:0]], draws=1, seed=0)
    whole = fisher.diagonal(model, task, CELLS, draws=1, seed=0)
    for name, value in overlap.pooled([(parts[0], 2), (parts[1], 4), (parts[2], 0)]).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-6)


def test_per_gene_is_the_cosine_within_each_row(task: VaeTask) -> None:
    model = task.new_model(0)
    one, other = (fisher.diagonal(model, task, cells, draws=1, seed=0) for cells in (CELLS[:3], CELLS[3:]))
    found = overlap.per_gene(one, other)
    f, r = one["scale.weight"][7].double(), other["scale.weight"][7].double()
    assert found[7] == pytest.approx(float(f @ r / f.norm() / r.norm()))
    assert overlap.genes_summary(found)["above_half"] == (found > 0.5).mean()


def test_compare_and_diagonals_give_one_cosine_by_two_ways(task: VaeTask) -> None:
    model = task.new_model(0)
    with torch.no_grad():
        model.log_var.bias.fill_(-30)  # all draws are the mean
    cells = np.arange(40)
    forget = cells < 12
    gram = overlap.vae_grams(model, task, cells, draws=1, seed=0)
    found = overlap.compare([gram], forget, ~forget, SETTINGS, level=0.9, seed=0)
    one, other = (fisher.diagonal(model, task, cells[which], draws=1, seed=0) for which in (forget, ~forget))
    exact = overlap.diagonals(one, other, overlap.vae_parts(model))["groups"]
    assert exact.keys() == found.keys()
    for group, row in exact.items():
        assert found[group]["cosine"] == pytest.approx(row["cosine"], rel=1e-3)


def test_forgotten_cells_like_the_retained_ones_overlap_as_random_sets_do_and_others_do_not() -> None:
    generator = np.random.default_rng(4)
    means = generator.exponential(size=(2, 80))
    forget = np.arange(120) < 20
    for own, alike in ((0, True), (1, False)):
        rows = means[np.where(forget, own, 0)] * generator.exponential(size=(120, 80))
        found = overlap.compare([{"encoder": rows @ rows.T}], forget, ~forget, SETTINGS, level=0.9, seed=1)["global"]
        assert (found["same_size"]["p_lower"] > 0.1) is alike
        assert found["halves"]["unbiased"] > 0.9

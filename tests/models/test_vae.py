"""The VAE: its sizes, its blocks, and how its decoder becomes a likelihood."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from torch import nn

from scforget.models.layers import Dropout
from scforget.models.vae import BLOCKS, VAE, Batch, VAESettings, block_of, gaussian_kl

PUBLISHED: dict[str, Any] = {
    "hidden": [1024, 512, 128], "latent": 32, "likelihood": "nb", "dispersion": "gene-cell", "dropout": 0.1,
}  # fmt: skip
KINDS = list(product(["nb", "zinb", "log_mse"], ["gene-cell", "gene"]))


def small(**changes: Any) -> VAE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VAE(9, VAESettings(**{**PUBLISHED, "hidden": [8, 6], "latent": 3, **changes})).eval()


def sizes(**changes: Any) -> Counter[str]:
    """Parameters of each block at the published sizes; nothing is allocated."""
    with torch.device("meta"):
        model = VAE(2000, VAESettings(**{**PUBLISHED, **changes}))
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        found[block_of(name)] += parameter.numel()
    return found


@pytest.fixture
def batch() -> Batch:
    counts = torch.from_numpy(np.random.default_rng(0).poisson(3, (5, 9)).astype(np.float32))
    library = counts.sum(1, keepdim=True)
    return Batch(counts, torch.log1p(1e4 * counts / library), library)


@pytest.mark.parametrize("likelihood", ["nb", "log_mse"])
def test_vae_has_the_published_number_of_parameters(likelihood: str) -> None:
    found = sizes(likelihood=likelihood)
    assert found == {"encoder": 2_642_816, "bottleneck": 8_256, "decoder": 598_912, "heads": 4_100_000}
    assert found.total() == 7_349_984


def test_vae_told_14_groups_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = VAE(2000, VAESettings(**PUBLISHED), conditions=14)
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_377_984
    assert model.scale.weight.shape == (2000, 1024 + 14)


@pytest.mark.parametrize(
    ("likelihood", "dispersion", "heads"),
    [("zinb", "gene-cell", 3 * 2_050_000), ("nb", "gene", 2_050_000 + 2_000), ("zinb", "gene", 2 * 2_050_000 + 2_000)],
)
def test_vae_has_a_head_more_for_zeros_and_one_less_for_shared_dispersion(
    likelihood: str, dispersion: str, heads: int
) -> None:
    found = sizes(likelihood=likelihood, dispersion=dispersion)
    assert found["heads"] == heads
    assert found.total() - heads == 7_349_984 - 4_100_000


def test_vae_hidden_blocks_are_linear_norm_relu_dropout_mirrored() -> None:
    model = small(hidden=[8, 6, 4], dropout=0.25)
    for part in (model.encoder, model.decoder):
        assert [type(layer) for layer in part] == 3 * [nn.Linear, nn.LayerNorm, nn.ReLU, Dropout]
        assert {layer.p for layer in part if isinstance(layer, Dropout)} == {0.25}
    widths = [
        [layer.out_features for layer in p if isinstance(layer, nn.Linear)] for p in (model.encoder, model.decoder)
    ]
    assert widths == [[8, 6, 4], [4, 6, 8]]


@pytest.mark.parametrize(("likelihood", "dispersion"), KINDS)
def test_block_of_covers_every_parameter_and_every_block(likelihood: str, dispersion: str) -> None:
    names = dict(small(likelihood=likelihood, dispersion=dispersion).named_parameters())
    assert {block_of(name) for name in names} == set(BLOCKS)
    assert all(name.split(".")[0] in BLOCKS[block_of(name)] for name in names)


def test_blocks_share_no_module() -> None:
    modules = [module for part in BLOCKS.values() for module in part]
    assert len(set(modules)) == len(modules)


def test_gaussian_kl_equals_torch_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    mu, log_var = 3 * torch.randn(2, 50, 4, generator=generator, dtype=torch.float64)
    posterior = torch.distributions.Normal(mu, (0.5 * log_var).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    torch.testing.assert_close(gaussian_kl(mu, log_var), torch.distributions.kl_divergence(posterior, prior))


def test_gaussian_kl_is_0_at_the_prior_only() -> None:
    assert gaussian_kl(torch.zeros(1), torch.zeros(1)).item() == 0
    assert (gaussian_kl(torch.tensor([0.1, 0.0, 0.0]), torch.tensor([0.0, 0.1, -0.1])) > 0).all()


@pytest.mark.parametrize("dispersion", ["gene-cell", "gene"])
def test_vae_log_prob_is_nb_with_mean_library_times_shares(batch: Batch, dispersion: str) -> None:
    model = small(dispersion=dispersion).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.dispersion.parameters():  # a per-gene dispersion starts at 0, where genes are alike
            parameter.add_(torch.linspace(-1, 1, parameter.shape[0]).reshape(-1, *[1] * (parameter.ndim - 1)))
        decoded = model.decode(model.encode(batch.inputs)[0])
        got = model.log_prob(batch, decoded)
        torch.testing.assert_close(model.reconstruction(batch, decoded), got.sum(1), rtol=1e-6, atol=0)
    weights = np.exp(decoded.logits.double().numpy())
    mean = batch.library.numpy() * weights / weights.sum(1, keepdims=True)
    r = np.exp(decoded.log_inverse_dispersion.double().numpy())
    np.testing.assert_allclose(got, stats.nbinom.logpmf(batch.counts.numpy(), r, r / (r + mean)), rtol=1e-5, atol=1e-6)


def test_vae_log_prob_of_zinb_mixes_in_zeros(batch: Batch) -> None:
    model = small(likelihood="zinb")
    with torch.no_grad():
        decoded = model.decode(model.encode(batch.inputs)[0])
        assert decoded.zero_logits is not None
        got = model.log_prob(batch, decoded).double().numpy()
        plain = small().log_prob(batch, decoded._replace(zero_logits=None)).double().numpy()
    share = 1 / (1 + np.exp(-decoded.zero_logits.double().numpy()))
    wanted = np.log(share * (batch.counts.numpy() == 0) + (1 - share) * np.exp(plain))
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def test_vae_log_prob_of_log_mse_needs_neither_counts_nor_dispersion(batch: Batch) -> None:
    model = small(likelihood="log_mse")
    with torch.no_grad():
        decoded = model.decode(model.encode(batch.inputs)[0])
        got = model.log_prob(batch, decoded)
        other = decoded._replace(log_inverse_dispersion=decoded.log_inverse_dispersion + 5)
        assert torch.equal(got, model.log_prob(batch._replace(counts=batch.counts * torch.nan), other))
        wanted = (batch.inputs - decoded.logits.softmax(1) * batch.inputs.sum(1, keepdim=True)) ** 2
    torch.testing.assert_close(got, -wanted)


@pytest.mark.parametrize(("likelihood", "dispersion"), KINDS)
def test_vae_decode_has_the_heads_that_its_settings_name(batch: Batch, likelihood: str, dispersion: str) -> None:
    model = small(likelihood=likelihood, dispersion=dispersion)
    mu, log_var = model.encode(batch.inputs)
    assert mu.shape == log_var.shape == (5, 3)
    decoded = model.decode(mu)
    assert decoded.logits.shape == decoded.log_inverse_dispersion.shape == (5, 9)
    assert (decoded.zero_logits is not None) == (likelihood == "zinb")
    shared = bool((decoded.log_inverse_dispersion == decoded.log_inverse_dispersion[:1]).all())
    assert shared == (dispersion == "gene")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden", []), ("hidden", [0]), ("hidden", [8.5]), ("latent", 0), ("latent", "32"), ("likelihood", "poisson"),
        ("dispersion", "cell"), ("dropout", 1.0), ("dropout", -0.1), ("activation", "gelu"),
    ],
)  # fmt: skip
def test_vae_settings_refuse_what_is_no_architecture(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        VAESettings.model_validate({**PUBLISHED, key: value})


@pytest.mark.parametrize("key", list(PUBLISHED))
def test_vae_settings_have_no_defaults(key: str) -> None:
    with pytest.raises(ValidationError, match=key):
        VAESettings.model_validate({name: value for name, value in PUBLISHED.items() if name != key})

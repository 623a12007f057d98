"""The registries of attacks: what is in them is called alike, and gives the scores that it names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scforget import config
from scforget.attacks import (
    ATTACKS,
    LEARNED,
    MODEL_ATTACKS,
    REFERENCE_ATTACKS,
    gene_list,
    knn,
    likelihood_ratio,
    lira,
    rmia,
    threshold,
)
from scforget.attacks.references import References
from scforget.settings import Settings
from scforget.tasks import Signals

SECTIONS = config.read_yaml(Path(__file__).parents[2] / "params.yaml")["audit"]["attacks"]
MODULES = {
    "threshold": threshold, "knn": knn, "likelihood_ratio": likelihood_ratio, "lira": lira, "rmia": rmia,
}  # fmt: skip
N = 30
ASIDE = np.arange(N) >= 20


def settings_of(name: str) -> Settings:
    return ATTACKS[name].settings.model_validate(SECTIONS[name])


@pytest.fixture
def signals() -> Signals:
    rng = np.random.default_rng(0)
    return Signals(
        cells=np.arange(N),
        reconstruction=-rng.uniform(100, 200, N),
        kl=rng.uniform(1, 5, N),
        mu=rng.normal(size=(N, 3)),
        log_var=rng.normal(size=(N, 3)),
    )


@pytest.fixture
def references() -> References:
    rng = np.random.default_rng(1)
    members = (np.arange(8)[:, None] % 2 == np.arange(N) % 2) & ~ASIDE
    return References(rng.normal(size=(4, N)), rng.normal(size=(8, N)) + members, members, ASIDE)


def test_attacks_name_every_attack_that_has_settings() -> None:
    assert set(ATTACKS) == set(SECTIONS)
    assert set(ATTACKS) == {*MODEL_ATTACKS, *REFERENCE_ATTACKS, "mlp", "population"}
    assert not set(MODEL_ATTACKS) & set(REFERENCE_ATTACKS)
    for attacks in (MODEL_ATTACKS, REFERENCE_ATTACKS):
        assert all(ATTACKS[name] is attack for name, attack in attacks.items())


@pytest.mark.parametrize("name", MODEL_ATTACKS)
def test_model_attacks_give_the_scores_that_they_name(name: str, signals: Signals) -> None:
    scores = MODEL_ATTACKS[name].run(signals, signals, settings_of(name))
    assert tuple(scores) == MODULES[name].SCORES
    assert all(values.shape == (N,) and np.isfinite(values).all() for values in scores.values())


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", REFERENCE_ATTACKS)
def test_reference_attacks_give_the_scores_that_they_name(name: str, own: bool, references: References) -> None:
    audited = references.retrains if own else np.random.default_rng(2).normal(size=(3, N))
    scores = REFERENCE_ATTACKS[name].run(audited, references, settings_of(name), own=own)
    assert tuple(scores) == MODULES[name].SCORES
    assert all(values.shape == audited.shape for values in scores.values())
    assert all(np.isfinite(values[:, ~ASIDE]).all() for values in scores.values())


def test_scores_of_all_attacks_have_names_of_their_own() -> None:
    names = [score for module in (*MODULES.values(), gene_list) for score in module.SCORES] + [*LEARNED]
    assert len(set(names)) == len(names) == 12
    assert set(MODULES) == {*MODEL_ATTACKS, *REFERENCE_ATTACKS}
    assert LEARNED == ("mlp", "published_mlp")

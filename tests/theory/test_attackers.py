from __future__ import annotations

import numpy as np
import pytest

from judged import audit_settings, draw, small_case
from scforget.attacks.mlp import MlpSettings, attack_features
from scforget.data.splits import ForgetSets
from scforget.tasks import Signals, VaeTask
from scforget.theory.attackers import attack, attacks, feature_attacks, feature_rows, subsets
from scforget.theory.judging import Case, Judge, Scored

LATENT = 3  # of the drawn models


@pytest.fixture(scope="module")
def judge(task: VaeTask, forget_sets: ForgetSets) -> Judge:
    case = small_case(task, forget_sets)
    return Judge(case, draw(case, 4, 1), audit_settings(), 0)


@pytest.fixture(scope="module")
def settings() -> MlpSettings:
    found: MlpSettings = audit_settings().of("mlp")
    return found


def leaking(case: Case, column: int) -> list[Scored]:
    """Models that give the forgotten cells away in one column."""
    models = draw(case, 2, 2)
    for one in models:
        one.features[case.groups.forget, column] += 8 * one.features[:, column].std()
    return models


def test_subsets_name_the_columns_where_attack_features_puts_them() -> None:
    noise = np.random.default_rng(0)
    mu, log_var = noise.normal(size=(6, 32)), noise.normal(size=(6, 32))
    signals = Signals(np.arange(6), noise.normal(size=6), noise.uniform(size=6), mu, log_var)
    features, parts = attack_features(signals), subsets(69)
    np.testing.assert_array_equal(features[:, parts["encoder"]], np.hstack([mu, log_var]))
    np.testing.assert_array_equal(features[:, parts["decoder"]][:, 0], signals.reconstruction)
    assert len(parts["encoder"]) == 64
    encoder = features[:, parts["encoder_and_sums"]]
    norms = [np.linalg.norm(part, axis=1)[:, None] for part in (mu, log_var)]
    np.testing.assert_allclose(encoder, np.hstack([signals.kl[:, None], mu, log_var, *norms]))
    scalars = [part[:, None] for part in (signals.reconstruction, signals.kl, signals.elbo)]
    np.testing.assert_allclose(features[:, parts["scalars"]], np.hstack([*scalars, *norms]))
    assert parts["all"].tolist() == list(range(69))


def test_attack_finds_a_leak_in_the_columns_that_it_sees(judge: Judge, settings: MlpSettings) -> None:
    models, parts = leaking(judge.case, 4), subsets(5 + 2 * LATENT)
    groups = judge.case.groups

    def auc(name: str) -> float:
        [first, _] = attacks(judge, models, parts[name], "same_group", settings, seed=0)
        return float(groups.aucs(attack(first)[None], "same_group")[0])

    assert auc("encoder") > 0.95
    assert auc("all") > 0.95
    assert auc("decoder") < 0.8
    assert auc("scalars") < 0.8


def test_attacks_take_the_controls_asked_for(judge: Judge, settings: MlpSettings) -> None:
    [one, _] = attacks(judge, leaking(judge.case, 4), np.arange(2), "matched_knn", settings, seed=0)
    np.testing.assert_array_equal(one.controls, judge.case.groups.controls["matched_knn"])
    np.testing.assert_array_equal(one.forget, judge.case.groups.forget)


def test_feature_attacks_share_their_seeds_over_subsets(judge: Judge, settings: MlpSettings) -> None:
    jobs = feature_attacks(judge, draw(judge.case, 2, 2), settings, 0)
    seeds = np.array([job.seed for job in jobs]).reshape(5, 2 + 4)
    assert (seeds == seeds[0]).all()
    assert len(set(seeds[0].tolist())) == 6
    assert [job.features.shape[1] for job in jobs[::6]] == [6, 9, 1, 5, 11]


def test_feature_rows_put_every_score_where_it_belongs(judge: Judge, settings: MlpSettings) -> None:
    models = draw(judge.case, 2, 2)
    scores = [np.random.default_rng(i).normal(size=len(judge.case.cells)) for i in range(5 * 6)]
    rows = feature_rows(judge, models, scores)
    assert [row["features"] for row in rows] == list(subsets(11))
    aucs = np.array([judge.case.groups.aucs(one[None], "same_group")[0] for one in scores]).reshape(5, 6)
    for row, own in zip(rows, aucs, strict=True):
        assert row["per_model"] == pytest.approx(own[:2])
        assert row["retrain_mean"] == pytest.approx(own[2:].mean())
        away = own - aucs[0]
        assert row["beyond_encoder"]["difference"] == pytest.approx(away[:2].mean() - away[2:].mean())
    assert rows[0]["beyond_encoder"] == {"difference": 0.0, "interval": [0.0, 0.0]}


def test_feature_rows_show_which_part_leaks(judge: Judge, settings: MlpSettings) -> None:
    models = leaking(judge.case, 4)
    jobs = feature_attacks(judge, models, settings, 0)
    rows = {row["features"]: row for row in feature_rows(judge, models, [attack(job) for job in jobs])}
    assert rows["encoder"]["difference_interval"][0] > 0
    assert rows["decoder"]["beyond_encoder"]["interval"][1] < 0
    assert rows["decoder"]["difference"] < 0.2 < rows["encoder"]["difference"]

"""What the classifier papers print: against scipy, slow loops and numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy

from audit.classes_made import LEVEL, PART, A, F, R, T, U, outputs, population, scene, settings
from scforget import artifacts
from scforget.attacks import kaggle
from scforget.attacks.lira import lira
from scforget.audit import Margins, classification
from scforget.audit.assess import describe_target, judge, with_references
from scforget.audit.classification import (
    ClassOutputs,
    ClassPopulation,
    class_record,
    compared,
    distances,
    kaggle_scores,
    lira_rates,
)
from scforget.audit.intervals import clopper_pearson
from scforget.audit.samples import energy, sliced_wasserstein
from scforget.class_tasks import ClassSignals
from scforget.errors import DataError, EmptyGroupError

SETTINGS, SEED = settings(), 42
RNG = np.random.default_rng(0)


@cache
def target() -> dict[str, Any]:
    return class_record(scene().target, scene(), None, SETTINGS, SEED)


# outputs


def test_outputs_count_right_answers_of_each_group() -> None:
    sure = np.ones((2, PART.size))
    sure[0, PART == 0] = [-1, *[1] * (F - 1)]
    sure[1, PART == 4] = -1
    found = outputs(sure)
    np.testing.assert_allclose(found.accuracy("forget"), [(F - 1) / F, 1])
    np.testing.assert_array_equal(found.accuracy("test"), [1, 0])
    np.testing.assert_array_equal(found.accuracy("retain"), [1, 1])


def test_outputs_have_the_confidences_and_probabilities_of_single_models() -> None:
    logits, labels = RNG.normal(size=(2, 9, 4)) * 20, RNG.integers(0, 4, 9)
    groups = [np.arange(9) % 4 == group for group in range(4)]
    found = ClassOutputs(logits, labels, *groups)
    for model in range(2):
        one = ClassSignals(np.arange(9), labels, logits[model], np.zeros((9, 1)))
        np.testing.assert_allclose(found.confidence(np.ones(9, dtype=bool))[model], one.confidence)
        np.testing.assert_allclose(found.probabilities(groups[0])[model], scipy.special.softmax(logits[model, ::4], 1))
    np.testing.assert_array_equal(found.logits, logits)  # nothing was written into them


def test_outputs_refuse_what_cannot_be() -> None:
    logits, labels = np.zeros((1, 4, 2)), np.zeros(4, dtype=np.int64)
    groups = list(np.eye(4, dtype=bool))
    ClassOutputs(logits, labels, *groups)
    with pytest.raises(DataError, match=r"found \(1, 4, 2\) and \(3,\)"):
        ClassOutputs(logits, labels[:3], *groups)
    with pytest.raises(EmptyGroupError, match="classifiers: found 0"):
        ClassOutputs(logits[:0], labels, *groups)
    with pytest.raises(EmptyGroupError, match="test items: found 0; wanted at least 1"):
        ClassOutputs(logits, labels, groups[0], groups[1], np.zeros(4, dtype=bool), groups[3])
    with pytest.raises(DataError, match="1 items in two of them"):
        ClassOutputs(logits, labels, groups[0], groups[0], groups[2], groups[3])
    with pytest.raises(DataError, match="2 not finite"):
        ClassOutputs(np.array([[[np.nan, 0], [0, np.inf], [0, 0], [0, 0]]]), labels, *groups)
    with pytest.raises(DataError, match="labels of items: found 2; wanted class codes from 0 to 1"):
        ClassOutputs(logits, labels + 2, *groups)


# one number a model, beside the retrains'


def test_compared_has_the_intervals_of_scipys_t_tests() -> None:
    own, base = RNG.normal(0.6, 0.1, 5), RNG.normal(0.5, 0.3, 9)
    found = compared(own, base, LEVEL)
    alone = scipy.stats.ttest_1samp(own, 0).confidence_interval(LEVEL)
    apart = scipy.stats.ttest_ind(own, base, equal_var=False).confidence_interval(LEVEL)
    np.testing.assert_allclose(found["interval"], alone)
    np.testing.assert_allclose(found["difference_interval"], apart)
    assert (found["mean"], found["retrain"]) == (own.mean(), base.mean())
    assert found["difference"] == own.mean() - base.mean()
    assert found["per_seed"] == own.tolist()


def test_compared_of_a_single_model_has_no_interval_and_of_the_retrains_no_difference() -> None:
    assert np.isnan(compared(np.ones(1), np.ones(3), LEVEL)["difference_interval"]).all()
    alone = compared(np.ones(3), None, LEVEL)
    assert (alone["retrain"], alone["difference"], alone["difference_interval"]) == (None, None, None)


# LiRA


def slow_tnr(forget: np.ndarray, retain: np.ndarray) -> float:
    """Largest share of forget items at or below a threshold with at most 1 % of the retained ones there."""
    thresholds = [-np.inf, *forget, *retain]
    return max(float((forget <= t).mean()) for t in thresholds if (retain <= t).sum() <= 0.01 * retain.size)


@pytest.mark.parametrize("digits", [8, 0])
def test_lira_rates_equal_a_slow_search_with_ties_as_blocks(digits: int) -> None:
    scores = np.round(RNG.normal(size=(3, F + R)) * 2, digits)
    forget = np.arange(F + R) < F
    scores[:, forget] -= 3
    found = lira_rates(scores, forget, None, LEVEL)
    wanted = [slow_tnr(row[forget], row[~forget]) for row in scores]
    assert found["tnr"]["per_seed"] == wanted
    assert 0 < min(wanted) < 1
    pairs = [(row[~forget][:, None] > row[forget]) + 0.5 * (row[~forget][:, None] == row[forget]) for row in scores]
    np.testing.assert_allclose(found["auc"]["per_seed"], [pair.mean() for pair in pairs])
    for model, tnr in zip(found["models"], wanted, strict=True):
        np.testing.assert_allclose(model["tpr_interval"], clopper_pearson(round(tnr * F), F, LEVEL))
        assert model["fpr"] <= 0.01


def test_lira_rates_of_items_like_the_retained_ones_are_those_of_chance() -> None:
    scores = RNG.normal(size=(40, 400 + 2000))
    found = lira_rates(scores, np.arange(2400) < 400, None, LEVEL)
    assert found["tnr"]["mean"] == pytest.approx(0.01, abs=0.003)
    assert found["auc"]["mean"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("shift", "words"), [(2.0, "below the"), (0.0, "not told from"), (-2.0, "above the")])
def test_lira_rates_say_on_which_side_of_the_retrains_a_method_lies(shift: float, words: str) -> None:
    forget = np.arange(60 + R) < 60
    rng = np.random.default_rng(1)
    base, own = rng.normal(size=(12, forget.size)), rng.normal(size=(6, forget.size))
    base[:, forget] -= 2
    own[:, forget] += shift - 2
    record = lira_rates(own, forget, lira_rates(base, forget, None, LEVEL), LEVEL)
    assert record["reading"].startswith(words)
    assert ("over-unlearning" in record["reading"]) == (shift < 0)
    assert np.sign(record["tnr"]["difference"]) == -np.sign(shift) or shift == 0


def test_lira_rates_give_no_tnr_with_too_few_retained_items_and_read_the_auc() -> None:
    forget = np.arange(20 + 298) < 20
    rng = np.random.default_rng(2)
    base, own = rng.normal(size=(6, forget.size)), rng.normal(size=(6, forget.size)) - 3 * forget
    record = lira_rates(own, forget, lira_rates(base, forget, None, LEVEL), LEVEL)
    assert record["tnr"] is None
    assert record["retain_needed"] == 299
    assert record["models"][0]["status"] == "undetermined"
    assert record["reading"].startswith("above the")


# distances


def test_distances_are_scipys_and_those_of_samples_minus_the_retrains() -> None:
    own = population(5, 3, remembered=2).outputs
    base = distances(scene().target.outputs, None, LEVEL, SEED)
    found = distances(own, {name: row for name, row in base.items() if isinstance(row, dict)}, LEVEL, SEED)
    sure = own.confidence(own.forget), own.confidence(own.controls)
    said = own.probabilities(own.forget), own.probabilities(own.controls)
    for model in range(3):
        one, two = sure[0][model], sure[1][model]
        assert found["wasserstein"]["per_seed"][model] == pytest.approx(scipy.stats.wasserstein_distance(one, two))
        assert found["cramer"]["per_seed"][model] == pytest.approx(energy(one[:, None], two[:, None]))
        points = said[0][model], said[1][model]
        assert found["cramer_output"]["per_seed"][model] == pytest.approx(energy(*points))
        wanted = sliced_wasserstein(*points, SEED)
        assert found["wasserstein_output"]["per_seed"][model] == pytest.approx(wanted)
    assert found["wasserstein"]["retrain"] == pytest.approx(base["wasserstein"]["mean"])
    assert found["items"] == {"forget": F, "controls": U}


def test_distances_of_answers_that_are_shifted_have_closed_forms() -> None:
    sure = np.zeros((1, PART.size))
    sure[0, PART == 0] = 3.0
    found = distances(outputs(sure), None, LEVEL, SEED)
    assert found["wasserstein"]["mean"] == pytest.approx(3)
    assert found["cramer"]["mean"] == pytest.approx(6)


def test_distances_over_many_items_take_the_same_ones_for_all_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classification, "ITEMS", 7)
    models = population(3, 2, remembered=0).outputs
    twice = distances(outputs(np.repeat(models.confidence(PART >= 0)[:1], 2, axis=0)), None, LEVEL, SEED)
    assert twice["items"] == {"forget": 7, "controls": 7}
    for name in ("wasserstein", "cramer", "wasserstein_output", "cramer_output"):
        assert twice[name]["per_seed"][0] == twice[name]["per_seed"][1] > 0


# Kaggle's score


def test_kaggle_scores_are_those_of_the_scorers_on_their_own_outputs() -> None:
    around = scene()
    own = around.originals
    assert isinstance(own, ClassPopulation)
    accuracy = {
        name: {"mean": own.outputs.accuracy(name).mean(), "retrain": target()["accuracy"][name]["mean"]}
        for name in ("retain", "test")
    }
    found = kaggle_scores(own, around, target(), accuracy=accuracy, settings=SETTINGS, seed=SEED)
    ratio = np.prod([row["mean"] / row["retrain"] for row in accuracy.values()])
    forget = around.groups.forget
    sure = [models.scores["confidence"][:6, forget] for models in (own, around.target)]
    # of two classes with logits φ and 0: minus the log-probability of the larger one
    entropies = [np.log1p(np.exp(-np.abs(values))) for values in sure]
    for scorer, (one, two) in {"official": sure, "suprun": entropies}.items():
        epsilons = kaggle.kaggle_epsilon(one, two, scorer=scorer, delta=kaggle.DELTAS[scorer])
        quality = kaggle.forgetting_quality(epsilons, 6, scorer)
        assert found[scorer]["forgetting_quality"] == quality
        assert found[scorer]["epsilon"] == {"median": np.median(epsilons), "max": epsilons.max()}
        assert found[scorer]["final_score"] == pytest.approx(quality * ratio)
        assert found[scorer]["models"] == 6
        assert found[scorer]["forgetting_ceiling"] == target()["kaggle"]["ceilings"][scorer]
        assert quality < found[scorer]["forgetting_ceiling"]["mean"]


def test_kaggle_ceilings_are_of_as_many_models_as_are_scored() -> None:
    around = scene()
    fewer = population(7, 4, remembered=0)
    even = {name: {"mean": 0.5, "retrain": 0.5} for name in ("retain", "test")}
    found = kaggle_scores(fewer, around, target(), accuracy=even, settings=SETTINGS, seed=SEED)
    wanted = kaggle.forgetting_ceiling(
        around.target.score[:, around.groups.forget], 4, scorer="official", delta=1e-5, seed=SEED, draws=2
    )
    assert found["official"]["forgetting_ceiling"] == wanted != target()["kaggle"]["ceilings"]["official"]
    assert found["suprun"]["models"] == 4
    assert "4 and 4; wanted both kinds in every test fold of a tenth; 6 of each will do" in found["suprun"]["refused"]


def test_kaggle_scores_refuse_two_models_in_words() -> None:
    around = scene(originals=2, retrains=4)
    base = class_record(around.target, around, None, SETTINGS, SEED)
    found = class_record(population(7, 2, remembered=0), around, base, SETTINGS, SEED)["kaggle"]
    assert base["kaggle"]["ceilings"] == {"models": 2, "official": None, "suprun": None}
    for scorer in ("official", "suprun"):
        assert set(found[scorer]) == {"models", "refused"}
        assert "2" in found[scorer]["refused"]


# the whole record


def test_class_record_of_the_retrains_has_no_differences_but_the_ceilings() -> None:
    found = target()
    assert found["accuracy"]["test"]["difference"] is None
    assert found["lira"]["reading"] is None
    assert set(found["kaggle"]) == {"ceilings"}
    assert found["lira"]["items"] == {"forget": F, "retain": R}
    assert (found["lira"]["shadows"], found["lira"]["variance"]) == (8, "global")


def test_class_record_tells_originals_from_retrains_and_retrains_from_nothing() -> None:
    around = scene()
    original = class_record(around.originals, around, target(), SETTINGS, SEED)
    like = class_record(population(8, 6, remembered=0), around, target(), SETTINGS, SEED)
    for record, told in ((original, True), (like, False)):
        rows = [record["accuracy"]["forget"], record["lira"]["auc"], record["distance"]["wasserstein"]]
        assert [row["difference_interval"][0] * row["difference_interval"][1] > 0 for row in rows] == [told] * 3
    assert original["lira"]["auc"]["mean"] == pytest.approx(0.5, abs=0.17)  # two standard errors of 12 items
    assert target()["lira"]["auc"]["mean"] > 0.9
    assert original["lira"]["reading"].startswith("below")


def test_class_record_has_the_online_lira_of_the_training_items() -> None:
    around, own = scene(), population(9, 3, remembered=1)
    found = class_record(own, around, target(), SETTINGS, SEED)
    sure = np.concatenate([own.outputs.confidence(own.outputs.forget), own.outputs.confidence(own.outputs.retain)], 1)
    ratios = lira(sure, around.trained, SETTINGS.of("lira"), own=False)["lira_online"]
    wanted = lira_rates(ratios, np.arange(F + R) < F, target()["lira"], LEVEL)
    assert {key: found["lira"][key] for key in wanted} == wanted


def test_class_record_refuses_shadow_models_of_other_items() -> None:
    other = scene().trained
    fewer = type(other)(other.retrains[:, 1:], other.shadows[:, 1:], other.members[:, 1:], other.aside[1:])
    around = scene()
    object.__setattr__(around, "trained", fewer)
    with pytest.raises(DataError, match=rf"wanted shape \[M, {F + R - 1}\]"):
        class_record(population(9, 3, remembered=1), around, target(), SETTINGS, SEED)


def test_class_record_is_json(tmp_path: Path) -> None:
    record = class_record(population(9, 3, remembered=1), scene(), target(), SETTINGS, SEED)
    artifacts.write_json(tmp_path / "record.json", record)  # refuses NaN and infinity
    assert artifacts.read_json(tmp_path / "record.json") == artifacts._plain(record)
    assert set(record) >= {"lira", "kaggle"}


# the audit around it


def test_judge_of_classifiers_rests_on_the_confidence() -> None:
    around = scene()
    scored = with_references(around.originals, around.references, SETTINGS, own=False)
    base = with_references(around.target, around.references, SETTINGS, own=True)
    object.__setattr__(around, "originals", scored)
    object.__setattr__(around, "target", base)
    described = describe_target(around, SETTINGS, SEED)
    record = judge("original", scored, around, target_attacks=described["attacks"], settings=SETTINGS, seed=SEED)
    assert record["score"] == described["score"] == "confidence"
    assert record["verdict"] == "NOT_FORGOTTEN"
    assert set(record["utility"]["verdicts"]) == {"accuracy"}
    assert set(record["population"]["epsilon_bounds"]) == {"membership", "mean_confidence"}
    assert {"rmia_online", "lira_online", "likelihood_ratio", "confidence"} <= set(record["attacks"])
    wanted = record["attacks"]["confidence"]["same_group"]["per_seed"]
    np.testing.assert_allclose(record["primary"]["membership"]["mean"], np.mean(wanted))
    assert "collapse" not in record["failure_modes"]
    assert PART.size == F + U + A + R + T


def test_margins_of_utility_are_those_of_no_primary_statistic() -> None:
    assert SETTINGS.margins.utility == {"accuracy": 0.02}
    assert Margins(membership=0.02, trace=1.0, elbo=5.0, marker_r=0.3).utility == {"elbo": 5.0, "marker_r": 0.3}


def test_score_of_a_population_is_the_primary_one_or_an_error_names_those_there_are() -> None:
    own = population(0, 2, remembered=0)
    assert own.score is own.scores["confidence"]
    assert replace(own, primary="mlp").score is own.scores["mlp"]
    with pytest.raises(DataError, match="found confidence, max_prob, mlp; wanted elbo among them"):
        replace(own, primary="elbo").score  # noqa: B018

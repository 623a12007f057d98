"""The audit record of made-up populations whose answer is known."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from audit.simulating import SETTINGS
from scforget import artifacts
from scforget.arrays import BoolArray, FloatArray
from scforget.attacks import LEARNED
from scforget.attacks.references import References
from scforget.audit import equivalence, roc
from scforget.audit.assess import attacks, describe_target, judge, utility_table, with_references
from scforget.audit.scene import Groups, Population, Scene
from scforget.errors import DataError, EmptyGroupError

F, SAME, OTHER, APART = 40, 120, 60, 20
SCORED = F + SAME + OTHER  # forget cells and controls; those set aside come after them
N = SCORED + APART
METRICS = {"elbo": -100.0, "kl": 12.0, "marker_r": 0.4}


def mask(start: int, stop: int) -> BoolArray:
    return (np.arange(N) >= start) & (np.arange(N) < stop)


GROUPS = Groups(
    mask(0, F), {"same_group": mask(F, F + SAME), "matched_knn": mask(F + 90, SCORED), "all_unseen": mask(F, SCORED)}
)  # fmt: skip
ASIDE = mask(SCORED, N)
LABELS, DONORS = np.where(np.arange(N) % 2, "T", "B"), np.full(N, "")
NAMES = np.array([f"cell_{cell}" for cell in range(N)])


def population(seed: int, models: int = 8, shift: float = 0.0, **utility: float) -> Population:
    """Cells differ (spread 2), models disagree a little on each (0.1); ``shift`` raises the forgotten ones."""
    rng = np.random.default_rng(seed)
    cells = -100 + 2 * np.random.default_rng(99).normal(size=N)
    elbo = cells + 0.1 * rng.normal(size=(models, N)) + shift * GROUPS.forget
    rows = [
        {
            place: {name: value + 0.001 * rng.normal() for name, value in {**METRICS, **utility}.items()}
            for place in ("outside", "inside")
        }
        for _ in range(models)
    ]
    scores = {"elbo": elbo, "kl": -rng.uniform(size=(models, N))}
    return Population(list(range(models)), scores, rows, rng.normal(size=(N, 3)), rng.normal(size=(models, 2, N)))


ORIGINALS, TARGET = population(1, shift=3.0), population(2, models=12)


def scene(originals: Population = ORIGINALS, target: Population = TARGET, groups: Groups = GROUPS) -> Scene:
    """Every other shadow model was trained on a cell, of those that were not set aside."""
    members = (np.arange(8)[:, None] % 2 == np.arange(N) % 2) & ~ASIDE
    shadows = population(7).scores["elbo"] + members
    references = References(target.scores["elbo"], shadows, members, ASIDE)
    return Scene(originals, target, groups, references, LABELS, NAMES, DONORS)


@lru_cache(maxsize=1)
def target_attacks() -> dict[str, Any]:
    return attacks(TARGET, TARGET, GROUPS, SETTINGS, 0)


def judged(own: Population, originals: Population = ORIGINALS, target: Population = TARGET) -> dict[str, Any]:
    """Judge by the attacks on ``TARGET``, whose scores every target here has."""
    return judge("method", own, scene(originals, target), target_attacks=target_attacks(), settings=SETTINGS, seed=0)


@pytest.mark.parametrize(
    ("shift", "verdict", "modes"),
    [
        (0.0, "FORGOTTEN", []),
        (3.0, "NOT_FORGOTTEN", ["ineffective"]),
        (0.5, "NOT_FORGOTTEN", []),
        (-1.0, "OVER_FORGOTTEN", ["streisand"]),
    ],
)
def test_judge_finds_the_planted_verdict(shift: float, verdict: str, modes: list[str]) -> None:
    record = judged(population(3, shift=shift))
    assert record["verdict"] == verdict
    assert record["failure_modes"] == modes
    assert not record["nothing_to_forget"]
    assert record["utility"]["verdict"] == "kept"
    wanted = {"FORGOTTEN": "Forgotten:", "NOT_FORGOTTEN": "Not forgotten:", "OVER_FORGOTTEN": "Over-forgotten:"}
    assert record["explanation"].startswith(wanted[verdict])


def test_judge_takes_the_side_of_the_original_for_not_forgotten() -> None:
    """Where originals score their members **lower**, so do models that have not forgotten."""
    below = population(1, shift=-3.0)
    assert judged(population(3, shift=-1.0), originals=below)["verdict"] == "NOT_FORGOTTEN"
    assert judged(population(3, shift=1.0), originals=below)["verdict"] == "OVER_FORGOTTEN"


def test_judge_of_the_originals_is_not_forgotten_and_no_failure() -> None:
    record = judged(ORIGINALS)
    assert record["verdict"] == "NOT_FORGOTTEN"
    assert record["failure_modes"] == []
    assert not record["nothing_to_forget"]


def test_judge_says_when_there_is_nothing_to_forget() -> None:
    record = judged(population(3), originals=population(1))
    assert record["nothing_to_forget"]
    assert record["explanation"].startswith("There is nothing to forget here")


def test_judge_leaves_two_noisy_models_undetermined() -> None:
    noisy = population(3, models=2)
    noisy.scores["elbo"][0, GROUPS.forget] += 5
    record = judged(noisy)
    assert record["verdict"] == "UNDETERMINED"
    assert "does not decide" in record["explanation"]


def test_judge_attacks_equal_sklearn_against_every_control() -> None:
    own = population(3, shift=0.7)
    record = judged(own)
    assert set(record["attacks"]) == {"elbo", "kl"}
    for name, by_control in record["attacks"].items():
        for control, found in by_control.items():
            used = GROUPS.forget | GROUPS.controls[control]

            def aucs(models: Population, name: str = name, used: BoolArray = used) -> FloatArray:
                return np.array([roc_auc_score(GROUPS.forget[used], row[used]) for row in models.scores[name]])

            mean = aucs(own).mean()
            np.testing.assert_allclose(found["per_seed"], aucs(own), rtol=1e-12)
            assert found["auc"] == pytest.approx(mean)
            assert found["signed"] == pytest.approx(mean - 0.5)
            assert found["advantage"] == pytest.approx(2 * abs(mean - 0.5))
            assert found["distance_to_retrain"] == pytest.approx(mean - aucs(TARGET).mean(), abs=1e-12)
            assert found["interval"][0] < mean < found["interval"][1]
            null = roc.advantage_null(F, int(GROUPS.controls[control].sum()), seed=0, draws=SETTINGS.null_draws)
            assert found["null"] == null
    assert record["groups"] == {"forget": F, "same_group": SAME, "matched_knn": 90, "all_unseen": SAME + OTHER}


def test_attacks_give_no_null_to_attackers_that_learned_the_labels() -> None:
    learned = {name: np.random.default_rng(4).normal(size=(12, N)) for name in LEARNED}
    own = replace(TARGET, scores={**TARGET.scores, **learned})
    found = attacks(own, own, GROUPS, SETTINGS, 0)
    assert set(found) == {"elbo", "kl", *LEARNED}
    for name, by_control in found.items():
        assert set(by_control) == set(GROUPS.controls)
        for control, row in by_control.items():
            null = roc.advantage_null(F, int(GROUPS.controls[control].sum()), seed=0, draws=SETTINGS.null_draws)
            assert row["null"] == (None if name in LEARNED else null)
            assert 0 < null["mean"] < null["q95"] < 1


def test_judge_rests_on_the_elbo_of_same_group_controls_and_the_trace() -> None:
    own = population(3, shift=0.2)
    record = judged(own)
    margins = {"membership": 0.02, "trace": 1.0}
    for name, margin in margins.items():
        found = record["primary"][name]
        if name == "membership":
            samples = [
                [roc.auc(row[GROUPS.forget], row[GROUPS.controls["same_group"]]) for row in models.scores["elbo"]]
                for models in (own, TARGET)
            ]
        else:
            base = TARGET.scores["elbo"][:, :F]
            traces = equivalence.trace(own.scores["elbo"][:, :F], base, shrinkage=0.5)
            samples = [traces.tolist(), equivalence.trace_leave_one_out(base, 0.5).tolist()]
            assert record["trace_per_seed"] == pytest.approx(samples[0])
        wanted = equivalence.welch_equivalence(*samples, margin=margin, level=0.9, original_side=1).to_dict()
        assert found.pop("interval") == pytest.approx(wanted.pop("interval"))
        side = wanted.pop("side")
        assert found.pop("side") == side
        assert found == pytest.approx(wanted)
    assert len(record["excess_abs_z"]) == 8


def test_judge_reads_tpr_off_each_model_where_the_controls_suffice() -> None:
    own = population(3, shift=3.0)
    found = judged(own)["fixed_fpr"]
    assert set(found) == {"0.01", "0.05"}
    assert {row["status"] for row in found["0.01"]} == {"undetermined"}
    for row, scores in zip(found["0.05"], own.scores["elbo"], strict=True):
        assert row["status"] == "measured"
        assert (scores[GROUPS.controls["same_group"]] >= row["threshold"]).mean() <= 0.05
        assert row["tpr"] == pytest.approx((scores[GROUPS.forget] >= row["threshold"]).mean())


@pytest.mark.parametrize(("shift", "inside"), [(0.0, True), (3.0, False)])
def test_judge_reports_the_published_criterion(shift: float, inside: bool) -> None:
    assert judged(population(3, shift=shift))["published_criterion"] is inside


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "kept"),
        ({"elbo": -106.0}, "lost"),
        ({"marker_r": 0.3}, "lost"),
        ({"elbo": -90.0, "marker_r": 0.9}, "kept"),
        ({"kl": 0.5}, "kept"),
    ],
)
def test_judge_finds_the_planted_utility(change: dict[str, Any], verdict: str) -> None:
    record = judged(population(3, **change))
    assert record["utility"]["verdict"] == verdict
    assert record["verdict"] == "FORGOTTEN"
    assert record["failure_modes"] == (["collapse"] if "kl" in change else [])
    assert record["utility_rows"] == population(3, **change).utility


def test_utility_table_gives_means_intervals_and_values_by_place() -> None:
    own = population(3)
    table = utility_table(own, 0.95)
    assert list(table) == ["outside", "inside"]
    for place, metrics in table.items():
        assert set(metrics) == set(METRICS)
        for metric, found in metrics.items():
            values = [row[place][metric] for row in own.utility]
            assert found["per_seed"] == values
            assert found["mean"] == pytest.approx(np.mean(values))
            assert found["interval"][0] < found["mean"] < found["interval"][1]


def without(own: Population, metric: str, missing: object, models: slice) -> Population:
    """Return the population with a metric missing outside the forgotten kind under some models."""
    rows: list[Any] = [{place: dict(values) for place, values in row.items()} for row in own.utility]
    for row in rows[models]:
        if missing == "absent":
            del row["outside"][metric]
        else:
            row["outside"][metric] = missing
    return replace(own, utility=rows)


@pytest.mark.parametrize("missing", ["absent", None, float("nan"), float("inf")])
@pytest.mark.parametrize("models", [slice(0, 1), slice(0, None)])
@pytest.mark.parametrize("where", ["method", "retrain"])
def test_judge_leaves_a_metric_with_missing_values_out_of_the_utility_verdict(
    missing: object, models: slice, where: str
) -> None:
    own, target = population(3, marker_r=0.1), TARGET
    if where == "method":
        own = without(own, "marker_r", missing, models)
    else:
        target = without(TARGET, "marker_r", missing, models)
    utility = judged(own, target=target)["utility"]
    assert utility["verdicts"] == {"elbo": "kept"}
    assert utility["verdict"] == "kept"
    if where == "method" and models == slice(0, 1):
        assert utility["outside"]["marker_r"]["per_seed"][0] is None
        assert utility["outside"]["marker_r"]["mean"] == pytest.approx(0.1, abs=0.01)


def test_judge_without_a_utility_that_all_models_have_is_undetermined() -> None:
    own = population(3)
    for metric in METRICS:
        own = without(own, metric, "absent", slice(0, None))
    record = judged(own)
    assert record["utility"]["verdict"] == "undetermined"
    assert record["verdict"] == "FORGOTTEN"
    assert record["failure_modes"] == []


def test_judge_claims_no_collapse_where_the_kl_of_a_retrain_is_missing() -> None:
    target = without(TARGET, "kl", "absent", slice(0, 1))
    assert judged(population(3, kl=0.1), target=target)["failure_modes"] == []


def test_describe_target_compares_retrains_with_retrains() -> None:
    record = describe_target(scene(), SETTINGS, 0)
    assert record["verdict"] == "TARGET"
    assert record["primary"] is None
    assert record["utility"]["verdict"] is None
    for by_control in record["attacks"].values():
        assert all(abs(found["distance_to_retrain"]) < 1e-12 for found in by_control.values())
    base = TARGET.scores["elbo"]
    aucs = np.array([roc.auc(row[GROUPS.forget], row[GROUPS.controls["same_group"]]) for row in base])
    traces = equivalence.trace_leave_one_out(base[:, :F], 0.5)
    for name, values in (("membership", aucs), ("trace", traces)):
        assert record["spread"][name] == pytest.approx(values.std(ddof=1))
        assert record["noise_floor"][name] == pytest.approx(equivalence.half_difference(values))
        power = equivalence.design_power(values, 8, margin=getattr(SETTINGS.margins, name), level=0.9)
        assert record["design_power"][name] == pytest.approx(power)
    assert record["trace_per_seed"] == pytest.approx(traces)


def test_records_have_the_same_keys_and_are_plain_json(tmp_path: Path) -> None:
    gap = without(population(3), "marker_r", "absent", slice(1, None))
    records = {"method": judged(gap), "retrain": describe_target(scene(), SETTINGS, 0)}
    against_target = {"excess_abs_z", "population", "exposure"}
    assert set(records["method"]) - set(records["retrain"]) == against_target
    of_retrains = {"noise_floor", "design_power", "spread"}
    assert set(records["retrain"]) - set(records["method"]) == of_retrains
    json.dumps(records)
    artifacts.write_json(tmp_path / "result.json", records)
    again = artifacts.read_json(tmp_path / "result.json")
    assert again["method"]["attacks"] == records["method"]["attacks"]
    assert again["method"]["primary"] == records["method"]["primary"]
    assert again["method"]["utility"]["outside"]["marker_r"]["interval"] == [None, None]


def test_judge_depends_on_its_seed_alone() -> None:
    assert json.dumps(judged(population(3))) == json.dumps(judged(population(3)))


def test_with_references_adds_the_scores_of_every_reference_attack_and_nothing_else() -> None:
    own = population(3)
    found = with_references(own, scene().references, SETTINGS, own=False)
    added = {"likelihood_ratio", "lira_online", "lira_offline", "rmia_online", "rmia_offline"}
    assert set(found.scores) == {"elbo", "kl"} | added
    assert set(own.scores) == {"elbo", "kl"}
    assert all(scores.shape == (8, N) for scores in found.scores.values())
    assert (found.seeds, found.utility) == (own.seeds, own.utility)
    wanted = own.scores["elbo"] - TARGET.scores["elbo"].mean(axis=0)
    np.testing.assert_allclose(found.scores["likelihood_ratio"], wanted, atol=1e-9)


def test_with_references_leaves_each_retrain_out_of_its_own_comparison() -> None:
    elbo = TARGET.scores["elbo"]
    found = with_references(TARGET, scene().references, SETTINGS, own=True).scores["likelihood_ratio"]
    for model, row in enumerate(found):
        np.testing.assert_allclose(row, elbo[model] - np.delete(elbo, model, axis=0).mean(axis=0), atol=1e-9)
    with pytest.raises(DataError, match="audited models that are the retrained ones"):
        with_references(ORIGINALS, scene().references, SETTINGS, own=True)


def changed(own: Population, name: str, cells: BoolArray, value: float) -> Population:
    """Return the population with one value in place of a score at some cells."""
    return replace(own, scores={**own.scores, name: np.where(cells, value, own.scores[name])})


@pytest.mark.parametrize("name", ["elbo", "kl"])
@pytest.mark.parametrize("cells", [mask(0, 1), mask(F, F + 1), mask(0, N)])
def test_judge_refuses_scores_that_are_nan(name: str, cells: BoolArray) -> None:
    with pytest.raises(DataError, match="that are NaN; wanted a score for every cell"):
        judged(changed(population(3), name, cells, np.nan))


def test_judge_takes_a_constant_score_for_what_it_is_and_refuses_constant_scores_alone() -> None:
    everywhere = mask(0, N)
    record = judged(changed(population(3), "kl", everywhere, 1.0))
    assert record["attacks"]["kl"]["same_group"]["auc"] == 0.5
    assert record["worst_attack"]["constant"] == ["kl"]
    none = changed(changed(population(3), "kl", everywhere, 1.0), "elbo", everywhere, -100.0)
    with pytest.raises(DataError, match="scores of all attacks: found the same for all cells"):
        judged(none)


def first(own: Population, models: int) -> Population:
    """Return a population of the first models only."""
    scores = {name: values[:models] for name, values in own.scores.items()}
    return replace(
        own, seeds=own.seeds[:models], scores=scores, utility=own.utility[:models], attackers=own.attackers[:models]
    )


def test_judge_and_describe_target_refuse_a_single_retrain() -> None:
    single = first(TARGET, 1)
    with pytest.raises(EmptyGroupError, match="retrained models"):
        judged(population(3), target=single)
    with pytest.raises(EmptyGroupError, match="at least 2"):
        describe_target(scene(target=single), SETTINGS, 0)


def test_judge_by_two_retrains_finds_no_spread_and_so_no_model_forgotten(tmp_path: Path) -> None:
    pair = first(TARGET, 2)
    record, target = judged(population(3), target=pair), describe_target(scene(target=pair), SETTINGS, 0)
    assert record["verdict"] == "UNDETERMINED"
    assert "at least 2 unlearned and 3 retrained models" in record["explanation"].lower()
    assert "trace" not in target["spread"] | target["design_power"]
    artifacts.write_json(tmp_path / "result.json", {"original": record, "retrain": target})


@pytest.mark.parametrize("empty", ["forget", "same_group", "matched_knn", "all_unseen"])
def test_judge_refuses_an_empty_group(empty: str) -> None:
    controls = {name: cells & (name != empty) for name, cells in GROUPS.controls.items()}
    groups = Groups(GROUPS.forget & (empty != "forget"), controls)
    with pytest.raises(EmptyGroupError):
        judge("m", population(3), scene(groups=groups), target_attacks=target_attacks(), settings=SETTINGS, seed=0)


@pytest.mark.parametrize("name", ["same_group", "matched_knn", "all_unseen"])
def test_groups_refuse_a_forget_cell_among_any_controls(name: str) -> None:
    with pytest.raises(DataError, match=f"{name} controls: found 1 forget cells among them"):
        Groups(GROUPS.forget, {**GROUPS.controls, name: mask(F - 1, F + SAME)})

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import scipy

from judged import CELLS, audit_settings, draw, small_case, unseen_cells
from scforget.arrays import IntArray
from scforget.audit import AuditSettings, equivalence, roc
from scforget.data.splits import ForgetSets, Scenario
from scforget.errors import EmptyGroupError
from scforget.tasks import VaeTask
from scforget.theory.judging import Case, Judge, contrast, make_case


@pytest.fixture(scope="module")
def audit() -> AuditSettings:
    return audit_settings()


@pytest.fixture(scope="module")
def unseen(forget_sets: ForgetSets) -> IntArray:
    return unseen_cells(forget_sets)


@pytest.fixture(scope="module")
def case(task: VaeTask, forget_sets: ForgetSets) -> Case:
    return small_case(task, forget_sets)


def test_contrast_is_welch_of_two_populations() -> None:
    one, two = np.random.default_rng(0).normal(size=5), np.random.default_rng(1).normal(1, 3, size=7)
    estimate, interval = contrast([(1, one), (-1, two)], 0.9)
    wanted = scipy.stats.ttest_ind(one, two, equal_var=False).confidence_interval(0.9)
    assert estimate == pytest.approx(one.mean() - two.mean())
    assert interval == pytest.approx([wanted.low, wanted.high])


def test_contrast_of_one_population_is_students() -> None:
    values = np.random.default_rng(0).normal(size=4)
    wanted = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert contrast([(1, values)], 0.95)[1] == pytest.approx([wanted.low, wanted.high])


def test_contrast_has_no_interval_for_a_single_model() -> None:
    assert contrast([(1, np.array([3.0])), (-1, np.array([1.0, 2.0]))], 0.9) == (1.5, [None, None])


def test_contrast_covers_a_sum_of_three_populations_and_cells() -> None:
    noise, hits = np.random.default_rng(3), 0
    for _ in range(1000):
        parts = [noise.normal(mean, sd, n) for mean, sd, n in ((1, 1, 3), (2, 3, 4), (0, 0.5, 4))]
        cells = noise.normal(0, 4, 20)
        parts[0] = parts[0] + cells.mean()  # what these cells happen to be is common to all models
        low, high = contrast([(1, parts[0]), (-1, parts[1]), (1, parts[2])], 0.9, [cells])[1]
        hits += low <= -1 <= high
    assert 860 <= hits <= 960


def test_make_case_puts_forgotten_cells_first_and_marks_groups(case: Case, unseen: IntArray) -> None:
    forget = case.sets.forget
    assert case.cells.tolist() == [*forget, *unseen]
    assert case.cells[case.groups.forget].tolist() == forget.tolist()
    assert case.cells[case.groups.controls["same_group"]].tolist() == unseen[:25].tolist()
    assert case.cells[case.kept].tolist() == unseen[25:].tolist()


def test_make_case_matches_the_nearest_unseen_cells(case: Case, task: VaeTask, unseen: IntArray) -> None:
    model = task.new_model(0)
    own, others = task.signals(model, case.sets.forget).mu, task.signals(model, unseen).mu
    wanted: set[int] = set()
    for mu in own:
        wanted |= set(unseen[np.argsort(((others - mu) ** 2).sum(1))[:3]].tolist())
    assert set(case.cells[case.groups.controls["matched_knn"]].tolist()) == wanted


def test_make_case_keeps_every_unseen_cell_of_a_scattered_request(
    task: VaeTask, forget_sets: ForgetSets, unseen: IntArray
) -> None:
    scenario = Scenario(forget_sets, np.ones(CELLS, dtype=bool), unseen)
    assert make_case(task, scenario, unseen, task.new_model(0), 3).kept.sum() == len(unseen)


def test_case_survives_pickling_and_scores_the_same(case: Case, task: VaeTask) -> None:
    model = task.new_model(3)
    other: Case = pickle.loads(pickle.dumps(case))
    np.testing.assert_array_equal(other.score(model).features, case.score(model).features)


def test_score_is_the_elbo_at_the_mean(case: Case, task: VaeTask) -> None:
    model = task.new_model(3)
    signals, scored = task.signals(model, case.cells), case.score(model, 7)
    np.testing.assert_array_equal(scored.elbo, signals.reconstruction - signals.kl)
    np.testing.assert_array_equal(scored.kl, signals.kl)
    assert scored.passes == 7
    np.testing.assert_array_equal(scored.short().elbo, scored.elbo)


def test_judge_refuses_too_few_retrains(case: Case, audit: AuditSettings) -> None:
    with pytest.raises(EmptyGroupError, match="at least 4"):
        Judge(case, draw(case, 3, 1), audit, 0)


def test_judge_reports_what_its_parts_say(case: Case, audit: AuditSettings) -> None:
    retrains, models = draw(case, 5, 1), draw(case, 3, 2, shift=15.0)
    found = Judge(case, retrains, audit, 0).judge(models, models)
    forget, controls = case.groups.forget, case.groups.controls["same_group"]
    aucs, base = (np.array([roc.auc(m.elbo[forget], m.elbo[controls]) for m in group]) for group in (models, retrains))
    assert found["membership"]["per_model"] == pytest.approx(aucs)
    assert found["membership"]["advantage"] == pytest.approx(2 * abs(aucs.mean() - 0.5))
    wanted = scipy.stats.ttest_ind(aucs, base, equal_var=False).confidence_interval(audit.level)
    assert found["membership"]["difference_interval"] == pytest.approx([wanted.low, wanted.high])
    own = equivalence.trace(
        [m.elbo[forget] for m in models], [m.elbo[forget] for m in retrains], shrinkage=audit.trace_shrinkage
    )
    assert found["trace"]["per_model"] == pytest.approx(own)
    assert found["elbo"]["mean"] == pytest.approx(np.mean([m.elbo[case.kept].mean() for m in models]))
    assert found["kl"]["retrain_mean"] == pytest.approx(np.mean([m.kl[case.kept].mean() for m in retrains]))
    assert found["passes"] == 100
    low, high = found["membership"]["interval"]
    assert low < aucs.mean() < high


def test_judge_tells_memory_from_over_forgetting_and_from_retraining(case: Case, audit: AuditSettings) -> None:
    judge = Judge(case, draw(case, 8, 1), audit, 0)
    originals = draw(case, 6, 2, shift=15.0)
    verdicts = [judge.judge(draw(case, 6, 3, shift), originals)["verdict"] for shift in (15.0, -15.0)]
    assert verdicts == ["NOT_FORGOTTEN", "OVER_FORGOTTEN"]
    assert judge.judge(draw(case, 40, 3), originals)["verdict"] in ("FORGOTTEN", "UNDETERMINED")
    assert abs(judge.judge(draw(case, 40, 3), originals)["trace"]["difference"]) < 1


def test_judge_of_one_model_has_cells_interval_and_no_verdict(case: Case, audit: AuditSettings) -> None:
    originals = draw(case, 3, 2, shift=15.0)
    found = Judge(case, draw(case, 4, 1), audit, 0).judge(originals[:1], originals)
    low, high = found["membership"]["interval"]
    assert low < found["membership"]["mean"] < high
    assert found["trace"]["interval"] == found["trace"]["difference_interval"] == [None, None]
    assert found["verdict"] == "UNDETERMINED"


def test_judge_advantage_interval_reaches_zero_over_one_half(case: Case, audit: AuditSettings) -> None:
    judge, even = Judge(case, draw(case, 4, 1), audit, 0), draw(case, 3, 2)
    for one in even:  # forgotten cells and controls interleaved: no direction at all
        order = np.flatnonzero(case.groups.forget | case.groups.controls["same_group"])
        one.features[order, 2] = np.random.default_rng(1).permutation(len(order))
    found = judge.judge(even, even)["membership"]
    assert found["interval"][0] <= 0.5 <= found["interval"][1]
    assert found["advantage_interval"][0] == 0
    assert found["advantage_interval"][1] == pytest.approx(2 * max(abs(end - 0.5) for end in found["interval"]))


def test_judge_is_json_and_the_same_again(case: Case, audit: AuditSettings) -> None:
    judge, models = Judge(case, draw(case, 4, 1), audit, 0), draw(case, 2, 2)
    first, second = judge.judge(models, models), copy.deepcopy(judge).judge(models, models)
    assert json.dumps(first, allow_nan=False) == json.dumps(second, allow_nan=False)


def test_compare_aucs_reads_each_kind_of_control(case: Case, audit: AuditSettings) -> None:
    judge = Judge(case, draw(case, 4, 1), audit, 0)
    scores = np.zeros((2, len(case.cells)))
    scores[:, case.groups.forget] = 1.0
    scores[:, case.groups.controls["matched_knn"]] = 2.0
    only: Callable[[str], float] = lambda control: judge.compare_aucs(scores, scores, control)["mean"]  # noqa: E731
    assert only("matched_knn") == 0
    both = case.groups.controls["same_group"]
    assert only("same_group") == pytest.approx((both & ~case.groups.controls["matched_knn"]).sum() / both.sum())

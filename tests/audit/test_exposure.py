from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scforget.arrays import BoolArray, FloatArray
from scforget.audit import equivalence, exposure, intervals, roc
from scforget.errors import DataError, EmptyGroupError

SEEDS = st.integers(0, 2**32 - 1)


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.sampled_from([0.0, 0.5, 1.0]))
def test_exposure_equals_loop(seed: int, shrinkage: float) -> None:
    rng = np.random.default_rng(seed)
    scores, retrains = rng.normal(size=(3, 12)), rng.normal(-1, 2, (5, 12))
    typical = np.median([np.std(retrains[:, x], ddof=1) for x in range(12)]) ** 2
    found = exposure.exposure(scores, retrains, shrinkage=shrinkage, level=0.9)
    for x in range(12):
        spread = np.sqrt((1 - shrinkage) * np.var(retrains[:, x], ddof=1) + shrinkage * typical)
        z = [(scores[m, x] - retrains[:, x].mean()) / spread for m in range(3)]
        assert found.mean[x] == pytest.approx(np.mean(z))
        assert tuple(found.interval[x]) == pytest.approx(intervals.mean_interval(z, 0.9))
        assert found.rank[x] == 1 + sum(other > found.mean[x] for other in found.mean)
    assert found.worst.tolist() == sorted(range(12), key=lambda x: -found.mean[x])[:2]
    assert found.above_null == np.mean([value > found.null_band[1] for value in found.mean])


def test_exposure_averages_to_the_trace() -> None:
    rng = np.random.default_rng(0)
    scores, retrains = rng.normal(size=(4, 30)), rng.normal(size=(6, 30))
    found = exposure.exposure(scores, retrains, shrinkage=0.5, level=0.9)
    assert found.mean.mean() == pytest.approx(equivalence.trace(scores, retrains, shrinkage=0.5).mean())


def test_exposure_null_band_is_the_leave_one_out_range() -> None:
    rng = np.random.default_rng(0)
    retrains = rng.normal(size=(6, 30))
    z = []
    for k in range(6):
        others = np.delete(retrains, k, axis=0)
        spread = np.sqrt(0.5 * others.var(axis=0, ddof=1) + 0.5 * np.median(others.std(axis=0, ddof=1)) ** 2)
        z.extend((retrains[k] - others.mean(axis=0)) / spread)
    found = exposure.exposure(retrains[:2], retrains, shrinkage=0.5, level=0.9)
    assert found.null_band == pytest.approx((np.quantile(z, 0.05), np.quantile(z, 0.95)))


def test_exposure_null_band_holds_a_new_retrain_and_its_intervals_hold_the_truth() -> None:
    rng, inside, covered, cells = np.random.default_rng(0), 0, 0, 0
    for _ in range(60):
        ease = 20 * rng.normal(size=50)
        retrains, one = ease + rng.normal(size=(8, 50)), ease + rng.normal(size=(1, 50))
        band = exposure.exposure(one, retrains, shrinkage=0.5, level=0.95)
        inside += int(((band.mean > band.null_band[0]) & (band.mean < band.null_band[1])).sum())
        many = exposure.exposure(ease + 1 + rng.normal(size=(5, 50)), retrains, shrinkage=0.5, level=0.95)
        # Given the retrained models, what the models' own mean would be with infinitely many of them.
        truth = equivalence._standardised((ease + 1)[None], retrains, 0.5)[0]
        covered += int(((many.interval[:, 0] < truth) & (truth < many.interval[:, 1])).sum())
        cells += 50
    # The leave-one-out band is measured against 7 models instead of 8, so it is slightly wide.
    assert 0.94 < inside / cells < 0.97
    assert covered / cells == pytest.approx(0.95, abs=3 * np.sqrt(0.95 * 0.05 / cells))


def test_exposure_finds_the_planted_cells() -> None:
    rng = np.random.default_rng(0)
    scores, retrains = rng.normal(size=(5, 40)), rng.normal(size=(10, 40))
    scores[:, [3, 17, 20, 39]] += 6
    scores[:, 5] -= 6
    found = exposure.exposure(scores, retrains, shrinkage=0.5, level=0.95)
    assert set(found.worst.tolist()) == {3, 17, 20, 39}
    assert found.rank[5] == 40
    assert found.above_null >= 0.1


def test_exposure_of_one_model_has_no_interval_and_goes_into_json() -> None:
    rng = np.random.default_rng(0)
    found = exposure.exposure(rng.normal(size=5), rng.normal(size=(4, 5)), shrinkage=0.5, level=0.95)
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["interval"] == [[None, None]] * 5
    assert record["worst"] == [int(np.argmax(found.mean))]
    assert set(record) == set(exposure.Exposure.__dataclass_fields__)


def test_exposure_of_equal_cells_shares_the_rank() -> None:
    retrains = np.tile(np.random.default_rng(0).normal(size=(4, 1)), (1, 3))
    found = exposure.exposure(np.ones((2, 3)), retrains, shrinkage=0.5, level=0.95)
    assert found.rank.tolist() == [1, 1, 1]
    assert found.worst.tolist() == [0]


def test_exposure_refuses_impossible_input() -> None:
    scores = np.random.default_rng(0).normal(size=(4, 5))
    with pytest.raises(EmptyGroupError, match="at least 3"):
        exposure.exposure(scores, scores[:2], shrinkage=0.5, level=0.9)
    with pytest.raises(DataError, match="same forget cells"):
        exposure.exposure(scores[:, :3], scores, shrinkage=0.5, level=0.9)
    with pytest.raises(DataError, match="retrained models that differ"):
        exposure.exposure(scores, np.ones((4, 5)), shrinkage=0.5, level=0.9)
    with pytest.raises(DataError, match="level"):
        exposure.exposure(scores, scores, shrinkage=0.5, level=95)


def test_by_group_equals_counting() -> None:
    values = np.arange(20.0)
    groups = np.array(["B", "NK"])[(np.arange(20) >= 15).astype(int)]
    assert exposure.by_group(values, groups) == [
        {"name": "NK", "cells": 5, "mean": 17.0, "worst_share": 0.4},
        {"name": "B", "cells": 15, "mean": 7.0, "worst_share": 0.0},
    ]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.floats(-5, 5), st.sampled_from(["a", "b", "c"])), min_size=1, max_size=40))
def test_by_group_shares_out_all_cells(pairs: list[tuple[float, str]]) -> None:
    values, groups = zip(*pairs, strict=True)
    rows = exposure.by_group(values, groups)
    assert sum(row["cells"] for row in rows) == len(pairs)
    assert sum(row["cells"] * row["mean"] for row in rows) == pytest.approx(sum(values), abs=1e-9)
    assert sum(row["cells"] * row["worst_share"] for row in rows) == pytest.approx(int(np.ceil(len(pairs) / 10)))
    assert [row["mean"] for row in rows] == sorted((row["mean"] for row in rows), reverse=True)


def test_by_group_reads_labels_as_text_and_breaks_ties_by_name() -> None:
    rows = exposure.by_group([1.0, 1.0, 1.0], [2, 10, 2])
    assert [(row["name"], row["cells"]) for row in rows] == [("10", 1), ("2", 2)]


def test_by_group_refuses_impossible_input() -> None:
    with pytest.raises(DataError, match="one label for each cell"):
        exposure.by_group([1.0, 2.0], ["a"])
    with pytest.raises(DataError, match="finite"):
        exposure.by_group([1.0, np.inf], ["a", "b"])
    with pytest.raises(EmptyGroupError):
        exposure.by_group([], [])


def donors_and_masks() -> tuple[list[str], BoolArray, BoolArray]:
    """Donors a, b, c to be forgotten (c has a control cell too), d and e with controls only, f in neither group."""
    donors = [*"aaabbccdddeeff"]
    forget = np.isin(donors, ["a", "b", "c"])
    forget[6] = False
    return donors, forget, np.isin(np.arange(14), [6, 7, 8, 9, 10, 11])


def donor_auc(scores: FloatArray, *, seed: int = 0) -> dict[str, object]:
    donors, forget, controls = donors_and_masks()
    return exposure.donor_auc(scores, donors, forget, controls, level=0.95, seed=seed, draws=200)


def test_donor_auc_ranks_the_donors_means() -> None:
    scores = np.random.default_rng(0).normal(size=(3, 14))
    expected = []
    for row in scores:
        inside = [row[0:3].mean(), row[3:5].mean(), row[5]]
        expected.append(roc.auc(inside, [row[7:10].mean(), row[10:12].mean()]))
    found = donor_auc(scores)
    assert found["per_model"] == expected
    assert found["auc"] == pytest.approx(np.mean(expected))
    assert (found["member_donors"], found["control_donors"]) == (["a", "b", "c"], ["d", "e"])
    low, high = found["interval"]  # type: ignore[misc]
    assert 0 <= low < np.mean(expected) < high <= 1
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert donor_auc(scores) == found


def test_donor_auc_sees_what_single_cells_hide() -> None:
    """Cells overlap, their donors' means do not."""
    rng = np.random.default_rng(0)
    donors = np.repeat(np.arange(12), 100)
    forget = donors < 6
    scores = rng.normal(size=(2, 1200)) + 0.6 * forget
    found = exposure.donor_auc(scores, donors, forget, ~forget, level=0.95, seed=0, draws=200)
    assert found["auc"] == 1
    assert roc.auc(scores[0, forget], scores[0, ~forget]) < 0.7


def test_donor_auc_of_donors_without_a_leak_covers_one_half() -> None:
    rng, runs, covered = np.random.default_rng(0), 200, 0
    donors = np.repeat(np.arange(16), 5)
    for run in range(runs):
        forget = np.isin(donors, rng.permutation(16)[:8])
        scores = np.repeat(rng.normal(size=16), 5) + rng.normal(size=(3, 80))
        low, high = exposure.donor_auc(scores, donors, forget, ~forget, level=0.9, seed=run, draws=100)["interval"]
        covered += low <= 0.5 <= high
    assert covered / runs > 0.9 - 3 * np.sqrt(0.09 / runs)


def test_donor_auc_says_why_there_is_none_with_a_single_donor() -> None:
    donors, forget, controls = donors_and_masks()
    controls[[10, 11]] = False
    found = exposure.donor_auc(np.arange(14.0), donors, forget, controls, level=0.95, seed=0, draws=10)
    assert found["auc"] is None
    assert found["interval"] is None
    assert found["reason"].startswith("3 donors have forget cells and 1 have control cells only")


def test_donor_auc_refuses_impossible_input() -> None:
    donors, forget, controls = donors_and_masks()
    scores = np.ones((2, 14))
    with pytest.raises(DataError, match="one donor for each cell"):
        exposure.donor_auc(scores, donors[:-1], forget, controls, level=0.95, seed=0, draws=10)
    with pytest.raises(DataError, match="cells in both"):
        exposure.donor_auc(scores, donors, forget, forget, level=0.95, seed=0, draws=10)
    scores[0, 0] = np.inf
    with pytest.raises(DataError, match="finite"):
        exposure.donor_auc(scores, donors, forget, controls, level=0.95, seed=0, draws=10)

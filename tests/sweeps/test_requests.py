"""What a search sees: half of the unseen cells, a request apart from the final one, and models scored as audits do."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scforget import artifacts, context, loading, schema
from scforget.artifacts import Workspace
from scforget.audit import assess, verdict
from scforget.audit.scene import Groups, Population
from scforget.errors import DataError, EmptyGroupError
from scforget.sweeps import requests
from scforget.sweeps.requests import FOLDS, Arena, Request, Scored, deal_folds, disjoint, evaluate
from spoiling import put


@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_deal_folds_halves_every_kind(counts: list[int], seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    cells = np.random.default_rng(seed).permutation(500)[: len(labels)].astype(np.int64)
    folds = deal_folds(cells, labels, seed)
    assert tuple(folds) == FOLDS
    first, second = folds.values()
    assert sorted([*first, *second]) == sorted(cells)
    assert all((np.diff(fold) > 0).all() for fold in (first, second))
    for kind, count in enumerate(counts):
        members = set(cells[labels == kind])
        assert {len(members & set(first)), len(members & set(second))} <= {count // 2, count - count // 2}


def test_deal_folds_is_random_and_the_seed_s_own():
    cells, labels = np.arange(200), np.repeat([0, 1], 100)
    first, again, other = (deal_folds(cells, labels, seed)["development"] for seed in (1, 1, 2))
    assert (first == again).all()
    assert 30 < len(set(first) & set(other)) < 70


@pytest.fixture
def arena(project: Workspace) -> Arena:
    return Arena(context.open_sweep("ssd", None, "part"), "ssd")


@pytest.fixture
def final(arena: Arena) -> Request:
    return Request(arena, "part", "final")


def test_arena_deals_the_unseen_cells_and_nothing_else(arena, project):
    sets = loading.load_sets(project, "tiny")
    both = np.concatenate(list(arena.folds.values()))
    assert sorted(both) == sorted(sets.unseen)
    labels = loading.load_cells(project, "tiny")[0].obs["label"].astype(str).to_numpy()
    for name in np.unique(labels):
        sizes = [int((labels[fold] == name).sum()) for fold in arena.folds.values()]
        assert abs(sizes[0] - sizes[1]) <= 1
    assert arena.originals == [0, 1, 2, 3, 4, 5]


def test_requests_share_no_cell_that_they_are_judged_by(arena, final):
    development = Request(arena, "part_dev", "development")
    disjoint(development, final)
    assert len(development.sets.forget) == len(final.sets.forget) > 0
    assert not np.intersect1d(development.sets.forget, final.sets.forget).size
    assert not np.intersect1d(development._controls, final._controls).size
    assert not np.intersect1d(development._kept, final._kept).size
    assert len(development.retrains) == 4  # made here, sweep.retrains
    assert len(final.retrains) == 5  # the pipeline's own, retrain.seeds


def test_disjoint_refuses_requests_that_share_forgotten_cells(arena, final):
    same = Request(arena, "part", "development")
    count = len(final.sets.forget)
    with pytest.raises(DataError) as caught:
        disjoint(same, final)
    said = f"part and part: found {count} forgotten cells in both; wanted none: describe the first as "
    assert str(caught.value) == said + "{kind: sibling, of: part}"


def test_request_keeps_its_retrained_models_for_the_next_time(arena, project, monkeypatch):
    first = Request(arena, "part_dev", "development").retrains

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("scforget.families.fit", fail)
    again = Request(arena, "part_dev", "development").retrains
    assert [one.elbo for one in first] == [one.elbo for one in again]
    assert all(one.passes > 0 for one in first)


def test_request_needs_controls_in_its_half(arena, final, project):
    """There are enough of them in both halves together."""
    there, wanted = len(final._controls), len(final._controls) + 1
    assert len(loading.load_scenario(project, "tiny", "part").controls) >= wanted
    put("audit", "min_controls", value=wanted)(project.root)
    with pytest.raises(EmptyGroupError) as caught:
        Request(Arena(context.open_sweep("ssd", None, "part"), "ssd"), "part", "final")
    what = f"part: controls in the final half of the unseen cells: found {there}"
    assert str(caught.value) == f"{what}; wanted at least {wanted} (audit.min_controls)"


def test_request_needs_four_retrained_models(project):
    path = project.results("retrain", "tiny", "part") / "result.json"
    made = artifacts.read_json(path)
    artifacts.write_json(path, {**made, "seeds": {seed: made["seeds"][seed] for seed in "012"}})
    with pytest.raises(EmptyGroupError, match="at least 4"):
        Request(Arena(context.open_sweep("ssd", None, "part"), "ssd"), "part", "final")


def test_score_is_what_one_finds_by_hand(arena, final, project):
    task, (cells, genes, markers) = arena.task, loading.load_cells(project, "tiny")
    model = loading.load_model(task, arena.original(2))
    found = final.score(model, 77)
    scenario, fold = loading.load_scenario(project, "tiny", "part"), arena.folds["final"]

    elbo = {cell: float(task.signals(model, np.array([cell])).elbo[0]) for cell in [*scenario.sets.forget, *fold]}
    assert found.forgotten == pytest.approx([elbo[cell] for cell in scenario.sets.forget], rel=1e-5)
    controls = [cell for cell in scenario.controls if cell in fold]
    pairs = [np.sign(elbo[a] - elbo[b]) for a in scenario.sets.forget for b in controls]
    assert found.auc == pytest.approx((np.mean(pairs) + 1) / 2, abs=1e-3)
    outside = [cell for cell in fold if cells.obs["label"].astype(str).iloc[cell] != "0"]
    assert len(outside) > 20
    assert found.elbo == pytest.approx(np.mean([elbo[cell] for cell in outside]), rel=1e-5)
    places = [genes.index(marker) for marker in markers]
    own = task.batch(np.array(outside)).inputs.double().numpy()[:, places]
    decoded = task.decoded_means(model, np.array(outside), np.array(places))
    by_gene = [np.corrcoef(own[:, k], decoded[:, k])[0, 1] for k in range(len(places))]
    assert found.marker_r == pytest.approx(np.mean(by_gene), abs=1e-5)
    assert found.passes == 77


def test_originals_cost_nothing_and_retrains_as_much_as_themselves(final):
    assert final.cost(final.originals([0, 1])) == 0.0
    assert final.cost(final.retrains) == 1.0
    assert final.losses(final.retrains) == {"elbo": 0.0, "marker_r": 0.0}


# numbers without models


def fabricated(seed: int, models: int, shift: float = 0.0, elbo: float = -300.0, passes: int = 100) -> list[Scored]:
    rng = np.random.default_rng(seed)
    typical = np.random.default_rng(9).normal(-300, 40, 25)
    return [
        Scored(
            typical + rng.normal(shift, 2.0, 25), 0.5 + 0.01 * shift + rng.normal(0, 0.004), elbo + rng.normal(0, 1),
            0.8 + rng.normal(0, 0.003), passes,
        )
        for _ in range(models)
    ]  # fmt: skip


@pytest.fixture
def made_up(trained: Any) -> Callable[[list[Scored]], Request]:
    """A request of retrained models whose numbers are given."""
    params = schema.load(trained / "params.yaml")

    def make(retrains: list[Scored]) -> Request:
        request = object.__new__(Request)
        request._arena = SimpleNamespace(context=SimpleNamespace(params=params))  # type: ignore[assignment]
        request.retrains = retrains
        return request

    return make


def test_evaluate_describes_a_population(made_up):
    retrains, models = fabricated(0, 6, passes=200), fabricated(1, 3, shift=3.0, elbo=-307.0, passes=50)
    request = made_up(retrains)
    found = evaluate(request, models)
    distance = request.distance(models)
    assert found["distance"] == np.mean(found["per_model"]) == distance.total.mean()
    assert found["standard_error"] == pytest.approx(np.std(found["per_model"], ddof=1) / np.sqrt(3))
    assert (found["scores"], found["membership"]) == (distance.scores.mean(), distance.membership.mean())
    assert (found["cost"], found["models"]) == (0.25, 3)
    lost = np.mean([one.elbo for one in retrains]) - np.mean([one.elbo for one in models])
    assert found["elbo_loss"] == pytest.approx(lost / 5.0)  # margins of params.yaml
    lost = np.mean([one.marker_r for one in retrains]) - np.mean([one.marker_r for one in models])
    assert found["marker_r_loss"] == pytest.approx(lost / 0.02)
    assert np.isnan(evaluate(request, models[:1])["standard_error"])


def test_floor_is_nearer_than_models_that_remember(made_up):
    request = made_up(fabricated(0, 6))
    assert request.floor().total.mean() < request.distance(fabricated(1, 6, shift=3.0)).total.mean() / 2


VERDICTS = {
    "NOT_FORGOTTEN": (9.0, -300.0), "OVER_FORGOTTEN": (-9.0, -300.0), "FORGOTTEN": (0.0, -300.0), "lost": (0.0, -320.0),
}  # fmt: skip


@pytest.mark.parametrize("name", VERDICTS)
@pytest.mark.parametrize("side", [9.0, -9.0])
def test_verdict_is_the_audit_s_on_the_same_numbers(made_up, name, side):
    """By the audit's own code, from scores of cells; the originals say which side is memory."""
    shift, elbo = VERDICTS[name]
    retrains, originals, models = fabricated(0, 12), fabricated(2, 8, shift=side), fabricated(1, 8, shift, elbo)
    request = made_up(retrains)
    found = request.verdict(models, originals)
    params = request._arena.context.params.audit
    groups = Groups(np.arange(50) < 25, {"same_group": np.arange(50) >= 25})

    def audited(rows: list[Scored]) -> Population:
        """Controls score so that the AUC is the one of the row, to 1/625."""
        scores = np.stack([np.concatenate([row.forgotten, controls_of(row)]) for row in rows])
        utility = [{"outside": {"elbo": row.elbo, "marker_r": row.marker_r}} for row in rows]
        return Population(range(len(rows)), {"elbo": scores}, utility, np.zeros((50, 1)), np.zeros((0, 0, 0)))

    def rescored(rows: list[Scored]) -> list[Scored]:
        aucs = groups.aucs(audited(rows).scores["elbo"], "same_group")
        return [row._replace(auc=float(auc)) for row, auc in zip(rows, aucs, strict=True)]

    retrains, originals, models = map(rescored, (retrains, originals, models))
    request.retrains = retrains
    found = request.verdict(models, originals)
    target, start, own = map(audited, (retrains, originals, models))
    before = assess._statistics(start, target, groups, params)
    sides = {key: 1 if one.mean() >= base.mean() else -1 for key, (one, base) in before.items()}
    tested = assess._equivalences(assess._statistics(own, target, groups, params), sides, params)
    assert found["verdict"] == str(verdict.decide(tested["membership"], tested["trace"]))
    assert found["utility"] == assess._utility(own, target, params)["verdict"]
    if name == "lost":
        assert found["utility"] == "lost"
    elif side > 0:
        assert found == {"verdict": name, "utility": "kept"}


def controls_of(row: Scored) -> np.ndarray[Any, Any]:
    above = int(np.clip(round((1 - row.auc) * 25), 0, 25))
    return np.concatenate([np.full(above, 1e3), np.full(25 - above, -1e3)]) + np.arange(25) * 1e-3


def test_verdict_of_the_retrained_models_themselves_is_forgotten(made_up):
    request = made_up(fabricated(0, 12))
    found = request.verdict(request.retrains, fabricated(2, 8, shift=9.0))
    assert found == {"verdict": "FORGOTTEN", "utility": "kept"}
    assert requests._columns(request.retrains)[0].shape == (12, 25)

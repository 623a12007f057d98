"""The bounds of Corollary 2 against brute force over vertices, fine grids and classifiers written out."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from scforget.arrays import FloatArray
from scforget.errors import DataError
from scforget.theory.corollary import BoundSettings, bounds, cosine, even_residuals, one_sided, placed, simulate_bounds

VALUES: dict[str, Any] = {
    "outputs": [9, 60], "differing": [1, 4, 7, 60], "largest": [1.0, 3.5], "classes": [3, 14], "profiles": 300,
    "starts": 5,
}  # fmt: skip


def both(D: int, u: FloatArray, v: FloatArray) -> float:
    ones = np.ones(D - len(u))
    return cosine(np.r_[ones, u], np.r_[ones, v])


@pytest.mark.parametrize(("D", "M", "V"), [(3, 1, 1.0), (5, 2, 4.0), (9, 3, 2.5), (7, 4, 3.0), (20, 5, 8.0)])
def test_bounds_equals_brute_force_over_vertices(D: int, M: int, V: float) -> None:
    vertices = [np.array(one) * V for one in product([0, 1], repeat=M)]
    found = bounds(D, M, V, 3)
    assert found["exact_both"] == pytest.approx(min(both(D, u, v) for u in vertices for v in vertices), rel=1e-12)
    assert found["exact_one"] == pytest.approx(min(both(D, u, np.ones(M)) for u in vertices), rel=1e-12)
    assert found["published"] < found["disjoint"] <= found["exact_both"] * (1 + 1e-12)
    assert (abs(found["disjoint"] / found["exact_both"] - 1) < 1e-12) == (M % 2 == 0)


def test_bounds_has_no_smaller_cosine_inside_the_box() -> None:
    grid = np.linspace(0, 3, 13)
    pairs = [np.array(one) for one in product(grid, repeat=2)]
    found = bounds(4, 2, 3.0, 3)
    assert min(both(4, u, v) for u in pairs for v in pairs) == pytest.approx(found["exact_both"], rel=1e-12)
    assert min(both(4, u, np.ones(2)) for u in pairs) == pytest.approx(found["exact_one"], rel=1e-12)


def test_bounds_gives_the_published_numbers() -> None:
    found = bounds(2000, 100, 3.0, 14)
    assert found["published"] == pytest.approx(1900 / 2800)
    assert found["disjoint"] == found["exact_both"] == pytest.approx(1900 / 2350)
    assert found["all_at_largest"] == pytest.approx(both(2000, np.full(100, 3.0), np.ones(100)))
    assert round(found["all_at_largest"], 2) == 0.93
    assert found["one_class"] == pytest.approx(cosine(np.eye(14)[0], np.ones(14)))
    assert round(found["one_class"], 3) == 0.267


@pytest.mark.parametrize(("D", "M", "V"), [(4, 4, 2.0), (4, 0, 2.0), (4, 2, 0.9)])
def test_bounds_refuses_what_is_no_point(D: int, M: int, V: float) -> None:
    with pytest.raises(DataError):
        bounds(D, M, V, 3)


@pytest.mark.parametrize(("D", "M", "V"), [(9, 8, 3.0), (50, 30, 4.0), (50, 30, 2.0), (50, 30, 1.5), (2000, 100, 3.0)])
def test_one_sided_equals_a_search_over_counts(D: int, M: int, V: float) -> None:
    every = [both(D, np.r_[np.full(k, V), np.zeros(M - k)], np.ones(M)) for k in range(M + 1)]
    smallest, entries = one_sided(D, M, V)
    assert smallest == pytest.approx(min(every), rel=1e-12)
    assert every[entries] == pytest.approx(min(every), rel=1e-12)


def test_one_sided_has_its_closed_form_at_a_whole_minimiser() -> None:
    smallest, entries = one_sided(20, 12, 4.0)  # k* = 8·2/16
    assert entries == 1
    assert smallest == pytest.approx(2 * np.sqrt(8 * 3 / 20) / 4, rel=1e-12)


@pytest.mark.parametrize("C", [3, 5, 14])
@pytest.mark.parametrize("error", [0.05, 0.7])
def test_even_residuals_equals_softmax_gradients_written_out(C: int, error: float) -> None:
    probabilities = np.where(np.eye(C, dtype=bool), 1 - error, error / (C - 1))  # a row for each class
    squared = (probabilities - np.eye(C)) ** 2
    whole, part = even_residuals(C)
    assert whole == pytest.approx(cosine(squared[0], squared[1:].mean(0)), rel=1e-12)
    assert part == pytest.approx(cosine(squared[0], squared.mean(0)), rel=1e-12)


def test_even_residuals_falls_with_the_power_that_is_claimed() -> None:
    assert even_residuals(1000)[0] * 1000**1.5 == pytest.approx(2, rel=0.01)
    assert even_residuals(1000)[1] * 1000**0.5 == pytest.approx(1, rel=0.01)


def test_simulate_bounds_finds_no_violation_and_attains_the_minima() -> None:
    found = simulate_bounds(BoundSettings(**VALUES), 1)
    assert found["violations"] == 0
    assert len(found["profiles"]) == (3 + 3) * 2  # only M below D
    small = [row for row in found["profiles"] if row["differing"] <= 4 and row["outputs"] == 60]
    assert all(row["exact_both_tightness"] < 1 + 1e-9 for row in small)
    assert all(row["exact_one_tightness"] < 1 + 1e-9 for row in found["profiles"])
    assert found == simulate_bounds(BoundSettings(**VALUES), 1)


def test_simulate_bounds_sees_a_bound_that_is_too_high(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(D: int, M: int, V: float, C: int) -> dict[str, Any]:
        return {**bounds(D, M, V, C), "disjoint": (D - M) / (D - M + M * V**2 / 3)}

    monkeypatch.setattr("scforget.theory.corollary.bounds", wrong)
    assert simulate_bounds(BoundSettings(**VALUES), 1)["violations"] > 0


def test_simulate_bounds_classifiers_lie_on_both_sides_of_one_class() -> None:
    few, many = simulate_bounds(BoundSettings(**VALUES), 1)["classifiers"]
    assert 0 < few["whole_below"] < 1
    assert 0 < many["part_below"] < 1
    assert many["whole_below"] > 0.99
    assert many["whole_low"] < many["whole_even"] < many["whole_high"]


def test_placed_finds_the_genes_that_differ() -> None:
    rng = np.random.default_rng(0)
    retain = rng.uniform(0.9, 1.1, 100)
    forget = 7 * retain * rng.uniform(0.8, 1.25, 100)
    forget[:10] *= 40
    found = placed(forget, retain, factor=2.0)
    assert (found["outputs"], found["differing"]) == (100, 10)
    assert found["largest"] == pytest.approx(forget[:10].max() / np.sqrt((forget[10:] ** 2).mean()))
    assert found["cosine"] == pytest.approx(cosine(forget, retain))
    assert found["published_satisfied"]
    assert found["disjoint_satisfied"]
    assert found == pytest.approx(placed(100 * forget, retain, factor=2.0))


def test_placed_bounds_hold_for_any_pair_and_can_be_close() -> None:
    rng = np.random.default_rng(1)
    closest = np.inf
    for factor, D in product([1.2, 2.0, 5.0], [2, 3, 10, 100]):
        for _ in range(50):
            base = rng.lognormal(sigma=2, size=D)
            found = placed(base * rng.lognormal(sigma=0.5, size=D), base, factor=factor)
            assert found["published_satisfied"]
            assert found["disjoint_satisfied"]
            closest = min(closest, found["cosine"] / found["disjoint"])
    assert closest < 1.1
    # shared genes half a factor up, half down, in equal energy: the constant κ is attained
    pair = np.array([2.0, 1.0]), np.array([1.0, 2.0])
    found = placed(*pair, factor=2.0)
    assert found["cosine"] == pytest.approx(found["disjoint"], rel=1e-12)


def test_placed_counts_a_gene_that_one_set_lacks() -> None:
    found = placed(np.array([1.0, 1.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0, 5.0]), factor=2.0)
    assert (found["differing"], found["largest"]) == (1, 5.0)
    with pytest.raises(DataError):
        placed(np.array([0.0, 1.0]), np.array([1.0, 0.0]), factor=2.0)

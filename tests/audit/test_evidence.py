"""What stands under a verdict, of made-up populations in which it is known what there is to find."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from audit.simulating import SETTINGS
from scforget.arrays import BoolArray, FloatArray
from scforget.attacks import LEARNED
from scforget.attacks.references import References
from scforget.audit.evidence import (
    against_retrains,
    cell_table,
    exposed_cells,
    gene_list,
    indistinguishability,
    of_population,
    of_target,
    worst_attack,
)
from scforget.audit.scene import Groups, Population, Scene
from scforget.errors import DataError, EmptyGroupError

F, SAME, OTHER, APART = 20, 40, 30, 10
N = F + SAME + OTHER + APART
PART = np.repeat(np.arange(4), [F, SAME, OTHER, APART])
FORGET, UNSEEN, ASIDE = PART == 0, (PART == 1) | (PART == 2), PART == 3
GROUPS = Groups(FORGET, {"same_group": PART == 1, "matched_knn": PART == 2, "all_unseen": UNSEEN})
NAMES, LABELS = np.array([f"cell_{cell}" for cell in range(N)]), np.array(["B", "B", "B", "T"])[np.arange(N) % 4]
NOBODY = np.full(N, "")


def population(seed: int, models: int = 8, shift: FloatArray | float = 0.0) -> Population:
    """ELBOs of cells that differ by 5 nats and models that disagree by 1; ``shift`` is added to the forget cells."""
    rng = np.random.default_rng(seed)
    elbo = -100 + 5 * np.random.default_rng(99).normal(size=N) + rng.normal(size=(models, N))
    elbo[:, FORGET] += shift
    attackers = rng.normal(size=(models, 2, N))
    return Population(list(range(models)), {"elbo": elbo}, [{}] * models, rng.normal(size=(N, 3)), attackers)


TARGET = population(2, models=24)


def scene(target: Population = TARGET, donors: Any = NOBODY) -> Scene:
    references = References(target.scores["elbo"], np.zeros((2, N)), np.zeros((2, N), dtype=bool), ASIDE)
    return Scene(population(1, shift=3.0), target, GROUPS, references, LABELS, NAMES, donors)


# the worst attack


def attacked(**more: Any) -> Population:
    """Three models with a score that finds the forget cells and one that does not; further ones by name."""
    rng = np.random.default_rng(5)
    scores = {"weak": rng.normal(size=(3, N)), "strong": rng.normal(size=(3, N)) + 2 * FORGET, **more}
    return replace(population(3, 3), scores=scores)


def test_worst_attack_is_the_one_that_finds_most_with_the_p_value_of_having_tried_all() -> None:
    own = attacked()
    found = worst_attack(own, GROUPS, SETTINGS, 0)
    assert found["worst"]["name"] == "strong"
    assert found["worst"]["p_adjusted"] == 1 / (SETTINGS.permutation_draws + 1)  # no permutation comes near
    assert found["constant"] == []
    compared = FORGET | GROUPS.controls["same_group"]
    for test in found["attacks"]:
        rows = own.scores[test["name"]]
        wanted = np.mean([roc_auc_score(FORGET[compared], row[compared]) for row in rows])
        assert test["auc"] == pytest.approx(wanted)
    weak = found["attacks"][0]
    assert weak["p"] > 0.05
    assert weak["p_adjusted"] >= weak["p"]


def test_worst_attack_leaves_attackers_that_learned_the_labels_out() -> None:
    perfect = np.tile(FORGET.astype(float), (3, 1)) + np.linspace(0, 0.1, N)
    found = worst_attack(attacked(**dict.fromkeys(LEARNED, perfect)), GROUPS, SETTINGS, 0)
    assert found["worst"]["name"] == "strong"
    assert [test["name"] for test in found["attacks"]] == ["weak", "strong"]
    assert found["constant"] == []


def test_worst_attack_names_constant_scores_and_goes_on() -> None:
    outside = np.tile(np.where(UNSEEN & ~GROUPS.controls["same_group"], np.arange(N), 1.0), (3, 1))
    found = worst_attack(attacked(flat=np.ones((3, N)), elsewhere=outside), GROUPS, SETTINGS, 0)
    assert found["constant"] == ["flat", "elsewhere"]
    assert [test["name"] for test in found["attacks"]] == ["weak", "strong"]
    assert found["worst"] == worst_attack(attacked(), GROUPS, SETTINGS, 0)["worst"]


def test_worst_attack_keeps_a_score_that_varies_under_some_model_or_lacks_cells_set_aside() -> None:
    varied = np.vstack([np.ones((2, N)), np.arange(N)])
    holes = np.where(ASIDE, np.nan, np.random.default_rng(6).normal(size=(3, N)))
    found = worst_attack(attacked(varied=varied, holes=holes), GROUPS, SETTINGS, 0)
    assert [test["name"] for test in found["attacks"]] == ["weak", "strong", "varied", "holes"]
    assert found["constant"] == []


def test_worst_attack_refuses_constant_scores_alone() -> None:
    flat = np.ones((3, N))
    own = replace(population(3, 3), scores={"flat": flat, "mlp": np.tile(np.arange(N), (3, 1))})
    with pytest.raises(DataError, match="scores of all attacks: found the same for all cells"):
        worst_attack(own, GROUPS, SETTINGS, 0)


# populations of models


def test_against_retrains_of_retrains_comes_near_the_ceiling() -> None:
    found = [against_retrains(population(seed, 12), scene(), SETTINGS, 0) for seed in range(10, 18)]
    assert {record["models"] for record in found} == {12}
    quality = np.mean([record["forgetting_quality"] for record in found])
    ceiling = found[0]["forgetting_ceiling"]
    assert ceiling["low"] <= quality <= ceiling["high"]
    assert ceiling["mean"] > 0.1
    assert np.mean([record["klom"]["excess"] for record in found]) == pytest.approx(0, abs=0.5)
    assert np.mean([record["u_lira"]["auc"] for record in found]) == pytest.approx(0.5, abs=0.05)


def test_against_retrains_of_a_far_population_is_0() -> None:
    found = against_retrains(population(3, 12, shift=50.0), scene(), SETTINGS, 0)
    assert found["forgetting_quality"] == 0
    assert found["epsilon"] == {"median": 50.0, "max": 50.0}
    assert found["klom"]["excess"] > 1
    assert found["u_lira"]["auc"] == 1


def test_against_retrains_compares_equal_numbers_of_models() -> None:
    for models, same in ((30, 12), (8, 8), (5, 5)):
        found = against_retrains(population(3, models), scene(), SETTINGS, 0)
        assert found["models"] == found["klom"]["models"] == same
    assert found["u_lira"]["status"] == "undetermined"  # it needs 8 of each


@pytest.mark.parametrize(("models", "retrains"), [(1, 24), (2, 24), (8, 2), (8, 3), (8, 4), (8, 5)])
def test_against_retrains_says_when_there_are_too_few_models(models: int, retrains: int) -> None:
    found = against_retrains(population(3, models), scene(population(2, retrains)), SETTINGS, 0)
    assert set(found) == {"models", "refused"}
    assert f"{models} unlearned and {retrains} retrained models" in found["refused"]


def test_indistinguishability_of_the_retrains_themselves_is_0() -> None:
    found = indistinguishability(TARGET, scene(), SETTINGS, 0)
    for name in ("membership", "mean_elbo"):
        assert found["epsilon_bounds"][name]["epsilon"] == 0
        assert found["delta_at_epsilon_1"][name] == pytest.approx({"forward": 0, "backward": 0}, abs=1e-6)


def test_indistinguishability_bound_of_equal_populations_is_0_in_all_but_five_per_cent() -> None:
    many = scene(population(2, 60))
    above = 0
    for seed in range(10, 30):
        bounds = indistinguishability(population(seed, 60), many, SETTINGS, 0)["epsilon_bounds"]
        above += any(bound["epsilon"] > 0 for bound in bounds.values())
    assert above <= stats.binom.ppf(0.999, 20, 0.05)


def test_indistinguishability_of_many_separated_models_is_bounded_away_from_0() -> None:
    found = indistinguishability(population(3, 60, shift=20.0), scene(population(2, 60)), SETTINGS, 0)
    for name in ("membership", "mean_elbo"):
        bound = found["epsilon_bounds"][name]
        assert bound["epsilon"] > 1
        assert bound["epsilon"] == pytest.approx(bound["ceiling"])  # no error at all: as much as so many can show
        assert bound["level"] == pytest.approx(0.975)  # two statistics share the 5 %
        assert (bound["n_positives"], bound["n_negatives"]) == (60, 60)
        assert found["delta_at_epsilon_1"][name]["forward"] > 0.99
        assert found["delta_at_epsilon_1"][name]["backward"] > 0.99


def test_indistinguishability_gives_no_delta_for_a_statistic_that_all_models_share() -> None:
    found = indistinguishability(population(3, shift=1000.0), scene(), SETTINGS, 0)  # AUC 1 under every model
    assert set(found["delta_at_epsilon_1"]) == {"mean_elbo"}
    assert found["epsilon_bounds"]["membership"]["epsilon"] > 0


# cells


def planted(cell: int, by: float = 4.0, models: int = 8) -> Population:
    return population(3, models, shift=by * (np.arange(F) == cell))


def standardised(own: Population) -> FloatArray:
    """Z of each model and forget cell by half the cell's own variance and half the typical cell's."""
    one, two = (models.scores["elbo"][:, FORGET] for models in (own, TARGET))
    sd = two.std(axis=0, ddof=1)
    return np.asarray((one - two.mean(axis=0)) / np.sqrt(0.5 * sd**2 + 0.5 * np.median(sd) ** 2))


def test_exposed_cells_ranks_a_planted_cell_first() -> None:
    own = planted(7)
    found = exposed_cells(own, scene(), SETTINGS, 0)
    assert len(found["worst"]) == 2  # a tenth of 20
    assert found["worst"][0]["cell"] == "cell_7"
    assert found["worst"][0]["label"] == "T"
    z = standardised(own).mean(axis=0)
    assert found["worst"][0]["z"] == pytest.approx(z[7])
    low, high = found["null_band"]
    assert -3 < low < -1 < 1 < high < 3
    assert found["above_null"] == pytest.approx((z > high).mean())
    assert 1 / F <= found["above_null"] < 0.2


def test_exposed_cells_by_label_are_all_forget_cells() -> None:
    rows = exposed_cells(planted(7), scene(), SETTINGS, 0)["by_label"]
    assert {row["name"]: row["cells"] for row in rows} == {"B": 15, "T": 5}
    assert rows[0]["name"] == "T"  # the planted cell's
    z = standardised(planted(7)).mean(axis=0)
    assert {row["name"]: row["mean"] for row in rows} == pytest.approx(
        {name: z[LABELS[FORGET] == name].mean() for name in ("B", "T")}
    )


def test_exposed_cells_by_donor_where_donors_are_known() -> None:
    donors = np.where(FORGET, "d", "e") + (np.arange(N) % 2).astype("<U1").astype(object)
    found = exposed_cells(planted(7), scene(donors=donors.astype(str)), SETTINGS, 0)
    assert {row["name"]: row["cells"] for row in found["by_donor"]} == {"d0": 10, "d1": 10}
    assert found["by_donor"][0]["name"] == "d1"
    assert found["donor_auc"]["member_donors"] == ["d0", "d1"]
    assert found["donor_auc"]["control_donors"] == ["e0", "e1"]
    assert 0 <= found["donor_auc"]["auc"] <= 1


@pytest.mark.parametrize("unknown", [np.ones(N, dtype=bool), np.arange(N) == 3])
def test_exposed_cells_says_nothing_of_donors_that_are_not_all_known(unknown: BoolArray) -> None:
    found = exposed_cells(planted(7), scene(donors=np.where(unknown, "", "d")), SETTINGS, 0)
    assert found["by_donor"] is None
    assert found["donor_auc"] is None


def test_cell_table_has_a_row_for_each_forget_cell_the_most_exposed_first() -> None:
    own = planted(7)
    table = cell_table(own, scene(donors=np.where(FORGET, NAMES, "x")), SETTINGS)
    assert list(table.columns) == ["cell", "label", "donor", "z", "low", "high", "rank"]
    assert table["cell"].iloc[0] == "cell_7"
    assert sorted(table["cell"]) == sorted(NAMES[FORGET])
    np.testing.assert_array_equal(table["donor"], table["cell"])
    z = standardised(own)
    place = [int(name.removeprefix("cell_")) for name in table["cell"]]
    np.testing.assert_allclose(table["z"], z.mean(axis=0)[place])
    assert (np.diff(table["z"]) <= 0).all()
    assert list(table["rank"]) == list(range(1, F + 1))
    wide = stats.t.ppf(0.975, 7) * stats.sem(z, axis=0)[place]
    np.testing.assert_allclose(table["high"] - table["z"], wide)
    np.testing.assert_allclose(table["z"] - table["low"], wide)
    np.testing.assert_array_equal(table["label"], LABELS[place])


def test_cells_of_two_retrains_have_no_spread_to_be_measured_by() -> None:
    pair = scene(population(2, 2))
    assert exposed_cells(planted(7), pair, SETTINGS, 0) == {"refused": "2 retrained models; wanted 3"}
    table = cell_table(planted(7), pair, SETTINGS)
    assert table.empty
    assert list(table.columns) == ["cell", "label", "donor", "z", "low", "high", "rank"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_exposed_cells_and_cell_table_refuse_scores_that_are_not_finite(value: float) -> None:
    own = population(3)
    own.scores["elbo"][0, 0] = value
    with pytest.raises(DataError):
        exposed_cells(own, scene(), SETTINGS, 0)
    with pytest.raises(DataError):
        cell_table(own, scene(), SETTINGS)


# the whole


def test_of_population_and_of_target_are_plain_json_and_hold_the_learned_attacks_variance() -> None:
    own = planted(7)
    found, target = of_population(own, scene(), SETTINGS, 0), of_target(scene(), SETTINGS, 0)
    json.dumps([found, target])
    assert set(found) == {"worst_attack", "population", "attacker_variance", "exposure"}
    assert set(target) == {"worst_attack", "attacker_variance"}
    compared = FORGET | GROUPS.controls["same_group"]
    aucs = [[roc_auc_score(FORGET[compared], row[compared]) for row in model] for model in own.attackers]
    variance = found["attacker_variance"]
    assert variance["mean"] == pytest.approx(np.mean(aucs))
    assert variance["audit"] == pytest.approx(np.var(aucs, axis=1, ddof=1).mean())
    assert (variance["n_originals"], variance["n_unlearning"], variance["n_audit"]) == (8, 1, 2)


def test_gene_list_gives_the_auc_against_every_kind_of_control() -> None:
    scores = np.random.default_rng(8).normal(size=N) + FORGET
    found = gene_list(scores, GROUPS, SETTINGS)
    assert list(found) == list(GROUPS.controls)
    for control, cells in GROUPS.controls.items():
        used = FORGET | cells
        assert found[control]["auc"] == pytest.approx(roc_auc_score(FORGET[used], scores[used]))
        low, high = found[control]["interval"]
        assert 0 <= low < found[control]["auc"] < high <= 1


def test_gene_list_refuses_nan_and_an_empty_group() -> None:
    scores = np.arange(N, dtype=float)
    with pytest.raises(DataError, match="NaN"):
        gene_list(np.where(FORGET, np.nan, scores), GROUPS, SETTINGS)
    with pytest.raises(EmptyGroupError):
        gene_list(scores, replace(GROUPS, forget=np.zeros(N, dtype=bool)), SETTINGS)

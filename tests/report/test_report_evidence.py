"""What stands under a verdict is shown with its interval or null beside it, and gaps never crash it."""

import copy
import re

import pytest

from scforget.report import details, evidence_tables, page, tables

DASH = tables.DASH


def row(table, *start):
    """The only row that begins so, by column (the first of equal names)."""
    (found,) = [row for row in table["rows"] if tuple(row[: len(start)]) == start]
    return found


def test_worst_stands_beside_the_same_attack_on_the_retrains(known):
    table = evidence_tables.worst(known)
    retrain = known["retrain"]["attacks"]["knn"]["same_group"]
    assert table["rows"] == [
        ["ssd", "knn", "0.641", tables.span(tables.bounds(known["ssd"]["attacks"]["knn"]["same_group"], "interval")),
         tables.number(retrain["auc"]), tables.span(tables.bounds(retrain, "interval")), "0.0125", "0.0833", "3",
         "rmia_online", "1999"]
    ]  # fmt: skip
    known["ssd"]["worst_attack"]["constant"] = []
    assert evidence_tables.worst(known)["rows"][0][9] == "none"
    known["ssd"]["worst_attack"]["constant"] = None
    assert evidence_tables.worst(known)["rows"][0][9] == DASH


def test_populations_say_every_measure_with_its_null_and_its_models(known, evidence):
    known["original"]["population"] = {**evidence["population"], "forgetting_quality": 0.0}
    table = evidence_tables.populations(known)
    assert [line[1] for line in table["rows"]] == 8 * ["original", "ssd"]  # method by method inside each measure
    assert [line[0] for line in table["rows"][::2]] == [line[0] for line in table["rows"][1::2]]
    assert row(table, "Kaggle ε of a cell, median", "ssd")[2:] == ["1.25", "largest 3.50", "4 and 4"]
    ceiling = "retrain against retrain 0.170 (0.150, 0.210)"
    assert row(table, "Forgetting quality", "ssd")[2:] == ["0.110", ceiling, "4 and 4"]
    assert row(table, "Forgetting quality", "original")[2] == "0.000"
    klom = "retrain against retrain 8.70; excess 1.00 (0.60, 1.40)"
    assert row(table, "KLOM (nats)", "ssd")[2:] == ["9.70", klom, "4 and 4"]
    assert row(table, "U-LiRA AUC", "ssd")[2:] == ["0.710", "0.520, 0.830", "5 and 8"]
    most = "could prove at most 0.34"
    assert row(table, "ε at least, from the membership AUC", "ssd")[2:] == ["0.00", most, "5 and 8"]
    assert row(table, "ε at least, from the mean ELBO", "ssd")[2:] == ["0.21", most, "5 and 8"]
    delta = row(table, "δ at ε = 1, from the membership AUC", "ssd")
    assert delta[2:] == ["0.310", "the other way round 0.290", "5 and 8"]
    assert row(table, "δ at ε = 1, from the mean ELBO", "ssd")[2] == "0.610"


def test_populations_say_why_an_attack_was_refused(known):
    refused = {"status": "undetermined", "reason": "2 unlearned models", "auc": None, "interval": [None, None]}
    known["ssd"]["population"]["u_lira"] = {**refused, "n_unlearned": 2, "n_retrained": 8}
    table = evidence_tables.populations(known)
    assert row(table, "U-LiRA AUC", "ssd")[2:] == [DASH, "refused: 2 unlearned models", "2 and 8"]


def test_learned_stands_beside_shuffled_labels_and_the_published_attacker(known):
    table = evidence_tables.learned(known)
    assert table["rows"] == [
        ["ssd", "0.749", "0.540, 0.880", "0.508 (0.430, 0.610)", "0.740", "0.660, 0.820", "0.0087", "0.0014", "5 × 3",
         "0.862", "0.630, 0.960"]
    ]  # fmt: skip


def test_learned_reads_the_published_attacker_on_the_controls_that_it_was_made_for(known):
    """Against others its AUC would say how it does on cells of a kind that it never met."""
    published = known["ssd"]["attacks"]["published_mlp"]
    del published["matched_knn"]
    assert evidence_tables.learned(known)["rows"][0][9:] == [DASH, DASH]
    published["matched_knn"] = {"auc": 0.51, "interval": [0.25, 0.75]}
    assert evidence_tables.learned(known)["rows"][0][9:] == ["0.510", "0.250, 0.750"]


def test_gene_list_is_read_from_the_retrains(known):
    known["ssd"]["gene_list"] = {"same_group": {"auc": 0.9}}
    table = evidence_tables.gene_list(known)
    assert table["rows"] == [
        ["same_group", "0.595", "0.345, 0.804", "14 and 17"],
        ["all_unseen", "0.728", "0.573, 0.842", "14 and 315"],
    ]


def test_cells_kinds_and_donors_stand_beside_what_a_retrain_shows(known):
    band = "−2.40, 1.80"
    assert evidence_tables.cells(known)["rows"] == [
        ["ssd", "1", "AATC-4", "CD56+ NK", DASH, "6.10", "5.20, 7.00", band],
        ["ssd", "2", "ATGA-4", "B", "d2", "5.50", DASH, band],
    ]
    assert evidence_tables.kinds(known)["rows"] == [
        ["ssd", "kind", "B", "6", "2.50", band, "0.33", "0.14"],  # 2 of 14 cells are the worst tenth
        ["ssd", "donor", "d2", "8", "1.50", band, "0.25", "0.14"],
    ]
    assert evidence_tables.donors(known)["rows"] == [["ssd", "0.830", "0.500, 1.000", "3 and 2"]]
    known["ssd"]["exposure"]["donor_auc"].update(auc=None, interval=None, reason="1 donor has forget cells")
    assert evidence_tables.donors(known)["rows"] == [["ssd", DASH, "refused: 1 donor has forget cells", "3 and 2"]]


def test_single_has_a_row_for_each_model_that_has_an_interval_or_stands_beside_one(known):
    assert evidence_tables.single(known)["rows"] == [
        ["ssd", "3", "0.688", "0.500, 0.900"],
        ["ssd", "4", "0.698", DASH],
        ["ssd", "7", "0.708", "0.400, 0.800"],
    ]
    known["ssd"]["attacks"]["elbo"]["same_group"]["per_seed_intervals"] = None  # a group of one cell
    assert evidence_tables.single(known)["rows"] == []


def test_tables_fold_away_evidence_only_where_there_is_some(known, audits):
    added = evidence_tables.tables(known)
    assert len({table["title"] for table in added}) == len(added) == 8
    assert all(table in details.tables(known) for table in added)
    for table in added:
        assert table["note"]
        assert all(len(line) == len(table["head"]) for line in table["rows"])
    bare = {method: {"method": method, "models": 3} for method in audits}
    assert evidence_tables.tables(bare) == []


def paths(record, at=()):
    for key, inner in record.items() if isinstance(record, dict) else enumerate(record):
        yield (*at, key)
        if isinstance(inner, dict | list):
            yield from paths(inner, (*at, key))


@pytest.mark.parametrize("method", ["ssd", "retrain"])
def test_tables_and_cards_survive_gaps_in_the_evidence(known, evidence, method):
    kept = [*evidence, "mlp_null", "gene_list"]
    for path in paths({key: known[method][key] for key in kept if key in known[method]}):
        for hole in (None, [], {}, "x"):
            broken = copy.deepcopy(known)
            inner = broken[method]
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = hole
            for table in evidence_tables.tables(broken):
                assert all(len(line) == len(table["head"]) for line in table["rows"])
                shown = [cell for line in table["rows"] for cell in line]
                assert all(isinstance(cell, str) and cell for cell in shown)
                assert not {"nan", "None", "inf"} & set(" ".join(shown).split())
            assert all(isinstance(fact, str) and fact for _, fact in page._card("ssd", broken)["facts"])


def test_card_names_the_strongest_attack_beside_the_retrain_and_counts_exposed_cells(known):
    facts = dict(page._card("ssd", known)["facts"])
    retrain = tables.number(known["retrain"]["attacks"]["knn"]["same_group"]["auc"])
    assert facts["Strongest attack"] == f"knn, AUC 0.641 (retrain {retrain}), p adjusted 0.0833"
    assert facts["Most exposed cells"] == "3 of 14 above what a retrain shows"
    bare = dict(page._card("partial_reset", known)["facts"])
    assert bare["Strongest attack"] == bare["Most exposed cells"] == DASH


def test_render_shows_the_evidence_with_its_notes_and_the_picture_of_cells(known, context):
    known["ssd"]["exposure"]["worst"][0]["label"] = "<b>NK</b>"
    scenario = {"context": context, "audits": known, "table": None,
                "figures": {"umap_ssd": b"u", "cell_scores_ssd": b"c", "score_histograms_ssd": b"s"}}  # fmt: skip
    html = page.render([scenario], context)
    summaries = re.findall(r"<summary>(.*?)</summary>", html)
    assert summaries[:3] == ["Scores of the forget set: ssd", "What remains exposed: ssd",
                             "Where the data lie: ssd"]  # fmt: skip
    for table in evidence_tables.tables(known):
        assert html.count(f'<summary>{table["title"]}</summary>\n<p class="caption">') == 1
    assert "&lt;b&gt;NK&lt;/b&gt;" in html
    assert "<b>NK" not in html

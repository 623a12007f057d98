import io
import math

import pytest
from matplotlib import pyplot
from rich.console import Console

from report.conftest import paths
from scforget.report import classification, page, tables

ODD = "a|b <b>\n[red]"


def row(mean, retrain, half=0.01):
    difference = None if retrain is None else mean - retrain
    ends = None if retrain is None else [difference - 2 * half, difference + 2 * half]
    return {"mean": mean, "interval": [mean - half, mean + half], "per_seed": [mean], "retrain": retrain,
            "difference": difference, "difference_interval": ends}  # fmt: skip


def record(method, shift):
    """What the audit of classifiers says; every number its own, so that none stands for another."""
    base = None if method == "retrain" else 1

    def beside(mean, retrain):
        return row(mean, base and retrain)

    ceiling = {"mean": 0.63, "low": 0.6, "high": 0.7}
    scored = {"ceilings": {"models": 5, "official": ceiling, "suprun": {**ceiling, "mean": 0.71}}}
    if base:
        scored = {
            "official": {"models": 5, "forgetting_quality": 0.21, "forgetting_ceiling": ceiling, "final_score": 0.19},
            "suprun": {"models": 5, "refused": "found 5 and 5; wanted 6"},
        }
    return {
        "accuracy": {
            "retain": beside(0.93 + shift, 0.94), "forget": beside(0.88 + shift, 0.76), "test": beside(0.75, 0.74)
        },
        "lira": {"tnr": beside(0.012 + shift, 0.086), "auc": beside(0.51 + shift, 0.69), "fnr": 0.01,
                 "items": {"forget": 14, "retain": 400}, "retain_needed": 299, "reading": None},
        "distance": {"wasserstein": beside(1.5 + shift, 0.4), "cramer": beside(0.31 + shift, 0.02),
                     "wasserstein_output": beside(0.17 + shift, 0.05),
                     "cramer_output": beside(0.08 + shift, 0.01)},
        "kaggle": scored,
    }  # fmt: skip


@pytest.fixture
def classifiers(audits):
    """The audits of the other tests as if they were of classifiers."""
    for place, (method, audit) in enumerate(audits.items()):
        audit["score"] = "confidence"
        audit["attacks"]["confidence"] = audit["attacks"].pop("elbo")
        audit["utility"] = {"verdict": audit["utility"]["verdict"], "outside": {"accuracy": {"mean": 0.7}}}
        audit["population"] = {"u_lira": {"auc": 0.61, "interval": [0.5, 0.72]}}
        audit["classification"] = record(method, 0.001 * place)
    return audits


def test_class_table_copies_the_record(classifiers):
    table = classification.class_table(classifiers).set_index("method")
    assert list(table.index) == tables.ordered(classifiers)
    found, said = table.loc["ssd"], classifiers["ssd"]["classification"]
    for name in ("retain", "forget", "test"):
        assert found[name] == said["accuracy"][name]["mean"]
        assert [found[f"{name}_lo"], found[f"{name}_hi"]] == said["accuracy"][name]["interval"]
    for name in ("tnr", "auc"):
        assert found[f"lira_{name}"] == said["lira"][name]["mean"]
        assert found[f"lira_{name}_difference"] == said["lira"][name]["difference"]
        ends = [found[f"lira_{name}_difference_lo"], found[f"lira_{name}_difference_hi"]]
        assert ends == said["lira"][name]["difference_interval"]
    for name in ("wasserstein", "cramer", "wasserstein_output", "cramer_output"):
        assert found[f"{name}_difference"] == said["distance"][name]["difference"]
    assert (found["f_official"], found["ceiling_official"], found["final_official"]) == (0.21, 0.63, 0.19)
    assert math.isnan(found["f_suprun"])
    assert (found["u_lira"], found["u_lira_lo"], found["u_lira_hi"]) == (0.61, 0.5, 0.72)
    assert found["trace_difference"] == 9.6
    assert (found["verdict"], found["utility"]) == ("NOT_FORGOTTEN", "kept")
    retrain = table.loc["retrain"]
    assert retrain.filter(like="difference").isna().all()
    assert (retrain["ceiling_official"], retrain["ceiling_suprun"]) == (0.63, 0.71)


@pytest.mark.parametrize(("ratio", "slow"), [(0.19, False), (0.2, False), (0.21, True), (None, False)])
def test_class_table_flags_more_than_a_fifth_of_a_retraining(classifiers, ratio, slow):
    classifiers["ssd"]["cost"]["seconds_ratio"] = ratio
    table = classification.class_table(classifiers).set_index("method")
    assert table.loc["ssd", "too_slow"] == slow
    shown = classification.display(classification.class_table(classifiers)).set_index("method")
    assert ("too slow" in shown.loc["ssd", "time ÷ retrain"]) == slow
    assert not table.loc["retrain", "too_slow"]


def test_display_puts_intervals_and_ceilings_below_their_numbers(classifiers):
    shown = classification.display(classification.class_table(classifiers)).set_index("method")
    assert list(shown.columns) == list(classification.COLUMNS)[1:]
    ssd = shown.loc["ssd"]
    assert ssd["forget"] == "0.880\n0.870, 0.890"
    assert ssd["LiRA − retrain"] == "−0.074\n−0.094, −0.054"
    assert ssd["F official"] == "0.210\nof 0.630\n0.600, 0.700"
    assert ssd["F suprun"] == "–\nof –"
    assert shown.loc["retrain", "F suprun"] == "–\nof 0.710\n0.600, 0.700"
    assert shown.loc["retrain", "LiRA − retrain"] == "–"


def test_display_shows_the_auc_where_there_is_no_tnr_and_the_note_says_why(classifiers):
    assert "No TNR" not in classification.note(classifiers)
    for audit in classifiers.values():
        audit["classification"]["lira"] |= {"tnr": None, "items": {"forget": 14, "retain": 250}}
    shown = classification.display(classification.class_table(classifiers)).set_index("method")
    assert shown.loc["ssd", "LiRA − retrain"] == "AUC −0.180\n−0.200, −0.160"
    note = classification.note(classifiers)
    assert "No TNR: 250 retained items, and 299 are needed" in note
    assert note.endswith("No F: found 5 and 5; wanted 6.")  # said once, not once a method


@pytest.mark.parametrize("method", ["ssd", "original", "retrain"])
def test_tables_of_classifiers_survive_every_gap(classifiers, method):
    import copy

    for path in [(), *paths(classifiers[method])]:
        broken = copy.deepcopy(classifiers)
        if path:
            inner = broken[method]
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = None
        else:
            broken[method] = {}
        shown = classification.display(classification.class_table(broken))
        assert len(shown) == 6
        assert not shown.map(lambda text: "nan" in text or "None" in text).to_numpy().any()
        classification.note(broken)
        tables.summary({"a/b": broken})


def test_to_rich_of_classifiers_shows_every_number_in_120_columns(classifiers):
    console = Console(width=120, file=io.StringIO(), color_system=None)
    classifiers[ODD] = classifiers.pop("gradient_ascent")
    table = classification.class_table(classifiers)
    console.print(classification.to_rich(table, "digits / [b]half[/b]"))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 120
    assert "…" not in text
    assert "[b]half[/b]" in text
    assert "[red]" in text
    for row in table.to_dict("records"):
        for name in ("retain", "forget", "test", "lira_tnr", "lira_auc"):
            assert f"{tables.number(row[name])} ±0.010" in text
        for name in ("lira_tnr", "lira_auc", "wasserstein", "cramer"):
            digits = 3 if "lira" in name else 2
            assert tables.number(row[f"{name}_difference"], digits, sign=True) in text
        assert tables.number(row["trace_difference"], 2, sign=True) in text
    for words in ("0.210 of 0.630", "– of 0.710", "0.190, –", "0.610", "0.500, 0.720", "too slow", "NOT FORGOTTEN"):
        assert words in text


def test_markdown_of_classifiers_keeps_odd_names_in_their_cells(classifiers):
    classifiers[ODD] = classifiers.pop("ssd")
    lines = tables.markdown(classification.display(classification.class_table(classifiers))).splitlines()
    assert [line.replace("\\|", "").count("|") for line in lines] == [len(classification.COLUMNS) + 1] * 8
    assert any("a\\|b &lt;b&gt; · [red]" in line for line in lines)


def test_summary_keeps_the_classifiers_numbers_without_single_models(classifiers):
    found = tables.summary({"a/b": classifiers})["a/b"]["ssd"]["classification"]
    assert set(found) == {"accuracy", "distance", "kaggle", "lira"}
    assert found["accuracy"]["forget"]["mean"] == 0.88
    assert found["lira"]["auc"]["difference"] == pytest.approx(-0.18)
    assert "per_seed" not in str(found)


def test_page_shows_the_table_of_classifiers_under_their_scenario_only(classifiers, context, audits):
    import copy

    plain = copy.deepcopy(audits)
    for audit in plain.values():
        audit.pop("classification"), audit.pop("score")
    pair = [{"context": context, "audits": found, "figures": {}, "table": None} for found in (classifiers, plain)]
    html = page.render(pair, context)
    assert html.count("Classifiers, as their papers count") == 1
    assert html.count('title="accuracy on test items"') == 1
    assert page.render(pair[1:], context).count("Cramér") == 0
    assert "accuracy 0.700" in html  # on the card, in place of ELBO and marker r


def test_scenario_table_of_classifiers_has_their_utility(classifiers):
    table = tables.scenario_table(classifiers)
    assert table.set_index("method").loc["ssd", "accuracy"] == 0.7
    assert not {"elbo", "marker_r"} & set(table.columns)
    assert list(tables.display(table).columns) == list(tables.display_columns("confidence"))
    wanted = classifiers["ssd"]["attacks"]["confidence"]["same_group"]["auc"]
    assert table.set_index("method").loc["ssd", "auc"] == wanted


def test_pictures_show_every_method_and_leave_out_what_is_not_known(classifiers):
    classifiers["ssd"]["classification"]["lira"]["tnr"] = None
    classifiers["partial_reset"]["classification"] = None
    found = classification.pictures(classifiers, "digits")
    assert set(found) == {"class_accuracies", "class_distances"} <= set(page.FIGURES)
    for figure in found.values():
        names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
        assert names == tables.ordered(classifiers)
    marks = {
        line.get_xdata()[0] for axes in found["class_accuracies"].axes for line in axes.lines if len(line.get_xdata())
    }
    assert {0.93, 0.88, 0.75} <= marks
    centres = {round(float(line.get_xdata()[0]), 6) for line in found["class_distances"].axes[1].lines}
    assert {1.1, 0.0} <= centres
    pyplot.close("all")


def test_pictures_of_vaes_are_none(audits):
    assert not classification.known(audits)
    assert classification.pictures(audits) == {}

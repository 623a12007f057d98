"""An audit in plain words: every number of the record is in the sentence where it belongs, and gaps leave no trace."""

import copy
import math
import re

import pytest

from scforget.report import tables
from scforget.report.explain import dissent, explain

QUESTION = "pbmc68k / cd56_nk: forget 14 cells (kind cluster, cluster CD56+ NK)"


def said(audits, method):
    """What is said of one method, line by line, the first with the verdict."""
    blocks = explain(audits, QUESTION).split("\n\n")
    (found,) = [block for block in blocks if block.startswith(f"{method}: ")]
    return [line.strip() for line in found.split("\n")]


def line(audits, method, start):
    """The only line on a method that begins so; None when there is none."""
    found = [one for one in said(audits, method) if one.startswith(start)]
    assert len(found) <= 1
    return found[0] if found else None


def test_explain_asks_first_and_then_goes_method_by_method_without_the_target(audits):
    heading, *blocks = explain(audits, QUESTION).split("\n\n")
    assert heading == f"{QUESTION}\n{'=' * len(QUESTION)}"
    methods = [method for method in tables.ordered(audits) if method != "retrain"]
    assert [block.split(":")[0] for block in blocks] == methods
    assert len(methods) == 5


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("original", "NOT FORGOTTEN"),
        ("ssd", "NOT FORGOTTEN"),
        ("gradient_ascent", "OVER-FORGOTTEN"),
        ("partial_reset", "FORGOTTEN"),
        ("retain_finetune", "UNDETERMINED"),
    ],
)
def test_explain_gives_the_verdict_and_its_reason_first(audits, method, words):
    assert said(audits, method)[:2] == [f"{method}: {words}", audits[method]["explanation"]]


def test_explain_gives_both_statistics_with_interval_margin_noise_and_power(audits):
    primary = audits["ssd"]["primary"]
    primary["membership"].update(difference=0.168, interval=[0.16, 0.176], noise_floor=0.006, power=0.83, side="beyond")
    primary["trace"].update(difference=-9.6, interval=[-10.0, -9.2], margin=1.5, noise_floor=0.31, power=0.94)
    assert line(audits, "ssd", "Membership") == (
        "Membership (are these very cells remembered?) +0.168 from the retrained models, 90 % interval 0.160, 0.176: "
        "outside the margin of ±0.02. Two halves of the retrained models differ by 0.006; a perfect method would pass "
        "with a chance of 0.83."
    )
    assert line(audits, "ssd", "Trace") == (
        "Trace (is anything of them left, the knowledge of their kind included?) −9.60 from the retrained models, "
        "90 % interval −10.00, −9.20: inside the margin of ±1.50. Two halves of the retrained models differ by 0.31; "
        "a perfect method would pass with a chance of 0.94."
    )


@pytest.mark.parametrize("name", ["membership", "trace"])
@pytest.mark.parametrize(
    ("side", "words"),
    [
        ("inside", ": inside the margin"),
        ("beyond", ": outside the margin"),
        ("opposite", ": outside the margin"),
        ("undecided", ": neither inside nor outside the margin"),
        (None, ": not compared with the margin"),
    ],
)
def test_explain_says_where_the_interval_of_a_statistic_lies(audits, name, side, words):
    audits["ssd"]["primary"][name]["side"] = side
    assert words in line(audits, "ssd", name.title())


def test_explain_names_the_strongest_attack_with_its_corrected_p_beside_the_retrains(known):
    base = known["retrain"]["attacks"]["knn"]["same_group"]
    base["auc"] = 0.4567
    assert line(known, "ssd", "Strongest") == (
        "Strongest attack: knn, AUC 0.641 (0.457 on the retrained models); "
        "p = 0.0833 after correction for every attack that was tried."
    )
    assert line(known, "partial_reset", "Strongest") is None
    known["ssd"]["worst_attack"]["worst"]["p_adjusted"] = 0.0005
    assert "p = 0.0005 after correction" in line(known, "ssd", "Strongest")


def test_explain_counts_the_cells_that_remain_exposed(known):
    words = "are known better than retrained models know 97.5 % of such cells."
    assert line(known, "ssd", "Cells") == f"Cells: 3 of 14 {words}"
    known["ssd"]["exposure"]["above_null"] = 0.0
    assert line(known, "ssd", "Cells") == f"Cells: 0 of 14 {words}"
    known["ssd"]["exposure"] = {"refused": "2 retrained models; wanted 3"}
    assert line(known, "ssd", "Cells") is None


@pytest.mark.parametrize(
    ("utility", "words"),
    [
        ("kept", "Utility kept: not worse than the retrained models by more than the margins."),
        ("lost", "Utility lost: worse than the retrained models by more than a margin."),
        ("undetermined", "Utility undetermined: too few models to say whether the loss is within the margins."),
        (None, "Utility not judged."),
    ],
)
def test_explain_judges_the_utility(audits, utility, words):
    audits["ssd"]["utility"]["verdict"] = utility
    assert line(audits, "ssd", "Utility") == words


@pytest.mark.parametrize(("met", "words"), [(True, "met"), (False, "not met"), (None, "not known")])
def test_explain_reports_the_published_criterion_last_and_that_it_decides_nothing(audits, met, words):
    audits["ssd"]["published_criterion"] = met
    last = f"The single-cell paper's own criterion is {words}; it decides nothing here."
    assert said(audits, "ssd")[-1] == last
    assert said(audits, "ssd")[0] == "ssd: NOT FORGOTTEN"


def gone(record, at=()):
    """All paths into nested dicts and lists."""
    for key, inner in record.items() if isinstance(record, dict) else enumerate(record):
        yield (*at, key)
        if isinstance(inner, dict | list):
            yield from gone(inner, (*at, key))


def broken(audits, method):
    """One copy of the audits for each path of one audit and each way in which something can be missing there."""
    yield {**audits, method: {}}
    for path in list(gone(audits[method])):
        for hole in (None, math.nan, "lacking"):
            found = copy.deepcopy(audits)
            inner = found[method]
            for key in path[:-1]:
                inner = inner[key]
            if hole == "lacking":
                del inner[path[-1]]
            elif hole is None or not isinstance(inner[path[-1]], str):  # no word is NaN
                inner[path[-1]] = hole
            yield found


@pytest.mark.parametrize("method", ["ssd", "retrain"])
def test_explain_leaves_no_trace_of_what_is_missing(known, method):
    """Only what is said is damaged: the rest of a record is not read."""
    read = ["verdict", "explanation", "primary", "worst_attack", "exposure", "groups", "utility", "published_criterion"]
    shown = {key: known[method][key] for key in read if key in known[method]}
    few = {name: {"same_group": by["same_group"]} for name, by in known[method]["attacks"].items() if name == "knn"}
    whole = explain({**known, method: {**shown, "attacks": few}}, QUESTION)
    assert whole == explain(known, QUESTION)
    texts = {explain(found, QUESTION) for found in broken({**known, method: {**shown, "attacks": few}}, method)}
    assert len(texts) > (15 if method == "ssd" else 1)
    for text in texts:
        assert text.startswith(QUESTION)
        assert not re.search(r"\b(nan|none|inf|null)\b", text, re.IGNORECASE), text
        for block in text.split("\n\n")[1:]:
            first, *rest = block.split("\n")
            assert re.fullmatch(r"\w+: [A-Z][A-Z -]+", first)
            assert all(one.startswith("  ") and one.strip() for one in rest)


def test_explain_of_an_empty_audit_says_that_nothing_was_judged():
    assert explain({"ssd": {}, "retrain": {}}, "Q") == (
        "Q\n=\n\nssd: NOT JUDGED\n  Utility not judged.\n"
        "  The single-cell paper's own criterion is not known; it decides nothing here."
    )
    assert explain({}, "Q") == "Q\n="


@pytest.mark.parametrize(("verdict", "p", "says"), [
    ("FORGOTTEN", 0.006, True), ("FORGOTTEN", 0.05, False), ("FORGOTTEN", None, False), ("UNDETERMINED", 0.006, False),
])  # fmt: skip
def test_dissent_is_voiced_where_an_attack_finds_cells_that_are_called_forgotten(audits, verdict, p, says):
    worst = {"name": "likelihood_ratio", "auc": 0.632, "p_adjusted": p}
    audits["partial_reset"].update(verdict=verdict, worst_attack={"worst": worst})
    expected = (
        "One attack disagrees: likelihood_ratio still finds them (AUC 0.632, p = 0.0060). The verdict holds "
        "means against margins; single cells show more."
    )
    assert dissent(audits["partial_reset"]) == (expected if says else None)
    assert line(audits, "partial_reset", "One attack disagrees") == (expected if says else None)


def test_dissent_is_silent_without_attacks(audits):
    audits["partial_reset"].update(verdict="FORGOTTEN")
    audits["partial_reset"].pop("worst_attack", None)
    assert dissent(audits["partial_reset"]) is None

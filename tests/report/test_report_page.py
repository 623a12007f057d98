import base64
import re
from html.parser import HTMLParser

import pytest

from scforget.report import page, tables

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Outline(HTMLParser):
    """Checks that tags nest; keeps text, tags and image addresses."""

    def __init__(self, html):
        super().__init__()
        self.stack, self.tags, self.images, self.text, self.cards = [], [], [], [], 0
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        self.cards += tag == "article"
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def scenario(audits, context):
    pictures = {
        "training_curves": "<svg><!-- t --></svg>",
        "umap_ssd": b"\x89PNG 1",
        "own <idea>": "<svg/>",
        "distance_to_target": "<svg>d</svg>",
    }
    return {"context": context, "audits": audits, "figures": pictures, "table": tables.scenario_table(audits)}


def text_of(html):
    return re.sub(r"\s+", " ", " ".join(Outline(html).text))


def test_render_puts_verdicts_before_evidence_and_limits_last(scenario, context):
    html = page.render([scenario], context)
    headings = re.findall(r"<h2>(.*?)</h2>", html)
    assert headings == [
        "What was asked",
        "Verdicts",
        "Evidence",
        "How to read this",
        "Provenance",
        "Limits of the evidence",
    ]
    assert html.index("partial_reset passes") < html.index("What was asked")
    assert Outline(html).cards == 5


def test_render_is_one_closed_file_and_the_same_twice(scenario, context):
    html = page.render([scenario], context)
    assert html == page.render([scenario], context)
    assert html.startswith("<!DOCTYPE html>")
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in Outline(html).images)
    for outside in ("http:", "https:", "<script", "@import", "url(", "<link"):
        assert outside not in html


def test_render_embeds_pictures_in_the_order_of_the_page(scenario, context):
    images = Outline(page.render([scenario], context)).images
    kinds = [image["src"].split(";")[0] for image in images]
    assert kinds == ["data:image/svg+xml", "data:image/png", "data:image/svg+xml", "data:image/svg+xml"]
    bodies = [base64.b64decode(image["src"].split(",")[1]) for image in images]
    assert bodies == [b"<svg>d</svg>", b"\x89PNG 1", b"<svg><!-- t --></svg>", b"<svg/>"]
    assert images[1]["alt"].startswith("Where the data lie: ssd")
    assert images[3]["alt"].startswith("own <idea>")


def test_render_keeps_pictures_of_a_kind_in_the_given_order(scenario, context):
    scenario["figures"] = {"umap_ssd": "<svg/>", "roc_z": "<svg/>", "umap_original": "<svg/>", "roc_a": "<svg/>"}
    summaries = re.findall(r"<summary>(.*?)</summary>", page.render([scenario], context))
    assert summaries[:4] == [
        "ROC curves: z",
        "ROC curves: a",
        "Where the data lie: ssd",
        "Where the data lie: original",
    ]


def test_render_escapes_everything(scenario, context):
    evil = "<script>alert(1)</script>&\"'"
    scenario["context"] = {
        **context,
        "dataset": evil,
        "scenario": evil,
        "kind": evil,
        "params": {evil: evil},
        evil: evil,
    }
    scenario["audits"][evil] = {
        **scenario["audits"]["ssd"],
        "explanation": evil,
        "failure_modes": [evil],
        "failed_seeds": {evil: evil},
        "verdict": evil,
        "utility": {"verdict": evil, "outside": {evil: 1.0}},
        "attacks": {evil: {evil: {"auc": 0.5, "per_seed": [0.5]}}},
        "groups": {evil: 3},
    }
    scenario["figures"] = {evil: "<svg/>"}
    scenario["table"] = tables.scenario_table(scenario["audits"])
    html = page.render([scenario, scenario], context)
    assert "<script" not in html
    assert "script" not in Outline(html).tags
    assert text_of(html).count("<script>alert(1)</script>&\"'") > 10


def test_render_shows_numbers_of_the_record(scenario, context):
    text = text_of(page.render([scenario], context))
    for shown in (
        "14 cells of pbmc68k",
        "17 same_group",
        "5 each of original, retrain",
        "+0.007 (−0.001, 0.015); margin ±0.02",
        "−6.40 (−6.80, −6.00); margin ±1.00",
        "undetermined; marker r 0.831, ELBO −500.1",
        "0.21 of a retrain's passes, 0.21 of a retrain's time, 1.7 s",
        "Failure mode: streisand, collapse",
        "Seed 3 failed: NonFiniteError",
        "0.69 0.70 0.71",
        "kl, inside the group",
        "original: 1, 2, 3, 4, 5; retrain: 11",
        "dvc repro",
        "0123456789abcdef0123456789abcdef",
        "only 14 forget cells",
        "failed seeds, left out of the numbers: 3",
    ):
        assert shown in text


@pytest.mark.parametrize("method", ["ssd", "retrain"])
def test_render_survives_every_gap(gaps, scenario, context, method):
    for audits in gaps(method):
        html = page.render([{**scenario, "audits": audits, "table": tables.scenario_table(audits)}], context)
        assert not re.search(r"\b(nan|None)\b", re.sub(r"<style>.*?</style>", "", html, flags=re.S))


def test_render_survives_almost_nothing():
    for scenarios in (
        [],
        [{}],
        [{"context": None, "audits": None, "figures": None, "table": None}, {"audits": {"x": {}}}],
    ):
        text = text_of(page.render(scenarios, {}))
        assert "Were the cells forgotten?" in text
    assert "No scenario was audited." in text_of(page.render([], {}))


def test_headline_needs_forgotten_and_kept(audits):
    assert page.headline(audits) == "partial_reset passes: cells forgotten, utility kept (1 of 4 methods)."
    audits["ssd"]["verdict"] = "FORGOTTEN"
    assert page.headline(audits).startswith("partial_reset, ssd pass:")
    for method in ("ssd", "partial_reset"):
        audits[method]["utility"]["verdict"] = "undetermined"
    assert page.headline(audits).startswith("No method passes: none of 4")
    assert page.headline({"retrain": audits["retrain"]}) == "No unlearning method was audited."


def test_headline_never_passes_a_reference(audits):
    audits["original"]["verdict"] = "FORGOTTEN"
    assert page.headline({"original": audits["original"]}) == "No unlearning method was audited."


def test_render_says_when_there_was_nothing_to_forget(scenario, context):
    assert "Nothing to forget here" not in page.render([scenario], context)
    scenario["audits"]["original"]["nothing_to_forget"] = True
    html = page.render([scenario], context)
    assert "There was nothing to forget." in html
    assert html.index("Nothing to forget here") < html.index('<div class="cards">')


def test_render_crosses_methods_with_scenarios_only_if_there_are_several(scenario, context):
    assert 'class="overview"' not in page.render([scenario], context)
    other = {**scenario, "context": {**context, "scenario": "scattered"}, "audits": {"ssd": scenario["audits"]["ssd"]}}
    html = page.render([scenario, other], context)
    table = html[html.index('class="overview"') : html.index("</table>")]
    assert table.count("<tr>") == 6
    assert table.count("Not judged") == 4
    assert "pbmc68k / scattered" in table


def test_render_repeats_no_provenance_of_the_whole_run(scenario, context):
    assert page.render([scenario], context).count("MD5 of the data") == 1
    scenario["context"] = {**context, "data_md5": "f" * 32}
    html = page.render([scenario], context)
    assert html.count("MD5 of the data") == 2
    assert html.count("<pre>") == 1


def test_render_lists_low_power_and_open_verdicts_as_limits(scenario, context):
    scenario["audits"]["ssd"]["primary"]["trace"]["power"] = 0.41
    scenario["audits"]["ssd"]["groups"] = {"forget": 400, "same_group": 500}
    html = page.render([scenario], context)
    limits = text_of("<main>" + html[html.index("<h2>Limits") : html.index("</section>\n</main>")] + "</main>")
    assert "ssd: power 0.41 on trace" in limits
    assert "retain_finetune: the verdict is open" in limits
    assert "partial_reset: power" not in limits

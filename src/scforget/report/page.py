"""The report: one HTML page that needs nothing else, verdict first, evidence under it.

Python prepares every number as text; ``page.html`` only lays it out. Pictures become data URIs inside ``<img>``, so
that their ids never meet and nothing in them can run; all other text is escaped by Jinja.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from scforget.report import classification, details, evidence_tables, explain
from scforget.report.details import words
from scforget.report.tables import (
    DASH,
    METRICS,
    REFERENCES,
    Audit,
    Audits,
    bounds,
    dig,
    display,
    display_columns,
    duration,
    items,
    look,
    margin,
    number,
    ordered,
    plain,
    score_in,
    score_of,
    span,
    value,
)

if TYPE_CHECKING:
    import pandas as pd
    from jinja2 import Template

Context = Mapping[str, Any]

KINDS = {
    "cluster": "all training {what} of one class",
    "scattered": "training {what} drawn at random from all groups",
    "subset": "training {what} drawn at random inside one large class",
    "donor": "all training {what} of one donor",
    "query": "the training {what} that a query selects",
    "people": "all training {what} of persons drawn at random",
    "sibling": "as many {what} of another request's kind, none of them that request's",
}
# name -> title, caption, and whether it is open from the start; in the order of the page.
FIGURES = {
    "distance_to_target": (
        "How far from the retrained models",
        "Each point is a method minus the retrained models, with its 90 % interval. An interval inside the shaded "
        "margin matches a retrain; one wholly outside does not. The bar of the retrain is the noise floor.",
        True,
    ),
    "cost_against_trace": (
        "What is left, against what it cost",
        "Trace minus the retrains' trace, with its 90 % interval. Dashed: the cost of a retrain by the same recipe. "
        "Dotted: where the original stands. Best is inside the shaded margin and far to the left.",
        True,
    ),
    "class_accuracies": (
        "Accuracies, beside the retrained classifiers'",
        "Means over models with 95 % intervals. Thin lines: the retrained classifiers. A method that matches them has "
        "each mark on the line of its kind; forget items that are classified worse than by a retrain show the removal.",
        True,
    ),
    "class_distances": (
        "LiRA and distances between answers, minus the retrained classifiers'",
        "Differences with 95 % intervals. 0 is a retrained classifier. LiRA above 0: over-unlearning, forget items "
        "look stranger than to models that never saw them. Distances are between what a classifier answers on forget "
        "items and on unseen ones; below 0 they lie nearer to each other than under a retrain.",
        True,
    ),
    "attack_grid": (
        "Every attack on every method",
        "AUC against controls of the same group. Compare a column with the retrain's column, not with 0.5. Outlined: "
        "the advantage is above the 95 % point of what chance alone gives with this number of them.",
        True,
    ),
    "roc": (
        "ROC curves",
        "Mean over models; the coloured band is the range of the models. Grey: where a curve lies in 95 % of cases "
        "when nothing leaks. The logarithmic axes show the few that an attacker can name with hardly an error.",
        False,
    ),
    "score_histograms": (
        "Scores of the forget set",
        "If it is forgotten, the first row looks like the third. Ticks are single ones, the dark line is the median.",
        False,
    ),
    "cell_scores": (
        "What remains exposed",
        "Each point is a forget cell with its interval over models: how many standard deviations better the models "
        "know it than models that never saw it do. Shaded: where 95 % of them lie under one retrained model. Above it "
        "something of the cell is left; far below, its removal shows.",
        False,
    ),
    "umap": ("Where the data lie", "Latent means or features in two dimensions; triangles: the forget set.", False),
    "training_curves": ("Training curves", "Thin: one seed. Thick: the mean over seeds.", False),
}
PROVENANCE = {
    "command": "Command",
    "git_commit": "Git commit",
    "data_md5": "MD5 of the data",
    "hardware": "Hardware",
    "seeds": "Seeds",
    "versions": "Versions",
}
SMALL_GROUP = 30  # P0's forget set: with 30 against 194 cells chance alone gives an advantage of 0.22 in 1 of 20 cases
LOW_POWER = 0.8  # what the default recipe promises at a true difference of zero


def render(scenarios: Sequence[Mapping[str, Any]], context: Context, sweeps: Sequence[Mapping[str, str]] = ()) -> str:
    """Render the report.

    Parameters
    ----------
    scenarios
        For each: ``context`` (dataset, scenario, kind, n_forget, provenance), ``audits`` (method -> audit), ``figures``
        (name -> SVG text or PNG bytes; a name that starts like one of ``FIGURES`` gets its place and caption) and
        ``table`` (from ``tables.scenario_table``; may be None).
    context
        Provenance of the whole run: command, git_commit, data_md5, params, seeds, hardware, versions; all optional.
    sweeps
        Rows of :func:`scforget.report.sweeps.displayed`, if any settings were searched.

    Returns
    -------
    str
        HTML; the same for the same input.
    """
    views = [_scenario(scenario, context) for scenario in scenarios]
    return _template().render(
        scenarios=views,
        overview=_overview(scenarios) if len(views) > 1 else None,
        provenance=_provenance(context),
        params=_json(context.get("params")),
        sweeps=list(sweeps),
        limits=[limit for scenario in scenarios for limit in _limits(scenario)],
    )


@cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    source = resources.files("scforget.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source)


def _name(scenario: Mapping[str, Any]) -> str:
    parts = (dig(scenario, "context", key) for key in ("dataset", "scenario"))
    return " / ".join(str(part) for part in parts if part is not None) or DASH


def _scenario(scenario: Mapping[str, Any], overall: Context) -> dict[str, Any]:
    """Prepare all that the page says of one scenario."""
    audits: Audits = dig(scenario, "audits") or {}
    context: Context = dig(scenario, "context") or {}
    figures = _figures(dig(scenario, "figures") or {})
    table = dig(scenario, "table")
    return {
        "name": _name(scenario),
        "question": _question(context, audits),
        "headline": headline(audits),
        "nothing": any(dig(audit, "nothing_to_forget") is True for audit in audits.values()),
        "cards": [_card(method, audits) for method in ordered(audits) if method != "retrain"],
        "open": [figure for figure in figures if figure["open"]],
        "closed": [figure for figure in figures if not figure["open"]],
        "columns": display_columns(score_in(audits)),
        "rows": [] if table is None else _rows(table),
        "classification": _classification(audits),
        "details": [table for table in details.tables(audits) if table["rows"]],
        # What the whole run says already is not said again.
        "provenance": _provenance({key: context[key] for key in context if context[key] != overall.get(key)}),
        "params": "" if context.get("params") == overall.get("params") else _json(context.get("params")),
    }


def _question(context: Context, audits: Audits) -> list[tuple[str, str]]:
    """Say what was to be forgotten and with how many cells and models it was judged."""
    groups: dict[str, Any] = {}
    for audit in audits.values():
        groups |= {key: n for key, n in (dig(audit, "groups") or {}).items() if n is not None}
    kind, what = context.get("kind"), items(audits)
    models: dict[str, list[str]] = {}
    for method in ordered(audits):
        models.setdefault(number(value(audits[method], "models"), 0), []).append(method)
    return [
        ("Forget", f"{words(context.get('n_forget'))} {what} of {words(context.get('dataset'))}"),
        ("Which", f"{KINDS.get(str(kind), words(kind)).format(what=what)} ({words(kind)})"),
        ("Compared with", ", ".join(f"{words(n)} {key}" for key, n in groups.items() if key != "forget") or DASH),
        ("Models", "; ".join(f"{n} each of {', '.join(methods)}" for n, methods in models.items()) or DASH),
    ]


def headline(audits: Audits) -> str:
    """Say in one sentence which methods pass: forgotten, with their utility kept."""
    judged = [method for method in ordered(audits) if method not in REFERENCES]
    passing = [
        method
        for method in judged
        if dig(audits[method], "verdict") == "FORGOTTEN" and dig(audits[method], "utility", "verdict") == "kept"
    ]
    if not judged:
        return "No unlearning method was audited."
    if not passing:
        return f"No method passes: none of {len(judged)} has forgotten the {items(audits)} and kept its utility."
    verb = "passes" if len(passing) == 1 else "pass"
    share = f"{len(passing)} of {len(judged)} methods"
    return f"{', '.join(passing)} {verb}: {items(audits)} forgotten, utility kept ({share})."


def _card(method: str, audits: Audits) -> dict[str, Any]:
    """Prepare the card of one method: verdict, why, and the numbers behind it."""
    audit = audits[method]
    seen = look(dig(audit, "verdict"))
    outside = dig(audit, "utility", "outside")
    metrics = [
        f"{name} {number(value(outside, metric), digits)}"
        for metric, (name, digits, _) in METRICS[score_of(audit)].items()
    ]
    published = {True: "met", False: "not met"}.get(dig(audit, "published_criterion"), DASH)
    facts = [
        ("Membership", _evidence(audit, "membership", 3)),
        ("Trace", _evidence(audit, "trace", 2)),
        ("Strongest attack", _strongest(method, audits)),
        (f"Most exposed {items(audits)}", _exposed(audit)),
        ("Utility", f"{words(dig(audit, 'utility', 'verdict'))}; {', '.join(metrics)}"),
        ("Cost", _cost(audit)),
        ("Published criterion", published),
    ]
    modes = dig(audit, "failure_modes") or []
    failed = dig(audit, "failed_seeds") or {}
    notes = [f"Failure mode: {words(modes)}"] if modes else []
    notes += [f"Seed {seed} failed: {why}" for seed, why in sorted(failed.items(), key=str)]
    return {
        "method": method,
        "look": seen,
        "explanation": words(dig(audit, "explanation")),
        "dissent": explain.dissent(audit),
        "facts": facts,
        "notes": notes,
        "reference": method in REFERENCES,
    }


def _evidence(audit: Audit, key: str, digits: int) -> str:
    found = dig(audit, "primary", key)
    if math.isnan(value(found, "difference")):
        return DASH
    difference = number(value(found, "difference"), digits, sign=True)
    interval = span(bounds(found, "interval"), digits)
    return f"{difference} ({interval}); margin ±{number(value(found, 'margin'), 2)}"


def _strongest(method: str, audits: Audits) -> str:
    """Name the attack that tells the forget cells best, with the price of having looked at all."""
    found = dig(audits[method], "worst_attack", "worst")
    if dig(found, "name") is None:
        return DASH
    name, auc, p = found["name"], value(found, "auc"), value(found, "p_adjusted")
    target = number(evidence_tables.target_auc(audits, name))
    return f"{name}, AUC {number(auc)} (retrain {target}), p adjusted {number(p, 4)}"


def _exposed(audit: Audit) -> str:
    found = evidence_tables.exposed(audit)
    return DASH if found is None else f"{found[0]} of {found[1]} above what a retrain shows"


def _cost(audit: Audit) -> str:
    ratios = {"passes": value(audit, "cost", "passes_ratio"), "time": value(audit, "cost", "seconds_ratio")}
    parts = [f"{number(x, 2)} of a retrain's {what}" for what, x in ratios.items() if math.isfinite(x)]
    return ", ".join([*parts, duration(value(audit, "cost", "seconds"))])


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    shown = display(table).to_dict("records")
    return [
        {"look": look(verdict), "cells": {key: str(text).split("\n") for key, text in row.items()}}
        for row, verdict in zip(shown, table["verdict"], strict=True)
    ]


def _classification(audits: Audits) -> dict[str, Any] | None:
    """Prepare the table of classifiers; None where none was audited."""
    if not classification.known(audits):
        return None
    table = classification.class_table(audits)
    shown = classification.display(table).to_dict("records")
    rows = [
        {"look": look(verdict), "cells": {key: str(text).split("\n") for key, text in row.items()}}
        for row, verdict in zip(shown, table["verdict"], strict=True)
    ]
    return {"columns": classification.COLUMNS, "rows": rows, "note": classification.note(audits)}


def _figures(figures: Mapping[str, str | bytes]) -> list[dict[str, Any]]:
    """Order the pictures as in ``FIGURES`` (of a kind, as given; unknown ones last); turn each into a data URI."""
    views = []
    for name in figures:
        kind = next((known for known in FIGURES if name.startswith(known)), None)
        title, caption, is_open = FIGURES[kind] if kind else (name, "", False)
        rest = name.removeprefix(kind or name).strip("_-/: ")
        picture = figures[name]
        data, mime = (picture, "png") if isinstance(picture, bytes) else (picture.encode(), "svg+xml")
        views.append(
            {
                "title": f"{title}: {rest}" if rest else title,
                "caption": caption.replace(" %", "\u00a0%"),  # no line break inside "95 %"
                "open": is_open,
                "uri": f"data:image/{mime};base64,{base64.b64encode(data).decode()}",
                "rank": list(FIGURES).index(kind) if kind else len(FIGURES),
            }
        )
    return sorted(views, key=lambda view: view["rank"])


def _overview(scenarios: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Cross all methods with all scenarios, so that a reader of many scenarios sees the whole first."""
    methods: dict[str, None] = {}
    for scenario in scenarios:
        methods |= dict.fromkeys(method for method in ordered(dig(scenario, "audits") or {}) if method != "retrain")
    rows = [(m, [look(dig(scenario, "audits", m, "verdict")) for scenario in scenarios]) for m in methods]
    return {"head": [_name(scenario) for scenario in scenarios], "rows": rows}


def _limits(scenario: Mapping[str, Any]) -> list[str]:
    """List what weakens the evidence of a scenario: few cells, low power, failed seeds, open verdicts."""
    audits: Audits = dig(scenario, "audits") or {}
    name, found = _name(scenario), []
    for group, what in (("forget", f"forget {items(audits)}"), ("same_group", "controls of the same group")):
        sizes = [value(audit, "groups", group) for audit in audits.values()]
        if (size := min((n for n in sizes if math.isfinite(n)), default=math.inf)) < SMALL_GROUP:
            found.append(f"{name}: only {number(size, 0)} {what}; an AUC of so few moves by chance.")
    for method in ordered(audits):
        for key in ("membership", "trace"):
            if (power := value(audits[method], "primary", key, "power")) < LOW_POWER:
                found.append(f"{name}, {method}: power {number(power, 2)} on {key}; too few models to show a match.")
        if failed := dig(audits[method], "failed_seeds"):
            found.append(f"{name}, {method}: failed seeds, left out of the numbers: {', '.join(map(str, failed))}.")
        if dig(audits[method], "verdict") == "UNDETERMINED":
            found.append(f"{name}, {method}: the verdict is open; that is neither a pass nor a failure.")
    if audits and not margin(audits, "membership"):
        found.append(f"{name}: no margin on membership is recorded, so nothing here was decided by it.")
    return found


def _provenance(context: Context) -> list[tuple[str, str]]:
    known = [(label, words(context[key])) for key, label in PROVENANCE.items() if context.get(key) is not None]
    asked = {*PROVENANCE, "params", "dataset", "scenario", "kind", "n_forget"}
    return known + [(str(key), words(context[key])) for key in sorted(set(context) - asked, key=str)]


def _json(params: object) -> str:
    return json.dumps(plain(params), indent=2, sort_keys=True, ensure_ascii=False) if params else ""

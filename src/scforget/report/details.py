"""The report's fold-out tables: all that is known of the deciding statistics, the attacks, the utility, the cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from scforget.report import evidence_tables
from scforget.report.tables import DASH, Audits, bounds, dig, duration, number, ordered, span, value


def primary(audits: Audits) -> dict[str, Any]:
    """Tabulate all that is known of the two statistics that decide."""
    head = ["method", "statistic", "mean", "retrains' mean", "difference", "90 % interval", "margin"]
    head += ["p (TOST)", "power", "noise floor", "side", "models needed (times as many)"]
    rows = []
    for method in ordered(audits):
        for key, digits in (("membership", 3), ("trace", 2)):
            found = dig(audits[method], "primary", key)
            if found is None:
                continue
            numbers = [number(value(found, part), digits) for part in ("mean", "target_mean", "difference")]
            rest = [number(value(found, part), digits) for part in ("margin", "p_tost", "power", "noise_floor")]
            needed = words(dig(found, "models_needed"))
            interval = span(bounds(found, "interval"), digits)
            rows.append([method, key, *numbers, interval, *rest, words(dig(found, "side")), needed])
    return {"title": "The two statistics that decide", "head": head, "rows": rows}


def attacks(audits: Audits) -> dict[str, Any]:
    """Tabulate every attack against every control group, model by model."""
    head = ["attack", "controls", "method", "AUC", "interval", "advantage", "null mean, 95 %", "AUC of each model"]
    rows = [
        [
            attack,
            group,
            method,
            number(value(found, "auc")),
            span(bounds(found, "interval")),
            number(value(found, "advantage")),
            span((value(found, "null", "mean"), value(found, "null", "q95"))),
            " ".join(number(value({"auc": auc}, "auc"), 2) for auc in dig(found, "per_seed") or []) or DASH,
        ]
        for method in ordered(audits)
        for attack, groups in (dig(audits[method], "attacks") or {}).items()
        for group, found in (groups or {}).items()
    ]
    place = {method: i for i, method in enumerate(ordered(audits))}
    return {
        "title": "Every attack, every control group, every model",
        "head": head,
        "rows": sorted(rows, key=lambda row: (row[0], row[1], place[row[2]])),
    }


def utility(audits: Audits) -> dict[str, Any]:
    """Tabulate utility outside and inside the forgotten group, a column for each method."""
    methods = ordered(audits)
    found = [
        (where, metric)
        for where in ("outside", "inside")
        for metric in sorted({m for audit in audits.values() for m in dig(audit, "utility", where) or {}})
    ]
    rows = [
        [
            f"{metric}, {where} the group",
            *(f"{number(value(audits[m], 'utility', where, metric))}" for m in methods),
        ]
        for where, metric in found
    ]
    return {"title": "Utility on unseen data", "head": ["mean over models", *methods], "rows": rows}


def costs(audits: Audits) -> dict[str, Any]:
    """Tabulate what each model took, and how far its parameters moved; means over models."""
    head = ["method", "models", "time", "steps", "passes over F", "passes over R", "÷ retrain", "moved", "memory (MB)"]
    head += ["facts"]
    rows = []
    for method in ordered(audits):
        found = dig(audits[method], "cost") or {}
        passes = [
            f"{number(value(found, f'forward_{name}'), 0)} + {number(value(found, f'backward_{name}'), 0)}"
            for name in ("forget", "retain")
        ]
        rows.append(
            [
                method,
                number(value(found, "models"), 0),
                duration(value(found, "seconds")),
                number(value(found, "steps"), 0),
                *passes,
                number(value(found, "passes_ratio"), 2),
                number(value(found, "relative_change"), 3),
                number(value(found, "peak_memory_mb"), 0),
                words(dig(found, "facts")),
            ]
        )
    return {"title": "What it took: forward + backward passes over the forget set (F) and the retain set (R)",
            "head": head, "rows": rows}  # fmt: skip


def tables(audits: Audits) -> list[dict[str, Any]]:
    """Every fold-out table of a scenario: its ``title``, ``head``, ``rows`` of text, and a ``note`` where it needs one.

    Those of :mod:`scforget.report.evidence_tables` are there where the audits know of them.
    """
    return [primary(audits), attacks(audits), *evidence_tables.tables(audits), utility(audits), costs(audits)]


def words(found: object) -> str:
    """Write any plain value as words; an en dash when there is none."""
    if isinstance(found, Mapping):
        return "; ".join(f"{key}: {words(found[key])}" for key in found) or DASH
    if isinstance(found, list | tuple):
        return ", ".join(map(words, found)) or DASH
    if found is None or found == "" or (isinstance(found, float) and math.isnan(found)):
        return DASH
    return f"{found:.3g}" if isinstance(found, float) else str(found)

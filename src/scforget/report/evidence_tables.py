"""Fold-out tables of what stands under a verdict: worst attack, populations, learned attack, gene list, cells."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from scforget.report.tables import (
    DASH,
    PRIMARY_GROUP,
    SCORES,
    Audit,
    Audits,
    bounds,
    dig,
    number,
    ordered,
    score_in,
    score_of,
    span,
    value,
)

Table = dict[str, Any]

#: The controls that the published attacker was trained and scored on.
PUBLISHED_GROUP = "matched_knn"


def text(found: object) -> str:
    """Write a name; an en dash when there is none."""
    return DASH if found is None or found == "" or (isinstance(found, float) and math.isnan(found)) else str(found)


def many(found: object) -> list[Any]:
    """Return a list as it is, and anything else as an empty one."""
    return found if isinstance(found, list) else []


def target_auc(audits: Audits, attack: object) -> float:
    """AUC of the same attack on the retrained models, against controls of the same group; NaN when not known."""
    return value(audits.get("retrain"), "attacks", str(attack), PRIMARY_GROUP, "auc")


def target_interval(audits: Audits, attack: object) -> tuple[float, float]:
    """Interval of :func:`target_auc`."""
    return bounds(audits.get("retrain"), "attacks", str(attack), PRIMARY_GROUP, "interval")


def exposed(audit: Audit) -> tuple[int, int] | None:
    """Number of forget cells above what a retrained model shows, and of all forget cells; None when not known."""
    share, size = value(audit, "exposure", "above_null"), value(audit, "groups", "forget")
    return (round(share * size), round(size)) if math.isfinite(share) and math.isfinite(size) else None


def _counts(*sizes: float) -> str:
    return " and ".join(number(size, 0) for size in sizes)


def worst(audits: Audits) -> Table:
    """Tabulate the strongest attack on each method, its p-value corrected for the number of attacks tried."""
    head = ["method", "attack", "AUC", "interval", "retrains' AUC", "retrains' interval", "p", "p adjusted"]
    head += ["attacks", "constant attacks", "permutations"]
    rows = []
    for method in ordered(audits):
        found = dig(audits[method], "worst_attack")
        if dig(found, "worst") is None:
            continue
        name = dig(found, "worst", "name")
        interval = bounds(audits[method], "attacks", str(name), PRIMARY_GROUP, "interval")
        p, adjusted = (number(value(found, "worst", key), 4) for key in ("p", "p_adjusted"))
        constant = ", ".join(map(text, many(dig(found, "constant"))))
        rows.append(
            [
                method,
                text(name),
                number(value(found, "worst", "auc")),
                span(interval),
                number(target_auc(audits, name)),
                span(target_interval(audits, name)),
                p,
                adjusted,
                str(len(many(dig(found, "attacks")))),
                constant or ("none" if isinstance(dig(found, "constant"), list) else DASH),
                number(value(found, "draws"), 0),
            ]
        )
    note = (
        "Against controls of the same group, by permuting who is a forget cell: p of this attack alone, and adjusted "
        "for having picked the strongest. It says whether cells can be told apart, not whether that is more than under "
        "a retrain: compare the retrains' AUC. Learned attacks are left out, as permuting would need a new training; "
        "constant ones give every cell the same score."
    )
    return {"title": "The worst attack, with the price of having looked at all", "note": note, "head": head,
            "rows": rows}  # fmt: skip


def _measures(audit: Audit, retrains: float) -> Iterator[tuple[str, str, str, str]]:
    """Measure, value, what stands beside it, and numbers of models of both kinds."""
    found, own = dig(audit, "population"), value(audit, "models")
    same = _counts(value(found, "models"), value(found, "models"))
    median, largest = (number(value(found, "epsilon", key), 2) for key in ("median", "max"))
    yield "Kaggle ε of a cell, median", median, f"largest {largest}", same
    ceiling = span(bounds({"range": [dig(found, "forgetting_ceiling", end) for end in ("low", "high")]}, "range"))
    quality = f"retrain against retrain {number(value(found, 'forgetting_ceiling', 'mean'))} ({ceiling})"
    yield "Forgetting quality", number(value(found, "forgetting_quality")), quality, same
    klom = dig(found, "klom")
    excess = f"{number(value(klom, 'excess'), 2)} ({span((value(klom, 'low'), value(klom, 'high')), 2)})"
    beside = f"retrain against retrain {number(value(klom, 'null'), 2)}; excess {excess}"
    yield "KLOM (nats)", number(value(klom, "value"), 2), beside, _counts(*2 * [value(klom, "models")])
    lira = dig(found, "u_lira")
    reason = f"refused: {text(dig(lira, 'reason'))}"
    measured = math.isfinite(value(lira, "auc"))
    known = span(bounds(lira, "interval")) if measured else reason
    sizes = _counts(value(lira, "n_unlearned"), value(lira, "n_retrained"))
    yield "U-LiRA AUC", number(value(lira, "auc")), known if lira is not None else DASH, sizes
    score = score_of(audit)
    statistics = {"membership": "membership AUC", f"mean_{score}": f"mean {SCORES[score]}"}
    for key, name in statistics.items():
        bound = dig(found, "epsilon_bounds", key)
        most = f"could prove at most {number(value(bound, 'ceiling'), 2)}"
        sizes = _counts(value(bound, "n_positives"), value(bound, "n_negatives"))
        yield f"ε at least, from the {name}", number(value(bound, "epsilon"), 2), most, sizes
    for key, name in statistics.items():
        delta = dig(found, "delta_at_epsilon_1", key)
        back = f"the other way round {number(value(delta, 'backward'))}"
        yield f"δ at ε = 1, from the {name}", number(value(delta, "forward")), back, _counts(own, retrains)


def populations(audits: Audits) -> Table:
    """Tabulate what compares whole populations of models, measure by measure; empty rows are left out."""
    head = ["measure", "method", "value", "beside it", "models, unlearned and retrained"]
    retrains = value(audits.get("retrain"), "models")
    found = [
        (place, measure, method, shown, beside, sizes)
        for method in ordered(audits)
        if dig(audits[method], "population") is not None
        for place, (measure, shown, beside, sizes) in enumerate(_measures(audits[method], retrains))
        if shown != DASH or beside.startswith("refused: ")
    ]
    note = (
        "Numbers of so few models are coarse. Kaggle's ε says how well a cell's score tells both kinds of models apart "
        "and is 50 where some rule makes no error. Forgetting quality: 0 is the worst, and a perfect method reaches "
        "the value of retrain against retrain, not 1. Ranges in brackets are over splits of these models, not over new "
        "ones. Proven ε: 0 is no evidence, not privacy. δ: an estimate from fitted normal distributions, biased "
        "upwards by few models, no bound and without interval."
    )
    rows = [list(row[1:]) for row in sorted(found, key=lambda row: row[0])]
    return {"title": "Populations of models", "note": note, "head": head, "rows": rows}


def learned(audits: Audits) -> Table:
    """Tabulate the attacks that are trained on the labels, with the null of shuffled ones."""
    head = ["method", "mlp AUC", "interval", "shuffled labels, mean and range", "AUC of one attacker", "interval"]
    head += ["variance between models", "between attacker seeds", "models × seeds", "published attacker's AUC"]
    head += ["interval"]
    shuffled = dig(audits.get("retrain"), "mlp_null")
    null = f"{number(value(shuffled, 'mean'))} ({span((value(shuffled, 'low'), value(shuffled, 'high')))})"
    rows = []
    for method in ordered(audits):
        found = dig(audits[method], "attacker_variance")
        mlp = dig(audits[method], "attacks", "mlp", PRIMARY_GROUP)
        published = dig(audits[method], "attacks", "published_mlp", PUBLISHED_GROUP)
        if found is None and mlp is None and published is None:
            continue
        rows.append(
            [
                method,
                number(value(mlp, "auc")),
                span(bounds(mlp, "interval")),
                null if shuffled is not None else DASH,
                number(value(found, "mean")),
                span(bounds(found, "interval")),
                number(value(found, "originals"), 4),
                number(value(found, "audit"), 4),
                " × ".join(number(value(found, key), 0) for key in ("n_originals", "n_audit")),
                number(value(published, "auc")),
                span(bounds(published, "interval")),
            ]
        )
    note = (
        "The learned attacker is trained for each model, and never on the cell that it scores. Shuffled labels: what "
        "it reaches on a retrained model when there is nothing to find. The published attacker is trained once, on the "
        "first original, against the paper's controls, and scored on forget cells most of which it learned from: its "
        "AUC on the first original is high without any leak, and on other models chance is no evidence of privacy."
    )
    return {"title": "The learned attack", "note": note, "head": head, "rows": rows}


def gene_list(audits: Audits) -> Table:
    """Tabulate the attack on the list of modelled genes, which needs no model."""
    found = dig(audits.get("retrain"), "gene_list") or {}
    groups = dig(audits.get("retrain"), "groups")
    rows = [
        [
            str(control),
            number(value(found, control, "auc")),
            span(bounds(found, control, "interval")),
            _counts(value(groups, "forget"), value(groups, control)),
        ]
        for control in found
    ]
    note = (
        "Are forget cells more typical of the modelled genes than their controls are? An interval without 0.5 against "
        "controls of the same group says that the choice of genes gives cells away in every model, retrained ones too. "
        "Other controls are other kinds of cells, and differ for that reason alone."
    )
    return {"title": "Before any model: the gene list", "note": note,
            "head": ["controls", "AUC", "interval", "forget cells and controls"], "rows": rows}  # fmt: skip


def cells(audits: Audits) -> Table:
    """Tabulate the tenth of the forget cells that is best known, worst first."""
    rows = [
        [
            method,
            number(value(cell, "rank"), 0),
            *(text(dig(cell, key)) for key in ("cell", "label", "donor")),
            number(value(cell, "z"), 2),
            span((value(cell, "low"), value(cell, "high")), 2),
            span(bounds(audits[method], "exposure", "null_band"), 2),
        ]
        for method in ordered(audits)
        for cell in many(dig(audits[method], "exposure", "worst"))
    ]
    note = (
        "z: how many standard deviations of the retrained models a cell's likelihood lies above theirs, mean over "
        "models. The band is what a single retrained model shows. Cells were picked for their z, so a new model's "
        "would be lower."
    )
    head = ["method", "rank", "cell", "label", "donor", "z", "interval", "null band"]
    return {"title": "Which cells remain exposed: the worst tenth", "note": note, "head": head, "rows": rows}


def _tenth(audit: Audit) -> float:
    """Share of the forget cells that the worst tenth holds, which few cells round up."""
    size = value(audit, "groups", "forget")
    return math.ceil(0.1 * size) / size if size > 0 else math.nan


def kinds(audits: Audits) -> Table:
    """Tabulate exposure by kind of cell and by donor."""
    rows = [
        [
            method,
            word,
            text(dig(group, "name")),
            number(value(group, "cells"), 0),
            number(value(group, "mean"), 2),
            span(bounds(audits[method], "exposure", "null_band"), 2),
            number(value(group, "worst_share"), 2),
            number(_tenth(audits[method]), 2),
        ]
        for method in ordered(audits)
        for key, word in (("by_label", "kind"), ("by_donor", "donor"))
        for group in many(dig(audits[method], "exposure", key))
    ]
    note = "The null band is that of one cell under one retrained model: a mean over cells that is outside is far out."
    head = ["method", "by", "name", "cells", "mean z", "null band", "share in the worst tenth", "if all were alike"]
    return {"title": "Exposure by kind and by donor", "note": note, "head": head, "rows": rows}


def donors(audits: Audits) -> Table:
    """Tabulate the attack on whole donors."""
    rows = []
    for method in ordered(audits):
        found = dig(audits[method], "exposure", "donor_auc")
        if found is None:
            continue
        auc = value(found, "auc")
        beside = span(bounds(found, "interval")) if math.isfinite(auc) else f"refused: {text(dig(found, 'reason'))}"
        sizes = _counts(*(len(many(dig(found, key))) for key in ("member_donors", "control_donors")))
        rows.append([method, number(auc), beside, sizes])
    note = "Donors differ in biology too: without a leak the AUC is 0.5 only where donors were drawn at random."
    return {"title": "Donors told apart as a whole", "note": note,
            "head": ["method", "AUC", "interval", "donors, forgotten and unseen"], "rows": rows}  # fmt: skip


def single(audits: Audits) -> Table:
    """Tabulate the AUC of each model with its interval over cells, for the attack and the controls that decide."""
    rows, score = [], score_in(audits)
    for method in ordered(audits):
        found = dig(audits[method], "attacks", score, PRIMARY_GROUP)
        intervals = many(dig(found, "per_seed_intervals"))
        known = zip_longest(many(dig(audits[method], "seeds")), many(dig(found, "per_seed")), intervals)
        rows += [
            [method, text(seed), number(value({"auc": auc}, "auc")), span(bounds({"interval": ends}, "interval"))]
            for seed, auc, ends in known
            if intervals
        ]
    return {"title": f"Single models: {SCORES[score]} attack against controls of the same group",
            "note": "Intervals are DeLong's, over cells; the AUC of no leak is 0.5.",
            "head": ["method", "seed", "AUC", "interval"], "rows": rows}  # fmt: skip


def tables(audits: Audits) -> list[Table]:
    """Return each of these tables that has something to say."""
    found = [make(audits) for make in (worst, single, learned, populations, gene_list, cells, kinds, donors)]
    return [table for table in found if table["rows"]]

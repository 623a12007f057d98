"""An audit in plain words, for those who have to sign it."""

from __future__ import annotations

from scforget.report import evidence_tables
from scforget.report.tables import Audit, Audits, bounds, dig, items, look, number, ordered, span, value

_WHAT = {
    "membership": ("Membership", "are these very {what} remembered?", 3),
    "trace": ("Trace", "is anything of them left, the knowledge of their kind included?", 2),
}
_SIGNIFICANT = 0.05
_SIDES = {
    "inside": "inside",
    "undecided": "neither inside nor outside",
    "beyond": "outside",
    "opposite": "outside",
}
_UTILITY = {
    "kept": "kept: not worse than the retrained models by more than the margins",
    "lost": "lost: worse than the retrained models by more than a margin",
    "undetermined": "undetermined: too few models to say whether the loss is within the margins",
}


def _statistic(audit: Audit, name: str) -> str | None:
    found = dig(audit, "primary", name)
    if found is None:
        return None
    title, question, digits = _WHAT[name]
    question = question.format(what=items({"": audit}))
    difference = number(value(found, "difference"), digits, sign=True)
    interval, margin = span(bounds(found, "interval"), digits), number(value(found, "margin"), 2)
    where = _SIDES.get(str(dig(found, "side")), "not compared with")
    floor, power = number(value(found, "noise_floor"), digits), number(value(found, "power"), 2)
    return (
        f"{title} ({question}) {difference} from the retrained models, 90 % interval {interval}: {where} the margin "
        f"of ±{margin}. Two halves of the retrained models differ by {floor}; a perfect method would pass with a "
        f"chance of {power}."
    )


def _strongest(audit: Audit, audits: Audits) -> str | None:
    worst = dig(audit, "worst_attack", "worst")
    name = dig(worst, "name")
    if name is None:
        return None
    base = number(evidence_tables.target_auc(audits, name))
    return (
        f"Strongest attack: {name}, AUC {number(value(worst, 'auc'), 3)} ({base} on the retrained models); "
        f"p = {number(value(worst, 'p_adjusted'), 4)} after correction for every attack that was tried."
    )


def dissent(audit: Audit) -> str | None:
    """Say so where cells are called forgotten and an attack finds them all the same, corrected p below 5 %."""
    worst = dig(audit, "worst_attack", "worst")
    if dig(audit, "verdict") != "FORGOTTEN" or not value(worst, "p_adjusted") < _SIGNIFICANT:
        return None
    return (
        f"One attack disagrees: {dig(worst, 'name')} still finds them (AUC {number(value(worst, 'auc'), 3)}, "
        f"p = {number(value(worst, 'p_adjusted'), 4)}). The verdict holds means against margins; single "
        f"{items({'': audit})} show more."
    )


def _exposed(audit: Audit) -> str | None:
    found = evidence_tables.exposed(audit)
    if found is None:
        return None
    what = items({"": audit})
    head = what.capitalize()
    return f"{head}: {found[0]} of {found[1]} are known better than retrained models know 97.5 % of such {what}."


def explain(audits: Audits, question: str) -> str:
    """Say what the audit of one forget request found, method by method.

    Parameters
    ----------
    audits
        method -> audit.
    question
        What was to be forgotten, the heading.

    Returns
    -------
    str
        Text for a terminal: for each method its verdict, why, the two statistics that decide with interval, margin,
        noise floor and power, the strongest attack with its corrected p-value, what remains exposed, utility,
        and the published criterion, which decides nothing.
    """
    blocks = [question, "=" * len(question)]
    for method in ordered(audits):
        audit = audits[method]
        if method == "retrain":
            continue
        utility = dig(audit, "utility", "verdict")
        published = {True: "met", False: "not met"}.get(dig(audit, "published_criterion"), "not known")
        lines = [
            f"{method}: {look(dig(audit, 'verdict')).words.upper()}",
            str(dig(audit, "explanation") or ""),
            _statistic(audit, "membership"),
            _statistic(audit, "trace"),
            _strongest(audit, audits),
            dissent(audit),
            _exposed(audit),
            f"Utility {_UTILITY.get(str(utility), 'not judged')}.",
            f"The single-cell paper's own criterion is {published}; it decides nothing here.",
        ]
        blocks.append("\n  ".join(line for line in lines if line))
    return "\n\n".join([blocks[0] + "\n" + blocks[1], *blocks[2:]])

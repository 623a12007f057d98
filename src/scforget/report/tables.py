"""Tables of audits: the summary that goes into Git, and one table a scenario for CSV, terminal, Markdown and page.

An audit is a plain dict (one method in one scenario) in which any value may be missing; a missing number is NaN in a
table, null in the summary and an en dash before a reader's eyes.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

Audit = Mapping[str, Any]
Audits = Mapping[str, Audit]

DASH = "–"
REFERENCES = ("original", "retrain")
PRIMARY_GROUP = "same_group"
#: Scores that the primary statistics may rest on, as they are written.
SCORES = {"elbo": "ELBO", "confidence": "confidence"}
#: Utility metrics of a scenario's table by its score: name, digits and meaning of each.
METRICS = {
    "elbo": {
        "marker_r": ("marker r", 3, "marker-gene correlation, unseen cells outside the group"),
        "elbo": ("ELBO", 1, "nats per cell, unseen cells outside the group"),
    },
    "confidence": {"accuracy": ("accuracy", 3, "share classified rightly, unseen and test items outside the group")},
}


@dataclass(frozen=True)
class Look:
    """How a verdict is worded and drawn; the shape says it again for readers who see or print no colour.

    Attributes
    ----------
    words
        For people, in sentence case.
    glyph, marker
        The same shape as text and as a matplotlib marker.
    filled
        Whether the marker is solid.
    colour
        Hex, at least 4.5:1 against white, apart from the others for the common kinds of colour blindness.
    terminal
        A rich style.
    """

    words: str
    glyph: str
    marker: str
    filled: bool
    colour: str
    terminal: str

    @property
    def fill(self) -> str:
        """Colour of the inside of the marker."""
        return self.colour if self.filled else "white"


LOOKS = {
    "FORGOTTEN": Look("Forgotten", "●", "o", True, "#0b5a94", "bold green"),
    "NOT_FORGOTTEN": Look("Not forgotten", "■", "s", True, "#b3400a", "bold red"),
    "OVER_FORGOTTEN": Look("Over-forgotten", "◆", "D", True, "#8e3a80", "bold magenta"),
    "UNDETERMINED": Look("Undetermined", "○", "o", False, "#595959", "bold yellow"),
    "TARGET": Look("Target (retrain)", "▲", "^", True, "#1a1a1a", "bold"),
}
UNJUDGED = Look("Not judged", "□", "s", False, "#595959", "dim")


def look(verdict: object) -> Look:
    """Return how a verdict is shown; unknown and missing ones are shown as not judged."""
    words = str(verdict or "").split()
    return LOOKS.get(words[0].upper(), UNJUDGED) if words else UNJUDGED


def dig(record: object, *keys: str) -> Any:
    """Follow keys into nested dicts; None as soon as one is missing, so that gaps never crash a report."""
    for key in keys:
        if not isinstance(record, Mapping):
            return None
        record = record.get(key)
    return record


def value(record: object, *keys: str) -> float:
    """Return the number at a path, or the ``mean`` of the dict there; NaN when there is none."""
    found = dig(record, *keys)
    if isinstance(found, Mapping):
        found = found.get("mean")
    return float(found) if isinstance(found, Real) and not isinstance(found, bool) else math.nan


def bounds(record: object, *keys: str) -> tuple[float, float]:
    """Return the two ends of the interval at a path, in ascending order; (NaN, NaN) when there is none."""
    found = dig(record, *keys)
    if not isinstance(found, list | tuple) or len(found) != 2:
        return math.nan, math.nan
    low, high = (value({"end": end}, "end") for end in found)
    return (high, low) if high < low else (low, high)


def score_of(audit: object) -> str:
    """Name of the score that an audit's primary statistics rest on; the ELBO where it does not say."""
    found = str(dig(audit, "score"))
    return found if found in SCORES else "elbo"


def items(audits: Audits) -> str:
    """What was forgotten, a plural: cells by a VAE, items of whatever kind by a classifier."""
    return "cells" if score_in(audits) == "elbo" else "items"


def score_in(audits: Audits) -> str:
    """Name of the score of a scenario, in which all methods have one."""
    return next((score_of(audit) for audit in audits.values() if dig(audit, "score") in SCORES), "elbo")


def margin(audits: Audits, key: str) -> float:
    """Return the margin of a primary statistic (``membership`` or ``trace``) in a scenario; 0 when none is known."""
    return max((m for a in audits.values() if (m := value(a, "primary", key, "margin")) > 0), default=0.0)


def number(x: float, digits: int = 3, *, sign: bool = False) -> str:
    """Write a number for people: fixed digits, a true minus, scientific when huge, an en dash for NaN."""
    if math.isnan(x):
        return DASH
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    style = "+" if sign else ""
    text = f"{x:{style}.2e}" if abs(x) >= 1e6 else f"{x:{style}.{digits}f}"
    if float(text) == 0:  # "-0.000" would say more than is known
        text = text.lstrip("+-")
    return text.replace("-", "−")


def span(pair: tuple[float, float], digits: int = 3) -> str:
    """Write an interval for people; an en dash when neither end is known."""
    return DASH if all(map(math.isnan, pair)) else f"{number(pair[0], digits)}, {number(pair[1], digits)}"


def duration(seconds: float) -> str:
    """Write seconds for people, in the unit that needs the fewest digits."""
    if not math.isfinite(seconds):
        return number(seconds)
    for limit, unit, size, digits in ((10, "s", 1, 1), (120, "s", 1, 0), (7200, "min", 60, 0)):
        if seconds < limit:
            return f"{number(seconds / size, digits)} {unit}"
    return f"{number(seconds / 3600, 1)} h"


def ordered(audits: Audits) -> list[str]:
    """Return the methods as they are listed everywhere: original, retrain, then by distance to retrain."""

    def key(method: str) -> tuple[int, float, str]:
        if method in REFERENCES:
            return REFERENCES.index(method), 0.0, method
        distance = abs(value(audits[method], "primary", "membership", "difference"))
        return len(REFERENCES), math.inf if math.isnan(distance) else distance, method

    return sorted(audits, key=key)


def plain(found: object, digits: int = 6) -> Any:
    """Turn a value into JSON that diffs well: sorted keys, floats of `digits` significant digits, NaN as null."""
    if isinstance(found, Mapping):
        return {str(key): plain(found[key], digits) for key in sorted(found, key=str) if key != "per_seed"}
    if isinstance(found, list | tuple):
        return [plain(item, digits) for item in found]
    if isinstance(found, bool) or found is None or isinstance(found, str):
        return found
    if isinstance(found, Integral):
        return int(found)
    if isinstance(found, Real):
        return float(f"{float(found):.{digits}g}") if math.isfinite(float(found)) else None
    return str(found)


def summary(audits: Mapping[str, Audits]) -> dict[str, Any]:
    """Summarise all audits as the small JSON that is kept in Git.

    Parameters
    ----------
    audits
        ``dataset/scenario`` -> method -> audit.

    Returns
    -------
    dict
        scenario -> method -> ``verdict``, ``attacks`` (id -> AUC, interval and null against ``same_group`` controls),
        ``primary`` (differences from the retrains), ``utility``, ``classification`` (of classifiers alone), ``cost``
        (``passes_ratio`` and ``steps``, which are deterministic, and ``seconds``, which are not and so keep two
        digits). Keys sorted, floats of 6 significant digits, no NaN.
    """

    def one(audit: Audit) -> dict[str, Any]:
        attacks = dig(audit, "attacks") or {}
        cost, found = dig(audit, "cost"), dig(audit, "classification")
        kept = {key: plain(dig(found, key)) for key in ("accuracy", "distance", "kaggle")}
        kept |= {"lira": {key: plain(dig(found, "lira", key)) for key in ("auc", "reading", "tnr")}}
        return {
            **({"classification": kept} if found is not None else {}),
            "attacks": {
                str(name): {key: plain(dig(attacks, name, PRIMARY_GROUP, key)) for key in ("auc", "interval", "null")}
                for name in sorted(attacks)
            },
            "cost": {
                "passes_ratio": plain(dig(cost, "passes_ratio")),
                "seconds": plain(dig(cost, "seconds"), digits=2),
                "steps": plain(dig(cost, "steps")),
            },
            "primary": {
                str(name): {key: plain(dig(found, key)) for key in ("difference", "interval", "margin", "power")}
                for name, found in sorted((dig(audit, "primary") or {}).items())
            },
            "utility": plain(dig(audit, "utility")),
            "verdict": plain(dig(audit, "verdict")),
        }

    return {
        str(scenario): {str(method): one(audits[scenario][method]) for method in sorted(audits[scenario])}
        for scenario in sorted(audits)
    }


def _row(method: str, audit: Audit, score: str) -> dict[str, Any]:
    attack = dig(audit, "attacks", score, PRIMARY_GROUP)
    primary = dig(audit, "primary")
    auc_lo, auc_hi = bounds(attack, "interval")
    membership_lo, membership_hi = bounds(primary, "membership", "interval")
    trace_lo, trace_hi = bounds(primary, "trace", "interval")
    return {
        "method": method,
        "failed": len(dig(audit, "failed_seeds") or {}),
        "auc": value(attack, "auc"),
        "auc_lo": auc_lo,
        "auc_hi": auc_hi,
        "signed": value(attack, "signed"),
        "advantage": value(attack, "advantage"),
        "null_mean": value(attack, "null", "mean"),
        "null_q95": value(attack, "null", "q95"),
        "membership_difference": value(primary, "membership", "difference"),
        "membership_lo": membership_lo,
        "membership_hi": membership_hi,
        "trace_difference": value(primary, "trace", "difference"),
        "trace_lo": trace_lo,
        "trace_hi": trace_hi,
        "verdict": dig(audit, "verdict"),
        "utility": dig(audit, "utility", "verdict"),
        **{metric: value(audit, "utility", "outside", metric) for metric in METRICS[score]},
        "seconds": value(audit, "cost", "seconds"),
        "seconds_ratio": value(audit, "cost", "seconds_ratio"),
        "passes_ratio": value(audit, "cost", "passes_ratio"),
    }


def scenario_table(audits: Audits) -> pd.DataFrame:
    """Tabulate one scenario, a row for each method, as bare numbers for CSV.

    Parameters
    ----------
    audits
        method -> audit.

    Returns
    -------
    DataFrame
        Rows as ``ordered``. AUC, ``signed`` (AUC minus one half) and ``advantage`` with the mean and 95 % point of its
        null are of the primary score against ``same_group`` controls; the differences are method minus retrain with
        their 90 % intervals; the utility metrics (:data:`METRICS`) are of unseen cells outside the forgotten group.
    """
    import pandas as pd

    score = score_in(audits)
    rows = [_row(method, audits[method], score) for method in ordered(audits)]
    return pd.DataFrame(rows, columns=list(_row("", {}, score)))


def display_columns(score: str) -> dict[str, str]:
    """Return the columns of a displayed scenario table, and what each means."""
    return {
        "method": "unlearning method",
        "AUC": f"{SCORES[score]} attack against controls of the same group, with its interval",
        "signed": "AUC minus one half; above 0 the forget cells look like members",
        "advantage": "2·|AUC − ½|; below it the mean and the 95 % point when nothing leaks",
        "membership − retrain": "AUC minus the retrained models' AUC, with its 90 % interval",
        "trace − retrain": "trace minus the retrained models' trace, with its 90 % interval",
        "verdict": "privacy only",
        "utility": "non-inferiority to the retrain",
        **{name: meaning for name, _, meaning in METRICS[score].values()},
        "time": "wall time of one model",
        "time ÷ retrain": "as a fraction of a retrain by the same recipe",
        "passes ÷ retrain": "forward and backward passes, as a fraction of a retrain's",
    }


def _score_shown(table: pd.DataFrame) -> str:
    """Score of the scenario that a table is of, told by its utility metrics."""
    return next(score for score, metrics in METRICS.items() if set(metrics) <= set(table.columns))


def display(table: pd.DataFrame) -> pd.DataFrame:
    r"""Write a scenario table for people: strings, with the interval or null below its value after a ``\n``."""
    import pandas as pd

    score = _score_shown(table)
    rows = [
        {
            "method": f"{row['method']}\n{row['failed']} diverged" if row["failed"] else row["method"],
            "AUC": f"{number(row['auc'])}\n{span((row['auc_lo'], row['auc_hi']))}",
            "signed": number(row["signed"], sign=True),
            "advantage": f"{number(row['advantage'])}\nnull {number(row['null_mean'])}, {number(row['null_q95'])}",
            "membership − retrain": f"{number(row['membership_difference'], sign=True)}\n"
            + span((row["membership_lo"], row["membership_hi"])),
            "trace − retrain": f"{number(row['trace_difference'], 2, sign=True)}\n"
            + span((row["trace_lo"], row["trace_hi"]), 2),
            "verdict": look(row["verdict"]).words if isinstance(row["verdict"], str) else DASH,
            "utility": row["utility"] if isinstance(row["utility"], str) else DASH,
            **{name: number(row[metric], digits) for metric, (name, digits, _) in METRICS[score].items()},
            "time": duration(row["seconds"]),
            "time ÷ retrain": number(row["seconds_ratio"], 2),
            "passes ÷ retrain": number(row["passes_ratio"], 2),
        }
        for row in table.to_dict("records")
    ]
    return pd.DataFrame(rows, columns=list(display_columns(score)))


def to_rich(table: pd.DataFrame, title: str = "") -> Table:
    """Lay a scenario table out for a terminal of 120 columns; the verdict is both coloured and worded.

    Related columns share one, on up to three lines, since so many columns do not fit side by side.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(title) if title else None, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    grid.add_column("method", overflow="fold", min_width=18, max_width=24)
    for header in (
        "AUC\ninterval",
        "advantage\nsigned\nnull, 95 %",
        "membership\n− retrain\ninterval",
        "trace\n− retrain\ninterval",
    ):
        grid.add_column(header, justify="right", no_wrap=True)
    grid.add_column("verdict", overflow="fold", min_width=14, max_width=16)
    metrics = [name for name, _, _ in METRICS[_score_shown(table)].values()]
    for header in ("\n".join(["utility", *metrics]), "time\n÷ retrain\npasses ÷"):
        grid.add_column(header, justify="right", no_wrap=True)
    for row, raw in zip(display(table).to_dict("records"), table.to_dict("records"), strict=True):
        advantage, null = row["advantage"].split("\n")
        cells = {
            "method": str(row["method"]),
            "AUC": row["AUC"].replace(", ", "\n"),
            "advantage": f"{advantage}\n{row['signed']}\n{null.removeprefix('null ')}",
            "membership": row["membership − retrain"].replace(", ", "\n"),
            "trace": row["trace − retrain"].replace(", ", "\n"),
            "verdict": row["verdict"].upper(),
            "utility": "\n".join(row[name] for name in ("utility", *metrics)),
            "cost": f"{row['time']}\n{row['time ÷ retrain']}\n{row['passes ÷ retrain']}",
        }
        style = look(raw["verdict"]).terminal
        grid.add_row(*(Text(text, style=style if name == "verdict" else "") for name, text in cells.items()))
    return grid


def to_markdown(table: pd.DataFrame) -> str:
    """Write a scenario table as a GitHub table."""
    return markdown(display(table))


def markdown(shown: pd.DataFrame) -> str:
    """Write a table of strings as a GitHub table; names are escaped, so that none can break out of its cell."""

    def cell(text: object) -> str:
        return html.escape(str(text), quote=False).replace("|", "\\|").replace("\n", " · ")

    lines = [list(shown.columns), ["---"] * len(shown.columns), *shown.to_numpy().tolist()]
    return "".join("| " + " | ".join(map(cell, line)) + " |\n" for line in lines)


def to_csv(table: pd.DataFrame) -> str:
    """Write a scenario table as CSV with 6 significant digits; missing values are empty."""
    text: str = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    return text

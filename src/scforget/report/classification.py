"""The table and pictures of classifiers: what the classifier papers print, each number beside the retrained models'.

Audits are those of :mod:`scforget.report.tables`; what is read here stands under their key ``classification``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scforget.report.comparisons import mark, verdict_legend
from scforget.report.figures import BAND, DASHES, SERIES, SOFT, new_figure, styled
from scforget.report.tables import DASH, Audit, Audits, bounds, dig, look, number, ordered, span, value

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

#: The challenge's limit: slower than this share of a retraining is no unlearning.
TIME_LIMIT = 0.2
SETS = ("retain", "forget", "test")
SCORERS = ("official", "suprun")
_DISTANCES = {
    "wasserstein": "W₁",
    "cramer": "Cramér",
    "wasserstein_output": "W₁ of outputs",
    "cramer_output": "Cramér of outputs",
}

COLUMNS = {
    "method": "unlearning method",
    "verdict": "privacy only",
    "utility": "non-inferiority to the retrain",
    "retain": "accuracy on retained training items, with its interval over models",
    "forget": "accuracy on the items to be forgotten",
    "test": "accuracy on test items",
    "LiRA TNR": "share of forget items called non-members when 1 % of the retained ones may be",
    "LiRA − retrain": "LiRA TNR minus the retrained models' (where there are too few retained items, its AUC); "
    "above 0 is over-unlearning, no success",
    "LiRA AUC": "chance that a retained item scores above a forget item; 0.5: forget items look like members",
    "trace − retrain": "trace minus the retrained models' trace, with its 90 % interval",
    "W₁ − retrain": "Wasserstein distance between confidences on forget and unseen items, minus the retrained models'; "
    "below it that of the class probabilities (sliced)",
    "Cramér − retrain": "the same of the Cramér (energy) distance",
    "F official": "Kaggle forgetting quality on the confidence of the true class, interval over items; below it what "
    "retrains against each other reach, and its range over the choice of models",
    "F suprun": "the same by the community scorer, on the confidence in the own answer",
    "final score": "F times the ratios of retain and test accuracy to the retrained models'; official, then suprun",
    "U-LiRA": "AUC of telling unlearned from retrained models, 0.5 when alike, with its interval",
    "time ÷ retrain": f"above {TIME_LIMIT:g} the challenge would refuse the method",
    "passes ÷ retrain": "passes over items, as a fraction of a retrain",
}


def known(audits: Audits) -> bool:
    """Whether any audit of a scenario is of classifiers."""
    return any(isinstance(dig(audit, "classification"), Mapping) for audit in audits.values())


def _ends(row: dict[str, Any], name: str, record: object, *keys: str) -> None:
    row[name] = value(record, *keys)
    parent = dig(record, *keys)
    row[f"{name}_lo"], row[f"{name}_hi"] = bounds(parent, "interval")


def _difference(row: dict[str, Any], name: str, record: object) -> None:
    row[name] = value(record, "difference")
    row[f"{name}_lo"], row[f"{name}_hi"] = bounds(record, "difference_interval")


def _row(method: str, audit: Audit) -> dict[str, Any]:
    found = dig(audit, "classification")
    row: dict[str, Any] = {
        "method": method,
        "verdict": dig(audit, "verdict"),
        "utility": dig(audit, "utility", "verdict"),
    }
    for name in SETS:
        _ends(row, name, found, "accuracy", name)
        row[f"{name}_difference"] = value(found, "accuracy", name, "difference")
    for name in ("tnr", "auc"):
        _ends(row, f"lira_{name}", found, "lira", name)
        _difference(row, f"lira_{name}_difference", dig(found, "lira", name))
    row["lira_reading"] = dig(found, "lira", "reading")
    row["trace_difference"] = value(audit, "primary", "trace", "difference")
    row["trace_lo"], row["trace_hi"] = bounds(audit, "primary", "trace", "interval")
    for name in _DISTANCES:
        row[name] = value(found, "distance", name)
        _difference(row, f"{name}_difference", dig(found, "distance", name))
    for scorer in SCORERS:
        scored = dig(found, "kaggle", scorer)
        row[f"f_{scorer}"] = value(scored, "forgetting_quality")
        row[f"f_{scorer}_lo"], row[f"f_{scorer}_hi"] = bounds(scored, "interval")
        # of the retrained models against themselves: what a perfect method reaches
        own = ("ceilings", scorer) if method == "retrain" else (scorer, "forgetting_ceiling")
        row[f"ceiling_{scorer}"] = value(found, "kaggle", *own)
        for end, name in (("lo", "low"), ("hi", "high")):
            row[f"ceiling_{scorer}_{end}"] = value(found, "kaggle", *own, name)
        row[f"final_{scorer}"] = value(scored, "final_score")
        row[f"final_{scorer}_lo"], row[f"final_{scorer}_hi"] = bounds(scored, "final_interval")
    row["u_lira"] = value(audit, "population", "u_lira", "auc")
    row["u_lira_lo"], row["u_lira_hi"] = bounds(audit, "population", "u_lira", "interval")
    row["seconds_ratio"] = value(audit, "cost", "seconds_ratio")
    row["too_slow"] = bool(row["seconds_ratio"] > TIME_LIMIT) and method not in ("original", "retrain")
    row["passes_ratio"] = value(audit, "cost", "passes_ratio")
    return row


def class_table(audits: Audits) -> pd.DataFrame:
    """Tabulate the classifiers of one scenario, a row for each method, as bare numbers for CSV.

    Parameters
    ----------
    audits
        method -> audit.

    Returns
    -------
    DataFrame
        Rows as :func:`~scforget.report.tables.ordered`. Accuracies, LiRA and U-LiRA with their intervals
        (``…_lo``, ``…_hi``); every ``…_difference`` is method minus retrained models; ``f_SCORER``,
        ``ceiling_SCORER`` and ``final_SCORER`` are Kaggle's; ``too_slow`` says that the method took more than a fifth
        of a retraining.
    """
    import pandas as pd

    return pd.DataFrame([_row(method, audits[method]) for method in ordered(audits)], columns=list(_row("", {})))


def _two(first: str, second: str) -> str:
    return first if second == DASH else f"{first}\n{second}"


def _signed(row: Mapping[Any, Any], name: str, digits: int = 3) -> str:
    """A difference, and its interval below."""
    return _two(number(row[name], digits, sign=True), span((row[f"{name}_lo"], row[f"{name}_hi"]), digits))


def _rate(row: Mapping[Any, Any], name: str) -> str:
    return _two(number(row[name]), span((row[f"{name}_lo"], row[f"{name}_hi"])))


def _lira(row: Mapping[Any, Any]) -> str:
    """Distance of LiRA's TNR, or of its AUC where there is no TNR, from the retrained models'."""
    if math.isfinite(row["lira_tnr_difference"]):
        return _signed(row, "lira_tnr_difference")
    if math.isfinite(row["lira_auc_difference"]):
        return f"AUC {_signed(row, 'lira_auc_difference')}"
    return DASH


def _ceiling(row: Mapping[Any, Any], scorer: str) -> str:
    """What retrain against retrain reaches; below it the range of that over the choice of models."""
    ends = row[f"ceiling_{scorer}_lo"], row[f"ceiling_{scorer}_hi"]
    return _two(number(row[f"ceiling_{scorer}"]), span(ends))


def display(table: pd.DataFrame) -> pd.DataFrame:
    r"""Write a table of classifiers for people: strings, what belongs to a value below it after a ``\n``."""
    import pandas as pd

    rows = []
    for row in table.to_dict("records"):
        shown = {
            "method": str(row["method"]),
            "verdict": look(row["verdict"]).words if isinstance(row["verdict"], str) else DASH,
            "utility": row["utility"] if isinstance(row["utility"], str) else DASH,
            **{name: _rate(row, name) for name in SETS},
            "LiRA TNR": _rate(row, "lira_tnr"),
            "LiRA − retrain": _lira(row),
            "LiRA AUC": _rate(row, "lira_auc"),
            "trace − retrain": _two(
                number(row["trace_difference"], 2, sign=True), span((row["trace_lo"], row["trace_hi"]), 2)
            ),
            "W₁ − retrain": _two(
                number(row["wasserstein_difference"], 2, sign=True),
                number(row["wasserstein_output_difference"], 3, sign=True),
            ),
            "Cramér − retrain": _two(
                number(row["cramer_difference"], 2, sign=True), number(row["cramer_output_difference"], 3, sign=True)
            ),
            **{f"F {scorer}": f"{_rate(row, f'f_{scorer}')}\nof {_ceiling(row, scorer)}" for scorer in SCORERS},
            "final score": "\n".join(number(row[f"final_{scorer}"]) for scorer in SCORERS),
            "U-LiRA": _rate(row, "u_lira"),
            "time ÷ retrain": number(row["seconds_ratio"], 2) + ("\ntoo slow" if row["too_slow"] else ""),
            "passes ÷ retrain": number(row["passes_ratio"], 2),
        }
        rows.append(shown)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def note(audits: Audits) -> str:
    """Say above a table of classifiers how to read it, and what could not be measured."""
    said = (
        "Classifiers, as their papers count. Compare with the retrained models' row, not with the best: LiRA above it "
        "is over-unlearning, F is to be read beside what retrain against retrain reaches."
    )
    found = dig(next(iter(audits.values()), None), "classification", "lira")
    if isinstance(found, Mapping) and found.get("tnr") is None:
        said += (
            f" No TNR: {number(value(found, 'items', 'retain'), 0)} retained items, and "
            f"{number(value(found, 'retain_needed'), 0)} are needed for an FNR of 1 %."
        )
    refusals = {
        str(text)
        for audit in audits.values()
        for scorer in SCORERS
        if (text := dig(audit, "classification", "kaggle", scorer, "refused")) is not None
    }
    return " ".join([said, *(f"No F: {text}." for text in sorted(refusals))])


def _around(row: Mapping[Any, Any], name: str, digits: int = 3, *, sign: bool = False) -> str:
    """Write a number and half the width of its interval, which is symmetric."""
    half = (row[f"{name}_hi"] - row[f"{name}_lo"]) / 2
    return number(row[name], digits, sign=sign) + (f" ±{number(half, digits)}" if math.isfinite(half) else "")


def to_rich(table: pd.DataFrame, title: str = "") -> Table:
    """Lay a table of classifiers out for a terminal of 120 columns, related columns on several lines of one."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(title) if title else None, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    grid.add_column("method", overflow="fold", min_width=14, max_width=20)
    grid.add_column("verdict\nutility", overflow="fold", min_width=12, max_width=15)
    for header in (
        "retain\nforget\ntest",
        "LiRA TNR\n− retrain\nAUC\n− retrain",
        "− retrain:\ntrace\nW₁\nCramér",
        "F official\nF suprun\nfinal",
        "U-LiRA\ninterval",
        "time ÷\npasses ÷",
    ):
        grid.add_column(header, justify="right", no_wrap=True)
    for row, raw in zip(display(table).to_dict("records"), table.to_dict("records"), strict=True):
        verdict = Text(row["verdict"].upper(), style=look(raw["verdict"]).terminal)
        lira = [(name, sign) for rate in ("tnr", "auc") for name, sign in ((rate, False), (f"{rate}_difference", True))]
        cells = [
            [_around(raw, name) for name in SETS],
            [_around(raw, f"lira_{name}", sign=sign) for name, sign in lira],
            ["", _around({**raw, "trace": raw["trace_difference"]}, "trace", 2, sign=True)]
            + [_around(raw, f"{name}_difference", 2, sign=True) for name in ("wasserstein", "cramer")],
            [f"{number(raw[f'f_{scorer}'])} of {number(raw[f'ceiling_{scorer}'])}" for scorer in SCORERS]
            + [row["final score"].replace("\n", ", ")],
            [row["U-LiRA"]],
            [row["time ÷ retrain"], row["passes ÷ retrain"]],
        ]
        texts = [Text("\n".join(lines)) for lines in cells]
        grid.add_row(Text(row["method"]), verdict.append(f"\n{row['utility']}", style=""), *texts)
    return grid


def _measured(audits: Audits, *keys: str) -> list[tuple[int, str, Mapping[str, Any]]]:
    """Row, method and record of all methods that have one at a path."""
    found = enumerate(ordered(audits))
    records = ((row, method, dig(audits[method], "classification", *keys)) for row, method in found)
    return [(row, method, record) for row, method, record in records if isinstance(record, Mapping)]


@styled
def accuracies(audits: Audits, title: str = "") -> Figure:
    """Draw accuracy on retained, forget and test items, a row for each method, over the retrained models'."""
    figure = new_figure(7.2, 1.5 + 0.42 * len(audits), title)
    axes = figure.subplots()
    looks = {"retain": (SERIES[0], "o", True), "forget": (SERIES[1], "s", False), "test": (SERIES[2], "^", True)}
    for place, (name, (colour, marker, filled)) in enumerate(looks.items()):
        target = value(audits.get("retrain"), "classification", "accuracy", name)
        if math.isfinite(target):
            axes.axvline(target, color=colour, linewidth=0.9, linestyle=DASHES[place], zorder=1)
        for row, _, record in _measured(audits, "accuracy", name):
            mean, (low, high) = value(record, "mean"), bounds(record, "interval")
            reach = np.nan_to_num(np.abs([[mean - low], [high - mean]]))
            axes.errorbar(mean, row + 0.22 * (place - 1), xerr=reach, color=colour, marker=marker, markersize=6,
                          mfc=colour if filled else "white", capsize=2, zorder=3)  # fmt: skip
        axes.errorbar([], [], color=colour, marker=marker, mfc=colour if filled else "white", linestyle="", label=name)
    for row in range(0, len(audits), 2):
        axes.axhspan(row - 0.5, row + 0.5, color=BAND, alpha=0.5, linewidth=0, zorder=0)
    axes.set_yticks(range(len(audits)), ordered(audits))
    axes.set(xlabel="accuracy (lines: retrained models)", ylim=(len(audits) - 0.4, -0.6))
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _difference_panel(axes: Axes, audits: Audits, keys: tuple[str, ...], label: str) -> None:
    axes.axvline(0, color=SOFT, linewidth=0.7)
    for row, method, record in _measured(audits, *keys):
        if method == "retrain":
            centre, (low, high) = 0.0, bounds(record, "interval")
            low, high = low - value(record, "mean"), high - value(record, "mean")
        else:
            centre, (low, high) = value(record, "difference"), bounds(record, "difference_interval")
        if math.isfinite(centre):
            reach = np.nan_to_num(np.abs([[centre - low], [high - centre]]))
            mark(axes, centre, row, dig(audits[method], "verdict"), xerr=reach)
    axes.set(xlabel=label, ylim=(len(audits) - 0.4, -0.6))


@styled
def distances(audits: Audits, title: str = "") -> Figure:
    """Draw LiRA and the distances between answers on forget and unseen items, minus the retrained models'."""
    figure = new_figure(8.4, 1.7 + 0.34 * len(audits), title)
    panels = figure.subplots(1, 3, sharey=True)
    measured = any(math.isfinite(value(record, "mean")) for _, _, record in _measured(audits, "lira", "tnr"))
    lira = ("tnr", "LiRA TNR at 1 % FNR") if measured else ("auc", "LiRA AUC")
    _difference_panel(panels[0], audits, ("lira", lira[0]), "←  remembered    over-unlearned  →")
    panels[0].set_title(lira[1], fontweight="bold")
    for axes, name in zip(panels[1:], ("wasserstein", "cramer_output"), strict=True):
        _difference_panel(axes, audits, ("distance", name), "difference from the retrains")
    panels[1].set_title("W₁ of confidences", fontweight="bold")
    panels[2].set_title("Cramér of class probabilities", fontweight="bold")
    panels[0].set_yticks(range(len(audits)), ordered(audits))
    verdict_legend(figure, audits)
    return figure


def pictures(audits: Audits, title: str = "") -> dict[str, Figure]:
    """Both pictures by file stem; none where no classifier was audited."""
    if not known(audits):
        return {}
    return {"class_accuracies": accuracies(audits, title), "class_distances": distances(audits, title)}

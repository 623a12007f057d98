"""The guide to methods: for each kind of forget request, which method does it, at what cost, and how surely.

Made from audits alone. A method is recommended where its verdict is FORGOTTEN and the utility is kept everywhere that
the kind of request was tried; the cheapest of these in passes over cells; where there is none, retraining.
"""

from __future__ import annotations

import html
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scforget.arrays import FloatArray
from scforget.audit.intervals import clopper_pearson
from scforget.errors import DataError
from scforget.exhibits.paper_scatter import Primary, per_model
from scforget.report.tables import Audit, Audits, dig, duration, look, margin, number, ordered, span, value

if TYPE_CHECKING:
    import pandas as pd

#: What is forgotten, by the kind of scenario; in this order in the guide.
KINDS = {
    "cluster": "a whole cell type",
    "subset": "part of a cell type",
    "scattered": "scattered cells",
    "donor": "a donor",
}
LEVEL = 0.95


def _others_mean(values: FloatArray) -> FloatArray:
    """Mean of all the others, for each; what it is judged against must not hold itself."""
    return (values.sum() - values) / (len(values) - 1)


def within_margins(audits: Audits, method: str) -> tuple[int, int]:
    """How many models lie, each by itself, within both margins of the retrains' mean, and of how many.

    Parameters
    ----------
    audits
        method -> audit, ``retrain`` among them. A retrain's AUC is compared with the other retrains' mean; its trace
        is measured against the others already.

    Returns
    -------
    successes, models
        (0, 0) where a statistic, its margin or the retrains (fewer than two) are not known.

    Notes
    -----
    The verdict is on the mean over models; a request is answered with one model. Retrains vary too, so that not all
    of them succeed: their own share is what a method's is to be held against, not 1.
    """
    inside: list[Any] = []
    keys: tuple[Primary, ...] = ("membership", "trace")
    for key in keys:
        models, target = per_model(audits.get(method), key), per_model(audits.get("retrain"), key)
        wide = margin(audits, key)
        if not models.size or target.size < 2 or not wide:
            return 0, 0
        itself = method == "retrain" and key == "membership"
        inside.append(np.abs(models - (_others_mean(models) if itself else target.mean())) <= wide)
    both = inside[0] & inside[1]
    return int(both.sum()), int(both.size)


def _row(kind: str, place: str, audits: Audits, method: str) -> dict[str, Any]:
    audit: Audit = audits[method]
    successes, models = within_margins(audits, method)
    low, high = clopper_pearson(successes, models, LEVEL) if models else (np.nan, np.nan)
    needed = [value(audit, "primary", key, "models_needed") for key in ("membership", "trace")]
    outside = ("utility", "outside")
    base = audits.get("retrain")
    costs = dig(audit, "cost") if method != "original" else None  # what training it cost is not the question
    kept = dig(audit, "utility", "verdict") if method != "retrain" else "target"
    return {
        "kind": kind,
        "place": place,
        "method": method,
        "models": int(np.nan_to_num(value(audit, "models"))),
        "failed": len(dig(audit, "failed_seeds") or {}),
        "successes": successes,
        "judged": models,
        "success": successes / models if models else np.nan,
        "success_lo": low,
        "success_hi": high,
        "verdict": dig(audit, "verdict"),
        "models_needed": float(np.max(needed)),
        "utility": kept,
        "elbo_difference": value(audit, *outside, "elbo") - value(base, *outside, "elbo"),
        "marker_r_difference": value(audit, *outside, "marker_r") - value(base, *outside, "marker_r"),
        "passes_ratio": value(costs, "passes_ratio"),
        "seconds": value(costs, "seconds"),
        "seconds_ratio": value(costs, "seconds_ratio"),
        "nothing_to_forget": bool(dig(audits.get("original"), "nothing_to_forget")),
    }


def _fits(rows: pd.DataFrame, places: int) -> bool:
    """Whether a method is FORGOTTEN with the utility kept and no model lost at each of so many places of one kind."""
    good = (rows["verdict"] == "FORGOTTEN") & (rows["utility"] == "kept") & (rows["failed"] == 0)
    return len(rows) == places and bool(good.all()) and bool(np.isfinite(rows["passes_ratio"]).all())


def choose(table: pd.DataFrame) -> dict[str, str]:
    """Choose a method for each kind in a guide: the cheapest that fits at all its places, else ``retrain``.

    Cost is the mean over places of passes over cells ÷ those of a retrain; one that costs as much as a retrain is none.
    """
    chosen = {}
    for kind, rows in table.groupby("kind", sort=False):
        places = rows["place"].nunique()
        costs = {
            str(method): float(own["passes_ratio"].mean())
            for method, own in rows.groupby("method", sort=True)
            if method not in ("original", "retrain") and _fits(own, places)
        }
        costs = {method: cost for method, cost in costs.items() if cost < 1}
        chosen[str(kind)] = min(costs, key=lambda method: (costs[method], method)) if costs else "retrain"
    return chosen


def guide(audits_by_place: Mapping[str, Audits], kinds: Mapping[str, str]) -> pd.DataFrame:
    """Tabulate what every method did at every place, by kind of forget request, as bare numbers.

    Parameters
    ----------
    audits_by_place
        ``dataset/scenario`` -> method -> audit with its ``cost`` and ``failed_seeds``.
    kinds
        ``dataset/scenario`` -> ``cluster``, ``subset``, ``scattered`` or ``donor``.

    Returns
    -------
    DataFrame
        A row for each kind, place and method: ``success``, the share of its models that lie each within the margins
        (:func:`within_margins`) with its Clopper-Pearson 95 % interval; the audit's ``verdict`` and ``utility``, with
        the differences from the retrains' held-out ELBO (nats per cell) and marker r; ``passes_ratio`` and
        ``seconds_ratio`` (1 = as dear as a retrain), ``seconds``; ``models_needed``, the multiple of today's models
        that should decide an open verdict (NaN: no practical number would); ``recommended``.

    Raises
    ------
    DataError
        If a place has no kind, or one that is not known.
    """
    import pandas as pd

    order = list(KINDS)
    if unknown := {place: kinds.get(place) for place in audits_by_place if kinds.get(place) not in KINDS}:
        raise DataError("kinds of forget requests", unknown, f"one of {order} for each")
    places = sorted(audits_by_place, key=lambda place: (order.index(kinds[place]), place))
    rows = [
        _row(kinds[place], place, audits_by_place[place], method)
        for place in places
        for method in ordered(audits_by_place[place])
    ]
    table = pd.DataFrame(rows, columns=list(_row("", "", {"": {}}, "")))
    chosen = choose(table)
    table["recommended"] = [chosen[row["kind"]] == row["method"] for row in rows]
    return table


def _names(rows: pd.DataFrame, chosen: pd.Series[bool]) -> str:
    return ", ".join(f"`{name}`" for name in dict.fromkeys(rows.loc[chosen, "method"]))


def _open(row: Mapping[Hashable, Any]) -> str:
    """Name a method whose verdict is open, and say how many models should decide."""
    times = float(row["models_needed"])
    words = f"{times:.0f} times as many models should decide" if times > 1 else "no practical number of models decides"
    return f"`{row['method']}` in {row['place']} ({words})"


def _advice(kind: str, rows: pd.DataFrame, method: str) -> list[str]:
    """Say in plain sentences what to do for one kind of request, and what is not known."""
    methods = rows[~rows["method"].isin(["original", "retrain"])]
    places = rows["place"].nunique()
    where = f"in all {places} requests tried" if places > 1 else "in the one request tried"
    if method == "retrain":
        lines = [f"**Retrain.** No method is shown to forget {KINDS[kind]} and to keep the utility {where}."]
    else:
        own = methods[methods["method"] == method]
        share = ", ".join(f"{row['successes']} of {row['judged']}" for row in own.to_dict("records"))
        lines = [
            f"**Use `{method}`.** It is the cheapest method that is shown to forget {KINDS[kind]} and to keep the "
            f"utility {where}: {number(100 * float(own['passes_ratio'].mean()), 0)} % of a retrain's passes over "
            f"cells, {duration(float(own['seconds'].mean()))} a model. Of its models, each judged by itself, {share} "
            f"lie within the margins."
        ]
    retrains = rows[rows["method"] == "retrain"]
    if len(retrains):
        share = ", ".join(f"{row['successes']} of {row['judged']}" for row in retrains.to_dict("records"))
        lines.append(f"Of the retrained models themselves {share} do.")
    idle = [str(place) for place, own in rows.groupby("place", sort=False) if own["nothing_to_forget"].any()]
    if idle:
        lines.append(
            f"In {', '.join(idle)} the original is not shown to remember the cells: forgetting is easy to show there."
        )
    lost = (methods["verdict"] == "FORGOTTEN") & (methods["utility"] != "kept")
    if lost.any():
        lines.append(f"Forgotten, but the utility is lost or undetermined: {_names(methods, lost)}.")
    undetermined = methods[methods["verdict"] == "UNDETERMINED"]
    if len(undetermined):
        names = ", ".join(_open(row) for row in undetermined.to_dict("records"))
        lines.append(f"Undetermined, which is neither success nor failure: {names}.")
    return lines


def _table(rows: pd.DataFrame) -> list[str]:
    def cell(text: object) -> str:
        return html.escape(str(text), quote=False).replace("|", "\\|").replace("\n", " ")

    header = ["request", "method", "verdict", "utility", "models within the margins", "ELBO − retrain",
              "marker r − retrain", "passes ÷ retrain", "time", "time ÷ retrain"]  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for row in rows.to_dict("records"):
        interval = span((row["success_lo"], row["success_hi"]), 2)
        share = f"{row['successes']} of {row['judged']} ({interval})" if row["judged"] else "not measured"
        cells = [
            row["place"],
            f"**{row['method']}**" if row["recommended"] else row["method"],
            look(row["verdict"]).words,
            row["utility"] or "–",
            f"{share}, {row['failed']} diverged" if row["failed"] else share,
            number(row["elbo_difference"], 1, sign=True),
            number(row["marker_r_difference"], 3, sign=True),
            number(row["passes_ratio"], 2),
            duration(row["seconds"]),
            number(row["seconds_ratio"], 2),
        ]
        lines.append("| " + " | ".join(map(cell, cells)) + " |")
    return lines


def to_markdown(table: pd.DataFrame) -> str:
    """Write a guide for people: what to do for each kind of request in plain sentences, and the table behind it."""
    chosen = choose(table)
    parts = [
        "# Which method for which request",
        "Recommended is the cheapest method, in passes over cells, whose models are on average equivalent to models "
        "retrained without the cells (verdict: forgotten, two one-sided tests at 5 %) and whose utility is kept; where "
        "there is none, retrain. Nothing is corrected for the number of methods that were tried, and what held for "
        "these requests need not hold for another: audit the model that you release. The share of models within the "
        "margins has a Clopper-Pearson 95 % interval.",
    ]
    for kind, words in KINDS.items():
        rows = table[table["kind"] == kind]
        parts.append(f"## To forget {words}")
        if rows.empty:
            parts.append("Not measured: no scenario of this kind was run. Retrain.")
            continue
        parts += [" ".join(_advice(kind, rows, chosen[kind])), "\n".join(_table(rows))]
    return "\n\n".join(parts) + "\n"

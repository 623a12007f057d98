"""The table of claims: what the single-cell paper says of Fisher overlap, what we measure, and whether it survives.

The rule, fixed on pbmc68k before any other data set was looked at:

1. *not measured*: a stage or a kind of model that the claim needs is absent.
2. *falls*: the statement that the number carries is refuted by our interval (all of it on the wrong side).
3. *undetermined*: the interval of the statement lies on both sides.
4. *survives*: the published number lies in our interval, or the claim is a statement without a number, and it holds.
5. *changes*: the published number lies outside, but the statement holds. A number that carries no statement of its own
   and lies outside also changes.

Intervals are of 95 %: percentiles of a bootstrap of cells and models where they can be had, ends of a ratio or a
difference from the intervals of its parts, and elsewhere Student's over models, which speaks of these cells only and
is named. So one number in twenty lies outside by chance, and nothing is corrected for there being some forty claims.
The request is the one most like the paper's, a whole rare cell type.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scforget.errors import EmptyGroupError
from scforget.exhibits.claims_controls import CONTROLS, ENTRIES
from scforget.exhibits.claims_list import FACTORISATION, OVERLAP
from scforget.exhibits.measured import Claim, Estimate, Measured, Statement

if TYPE_CHECKING:
    import pandas as pd

CLAIMS = OVERLAP + FACTORISATION + CONTROLS + ENTRIES
VERDICTS = ("survives", "changes", "falls", "undetermined", "not measured")
COLUMNS = ["claim", "published", "ours", "low", "high", "estimator", "verdict", "why"]
#: A number beyond this is none to be printed.
_UNBOUNDED = 1e4


def holds(statement: Statement) -> bool | None:
    """Whether a statement is shown, refuted, or (None) neither.

    An interval that ends at the limit is not beyond it: a part that never exceeds 1 is not shown to be below.
    """
    found, above, below = statement.estimate, statement.above, statement.below
    if found is None or not np.isfinite([found.low, found.high]).all():
        return None
    if above is not None and (found.low > above or found.high < above):
        return bool(found.low > above)
    if below is not None and (found.high < below or found.low > below):
        return bool(found.high < below)
    return None


def decide(number: float | None, ours: Estimate | None, statement: Statement | None) -> str:
    """Judge one claim; see the rule above."""
    if ours is None or not np.isfinite(ours.value) or (statement is not None and statement.estimate is None):
        return "not measured"
    shown = None if statement is None else holds(statement)
    if statement is not None and not shown:
        return "undetermined" if shown is None else "falls"
    if number is None:
        return "survives"
    if not np.isfinite([ours.low, ours.high]).all():
        return "undetermined"
    return "survives" if ours.low <= number <= ours.high else "changes"


def _row(claim: Claim, measured: Measured) -> dict[str, Any]:
    ours = claim.ours(measured)
    statement = None if claim.statement is None else claim.statement(measured)
    verdict = decide(claim.number, ours, statement)
    why = []
    if statement is not None and statement.estimate is not None:
        shown = {True: "holds", False: "refuted", None: "undecided"}[holds(statement)]
        ends = f"{statement.estimate.low:.3g} to {_number(statement.estimate.high)}"
        limit = statement.above if statement.above is not None else statement.below
        why.append(f"{statement.words}: {shown} ({ends}, limit {limit:.3g})")
    if verdict != "not measured":
        why.append(claim.why(measured))
    value, low, high = (np.nan,) * 3 if ours is None else ours[:3]
    return dict(
        zip(
            COLUMNS,
            [claim.name, claim.published, value, low, high, ours.estimator if ours else "", verdict,
             "; ".join(part for part in why if part)],
            strict=True,
        )
    )  # fmt: skip


def claims(overlap_result: Mapping[str, Any], more: Mapping[str, Any], *, request: str) -> pd.DataFrame:
    """Judge every claim by the results of one data set.

    Parameters
    ----------
    overlap_result
        Of the stage ``overlap``.
    more
        Records of the ablations: ``conditional`` (:func:`scforget.theory.variants.variant_rows`, of this request) and
        ``features`` (rows of :func:`scforget.theory.attackers.feature_rows` by request). What is absent is
        not measured.
    request
        The forget request most like the paper's.

    Returns
    -------
    DataFrame
        A row for each claim: ``claim``, ``published`` (in words), ``ours`` with ``low`` and ``high``, ``estimator``,
        ``verdict`` (one of ``VERDICTS``) and ``why``.

    Raises
    ------
    EmptyGroupError
        If the originals were not asked about this request.
    """
    import pandas as pd

    measured = Measured(overlap_result, more, request)
    if measured.place(measured.base) is None:
        raise EmptyGroupError(f"claims about {request}", "no overlap of the originals", "a request of the analysis")
    return pd.DataFrame([_row(claim, measured) for claim in CLAIMS], columns=COLUMNS)


def _cell(text: object) -> str:
    return html.escape(str(text), quote=False).replace("|", "\\|").replace("\n", " ")


def _number(value: float) -> str:
    if abs(value) > _UNBOUNDED:  # a ratio whose divisor may be 0
        return "no limit"
    return f"{value:.2g}" if abs(value) < 0.1 else f"{value:.2f}"


def _ours(row: Mapping[Any, Any]) -> str:
    if row["verdict"] == "not measured":
        return "not measured"
    ends = f" ({_number(row['low'])} to {_number(row['high'])})" if np.isfinite([row["low"], row["high"]]).all() else ""
    return f"{_number(row['ours'])}{ends}, **{row['verdict']}**"


def to_markdown(frames: Mapping[str, pd.DataFrame]) -> str:
    """Write the tables of several data sets as one: a row for each claim, then how each was measured and why.

    Parameters
    ----------
    frames
        :func:`claims` by data set.

    Raises
    ------
    EmptyGroupError
        Without a data set.
    """
    if not frames:
        raise EmptyGroupError("table of claims", "no data set", "at least one")
    tables = {name: frame.to_dict("records") for name, frame in frames.items()}
    first = next(iter(tables.values()))
    counts = [
        f"{name}: " + ", ".join(f"{(frame['verdict'] == verdict).sum()} {verdict}" for verdict in VERDICTS)
        for name, frame in frames.items()
    ]
    lines = [
        "Overlap is the cosine of the Fisher information of forgotten and of retained cells, parameter by parameter: "
        "1 if both depend on the same parameters in the same proportions, 0 if on different ones. Few cells make it "
        "too small by chance; ours is corrected for that.",
        "",
        "A claim **survives** if the published number lies in our 95 % interval and what it is said to show holds; "
        "it **changes** if the number does not but the statement does; it **falls** if our interval refutes the "
        "statement; else it is **undetermined**. Brackets hold the interval; the notes say of what.",
        "", *(f"- {_cell(line)}" for line in counts), "",
        "| # | claim of the paper | published | " + " | ".join(map(_cell, tables)) + " |",
        "| --- " * (3 + len(tables)) + "|",
    ]  # fmt: skip
    for i, row in enumerate(first):
        cells = [str(i + 1), row["claim"], row["published"], *(_ours(rows[i]) for rows in tables.values())]
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    lines += ["", "How each was measured, and what to know beside it:", ""]
    for i, row in enumerate(first):
        notes = [
            f"*{name}*: " + "; ".join(part for part in (rows[i]["estimator"], rows[i]["why"]) if part)
            for name, rows in tables.items() if rows[i]["verdict"] != "not measured"
        ]  # fmt: skip
        lines.append(f"{i + 1}. {_cell(row['claim'])}. " + (" ".join(map(_cell, notes)) or "Not measured."))
    return "\n".join(lines) + "\n"

"""What of an audit's record is shown in MLflow: metrics, tags and tables. Files and figures are left to others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pandas as pd

from scforget.report.tables import DASH, METRICS, Audits, bounds, ordered, scenario_table, score_in, span, value
from scforget.results import REFERENCES, Record
from scforget.tracking import flatten

#: Decimals of the tables: more would not be read, and the record beside them has all.
_DECIMALS = 4


def numbers(record: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Flatten to slash-separated metric keys; only numbers and truth values survive."""
    flat = {f"{prefix}{key.replace('.', '/')}": found for key, found in flatten(record).items()}
    return {key: float(found) for key, found in flat.items() if isinstance(found, int | float)}


def _evidence(record: Record) -> dict[str, float]:
    """What stands under the verdict, as far as it was measured."""
    worst, models = record.get("worst_attack") or {}, record.get("population") or {}
    found = {f"worst_attack/{key}": (worst.get("worst") or {}).get(key) for key in ("auc", "p_adjusted")}
    found |= {key: models.get(key) for key in ("forgetting_quality",)}
    found |= {f"klom/{key}": (models.get("klom") or {}).get(key) for key in ("value", "excess")}
    found["u_lira/auc"] = (models.get("u_lira") or {}).get("auc")
    for name, bound in (models.get("epsilon_bounds") or {}).items():
        found[f"epsilon_bound/{name}"] = bound.get("epsilon")
    found["exposed_share"] = (record.get("exposure") or {}).get("above_null")
    return numbers(found, "audit/")


def audit_metrics(record: Record) -> dict[str, float]:
    """What a person compares methods by: ``audit/…``, ``utility/…``, ``cost/…``."""
    metrics: dict[str, float] = {}
    for attack, by_control in record["attacks"].items():
        for control, row in by_control.items():
            place = "audit" if control == "same_group" else f"other_controls/{control}"
            keys = ("auc", "signed", "advantage", "distance_to_retrain")
            metrics |= numbers({key: row.get(key) for key in keys}, f"{place}/{attack}/")
    for statistic, row in (record.get("primary") or {}).items():
        shown = ("mean", "target_mean", "difference", "p_tost", "power", "noise_floor")
        metrics |= numbers({key: row.get(key) for key in shown}, f"audit/{statistic}/")
        metrics |= numbers(dict(zip(("low", "high"), row["interval"], strict=True)), f"audit/{statistic}/")
    metrics |= _evidence(record)
    metrics |= numbers(record.get("classification") or {}, "classification/")  # of classifiers, as their papers print
    for name in ("noise_floor", "design_power"):
        metrics |= numbers(record.get(name) or {}, f"audit/{name}/")
    for place, prefix in (("outside", "utility/"), ("inside", "utility/inside/")):
        metrics |= numbers({key: row["mean"] for key, row in record["utility"].get(place, {}).items()}, prefix)
    return metrics | numbers(record.get("cost") or {}, "cost/")


def seed_metrics(record: Record, index: int) -> dict[str, float]:
    """The same of one model of a population."""
    metrics = {}
    for attack, by_control in record["attacks"].items():
        row = by_control["same_group"]
        metrics[f"audit/{attack}/auc"] = row["per_seed"][index]
        if intervals := row.get("per_seed_intervals"):
            metrics |= {
                f"audit/{attack}/{end}": found for end, found in zip(("low", "high"), intervals[index], strict=True)
            }
    metrics["audit/trace"] = record["trace_per_seed"][index]
    for key, row in record["utility"].get("outside", {}).items():
        if row["per_seed"][index] is not None:
            metrics[f"utility/{key}"] = row["per_seed"][index]
    return metrics


def _worst(record: Mapping[str, Any]) -> Record:
    return (record.get("worst_attack") or {}).get("worst") or {}


def words(record: Record) -> dict[str, str]:
    """Tags of an audited population: what was found, in words to filter by."""
    return {
        "verdict": str(record.get("verdict")),
        "utility_verdict": str(record["utility"].get("verdict")),
        "published_criterion": str(record.get("published_criterion")),
        "worst_attack": str(_worst(record).get("name")),
    }


def forgotten(audits: Audits) -> list[str]:
    """Methods that forgot and kept the utility."""
    return [
        name
        for name, record in audits.items()
        if record.get("verdict") == "FORGOTTEN" and (record.get("utility") or {}).get("verdict") == "kept"
    ]


def verdict_counts(audits: Audits) -> dict[str, float]:
    """How many unlearning methods there are of each verdict, as metrics."""
    found = Counter(str(record.get("verdict")) for name, record in audits.items() if name not in REFERENCES)
    return {f"comparison/{verdict.lower()}": float(count) for verdict, count in sorted(found.items())}


def comparison_table(audits: Audits) -> pd.DataFrame:
    """Tabulate one scenario for MLflow: a row for each method, originals and retrains first, then the nearest first.

    Parameters
    ----------
    audits
        method -> audit, with its ``cost``.

    Returns
    -------
    DataFrame
        ``membership`` and ``trace``: method minus retrain, and ``…_ci``: its 90 % interval in words; ``passes_ratio``
        and ``seconds_ratio`` as fractions of an early-stopped retrain's; ``elbo`` (nats per cell) and ``marker_r``, or
        a classifier's ``accuracy``, of unseen cells outside the forgotten group. Four decimals.
    """
    table, worst = scenario_table(audits), [_worst(audits[method]) for method in ordered(audits)]
    shown = table[["method", "verdict", "utility"]].copy()
    for name in ("membership", "trace"):
        shown[name] = table[f"{name}_difference"]
        ends = zip(table[f"{name}_lo"], table[f"{name}_hi"], strict=True)
        shown[f"{name}_ci"] = [span(pair) for pair in ends]
    columns = ["passes_ratio", "seconds_ratio", *sorted(METRICS[score_in(audits)])]
    shown[columns] = table[columns]
    shown["worst_attack_auc"] = [value(found, "auc") for found in worst]
    shown["worst_attack"] = [found.get("name") for found in worst]
    words = ["verdict", "utility", "worst_attack"]
    shown[words] = shown[words].fillna(DASH)  # the UI would write "null"
    return shown.round(_DECIMALS)


def cell_table(cells: pd.DataFrame, record: Record) -> pd.DataFrame:
    """Tabulate the forget cells of a method for MLflow, the most exposed first.

    Parameters
    ----------
    cells
        What the audit left: ``cell``, ``label``, ``donor``, ``z``, ``low``, ``high``, ``rank``.
    record
        Of the same audit; gives the range of z that a single retrained model shows.

    Returns
    -------
    DataFrame
        ``rank``, ``cell``, ``label``, ``donor`` (left out where no cell has one), ``z`` in standard deviations of the
        retrains, ``exposed`` (where it is known): whether z is above what a retrain shows, and the ends of z's
        interval. Four decimals.
    """
    _, high = bounds(record, "exposure", "null_band")
    columns = ["rank", "cell", "label", "donor", "z", "low", "high"]
    known = [name for name in columns if name in cells and (name != "donor" or cells[name].notna().any())]
    table = cells.sort_values("rank", kind="stable")[known].reset_index(drop=True)
    if math.isfinite(high):
        table.insert(list(table).index("z") + 1, "exposed", table["z"] > high)
    return table.round(_DECIMALS)

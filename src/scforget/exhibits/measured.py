"""Reading the results of the Fisher analysis: estimates with their intervals, ratios of them, by what they are of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from scforget.audit.intervals import mean_interval

Record = Mapping[str, Any]
LEVEL = 0.95
_BOOT = "bootstrap of cells and models"


class Estimate(NamedTuple):
    """A number, its 95 % interval (or what stands for one), and in words how it was found."""

    value: float
    low: float
    high: float
    estimator: str


def within(value: float | None, ends: Sequence[float | None], estimator: str) -> Estimate:
    """Make an estimate of a number and its interval as a pair; what JSON holds as null is NaN."""
    numbers = [float("nan") if one is None else float(one) for one in (value, *ends)]
    return Estimate(numbers[0], numbers[1], numbers[2], estimator)


class Statement(NamedTuple):
    """What a number is said to show: that ``estimate`` lies above, or below, a limit."""

    words: str
    estimate: Estimate | None
    above: float | None = None
    below: float | None = None


def spread(values: Sequence[float], words: str) -> Estimate | None:
    """Mean over models with Student's interval, of models alone: these very cells; None without a model."""
    if not values:
        return None
    what = f"{words}; Student's interval over {len(values)} models, of these cells only"
    return within(float(np.mean(values)), mean_interval(values, LEVEL), what)


def _log(value: float) -> float:
    return float(np.log(max(value, np.finfo(float).tiny)))


def ratio(one: Estimate | None, other: Estimate | None, words: str) -> Estimate | None:
    """Ratio of two numbers above 0 from their intervals alone.

    Notes
    -----
    On the log scale, a − b: lower end a − b − √((a − a_low)² + (b_high − b)²), the upper one likewise (MOVER, Zou and
    Donner 2008). It takes the two as independent; that they are of the same cells makes it wider than need be, as both
    move together.
    """
    if one is None or other is None:
        return None
    (a, a_low, a_high), (b, b_low, b_high) = (tuple(map(_log, found[:3])) for found in (one, other))
    down, up = np.hypot(a - a_low, b_high - b), np.hypot(a_high - a, b - b_low)
    low, value, high = (float(np.exp(min(end, 700.0))) for end in (a - b - down, a - b, a - b + up))
    return Estimate(value, low, high, f"{words}, from both intervals (MOVER)")


def minus(one: Estimate | None, other: Estimate | None, words: str) -> Estimate | None:
    """Difference of two numbers from their intervals, likewise."""
    if one is None or other is None:
        return None
    low = one.value - other.value - float(np.hypot(one.value - one.low, other.high - other.value))
    high = one.value - other.value + float(np.hypot(one.high - one.value, other.value - other.low))
    return Estimate(one.value - other.value, low, high, f"{words}, from both intervals (MOVER)")


def dig(record: Any, *keys: str) -> Any:
    """Follow keys; None as soon as one is missing."""
    for key in keys:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


class Measured:
    """Results of one data set and request, asked by what they are of; None where something was not measured."""

    def __init__(self, result: Record, more: Mapping[str, Any], request: str) -> None:
        self.result, self.more, self.request = result, more, request
        self.base = str(result["base"])
        small = sorted(name for name in result["variants"] if name.startswith("latent_"))
        self.small = small[0] if small else "latent"
        #: Proposition 1 is about squared error, so it is tried on models trained by it where there are any.
        self.squared = "log_mse" if "log_mse" in result["variants"] else self.base

    def place(self, kind: str) -> Record | None:
        """Everything about one kind of VAE or classifier under this request."""
        family = "variants" if kind in self.result["variants"] else "classifiers"
        found: Record | None = dig(self.result, family, kind, "requests", self.request)
        return found

    def overlap(self, kind: str, group: str, against: str = "retained") -> Estimate | None:
        """Cosine of the Fishers of forgotten and retained (or ``unrelated``) cells, without sampling noise."""
        found = dig(self.place(kind), "overlap", group)
        found = dig(found, "unrelated") if against == "unrelated" else found
        if found is None:
            return None
        return within(found["unbiased"], found["interval"], f"exact Fisher, noise removed; {_BOOT}")

    def against(self, kind: str, group: str, other: str, its: str) -> Estimate | None:
        """Ratio of one part's overlap to another's."""
        return ratio(self.overlap(kind, group), self.overlap(other, its), "ratio of overlaps")

    def models(self, kind: str, *keys: str) -> list[float]:
        """One number of each model's exact diagonals (or other entry of its record)."""
        models = dig(self.place(kind), "models") or []
        found = [dig(model, *keys) for model in models]
        return [float(value) for value in found if value is not None]

    def by_its_estimator(self, group: str, kind: str | None = None) -> str:
        """What the paper's batch estimator gives on our models, in words."""
        values = self.models(kind or self.base, "published", "groups", group, "cosine")
        ends = f"{np.mean(values):.3g} ({min(values):.3g} to {max(values):.3g}, range of models)" if values else ""
        return f"its estimator on our models: {ends}" if values else ""

    def factor(self, kind: str, variant: str, key: str) -> Estimate | None:
        """An estimate of the factorisation: mean over models, and the ends of all their intervals."""
        records = dig(self.place(kind), "factorisation") or []
        rows = [row[key] for record in records for row in record["variants"] if row["variant"] == variant]
        if not rows:
            return None
        mean = float(np.mean([row["unbiased"] for row in rows]))
        low, high = min(row["low"] for row in rows), max(row["high"] for row in rows)
        return Estimate(mean, low, high, f"{kind}, {variant}; bootstrap of cells, widest over {len(rows)} models")

    def mismatched(self, key: str) -> Estimate | None:
        """Of the plain residuals' σ set against the real Fisher, as the paper does with its "data" factors."""
        found = [record["published"][key] for record in dig(self.place(self.squared), "factorisation") or []]
        if not found:
            return None
        low, high = min(one["low"] for one in found), max(one["high"] for one in found)
        return Estimate(float(np.mean([one["unbiased"] for one in found])), low, high, "residuals against the Fisher")

    def singular(self, key: str) -> Estimate | None:
        """A number of the published factorisation by singular vectors."""
        records = dig(self.place(self.squared), "factorisation") or []
        return spread([record["svd"][key] for record in records], f"{self.squared}, singular vectors")


def shown(found: Estimate | None, digits: int = 3) -> str:
    """``0.465 (0.347 to 0.63)``; no brackets where there is no interval."""
    if found is None:
        return "not measured"
    if not np.isfinite([found.low, found.high]).all():
        return f"{found.value:.{digits}g}"
    return f"{found.value:.{digits}g} ({found.low:.{digits}g} to {found.high:.{digits}g})"


class Claim(NamedTuple):
    """One claim of the paper.

    Attributes
    ----------
    name, published
        In words, and what the paper prints.
    number
        Its number, None for a statement without one.
    ours
        Our estimate of that number.
    statement
        What the number is said to show; None if nothing but its size.
    why
        What else is to be known, of these results.
    """

    name: str
    published: str
    number: float | None
    ours: Callable[[Measured], Estimate | None]
    statement: Callable[[Measured], Statement] | None
    why: Callable[[Measured], str]

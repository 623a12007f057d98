"""Where the spread of a statistic comes from: originals, unlearning seeds, audit seeds, each nested in the one before.

The unit of a verdict is an original. More unlearning or audit seeds of the same originals narrow its interval only as
far as their share of the variance goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy

from scforget.arrays import FloatArray
from scforget.audit.intervals import Interval, plain
from scforget.errors import DataError, EmptyGroupError


@dataclass(frozen=True)
class VarianceComponents:
    """A grand mean and the variance that each source adds to one value.

    Attributes
    ----------
    mean, standard_error, interval
        Grand mean; its standard error, from the spread between originals; Student-t interval on I − 1 degrees of
        freedom.
    level
        Coverage of the interval.
    originals, unlearning, audit
        Variance components, >= 0, in the squared unit of the values. None where there is one seed only: that source is
        then part of the nearest one above that is not None.
    truncated
        Names of the components that were estimated below 0 and set to 0; their true values are small.
    n_originals, n_unlearning, n_audit
        I, J, K.
    """

    mean: float
    standard_error: float
    interval: Interval
    level: float
    originals: float
    unlearning: float | None
    audit: float | None
    truncated: tuple[str, ...]
    n_originals: int
    n_unlearning: int
    n_audit: int

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return plain(self)


def _check_values(values: npt.ArrayLike, level: float) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 3:
        raise DataError(
            "values to split the variance of", f"{array.ndim} axes", "originals, unlearning and audit seeds"
        )
    if array.shape[0] < 2 or array.size == 0:
        raise EmptyGroupError("originals and seeds", array.shape, "at least 2 originals and 1 seed of each kind")
    if not np.isfinite(array).all():
        raise DataError("values to split the variance of", "NaN or infinity", "finite numbers")
    if not 0 < level < 1:
        raise DataError("level of an interval", level, "a number between 0 and 1")
    return array


def variance_components(values: npt.ArrayLike, *, level: float) -> VarianceComponents:
    """Split the variance of a statistic by nested random-effects analysis of variance.

    Parameters
    ----------
    values : ``[I, J, K]``
        One number for each of I >= 2 originals, J >= 1 unlearning seeds of each, K >= 1 audit (attacker) seeds of each
        of those; seeds of different originals have nothing in common.
    level
        Coverage of the interval of the grand mean, in (0, 1).

    Returns
    -------
    VarianceComponents

    Raises
    ------
    EmptyGroupError
        With fewer than 2 originals, or no seed.
    DataError
        If there are not three axes, a value is not finite, or the level cannot be.

    Notes
    -----
    y_ijk = μ + a_i + b_ij + e_ijk with independent effects. The mean squares between originals, between unlearning
    seeds within them and between audit seeds within those have the expectations JKσ_a² + Kσ_b² + σ_e², Kσ_b² + σ_e² and
    σ_e²; differences of neighbours estimate the components without bias, before those below 0 are set to 0 (Searle,
    Casella & McCulloch 1992). The mean has variance MS_originals / IJK, which holds all three sources.
    """
    array = _check_values(values, level)
    originals, seeds, audits = array.shape
    by_unlearning = array.mean(axis=2)
    squares = {"originals": seeds * audits * float(by_unlearning.mean(axis=1).var(ddof=1))}
    if seeds > 1:
        squares["unlearning"] = audits * float(by_unlearning.var(axis=1, ddof=1).mean())
    if audits > 1:
        squares["audit"] = float(array.var(axis=2, ddof=1).mean())
    counts = {"originals": seeds * audits, "unlearning": audits, "audit": 1}
    below = [*list(squares.values())[1:], 0.0]
    raw = {name: (square - less) / counts[name] for (name, square), less in zip(squares.items(), below, strict=True)}
    components = {name: max(0.0, value) for name, value in raw.items()}
    mean, error = float(array.mean()), float(np.sqrt(squares["originals"] / array.size))
    width = float(scipy.stats.t.ppf((1 + level) / 2, originals - 1)) * error
    return VarianceComponents(
        mean=mean,
        standard_error=error,
        interval=(mean - width, mean + width),
        level=level,
        originals=components["originals"],
        unlearning=components.get("unlearning"),
        audit=components.get("audit"),
        truncated=tuple(name for name, value in raw.items() if value < 0),
        n_originals=originals,
        n_unlearning=seeds,
        n_audit=audits,
    )

"""How far apart two residual profiles can be: the dimensional bounds of Corollary 2 and their exact worst cases.

And where a measured pair of profiles stands among them.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from scforget import seeding
from scforget.arrays import FloatArray
from scforget.errors import DataError
from scforget.settings import Settings

# Smallest cosine below a bound by no more than this is rounding.
_ROUNDING = 1e-12


class PointSettings(Settings):
    """One point of the bounds: D, M < D, V >= 1 and C >= 3; see :func:`bounds`."""

    outputs: Annotated[int, Field(ge=2)]
    differing: Annotated[int, Field(ge=1)]
    largest: Annotated[float, Field(ge=1)]
    classes: Annotated[int, Field(ge=3)]


class BoundSettings(Settings):
    """Grids over which the bounds are tried.

    Attributes
    ----------
    outputs, differing, largest
        Values of D, of M (those below D are used) and of V >= 1.
    classes
        Values of C >= 3.
    profiles
        Random pairs of profiles at each point of a grid.
    starts
        Random starts of the adversarial search at each point.
    """

    outputs: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1)]
    differing: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]
    largest: Annotated[list[Annotated[float, Field(ge=1)]], Field(min_length=1)]
    classes: Annotated[list[Annotated[int, Field(ge=3)]], Field(min_length=1)]
    profiles: Annotated[int, Field(gt=0)]
    starts: Annotated[int, Field(gt=0)]


def cosine(first: FloatArray, second: FloatArray) -> float:
    """Cosine of two arrays of one shape, taken as vectors."""
    return float(np.vdot(first, second) / np.sqrt(np.vdot(first, first) * np.vdot(second, second)))


def one_sided(D: int, M: int, V: float) -> tuple[float, int]:
    """Smallest cosine where only one profile deviates from all ones, and how many of its M entries are then V.

    Notes
    -----
    With n = D − M the cosine is (n + Σu)/√(D (n + Σu²)), u ∈ [0, V]^M. In each entry it rises and then falls, so the
    minimum has k entries V and M − k entries 0: c(k) = (n + kV)/√(D (n + kV²)), which falls before
    k* = n(V − 2)/V² and rises after it. Below V = 2, k = 0: √(n/D). Where 0 <= k* <= M is whole, 2√(n (V − 1)/D)/V.
    """
    n = D - M
    stationary = min(max(n * (V - 2) / V**2, 0.0), float(M))
    counts = sorted({int(np.floor(stationary)), int(np.ceil(stationary))})
    return min(((n + k * V) / np.sqrt(D * (n + k * V**2)), k) for k in counts)


def bounds(D: int, M: int, V: float, C: int) -> dict[str, Any]:
    """Every bound of Corollary 2 at one point.

    Parameters
    ----------
    D, M
        Outputs, and those of them on which the profiles may differ, 1 <= M < D.
    V : >= 1
        Largest entry on those M, in units of the root mean square of the others (all 1 where they are equal).
    C : >= 3
        Classes of a classifier.

    Returns
    -------
    dict
        ``published``, ``disjoint`` (the tighter form), ``exact_both`` and ``exact_one`` (attained minima),
        ``exact_one_entries`` (how many entries are V there), ``all_at_largest`` (all ones against M entries V),
        ``one_class`` (1/√C), ``one_class_even`` and ``part_of_class_even``, see :func:`even_residuals`.

    Raises
    ------
    DataError
        If there is no such point.

    Notes
    -----
    The profiles are equal on n' = D − M outputs, with Σ = n, and u, v ∈ [0, V]^M on the others:
    cos = (n + u·v)/√((n + ‖u‖²)(n + ‖v‖²)).

    *Published* (part i): numerator >= n, each norm <= n + MV², so cos >= n/(n + MV²).

    *Disjoint*: by the inequality of the means the denominator is <= n + (‖u‖² + ‖v‖²)/2. For one pair with uv = c,
    u² + v² <= V² + c²/V² <= V² + c, so cos >= (n + s)/(n + MV²/2 + s/2) with s = u·v, which rises in s: cos >=
    n/(n + MV²/2), attained by disjoint supports of M/2 entries V each.

    *Exact, any M*: in one entry t of v, everything else fixed, ∂ log cos/∂t has the sign of sB − tP, with s its partner
    in u, B = ‖v‖² + n without t and P the inner product without st: it rises, then falls. So a minimum has entries in
    {0, V}. A pair (V, V) made (V, 0) lowers the cosine (P² − 2PB + V²B <= B(V² − P) < 0, as V² < P <= B), so does a
    pair (0, 0) made (V, 0). What is left is k entries V in one profile and M − k in the other, smallest for the most
    equal split: n/√((n + ⌊M/2⌋V²)(n + ⌈M/2⌉V²)).

    Nothing but n = Σ of the shared squares enters the first three, so they hold for any shared profile of root mean
    square 1; ``exact_one`` and ``all_at_largest`` need all ones.
    """
    if not (1 <= M < D and V >= 1 and C >= 3):
        raise DataError("a point of the bounds", f"D={D}, M={M}, V={V}, C={C}", "1 <= M < D, V >= 1, C >= 3")
    n, square, (smallest, entries), (whole, part) = D - M, V**2, one_sided(D, M, V), even_residuals(C)
    return {
        "outputs": D, "differing": M, "largest": V, "classes": C,
        "published": n / (n + M * square),
        "disjoint": n / (n + M * square / 2),
        "exact_both": float(n / np.sqrt((n + M // 2 * square) * (n + (M - M // 2) * square))),
        "exact_one": float(smallest),
        "exact_one_entries": entries,
        "all_at_largest": float((n + M * V) / np.sqrt(D * (n + M * square))),
        "one_class": float(1 / np.sqrt(C)),
        "one_class_even": whole,
        "part_of_class_even": part,
    }  # fmt: skip


def even_residuals(C: int) -> tuple[float, float]:
    """Cosine of the residual profiles of one class and of the rest, where errors spread evenly over wrong classes.

    Returns
    -------
    tuple
        With the retain set free of that class (the whole class is forgotten), and with a retain set in which all C
        classes are equally frequent (a part of the class is forgotten).

    Notes
    -----
    A softmax classifier's gradient in its logits is p − 1_y. For an error mass q spread evenly over c = C − 1 wrong
    classes, its square is q² at y and q²/c² elsewhere. Forget profile: 1 at its class k, 1/c² elsewhere.

    1/√C (part ii) is what a profile on k alone has with a *flat* one. In general, on k alone the cosine is
    σ_k/‖σ‖ of the retain profile: any value in [0, 1], 1/√C if and only if σ_k is the root mean square of σ, and
    below 1/√C if and only if σ_k is below it. A retain set without class k meets output k only through its false
    alarms: profile 1/c² at k and (1 + (c − 1)/c²)/c elsewhere, so the cosine is about 2 C^(−3/2), not C^(−1/2). A
    retain set that keeps its share of the class has a flat profile, cosine (C/c)/√(C (1 + c⁻³)), just above 1/√C.
    """
    c = C - 1
    forget = np.r_[1.0, np.full(c, c**-2.0)]
    rest = np.r_[c**-2.0, np.full(c, (1 + (c - 1) / c**2) / c)]
    return cosine(forget, rest), cosine(forget, np.ones(C))


def _adversary(D: int, M: int, V: float, rng: np.random.Generator, *, both: bool) -> float:
    """Smallest cosine found from a random start by moving one output's pair of entries at a time."""
    n = float(D - M)
    u = rng.uniform(0, V, M)
    v = rng.uniform(0, V, M) if both else np.ones(M)
    found = np.inf
    while True:
        before = found
        for index in rng.permutation(M):
            s, t = u[index], v[index]
            tried = np.array([0.0, s, V])[:, None], np.array([0.0, t, V] if both else [t])
            norms = n + u @ u - s**2 + tried[0] ** 2, n + v @ v - t**2 + tried[1] ** 2
            values = (n + u @ v - s * t + tried[0] * tried[1]) / np.sqrt(norms[0] * norms[1])
            row, column = np.unravel_index(values.argmin(), values.shape)
            u[index], v[index], found = tried[0][row, 0], tried[1][column], float(values.min())
        if found >= before:
            return found


def _random(D: int, M: int, V: float, pairs: int, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Cosines of random pairs, ``[pairs]`` each: both deviating, only one."""
    u, v = rng.uniform(0, V, (2, pairs, M))
    extreme = rng.random((2, pairs)) < 0.5  # half of the profiles have entries 0 and V only
    share = rng.random((2, pairs, 1))
    u = np.where(extreme[0, :, None], V * (rng.random((pairs, M)) < share[0]), u)
    v = np.where(extreme[1, :, None], V * (rng.random((pairs, M)) < share[1]), v)
    n = D - M
    norm_u, norm_v = n + (u**2).sum(1), n + (v**2).sum(1)
    return (n + (u * v).sum(1)) / np.sqrt(norm_u * norm_v), (n + u.sum(1)) / np.sqrt(D * norm_u)


def _tried(D: int, M: int, V: float, settings: BoundSettings, rng: np.random.Generator) -> dict[str, Any]:
    both, one = _random(D, M, V, settings.profiles, rng)
    both = np.r_[both, [_adversary(D, M, V, rng, both=True) for _ in range(settings.starts)]]
    one = np.r_[one, [_adversary(D, M, V, rng, both=False) for _ in range(settings.starts)]]
    limit = bounds(D, M, V, 3)
    names = {"published": both, "disjoint": both, "exact_both": both, "exact_one": one}
    row: dict[str, Any] = {"outputs": D, "differing": M, "largest": V}
    row |= {"smallest_both": float(both.min()), "smallest_one": float(one.min())}
    for name, found in names.items():
        row[name] = limit[name]
        row[f"{name}_violations"] = float((found < limit[name] - _ROUNDING).mean())
        row[f"{name}_tightness"] = float(found.min() / limit[name])
    return row


def _classifiers(C: int, settings: BoundSettings, rng: np.random.Generator) -> dict[str, Any]:
    """Cosines of random softmax classifiers: each wrong class gets a random share of each class's error mass."""
    shares = rng.dirichlet(np.ones(C - 1), (settings.profiles, C))
    errors = rng.beta(1, 9, (settings.profiles, C)) ** 2
    squares = np.zeros((settings.profiles, C, C))
    squares[:, ~np.eye(C, dtype=bool)] = (shares**2 * errors[:, :, None]).reshape(settings.profiles, -1)
    squares[:, range(C), range(C)] = errors
    forget, whole, part = squares[:, 0], squares[:, 1:].mean(1), squares.mean(1)
    row: dict[str, Any] = {"classes": C, "one_class": float(1 / np.sqrt(C))}
    for name, rest, even in zip(("whole", "part"), (whole, part), even_residuals(C), strict=True):
        found = (forget * rest).sum(1) / np.sqrt((forget**2).sum(1) * (rest**2).sum(1))
        low, middle, high = np.quantile(found, [0.025, 0.5, 0.975])
        row |= {f"{name}_even": even, f"{name}_median": float(middle), f"{name}_low": float(low)}
        row |= {f"{name}_high": float(high), f"{name}_below": float((found < row["one_class"]).mean())}
    return row


def simulate_bounds(settings: BoundSettings, seed: int) -> dict[str, Any]:
    """Try random and adversarial profiles against every bound.

    Returns
    -------
    dict
        ``profiles``: one row for each D, M < D, V: the smallest cosines found, where both profiles deviate and where
        one does, and of each bound its value, the share of pairs that violate it (0) and its tightness, smallest
        found / bound (1: attained). ``classifiers``: one row for each C: 1/√C, and where the ``whole`` class or
        ``part`` of it is forgotten the cosine under even errors and the median, 95 % range and share below 1/√C over
        random errors. ``violations``: the largest share of all.
    """
    rng = seeding.numpy_generator(seed, "bounds")
    grid = [(D, M, V) for D in settings.outputs for M in settings.differing if M < D for V in settings.largest]
    rows = [_tried(D, M, V, settings, rng) for D, M, V in grid]
    return {
        "profiles": rows,
        "classifiers": [_classifiers(C, settings, rng) for C in settings.classes],
        "violations": max((value for row in rows for name, value in row.items() if "violations" in name), default=0.0),
    }


def placed(sigma_forget: FloatArray, sigma_retain: FloatArray, *, factor: float) -> dict[str, Any]:
    """Where a measured pair of profiles stands: its D, M and V, its cosine, and the bounds there.

    Parameters
    ----------
    sigma_forget, sigma_retain : ``[D]``, >= 0
        Residual second moments of the two sets.
    factor : > 1
        Genes count as differing where the ratio of the profiles is beyond this factor of its median.

    Returns
    -------
    dict
        ``outputs``, ``differing``, ``largest`` (V, over both profiles), ``cosine``, ``published``, ``disjoint``,
        whether each is ``_satisfied``; ``agreement``, by which the bounds are multiplied; ``shared_cosine`` and
        ``shared_energy_forget``, ``shared_energy_retain``: how alike the shared genes are, and what share of each
        profile's squared norm they hold.

    Raises
    ------
    DataError
        If no gene is positive in both.

    Notes
    -----
    Each profile is scaled to root mean square 1 over the shared genes, so that n = D − M. Genes whose ratio varies by
    no more than f² between them have a cosine of at least κ = 2/(f + 1/f) (Pólya and Szegő 1925), which replaces the
    numerator n by κn: cos >= κn/(n + MV²), and κn/(n + MV²/2) by the same steps as in :func:`bounds`.
    """
    positive = (sigma_forget > 0) & (sigma_retain > 0)
    if not positive.any():
        raise DataError("two residual profiles", "no gene with both > 0", "at least one")
    ratio = np.log(sigma_forget[positive] / sigma_retain[positive])
    shared = positive.copy()
    shared[positive] = np.abs(ratio - np.median(ratio)) <= np.log(factor)
    if not shared.any():  # an even number of genes in two far groups: the median lies between them
        shared[np.flatnonzero(positive)[np.abs(ratio - np.median(ratio)).argmin()]] = True
    n, M = int(shared.sum()), int((~shared).sum())
    scaled = [sigma / np.sqrt((sigma[shared] ** 2).mean()) for sigma in (sigma_forget, sigma_retain)]
    largest = max((float(one[~shared].max()) for one in scaled), default=0.0) if M else 0.0
    found, kappa = cosine(*scaled), 2 / (factor + 1 / factor)
    limits = {"published": kappa * n / (n + M * largest**2), "disjoint": kappa * n / (n + M * largest**2 / 2)}
    energy = [float(n / (one @ one)) for one in scaled]
    return {
        "outputs": n + M, "differing": M, "largest": largest, "factor": factor, "cosine": found,
        "agreement": kappa, "shared_cosine": cosine(*(one[shared] for one in scaled)),
        "shared_energy_forget": energy[0], "shared_energy_retain": energy[1], **limits,
        **{f"{name}_satisfied": bool(found >= limit - _ROUNDING) for name, limit in limits.items()},
    }  # fmt: skip

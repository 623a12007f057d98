"""A record of the stage ``overlap`` with chosen overlaps, for the tests of what is drawn and said of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Record = dict[str, Any]
GROUPS = (
    "encoder", "bottleneck", "decoder_hidden", "decoder_output", "scale", "scale_shared", "scale_condition",
    "dispersion", "global",
)  # fmt: skip
VARIANTS = ("likelihood", "permuted", "uncoupled", "residual")


def group(value: float, width: float = 0.1) -> Record:
    """Overlap of one part: interval from value/(1 + width) to value·(1 + width)."""
    ends = [value / (1 + width), value * (1 + width)]
    return {
        "cosine": 0.9 * value, "unbiased": value, "interval": ends, "per_model": [value, value, value],
        "halves": {"unbiased": 1.0, "range": [0.97, 1.0], "cosine": 0.96, "cosine_range": [0.95, 0.97]},
        "same_size": {
            "unbiased": 0.98, "range": [0.9, 1.0], "cosine": 0.8, "cosine_range": [0.7, 0.9], "p_lower": 0.005
        },
        "unrelated": {"unbiased": 0.05, "interval": [0.03, 0.08]},
    }  # fmt: skip


def _diagonals(cosine: float, groups: tuple[str, ...]) -> Record:
    return {
        "groups": {name: {"cosine": cosine, "parameters": 1000, "without_gradient": 10} for name in groups},
        "effective_rank": {
            side: {"participation": 100.0 * size, "entropy": 1000.0 * size}
            for side, size in (("forget", 1), ("retain", 4))
        },
        "top_1_percent": 0.2, "top_10_percent": 0.5, "log_correlation": 0.7,
        "genes": {"mean": 0.7, "median": 0.8, "above_half": 0.9, "below_fifth": 0.01},
    }  # fmt: skip


def estimate(value: float, width: float = 0.1) -> Record:
    """One number of the factorisation."""
    return {"value": value, "unbiased": value, "low": value - width, "high": value + width}


def factorisation(ratios: Mapping[str, float]) -> Record:
    """A record of the factorisation with chosen ratios of product and measured cosine, by variant."""
    rows = [
        {
            "variant": name, "measured": estimate(0.37), "cos_sigma": estimate(0.83 if name == "residual" else 0.51),
            "cos_nu": estimate(0.79), "product": estimate(0.37 * ratios[name]), "ratio": estimate(ratios[name], 0.02),
            "covariance_share_forget": 0.1, "covariance_share_retain": 0.2,
        }
        for name in VARIANTS
    ]  # fmt: skip
    svd = {"product": 0.41, "ratio": 1.11, "cos_sigma": 0.51, "rank_one_forget": 0.94, "rank_one_retain": 0.96}
    return {"variants": rows, "svd": svd, "published": {"product": estimate(0.6), "ratio": estimate(1.7)}}


def vae(overlaps: Mapping[str, float], ratios: Mapping[str, float] | None = None) -> Record:
    """One kind of VAE under one request; a part that is not named overlaps by 0.4."""
    models = []
    for shift in (-0.01, 0.0, 0.01):
        exact = _diagonals(0.4 + shift, GROUPS)
        models.append({
            "forget_cells": 19, "retain_cells": 296, "exact": exact, "exact_same_size": _diagonals(0.8, GROUPS),
            "published": _diagonals(0.3 + shift, GROUPS),
        })  # fmt: skip
    models[0]["ladder"] = {"batches": 0.3, "equal_batches": 0.2, "single_cells": 0.35}
    given = {name: overlaps.get(name, 0.4) for name in GROUPS}
    records = [factorisation(ratios)] * 3 if ratios else []
    return {
        "overlap": {name: group(value) for name, value in given.items()}, "models": models, "factorisation": records
    }  # fmt: skip


def classifier(overlaps: Mapping[str, float]) -> Record:
    """One kind of classifier under one request."""
    diagonals = _diagonals(0.1, ("output", "global"))
    return {
        "overlap": {name: group(value) for name, value in overlaps.items()},
        "models": [{"observed": diagonals, "expected": diagonals}] * 3,
    }


RATIOS = {"likelihood": 1.11, "permuted": 1.0, "uncoupled": 1.0, "residual": 1.1}


def overlap_result(
    vaes: Mapping[str, Mapping[str, float]] | None = None,
    classifiers: Mapping[str, Mapping[str, float]] | None = None,
    ratios: Mapping[str, float] = RATIOS, requests: tuple[str, ...] = ("rare",),
) -> Record:  # fmt: skip
    """Build a whole record; overlaps by kind of model and part."""
    vaes = vaes or {"nb": {}, "log_mse": {}, "latent_8": {}, "conditional": {"scale_condition": 1e-9}}
    classifiers = classifiers or {
        "probe": {"output": 0.02, "global": 0.02},
        "deep": {"hidden": 0.26, "output": 0.01, "global": 0.02},
        "matched": {"hidden": 0.26, "output": 0.01, "global": 0.02},
    }
    held = {"nb", "log_mse"}
    return {
        "base": "nb", "cells": 315, "unrelated": dict.fromkeys(requests, "B"),
        "variants": {
            kind: {
                "parameters": 1000, "latent": 16, "likelihood": "nb", "conditions": 16 if kind == "conditional" else 0,
                "requests": {name: vae(parts, ratios if kind in held else None) for name in requests},
            }
            for kind, parts in vaes.items()
        },
        "classifiers": {
            kind: {"facts": [], "requests": {name: classifier(parts) for name in requests}}
            for kind, parts in classifiers.items()
        },
    }  # fmt: skip

"""Made-up audits in the shape that the stages give: one scenario with every verdict, nulls and odd names."""

import copy

import numpy as np
import pandas as pd
import pytest


def equivalence(difference, half, margin, **more):
    return {
        "mean": 0.52 + difference,
        "target_mean": 0.52,
        "difference": difference,
        "interval": [difference - half, difference + half],
        "margin": margin,
        "p_tost": 0.01,
        "power": 0.91,
        "noise_floor": 0.3 * margin,
        "side": "inside",
        "models_needed": None,
        **more,
    }


def attack(auc):
    return {
        "auc": auc,
        "signed": auc - 0.5,
        "advantage": 2 * abs(auc - 0.5),
        "interval": [auc - 0.1, min(auc + 0.1, 1.0)],
        "null": {"mean": 0.094, "q95": 0.222},
        "per_seed": [auc - 0.01, auc, auc + 0.01],
        "distance_to_retrain": auc - 0.52,
    }


def metric(mean, half):
    return {"mean": mean, "interval": [mean - half, mean + half], "per_seed": [mean - half, mean + half]}


def audit(method, auc, trace, verdict, utility, passes, **more):
    groups = {"forget": 14, "same_group": 17, "matched_knn": 40, "all_unseen": 315}
    primary = {"membership": equivalence(auc - 0.52, 0.008, 0.02), "trace": equivalence(trace, 0.4, 1.0)}
    shift = {"elbo": 0.0, "reconstruction": 0.01, "kl": -0.03, "knn": -0.06}
    return {
        "method": method,
        "models": 5,
        "groups": groups,
        "attacks": {a: {g: attack(auc + d + 0.01 * i) for i, g in enumerate(groups) if i} for a, d in shift.items()},
        "primary": {"membership": None, "trace": None} if method == "retrain" else primary,
        "verdict": verdict,
        "explanation": f"The models of {method} stand {trace:g} spreads from the retrained ones.",
        "published_criterion": auc < 0.6,
        "nothing_to_forget": False,
        "utility": {
            "verdict": utility,
            "outside": {"elbo": metric(-500.1, 1.2), "marker_r": metric(0.831, 0.004), "ari": metric(0.46, 0.02)},
            "inside": {"elbo": metric(-612.4, 3.5), "kl": metric(9.8, 0.2)},
        },
        "failure_modes": [],
        "failed_seeds": {},
        "cost": {
            "seconds": 8.3 * (passes or 1.0),
            "seconds_ratio": passes,
            "passes_ratio": passes,
            "peak_memory_mb": 800,
            "steps": 120,
            "relative_change": 0.02,
        },
        **more,
    }


AUDITS = {
    record["method"]: record
    for record in (
        audit("ssd", 0.688, 9.6, "NOT_FORGOTTEN", "kept", 0.04, failure_modes=["ineffective"]),
        audit("retrain", 0.52, 0.0, "TARGET (retrain)", None, 1.0),
        audit("gradient_ascent", 0.213, -6.4, "OVER_FORGOTTEN", "lost", 0.11, failure_modes=["streisand", "collapse"]),
        audit("original", 0.702, 11.0, "NOT_FORGOTTEN", "kept", None),
        audit("partial_reset", 0.527, 0.3, "FORGOTTEN", "kept", 0.21),
        audit(
            "retain_finetune", 0.545, 1.2, "UNDETERMINED", "undetermined", 0.33, failed_seeds={"3": "NonFiniteError"}
        ),
    )
}

CONTEXT = {
    "dataset": "pbmc68k",
    "scenario": "cd56_nk",
    "kind": "cluster",
    "n_forget": 14,
    "git_commit": "4f2c1d9",
    "data_md5": "0123456789abcdef0123456789abcdef",
    "params": {"train": {"epochs": 100, "lr": 1e-3}, "audit": {"margins": {"membership": 0.02, "trace": 1.0}}},
    "seeds": {"original": [1, 2, 3, 4, 5], "retrain": [11, 12, 13, 14, 15, 16, 17, 18]},
    "hardware": "2 cores, 24 GB",
    "versions": {"scforget": "0.1.0", "torch": "2.13.0"},
    "command": "dvc repro",
}


@pytest.fixture
def audits():
    return copy.deepcopy(AUDITS)


def bound(epsilon):
    return {"epsilon": epsilon, "ceiling": 0.34, "n_positives": 5, "n_negatives": 8}


@pytest.fixture
def evidence():
    """What a method's record says besides its verdict; odd numbers, so that none stands for another."""
    return {
        "seeds": [3, 4, 7],
        "worst_attack": {
            "worst": {"name": "knn", "auc": 0.641, "statistic": 2.2, "p": 0.0125, "p_adjusted": 0.0833},
            "attacks": [{"name": "knn"}, {"name": "elbo"}, {"name": "kl"}],
            "constant": ["rmia_online"],
            "draws": 1999,
        },
        "population": {
            "models": 4,
            "epsilon": {"median": 1.25, "max": 3.5},
            "forgetting_quality": 0.11,
            "forgetting_ceiling": {"mean": 0.17, "low": 0.15, "high": 0.21},
            "klom": {"models": 4, "value": 9.7, "null": 8.7, "excess": 1.0, "low": 0.6, "high": 1.4},
            "u_lira": {"status": "measured", "reason": "", "auc": 0.71, "interval": [0.52, 0.83], "n_unlearned": 5,
                       "n_retrained": 8},
            "epsilon_bounds": {"membership": bound(0.0), "mean_elbo": bound(0.21)},
            "delta_at_epsilon_1": {"membership": {"forward": 0.31, "backward": 0.29},
                                   "mean_elbo": {"forward": 0.61, "backward": 0.59}},
        },
        "attacker_variance": {"mean": 0.74, "interval": [0.66, 0.82], "originals": 0.00866, "audit": 0.0014,
                              "n_originals": 5, "n_audit": 3},
        "exposure": {
            "null_band": [-2.4, 1.8],
            "above_null": 3 / 14,
            "worst": [
                {"cell": "AATC-4", "label": "CD56+ NK", "donor": "", "z": 6.1, "low": 5.2, "high": 7.0, "rank": 1},
                {"cell": "ATGA-4", "label": "B", "donor": "d2", "z": 5.5, "low": None, "high": None, "rank": 2},
            ],
            "by_label": [{"name": "B", "cells": 6, "mean": 2.5, "worst_share": 0.33}],
            "by_donor": [{"name": "d2", "cells": 8, "mean": 1.5, "worst_share": 0.25}],
            "donor_auc": {"auc": 0.83, "interval": [0.5, 1.0], "member_donors": ["d1", "d2", "d3"],
                          "control_donors": ["d4", "d5"], "reason": None},
        },
    }  # fmt: skip


@pytest.fixture
def known(audits, evidence):
    """The audits with all evidence of ``ssd``, and what the retrains say that it is compared with."""
    audits["ssd"] |= copy.deepcopy(evidence)
    attacks = audits["ssd"]["attacks"]
    learned = {**attacks["knn"]["same_group"], "null": None}
    attacks["mlp"] = {"same_group": {**learned, "auc": 0.749, "interval": [0.54, 0.88]}}
    attacks["published_mlp"] = {
        "same_group": {**learned, "auc": 0.777, "interval": [0.61, 0.91]},
        "matched_knn": {**learned, "auc": 0.862, "interval": [0.63, 0.96]},
    }
    attacks["elbo"]["same_group"]["per_seed_intervals"] = [[0.5, 0.9], None, [0.4, 0.8]]
    audits["retrain"]["mlp_null"] = {"mean": 0.508, "sd": 0.05, "low": 0.43, "high": 0.61}
    audits["retrain"]["models"] = 8
    audits["retrain"]["gene_list"] = {
        "same_group": {"auc": 0.595, "interval": [0.345, 0.804]},
        "all_unseen": {"auc": 0.728, "interval": [0.573, 0.842]},
    }
    return audits


@pytest.fixture
def context():
    return copy.deepcopy(CONTEXT)


@pytest.fixture
def scores():
    """Members ``[M, F]`` and controls ``[M, U]`` with a leak, and members under retrains ``[K, F]``."""
    rng = np.random.default_rng(7)
    return rng.normal(1.0, 1, (5, 14)), rng.normal(0.0, 1, (5, 17)), rng.normal(0.1, 1, (8, 14))


@pytest.fixture
def history():
    epochs = np.arange(1, 31)
    runs = [
        {
            "seed": s,
            "epoch": e,
            "train_elbo": -900 + 250 * (1 - 0.9**e) + s,
            "stop_elbo": -900 + 230 * (1 - 0.9**e) - 0.03 * e * s,
            "kl": 12 * (1 - 0.8**e),
        }
        for s in range(3)
        for e in epochs
    ]
    return pd.DataFrame(runs)


def paths(record, at=()):
    """All paths into nested dicts, outermost first."""
    for key, inner in record.items():
        yield (*at, key)
        if isinstance(inner, dict):
            yield from paths(inner, (*at, key))


@pytest.fixture
def gaps():
    """One copy of the audits for each path of one audit, with null there; and one with the whole audit empty."""

    def without(method):
        yield {**AUDITS, method: {}}
        for path in list(paths(AUDITS[method])):
            broken = copy.deepcopy(AUDITS)
            inner = broken[method]
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = None
            yield broken

    return without

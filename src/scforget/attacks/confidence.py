"""Attacks on one classifier: how sure it is of an item, in four numbers, and what the learned attack sees of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.special import log_softmax, logsumexp

from scforget.arrays import FloatArray
from scforget.attacks import rmia
from scforget.attacks.references import References
from scforget.class_tasks import ClassSignals
from scforget.settings import Settings

SCORES = ("confidence", "loss", "entropy", "max_prob")


class ConfidenceSettings(Settings):
    """Settings of the confidence attacks: none."""


def log_probability(confidence: FloatArray) -> FloatArray:
    """Return log p of logit-scaled confidences φ = log p − log(1 − p), same shape, nats, <= 0; without cancellation."""
    return np.asarray(-np.logaddexp(0.0, -confidence))


def _entropy(signals: ClassSignals) -> FloatArray:
    """``[N]``, nats, in [0, ln C]."""
    log_p = log_softmax(signals.logits, axis=1)
    return np.asarray(-(np.exp(log_p) * log_p).sum(axis=1))


def _largest(signals: ClassSignals) -> FloatArray:
    """``[N]``: logit-scaled confidence in the model's own answer."""
    ordered = np.sort(signals.logits, axis=1)
    return np.asarray(ordered[:, -1] - logsumexp(ordered[:, :-1], axis=1))


def confidence(signals: ClassSignals, _reference: ClassSignals, _settings: ConfidenceSettings) -> dict[str, FloatArray]:
    """Score each item by how sure the model is of it.

    Parameters
    ----------
    signals : of N items, C >= 2 classes
        What the audited model says of the items to score.
    _reference, _settings
        Not used; there because all attacks are called alike.

    Returns
    -------
    dict
        ``confidence`` (φ = log p_y − log(1 − p_y) of the true class), ``loss`` (**minus** the cross-entropy, log p_y,
        nats), ``entropy`` (**minus** the entropy of the output, nats) and ``max_prob`` (φ of the likeliest class,
        whatever the true one), each ``[N]``, higher = more member-like, finite for any finite logits.

    Notes
    -----
    Yeom et al. (2018): members have a lower loss. φ is that of Carlini et al. (2022): nearly normal over models, where
    probabilities crowd at 1. Within one model ``loss`` ranks items as ``confidence`` does; the two differ in means over
    models and in distances.
    """
    sure = signals.confidence
    return {
        "confidence": sure,
        "loss": log_probability(sure),
        "entropy": -_entropy(signals),
        "max_prob": _largest(signals),
    }


def attack_features(signals: ClassSignals) -> FloatArray:
    """What the learned attacker sees of each item: the whole output and the true class, as they come.

    Parameters
    ----------
    signals : of N items, C classes
        What the audited model says of them.

    Returns
    -------
    ``[N, 2 C + 3]``
        Log-probabilities of all classes (nats), the true class one-hot, then cross-entropy (nats), φ of the true class
        and entropy (nats).

    Notes
    -----
    Log-probabilities stay in the order of the classes: sorted, as Salem et al. (2019) have them, they would hide which
    classes an item is mistaken for. P3's last released evaluation gives its decision tree ten log-probabilities and
    the cross-entropy. Every column is finite for finite logits.
    """
    log_p = log_softmax(signals.logits, axis=1)
    classes = log_p.shape[1]
    numbers = [-log_probability(signals.confidence), signals.confidence, _entropy(signals)]
    return np.column_stack([log_p, np.eye(classes)[signals.labels], *numbers]).astype(np.float64)


def rmia_of_probabilities(
    scores: FloatArray, references: References, settings: rmia.RmiaSettings, *, own: bool
) -> dict[str, FloatArray]:  # fmt: skip
    """Run :func:`~scforget.attacks.rmia.rmia` on log p_y, which its ratios are of, in place of φ.

    Parameters
    ----------
    scores : ``[M, n]``
        φ of the true class under the audited models; references hold φ too.
    references, settings, own
        As of ``rmia``.

    Returns
    -------
    dict
        As of ``rmia``.

    Notes
    -----
    p(x | θ) = p_y = σ(φ). The offline score takes p(x) for the OUT mean as it stands, the paper's correction with
    a = 1: its a depends on the data set and is not tuned here.
    """
    probable = replace(
        references, retrains=log_probability(references.retrains), shadows=log_probability(references.shadows)
    )
    return rmia.rmia(log_probability(scores), probable, settings, own=own)

"""Threshold attacks: one number of the model's own loss, no training; the weakest attack, and the hardest to fool."""

from __future__ import annotations

from scforget.arrays import FloatArray
from scforget.settings import Settings
from scforget.tasks import Signals

SCORES = ("reconstruction", "kl", "elbo")


class ThresholdSettings(Settings):
    """Settings of the threshold attacks: none."""


def threshold(signals: Signals, _reference: Signals, _settings: ThresholdSettings) -> dict[str, FloatArray]:
    """Score each cell by how well the model explains it.

    Parameters
    ----------
    signals : of N cells
        What the audited model says of the cells to score.
    _reference, _settings
        Not used; there because all attacks are called alike.

    Returns
    -------
    dict
        ``reconstruction`` (log p(x | z = μ)), ``kl`` (**minus** the KL to the prior) and ``elbo`` (their sum), each
        ``[N]``, nats, higher = more member-like.

    Notes
    -----
    Yeom et al. (2018): members have a lower loss. P0's own version decodes without the cell's library, which makes its
    reconstruction score the same for every model; signals are always of the true library.
    """
    return {"reconstruction": signals.reconstruction, "kl": -signals.kl, "elbo": signals.elbo}

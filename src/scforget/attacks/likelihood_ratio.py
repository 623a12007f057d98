"""Likelihood-ratio attack: how much better a model explains a cell than models trained without it do."""

from __future__ import annotations

from scforget.arrays import FloatArray
from scforget.attacks.references import References
from scforget.errors import EmptyGroupError
from scforget.settings import Settings

SCORES = ("likelihood_ratio",)


class LikelihoodRatioSettings(Settings):
    """Settings of the likelihood-ratio attack: none."""


def likelihood_ratio(
    scores: FloatArray, references: References, _settings: LikelihoodRatioSettings, *, own: bool
) -> dict[str, FloatArray]:
    """Score each cell by its primary score minus the mean of it under the retrained models.

    Parameters
    ----------
    scores : ``[M, n]``
        Under the audited models: the per-cell ELBO in nats, or a classifier's logit-scaled confidence.
    references
        Of which only ``retrains`` ``[K, n]`` is used.
    _settings
        Not used; there because all attacks are called alike.
    own
        Whether the audited models are the retrained ones, in the same order; each is then compared with the others.

    Returns
    -------
    dict
        ``likelihood_ratio`` ``[M, n]``, in the score's unit, higher = more member-like.

    Raises
    ------
    EmptyGroupError
        With fewer than 2 retrained models.
    DataError
        If the scores do not fit the references.

    Notes
    -----
    s_m(x) − mean_k s_k(x), the mean over k ≠ m if ``own``: what is hard or easy about a cell for any model cancels.
    A retrain left out stands at K/(K − 1) times its distance to the mean of all K.
    """
    checked, retrains = references.check(scores, own=own), references.retrains
    K = len(retrains)
    if K < 2:
        raise EmptyGroupError("retrained models of the likelihood-ratio attack", K, "at least 2")
    difference = checked - retrains.mean(axis=0)
    return {"likelihood_ratio": difference * (K / (K - 1)) if own else difference}

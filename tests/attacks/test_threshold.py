from __future__ import annotations

import numpy as np
import pytest

from scforget.attacks.threshold import ThresholdSettings, threshold
from scforget.tasks import Signals


@pytest.fixture
def signals() -> Signals:
    rng = np.random.default_rng(0)
    return Signals(
        cells=np.arange(6),
        reconstruction=-rng.uniform(100, 200, 6),
        kl=rng.uniform(1, 5, 6),
        mu=rng.normal(size=(6, 3)),
        log_var=rng.normal(size=(6, 3)),
    )


def test_threshold_scores_are_likelihood_minus_kl_and_elbo(signals: Signals) -> None:
    scores = threshold(signals, signals, ThresholdSettings())
    np.testing.assert_array_equal(scores["reconstruction"], signals.reconstruction)
    np.testing.assert_array_equal(scores["kl"], -signals.kl)
    np.testing.assert_array_equal(scores["elbo"], signals.reconstruction - signals.kl)


def test_threshold_ranks_a_better_explained_cell_higher(signals: Signals) -> None:
    better = Signals(signals.cells, signals.reconstruction + 1, signals.kl - 0.5, signals.mu, signals.log_var)
    settings = ThresholdSettings()
    low, high = threshold(signals, signals, settings), threshold(better, better, settings)
    assert all((high[name] > low[name]).all() for name in low)

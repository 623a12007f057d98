"""What the tests of the methods share: a trained original, and counts whose forgotten cells must not be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import sparse
from torch import Tensor

from scforget.data.splits import ForgetSets
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.training import TrainingSettings, fit

State = dict[str, Tensor]


@pytest.fixture(scope="session")
def original_state(task: VaeTask, forget_sets: ForgetSets, recipe: Callable[..., dict[str, Any]]) -> State:
    train = np.union1d(forget_sets.forget, forget_sets.retain)
    trained = fit(task.new_model(1), task, train, forget_sets.stop, TrainingSettings(**recipe()), seed=1)
    return {name: value.clone() for name, value in trained.model.state_dict().items()}


@pytest.fixture
def original(task: VaeTask, original_state: State) -> Callable[[], VAE]:
    """A copy of the original that a method may change."""

    def load() -> VAE:
        model = task.new_model(0)
        model.load_state_dict(original_state)
        return model.eval()

    return load


@pytest.fixture(params=["nan", "huge"])
def poisoned(
    request: pytest.FixtureRequest, make_task: Callable[..., VaeTask], tiny_counts: sparse.csr_matrix,
    forget_sets: ForgetSets,
) -> VaeTask:  # fmt: skip
    """The same cells, but whoever reads those to be forgotten diverges."""
    counts = tiny_counts.toarray()
    counts[forget_sets.forget] = np.nan if request.param == "nan" else 1e30
    return make_task(counts=sparse.csr_matrix(counts))


@pytest.fixture(scope="session")
def same_bytes() -> Callable[[State, State], bool]:
    """Bit for bit, as −0 and 0 are told apart."""

    def same(one: State, other: State) -> bool:
        pairs = ((one[name].numpy().tobytes(), other[name].numpy().tobytes()) for name in one)
        return list(one) == list(other) and all(first == second for first, second in pairs)

    return same

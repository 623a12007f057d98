"""Layers of the networks that are faster here than torch's own, and give the same answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from scforget.models.likelihoods import COMPILED


def dropout_mask(shape: Sequence[int], p: float, seed: int) -> Tensor:
    """What inverted dropout multiplies with: 0 with probability p, else 1/(1 − p); float32, on the CPU.

    A hash of a counter and the seed; torch draws each entry from one serial generator, which takes ten times as long.
    Without numba it is torch's, another mask for the same seed.
    """
    if COMPILED is None:
        return torch.empty(*shape).bernoulli_(1 - p, generator=torch.Generator().manual_seed(seed)) / (1 - p)
    mask = np.empty(shape, np.float32)
    COMPILED.dropout_mask(seed, 1 - p, mask.reshape(-1))
    return torch.from_numpy(mask)


class Dropout(nn.Dropout):
    """Inverted dropout by :func:`dropout_mask`, seeded by a draw of torch's global stream; off the CPU torch's own."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Zero each entry with probability p and scale the others by 1/(1 − p); in eval mode do nothing."""
        if not self.training or self.p == 0:
            return inputs
        if inputs.device.type != "cpu":
            return super().forward(inputs)
        seed = int(torch.empty((), dtype=torch.int64).random_())
        return inputs * dropout_mask(inputs.shape, self.p, seed).to(inputs.dtype)

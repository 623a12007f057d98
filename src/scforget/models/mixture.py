"""A mixture of VAEs, one for each shard of the cells: what SISA trains."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from scforget.models.vae import VAE


class Mixture(nn.Module):
    """Several VAEs that answer as one, equally weighted.

    Parameters
    ----------
    members
        At least one; all of one architecture.

    Notes
    -----
    The bound on a cell's log-likelihood is log-mean-exp over members of their bounds; its latent position is their
    posterior means, concatenated. :class:`~scforget.tasks.VaeTask` puts the answers together.
    """

    def __init__(self, members: Sequence[VAE]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def __len__(self) -> int:
        """How many members."""
        return len(self.members)


#: Whatever a task can score.
Model = VAE | Mixture


def members_of(model: Model) -> list[VAE]:
    """The VAEs that a model is made of: itself, or a mixture's members."""
    if isinstance(model, VAE):
        return [model]
    return [member for member in model.members if isinstance(member, VAE)]

"""What the attacks with reference models compare an audited model with: retrained and shadow models' scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from scforget.arrays import BoolArray, FloatArray
from scforget.errors import DataError, EmptyGroupError


def _finite(what: str, values: FloatArray) -> None:
    if not np.isfinite(values).all():
        found = f"{int((~np.isfinite(values)).sum())} scores that are NaN or infinite"
        raise DataError(what, found, "a finite score for every cell")


@dataclass(frozen=True)
class References:
    """Primary scores of models other than the audited ones, on the same n scored cells.

    Attributes
    ----------
    retrains : ``[K, n]``, nats of ELBO or logit-scaled confidence
        Under models trained without the forget cells; no scored cell was seen by any of them.
    shadows : ``[S, n]``, in the same unit
        Under models trained on random parts of the cells.
    members : ``[S, n]`` bool
        Which scored cells each shadow was trained on (IN; the others are OUT).
    aside : ``[n]`` bool
        Scored cells that nobody was ever trained on and that are neither forget cells nor controls. All others are
        **compared** cells.

    Raises
    ------
    EmptyGroupError
        If there is no scored cell.
    DataError
        If shapes do not fit, a mask is not of booleans, a score is not finite, or a shadow was trained on a cell that
        was set aside.
    """

    retrains: FloatArray
    shadows: FloatArray
    members: BoolArray
    aside: BoolArray

    def __post_init__(self) -> None:
        shapes = [np.shape(array) for array in (self.retrains, self.shadows, self.members, self.aside)]
        n = shapes[3][-1:]
        wanted_shapes = len(shapes[0]) == len(shapes[1]) == 2 and len(shapes[3]) == 1 and shapes[1] == shapes[2]
        if not (wanted_shapes and shapes[0][1:] == shapes[1][1:] == n):
            found = ", ".join(map(str, shapes))
            raise DataError("retrains, shadows, members, aside", found, "shapes [K, n], [S, n], [S, n], [n]")
        if n == (0,):
            raise EmptyGroupError("scored cells", 0, "at least 1")
        if self.members.dtype != np.bool_ or self.aside.dtype != np.bool_:
            found = f"{self.members.dtype} and {self.aside.dtype}"
            raise DataError("members and aside", found, "booleans, one for each scored cell")
        _finite("scores of the retrained models", self.retrains)
        _finite("scores of the shadow models", self.shadows)
        trained = int(self.members[:, self.aside].any(axis=0).sum())
        if trained:
            raise DataError("cells set aside", f"{trained} that a shadow model was trained on", "cells nobody saw")

    def check(self, scores: FloatArray, *, own: bool) -> FloatArray:
        """Return the audited models' scores as float64, refusing those that do not fit these references.

        Parameters
        ----------
        scores : ``[M, n]``
            Under the audited models; M >= 1.
        own
            Whether the audited models are the retrained ones themselves, in the same order.

        Returns
        -------
        ``[M, n]``

        Raises
        ------
        EmptyGroupError
            If there is no audited model.
        DataError
            If the cells are others, a score is not finite, or ``own`` is claimed of other scores.
        """
        array = np.asarray(scores, dtype=np.float64)
        if array.ndim != 2 or array.shape[1] != self.aside.size:
            wanted = f"shape [M, {self.aside.size}], the cells that the reference models scored"
            raise DataError("scores of the audited models", array.shape, wanted)
        if not len(array):
            raise EmptyGroupError("audited models", 0, "at least 1")
        _finite("scores of the audited models", array)
        if own and not np.array_equal(array, self.retrains):
            found = f"{len(array)} models with other scores than the {len(self.retrains)} retrained ones"
            raise DataError("audited models that are the retrained ones", found, "the same scores in the same order")
        return array

    def require_shadows(self, at_least: int) -> None:
        """Refuse too few shadow models: of a compared cell, IN and OUT each; of a cell set aside, OUT.

        Raises
        ------
        EmptyGroupError
            If any cell has fewer than ``at_least``, or every cell was set aside.
        """
        if self.aside.all():
            raise EmptyGroupError("forget cells and controls", "only cells set aside", "at least 1")
        inside, outside = self.members.sum(axis=0)[~self.aside], (~self.members).sum(axis=0)
        for name, counts in (("trained on a cell (IN)", inside), ("not trained on a cell (OUT)", outside)):
            few = int((counts < at_least).sum())
            if few:
                found = f"as few as {counts.min()}, and too few for {few} of {counts.size} cells"
                raise EmptyGroupError(f"shadow models {name}", found, f"at least {at_least}")

"""Attacker networks: an MLP that learns to tell forget cells from controls by what one model says of them.

``mlp`` trains attackers afresh for every audited model and scores each cell by those that never saw it;
``fit_published`` is P0's protocol, kept for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from scforget import seeding
from scforget.arrays import BoolArray, FloatArray, IntArray
from scforget.attacks.nets import NetSettings, logits_of, new_nets, train
from scforget.errors import DataError, EmptyGroupError
from scforget.tasks import Signals

# A column that varies less than this share of its own size (or of 1) carries rounding errors only.
_SMALLEST_SPREAD = 1e-8
_PUBLISHED_SHARE = 0.8  # of the cells, which P0's attacker is trained on


class MlpSettings(NetSettings):
    """Settings of the cross-fitted attacker.

    Attributes
    ----------
    folds
        k of the cross-fitting; fewer where a group has fewer cells.
    attackers
        Attacker seeds whose logits are averaged; each has its own folds, weights, batches and dropout.
    shuffled_draws
        Of ``shuffled_label_null``.
    """

    folds: Annotated[int, Field(ge=2)]
    attackers: Annotated[int, Field(gt=0)]
    shuffled_draws: Annotated[int, Field(ge=2)]


_PUBLISHED = NetSettings(hidden=[256, 256], dropout=0.3, learning_rate=1e-3, batch_size=128, epochs=50)


@dataclass(frozen=True)
class MlpScores:
    """Logits of the cross-fitted attackers, higher = more member-like.

    Attributes
    ----------
    scores : ``[n]``
        Means over attacker seeds.
    per_attacker : ``[attackers, n]``
        Of each attacker seed; row i is the same whatever the number of rows.
    """

    scores: FloatArray
    per_attacker: FloatArray


def attack_features(signals: Signals) -> FloatArray:
    """What the attacker sees of each cell: P0's columns, in its order, at z = μ.

    Parameters
    ----------
    signals : of n cells, Z latent dimensions
        What the audited model says of them.

    Returns
    -------
    ``[n, 5 + 2 Z]``
        Reconstruction, KL, ELBO (nats), μ (Z), log σ² (Z), ‖μ‖, ‖log σ²‖; 69 columns for Z = 32.

    Notes
    -----
    Columns 1 and 3 are log-likelihood and ELBO, higher for a better explained cell; P0's are losses (a squared error,
    and that plus KL). After standardisation a column's sign and unit no longer matter.
    """
    norms = [np.linalg.norm(part, axis=1) for part in (signals.mu, signals.log_var)]
    bounds = [signals.reconstruction, signals.kl, signals.elbo]
    return np.column_stack([*bounds, signals.mu, signals.log_var, *norms]).astype(np.float64)


def _check(features: npt.ArrayLike, forget: BoolArray, controls: BoolArray) -> FloatArray:
    array = np.asarray(features, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] == 0 or forget.shape != array.shape[:1] or controls.shape != array.shape[:1]:
        found = f"features {array.shape}, forget {forget.shape}, controls {controls.shape}"
        raise DataError("cells of the mlp attack", found, "[n, D], [n] and [n]")
    if not np.isfinite(array).all():
        raise DataError("features of the mlp attack", f"{int((~np.isfinite(array)).sum())} not finite", "numbers")
    if (forget & controls).any():
        raise DataError("cells of the mlp attack", f"{int((forget & controls).sum())} in both groups", "none")
    return array


@dataclass(frozen=True)
class _Problem:
    """Cells ``cells`` of the two groups, ``labels`` of them (1 forget, 0 control), and all ``features [n, D]``."""

    features: FloatArray
    cells: IntArray
    labels: FloatArray


def _folds(labels: FloatArray, folds: int, generator: np.random.Generator) -> IntArray:
    """Fold of each cell, ``[len(labels)]``: each group is spread at random and evenly, larger folds of one first."""
    fold = np.empty(len(labels), dtype=np.int64)
    for label, order in ((1, np.arange(folds)), (0, np.arange(folds)[::-1])):
        group = np.flatnonzero(labels == label)
        fold[generator.permutation(group)] = np.resize(order, len(group))
    return fold


def _standardised(features: FloatArray, trained_on: IntArray) -> npt.NDArray[np.float32]:
    """``[n, D]`` by mean and standard deviation of an attacker's own training cells; columns constant there are 0."""
    mean, sd = features[trained_on].mean(axis=0), features[trained_on].std(axis=0)
    varies = sd > _SMALLEST_SPREAD * np.maximum(np.abs(mean), 1)
    return np.where(varies, (features - mean) / np.where(varies, sd, 1), 0).astype(np.float32)


def _balanced(labels: FloatArray) -> FloatArray:
    """Weight of each cell, with mean 1, so that both groups weigh the same."""
    members = labels.mean()
    return 0.5 * np.where(labels == 1, 1 / members, 1 / (1 - members))


def _fold_logits(
    problem: _Problem, folds: int, settings: NetSettings, generator: np.random.Generator
) -> tuple[FloatArray, IntArray]:
    """Leave out each fold in turn: logits ``[folds, n]`` of the networks, and the fold of each cell of the groups."""
    import torch

    fold = _folds(problem.labels, folds, generator)
    trained_on = [problem.cells[fold != k] for k in range(folds)]
    features = torch.from_numpy(np.stack([_standardised(problem.features, cells) for cells in trained_on]))
    labels, weights = np.zeros(len(problem.features)), np.zeros((folds, len(problem.features)))
    labels[problem.cells] = problem.labels
    for k, cells in enumerate(trained_on):
        weights[k, cells] = _balanced(labels[cells])
    nets = new_nets(folds, features.shape[2], settings.hidden, generator)
    steps = -(-max(map(len, trained_on)) // settings.batch_size)
    train(
        nets, features, torch.from_numpy(labels).float(), torch.from_numpy(weights),
        trained_on=trained_on, cuts=steps, settings=settings, generator=generator,
    )  # fmt: skip
    return logits_of(nets, features), fold


def _cross_fitted(problem: _Problem, folds: int, settings: MlpSettings, seed: int) -> FloatArray:
    """Logits ``[attackers, n]``: a cell of a group by the fold that left it out, any other by the mean of all folds."""
    rows = []
    for attacker in range(settings.attackers):
        generator = seeding.numpy_generator(seed, "mlp", attacker)
        logits, fold = _fold_logits(problem, folds, settings, generator)
        row = logits.mean(axis=0)
        row[problem.cells] = logits[fold, problem.cells]
        rows.append(row)
    scores = np.stack(rows)
    if not np.isfinite(scores).all():
        raise DataError("logits of the mlp attack", f"{int((~np.isfinite(scores)).sum())} not finite", "numbers")
    return scores


def _prepare(
    features: npt.ArrayLike, forget: BoolArray, controls: BoolArray, settings: MlpSettings
) -> tuple[_Problem, int]:
    """Check the groups; return the problem and the number of folds that both groups allow."""
    array = _check(features, forget, controls)
    F, U = int(forget.sum()), int(controls.sum())
    for name, size in (("forget cells of the mlp attack", F), ("control cells of the mlp attack", U)):
        if size < 2:
            raise EmptyGroupError(name, size, "at least 2")
    cells = np.flatnonzero(forget | controls)
    if (array[cells] == array[cells[0]]).all():
        raise DataError("features of the mlp attack", "the same for every cell", "a feature that differs")
    return _Problem(array, cells, forget[cells].astype(np.float64)), min(settings.folds, F, U)


def mlp(
    features: npt.ArrayLike, forget: BoolArray, controls: BoolArray, settings: MlpSettings, seed: int
) -> MlpScores:  # fmt: skip
    """Score cells by attackers trained on this model's own features, none of which saw the cell it scores.

    Parameters
    ----------
    features : ``[n, D]``
        Of one audited model, see ``attack_features``; any finite unit.
    forget, controls : ``[n]``
        The two groups; at least 2 cells each, none in both.
    settings
        Of the networks and the cross-fitting.
    seed
        Equal seeds give equal scores.

    Returns
    -------
    MlpScores
        Logits. A cell of either group is scored by the fold that left it out; a cell of neither by the mean of all.

    Raises
    ------
    EmptyGroupError
        If a group has fewer than 2 cells.
    DataError
        If shapes do not fit, a feature is not finite, a cell is in both groups, or no feature differs between cells.

    Notes
    -----
    For each attacker seed: folds stratified by group; features standardised on the training folds; the loss weighted so
    that both groups weigh the same; ReLU layers with dropout, every layer's weight divided by its spectral norm (Miyato
    et al. 2018). An epoch's batches are as even as can be, so that no step is taken on one or two cells.

    Under no leak the AUC is 0.5 on average, but spreads more than a fixed score's (about 1.3 to 1.5 times, simulated):
    cells of a fold share an attacker that learned from the others. Intervals and null bands that take cells as
    independent are too narrow here; ``shuffled_label_null`` is not.
    """
    problem, folds = _prepare(features, forget, controls, settings)
    per_attacker = _cross_fitted(problem, folds, settings, seed)
    return MlpScores(per_attacker.mean(axis=0), per_attacker)


def shuffled_label_null(  # noqa: PLR0917
    features: npt.ArrayLike, forget: BoolArray, controls: BoolArray, settings: MlpSettings, seed: int, draws: int
) -> dict[str, float]:
    """AUC of ``mlp`` when the labels of the same cells are shuffled, so that there is nothing to find.

    Parameters
    ----------
    features, forget, controls, settings, seed
        As for ``mlp``; features of cells in neither group are not looked at.
    draws
        Shuffles, >= 2; each costs a whole training.

    Returns
    -------
    dict
        ``mean``, ``sd`` (n − 1), ``low`` (smallest) and ``high`` (largest) of the draws' AUCs, in [0, 1].

    Raises
    ------
    DataError
        If ``draws`` is below 2, or as for ``mlp``.
    """
    from sklearn.metrics import roc_auc_score

    if draws < 2:
        raise DataError("draws of shuffled labels", draws, "at least 2")
    problem, folds = _prepare(features, forget, controls, settings)
    cells = np.arange(len(problem.cells))
    aucs = np.empty(draws)
    for draw in range(draws):
        labels = seeding.numpy_generator(seed, "shuffled labels", draw).permutation(problem.labels)
        shuffled = _Problem(problem.features[problem.cells], cells, labels)
        scores = _cross_fitted(shuffled, folds, settings, seeding.derive(seed, "shuffled attacker", draw))
        aucs[draw] = roc_auc_score(labels, scores.mean(axis=0))
    return {
        "mean": float(aucs.mean()), "sd": float(aucs.std(ddof=1)), "low": float(aucs.min()), "high": float(aucs.max()),
    }  # fmt: skip


@dataclass(frozen=True)
class PublishedAttacker:
    """P0's attacker: trained once, on one model's features, and applied unchanged to every other model's.

    Kept for comparison, because it is wrong in two ways. It is scored on all cells, most of which it was trained on, so
    its AUC is high without any leak. And it knows the first model's latent coordinates: in another model's, 64 of the
    69 columns mean something else, so chance there is no evidence of privacy.

    Attributes
    ----------
    weights : ``[out, in]`` of each layer
        Divided by their spectral norms.
    biases : ``[out]`` of each layer
    trained_on
        Rows of the features that it was fitted to which it was trained on.
    """

    weights: tuple[npt.NDArray[np.float32], ...]
    biases: tuple[npt.NDArray[np.float32], ...]
    trained_on: IntArray

    def score(self, features: npt.ArrayLike) -> FloatArray:
        """Logits ``[n]`` of features ``[n, D]``, higher = more member-like; not standardised.

        Raises
        ------
        DataError
            If the features are not of D columns, or not finite.
        """
        values = np.asarray(features, dtype=np.float64)
        wanted = self.weights[0].shape[1]
        if values.ndim != 2 or values.shape[1] != wanted:
            raise DataError("features of the published attacker", f"shape {values.shape}", f"[n, {wanted}]")
        if not np.isfinite(values).all():
            raise DataError("features of the published attacker", "NaN or infinite ones", "numbers")
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            values = np.maximum(values @ weight.T.astype(np.float64) + bias, 0)
        return np.asarray(values @ self.weights[-1][0].astype(np.float64) + self.biases[-1][0], dtype=np.float64)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return everything by name, for ``np.savez`` or safetensors; see ``from_arrays``."""
        arrays: dict[str, npt.NDArray[Any]] = {"trained_on": self.trained_on}
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            arrays |= {f"weight_{layer}": weight, f"bias_{layer}": bias}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> PublishedAttacker:
        """Rebuild from ``to_arrays``.

        Raises
        ------
        DataError
            If an array is missing.
        """
        layers = range(sum(name.startswith("weight_") for name in arrays))
        wanted = ["trained_on", "weight_0", *(f"{part}_{layer}" for layer in layers for part in ("weight", "bias"))]
        if missing := [name for name in wanted if name not in arrays]:
            raise DataError("arrays of a published attacker", f"no {missing[0]}", "those of to_arrays")
        weights, biases = (tuple(arrays[f"{part}_{layer}"] for layer in layers) for part in ("weight", "bias"))
        return cls(weights, biases, arrays["trained_on"])


def fit_published(features: npt.ArrayLike, forget: BoolArray, controls: BoolArray, seed: int) -> PublishedAttacker:
    """Train P0's attacker on the features of one model, the first original.

    Parameters
    ----------
    features : ``[n, D]``
        Of one draw of z, as published; that is the caller's business. Not standardised.
    forget, controls : ``[n]``
        The two groups; at least 1 cell each.
    seed
        Of the split, the weights, the batches and dropout.

    Raises
    ------
    EmptyGroupError
        If a group is empty.
    DataError
        If shapes do not fit, a feature is not finite, or a cell is in both groups.

    Notes
    -----
    P0's released code: 256-256 ReLU, spectral norm, dropout 0.3, Adam 1e-3, batches of 128, 50 epochs, cross-entropy
    that does not balance the groups, a random split that is not stratified, of which the 80 % are trained on. The sign
    of columns 1 and 3 (see ``attack_features``) does not matter, as weights begin symmetric about 0; their unit does.
    """
    import torch

    array = _check(features, forget, controls)
    for name, group in (("forget cells of the published attacker", forget), ("its control cells", controls)):
        if not group.any():
            raise EmptyGroupError(name, 0, "at least 1")
    generator = seeding.numpy_generator(seed, "published mlp")
    cells = generator.permutation(np.flatnonzero(forget | controls))
    cells = np.sort(cells[: max(1, int(_PUBLISHED_SHARE * len(cells)))])
    cuts = list(range(_PUBLISHED.batch_size, len(cells), _PUBLISHED.batch_size))
    nets = new_nets(1, array.shape[1], _PUBLISHED.hidden, generator)
    train(
        nets, torch.from_numpy(array).float()[None], torch.from_numpy(forget.astype(np.float32)),
        torch.ones(1, len(array)), trained_on=[cells], cuts=cuts, settings=_PUBLISHED, generator=generator,
    )  # fmt: skip
    with torch.no_grad():
        weights = tuple((weight / nets.norms(layer))[0].numpy() for layer, weight in enumerate(nets.weights))
    return PublishedAttacker(weights, tuple(bias.detach()[0].numpy() for bias in nets.biases), cells)

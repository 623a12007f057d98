"""How alike the Fisher information of forgotten and of retained cells is: part by part, with intervals and nulls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from scipy.stats import entropy
from torch import Tensor, nn

from scforget import fisher, published, seeding
from scforget.arrays import BoolArray, FloatArray, IntArray
from scforget.fisher import Diagonal
from scforget.models.vae import VAE, Batch
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.theory import grams
from scforget.theory.grams import ALL, Moments

Record = dict[str, Any]
#: Groups of parts, as the single-cell paper names the layer categories; ``scale`` is its ``fc_mean``.
GROUPS: dict[str, tuple[str, ...]] = {
    "encoder": ("encoder",),
    "bottleneck": ("bottleneck",),
    "decoder_hidden": ("decoder",),
    "decoder_output": ("scale", "condition", "dispersion", "zero"),
    "scale": ("scale", "condition"),
    "scale_shared": ("scale",),
    "scale_condition": ("condition",),
    "dispersion": ("dispersion",),
    "global": ("encoder", "bottleneck", "decoder", "scale", "condition", "dispersion", "zero"),
}
CLASSIFIER_GROUPS = {"hidden": ("hidden",), "output": ("output",), "global": ("hidden", "output")}
_BATCH = 256


class OverlapSettings(Settings):
    """How overlap is measured.

    Attributes
    ----------
    draws
        Latent draws of each cell.
    cells
        Training cells, at most, in the inner products (forgotten cells are always among them): their number squared is
        what a bootstrap costs. The estimates over all cells do not depend on it.
    bootstrap_draws
        Resamples of cells and models.
    random_sets
        Random sets of retained cells, as many cells as are forgotten, that the overlap is compared with.
    batch_size, damping
        Of the published estimator.
    """

    draws: Annotated[int, Field(gt=0)]
    cells: Annotated[int, Field(gt=1)]
    bootstrap_draws: Annotated[int, Field(ge=100)]
    random_sets: Annotated[int, Field(ge=20)]
    batch_size: Annotated[int, Field(gt=0)]
    damping: Annotated[float, Field(gt=0)]


def vae_parts(model: VAE) -> grams.Parts:
    """Parts of a VAE's layers: blocks, but each head by itself, and the columns for the cells' groups apart."""
    hidden = model.scale.in_features - model.conditions

    def parts(layer: str) -> Mapping[str, slice]:
        module = layer.split(".", 1)[0]
        if module == "scale" and model.conditions:
            return {"scale": slice(0, hidden), "condition": slice(hidden, None)}
        return {"bottleneck" if module in {"mu", "log_var"} else module: ALL}

    return parts


def classifier_parts(layer: str) -> Mapping[str, slice]:
    """Parts of a classifier: everything but the class-specific output layer is ``hidden``."""
    return {layer.split(".", 1)[0]: ALL}


def vae_grams(model: VAE, task: VaeTask, cells: IntArray, *, draws: int, seed: int) -> dict[str, FloatArray]:
    """:func:`scforget.theory.grams.grams` of a VAE's training loss over some cells, ``[n, n]`` by part."""
    model.eval()
    noise = seeding.torch_generator(seed, "grams")

    def losses(batch: Batch) -> Tensor:
        return task.loss(model, batch, noise).total

    def batches() -> list[Batch]:
        return [task.batch(cells[start : start + _BATCH]) for start in range(0, len(cells), _BATCH)]

    return grams.grams(model, losses, batches, draws=draws, parts=vae_parts(model))


def net_grams(
    model: nn.Module, losses: Callable[[IntArray], Tensor], cells: IntArray, parts: grams.Parts = classifier_parts
) -> dict[str, FloatArray]:
    """The same of a classifier, whose ``losses`` are asked for by cells and draw nothing."""
    model.eval()
    pieces = [cells[start : start + _BATCH] for start in range(0, len(cells), _BATCH)]
    return grams.grams(model, losses, lambda: pieces, draws=1, parts=parts)


def _known(gram: Mapping[str, FloatArray], groups: Mapping[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """Groups of which a gradient arrives anywhere, with those of their parts where it does."""
    live = {part for part, values in gram.items() if values.any()}
    found = {group: [part for part in parts if part in live] for group, parts in groups.items()}
    return {group: parts for group, parts in found.items() if parts}


def _moments(
    models: Sequence[Mapping[str, FloatArray]],
    groups: Mapping[str, Sequence[str]],
    first: FloatArray,
    second: FloatArray,
) -> dict[str, list[Moments]]:
    """Of each group of parts, one for each model."""
    needed = {part for parts in groups.values() for part in parts}
    by_part = [{part: grams.moments(gram[part], first, second) for part in needed} for gram in models]
    return {
        group: [reduce(Moments.plus, (known[part] for part in parts)) for known in by_part]
        for group, parts in groups.items()
    }


def _range(values: FloatArray, level: float) -> list[float]:
    return [float(q) for q in np.quantile(values, [(1 - level) / 2, (1 + level) / 2])]


def _random_weights(
    members: IntArray, n: int, size: int, times: int, generator: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Random parts of so many members, and the other members, ``[times, n]`` weights each."""
    inside, outside = np.zeros((times, n)), np.zeros((times, n))
    for row in range(times):
        order = generator.permutation(members)
        inside[row, order[:size]] = 1 / size
        outside[row, order[size:]] = 1 / (len(order) - size)
    return inside, outside


def compare(
    models: Sequence[Mapping[str, FloatArray]], forget: BoolArray, unrelated: BoolArray, settings: OverlapSettings, *,
    level: float, seed: int, classifier: bool = False,
) -> Record:  # fmt: skip
    """Overlap of forgotten with retained cells in one or more models, with everything that it is to be read beside.

    Parameters
    ----------
    models
        Inner products ``[n, n]`` by part of each model, over the same n cells.
    forget : ``[n]``
        Which cells are forgotten (2 at least); the others are retained.
    unrelated : ``[n]``
        Retained cells of another kind.
    level, seed, classifier
        Of intervals; of resamples and random sets; whose parts they are.

    Returns
    -------
    dict
        By group of parts: ``cosine`` of the diagonals as estimated from these cells; ``unbiased``, its estimate for the
        populations that cells are drawn from, with ``interval`` (resampling forgotten cells, retained cells and
        models) and ``per_model``; ``halves``, two random halves of the retained cells (the ceiling); ``same_size``,
        as many random retained cells as are forgotten against the others, with the share of them that overlap less
        than the forgotten cells do (``p_lower``); ``unrelated``, forgotten cells against those of another kind.
    """
    generator = seeding.numpy_generator(seed, "overlap")
    n, times = len(forget), settings.random_sets
    inside, outside = np.flatnonzero(forget), np.flatnonzero(~forget)
    one, other = grams.equal_weights(inside, n), grams.equal_weights(outside, n)
    first = grams.resampled_weights(inside, n, settings.bootstrap_draws, generator)
    second = grams.resampled_weights(outside, n, settings.bootstrap_draws, generator)
    far = grams.resampled_weights(np.flatnonzero(unrelated), n, settings.bootstrap_draws, generator)
    halves = _random_weights(outside, n, len(outside) // 2, times, generator)
    sized = _random_weights(outside, n, min(len(inside), len(outside) // 2), times, generator)
    chosen = generator.integers(len(models), size=(settings.bootstrap_draws, len(models)))
    groups = _known(models[0], CLASSIFIER_GROUPS if classifier else GROUPS)
    whole, drawn, apart, ceiling, null = (
        _moments(models, groups, *sets) for sets in ((one, other), (first, second), (first, far), halves, sized)
    )

    def averaged(several: list[Moments]) -> FloatArray:
        """Mean over resampled models of each resample's unbiased cosine, ``[B]``."""
        values = np.stack([found.unbiased_cosine for found in several], 1)
        return np.asarray(np.take_along_axis(values, chosen, 1).mean(1))

    return {
        group: {
            "cosine": float(np.mean([found.cosine for found in whole[group]])),
            "unbiased": float(np.mean([found.unbiased_cosine for found in whole[group]])),
            "interval": _range(averaged(drawn[group]), level),
            "per_model": [float(found.unbiased_cosine[0]) for found in whole[group]],
            "halves": _spread(ceiling[group], level),
            "same_size": _null(null[group], whole[group], level),
            "unrelated": {
                "unbiased": float(np.mean(averaged(apart[group]))), "interval": _range(averaged(apart[group]), level)
            },
        }
        for group in groups
    }  # fmt: skip


def _spread(several: list[Moments], level: float) -> Record:
    """Of random sets: means over models, their mean and range over sets, unbiased and as estimated."""
    values = np.mean([found.unbiased_cosine for found in several], 0)
    plain = np.mean([found.cosine for found in several], 0)
    return {
        "unbiased": float(values.mean()), "range": _range(values, level),
        "cosine": float(plain.mean()), "cosine_range": _range(plain, level),
    }  # fmt: skip


def _null(several: list[Moments], whole: list[Moments], level: float) -> Record:
    """The same, and how many random sets overlap no more than the forgotten cells do, as many cells each."""
    plain = np.mean([found.cosine for found in several], 0)
    observed = np.mean([found.cosine for found in whole])
    return {**_spread(several, level), "p_lower": float((1 + (plain <= observed).sum()) / (1 + len(plain)))}


def _flat(diagonal: Diagonal, parts: grams.Parts) -> dict[str, FloatArray]:
    """A diagonal's entries by part, float64."""
    found: dict[str, list[FloatArray]] = {}
    for name, value in diagonal.items():
        layer, kind = name.rsplit(".", 1)
        for part, columns in parts(layer).items():
            if kind == "weight":
                found.setdefault(part, []).append(value[:, columns].double().numpy().ravel() if value.ndim > 1
                                                  else value.double().numpy())  # fmt: skip
            elif columns.start in {None, 0}:
                found.setdefault(part, []).append(value.double().numpy().ravel())
    return {part: np.concatenate(values) for part, values in found.items()}


def _cosine(one: FloatArray, other: FloatArray) -> float:
    return float(one @ other / max(np.linalg.norm(one) * np.linalg.norm(other), np.finfo(float).tiny))


def _top(values: FloatArray, share: float) -> IntArray:
    count = max(1, int(share * len(values)))
    return np.argpartition(values, len(values) - count)[-count:]


def diagonals(
    one: Diagonal, other: Diagonal, parts: grams.Parts, groups: Mapping[str, tuple[str, ...]] = GROUPS
) -> Record:  # fmt: skip
    """What the single-cell paper says of two diagonals, each entry of a parameter that has a gradient in either set.

    Parameters
    ----------
    one, other
        Diagonals of forgotten and of retained cells, every tensor of its parameter's shape.
    parts
        Of the network's layers.

    Returns
    -------
    dict
        By group: ``cosine``, ``parameters`` and ``without_gradient`` (left out: dead units, an unused head). Of the
        whole: ``effective_rank`` of each, as the participation ratio (Σ F)²/Σ F² and as exp(entropy of F/Σ F); the
        share that the top 1 % and 10 % of both have in common; the correlation of log F where both are above 0.
    """
    first, second = _flat(one, parts), _flat(other, parts)
    by_group: Record = {}
    for group, names in groups.items():
        held = [name for name in names if name in first]
        if not held:
            continue
        f, r = (np.concatenate([side[name] for name in held]) for side in (first, second))
        live = (f > 0) | (r > 0)
        if live.any():
            by_group[group] = {"cosine": _cosine(f, r), "parameters": len(f), "without_gradient": int((~live).sum())}
    f, r = (np.concatenate([side[name] for name in first]) for side in (first, second))
    live = (f > 0) | (r > 0)
    f, r = f[live], r[live]
    both = (f > 0) & (r > 0)
    return {
        "groups": by_group,
        "effective_rank": {
            name: {"participation": float(side.sum() ** 2 / (side**2).sum()), "entropy": float(np.exp(entropy(side)))}
            for name, side in (("forget", f), ("retain", r))
        },
        "top_1_percent": float(np.isin(_top(f, 0.01), _top(r, 0.01)).mean()),
        "top_10_percent": float(np.isin(_top(f, 0.1), _top(r, 0.1)).mean()),
        "log_correlation": float(np.corrcoef(np.log(f[both]), np.log(r[both]))[0, 1]),
    }


def per_gene(one: Diagonal, other: Diagonal) -> FloatArray:
    """``[G]``: cosine of the two diagonals within each gene's row of the scale head's weight."""
    f, r = (side["scale.weight"].double().numpy() for side in (one, other))
    norms = np.linalg.norm(f, axis=1) * np.linalg.norm(r, axis=1)
    return np.asarray((f * r).sum(1) / np.maximum(norms, np.finfo(float).tiny))


def genes_summary(cosines: FloatArray) -> Record:
    """Mean, median and tails of :func:`per_gene`."""
    return {
        "mean": float(cosines.mean()), "median": float(np.median(cosines)),
        "above_half": float((cosines > 0.5).mean()), "below_fifth": float((cosines < 0.2).mean()),
    }  # fmt: skip


def batch_estimator(
    model: VAE, task: VaeTask, forget: IntArray, retain: IntArray, settings: OverlapSettings, *, seed: int
) -> tuple[Diagonal, Diagonal]:
    """Diagonals by the published estimator (:func:`scforget.published.batch_fisher`), damping included."""
    found = [
        published.batch_fisher(
            model, task, cells, batch_size=settings.batch_size, reduction="sum", damping=settings.damping, seed=seed
        )
        for cells in (forget, retain)
    ]
    model.eval()
    return found[0], found[1]


def exact(model: VAE, task: VaeTask, pieces: Sequence[IntArray], draws: int, seed: int) -> list[Diagonal]:
    """Exact diagonal of each of some disjoint sets of cells, the empty ones all 0."""
    return [
        fisher.diagonal(model, task, piece, draws=draws, seed=seeding.derive(seed, str(place)))
        if len(piece) else {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
        for place, piece in enumerate(pieces)
    ]  # fmt: skip


def pooled(sets: Sequence[tuple[Diagonal, int]]) -> Diagonal:
    """Diagonal of disjoint sets together: the mean of theirs, weighed by their cells."""
    total = sum(cells for _, cells in sets)
    return {name: sum(one[name] * (cells / total) for one, cells in sets) for name in sets[0][0]}  # type: ignore[misc]

"""What a method or an attack may ask of a classifier: loss per item, divergence between two, membership signals.

The classifier's counterpart of :mod:`scforget.tasks`: methods written in terms of :class:`~scforget.tasks.Task` serve
both.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from scipy.special import log_softmax, logsumexp
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, pad

from scforget import engine, seeding
from scforget.arrays import FloatArray, IntArray
from scforget.models.classifiers import Classifier, NetSettings, build
from scforget.settings import Settings

_SCORING_BATCH = 512
# Pixels are centred and scaled by constants: a mean of the training set would be a trace of its members.
_PIXEL_CENTRE, _PIXEL_SCALE = 127.5, 63.75


class AugmentationSettings(Settings):
    """Random views of a training item.

    Attributes
    ----------
    crop
        Images: pixels of black border from which a window of the image's own size is cut; 0 for none.
    flip
        Images: mirrored left to right with probability ½.
    noise
        Standard deviation of Gaussian noise on the net's input; 0 for none.
    """

    crop: Annotated[int, Field(ge=0)]
    flip: bool
    noise: Annotated[float, Field(ge=0)]

    @property
    def any(self) -> bool:
        """Whether two views of an item can differ."""
        return bool(self.crop or self.flip or self.noise)


class ClassBatch(NamedTuple):
    """Some items: the net's ``inputs [B, …]`` and class codes ``labels [B]``."""

    inputs: Tensor
    labels: Tensor


class ClassLoss(NamedTuple):
    """Cross-entropy of each item, ``total [B]`` nats, weighted by its class where classes have weights."""

    total: Tensor


class ClassDivergence(NamedTuple):
    """How far a student's class probabilities are from its teacher's, ``total [B]`` nats, >= 0."""

    total: Tensor


@dataclass(frozen=True)
class ClassSignals:
    """What one classifier says of some items, in eval mode and without augmentation.

    Attributes
    ----------
    cells, labels : ``[N]``
        Which items these are, and the codes of their classes.
    logits : ``[N, C]``
        The net's answer.
    features : ``[N, F]``
        What its last layer sees.
    """

    cells: IntArray
    labels: IntArray
    logits: FloatArray
    features: FloatArray

    @property
    def confidence(self) -> FloatArray:
        """``[N]``: φ = log p_y − log(1 − p_y) of the true class, the score s of the audit; finite for finite logits.

        Notes
        -----
        The logit-scaled confidence of Carlini et al. 2022: z_y − log Σ_{j≠y} exp z_j, in which nothing cancels.
        """
        rows = np.arange(len(self.labels))
        others = self.logits.copy()
        others[rows, self.labels] = -np.inf
        return np.asarray(self.logits[rows, self.labels] - logsumexp(others, axis=1))

    @property
    def log_prob(self) -> FloatArray:
        """``[N]``, nats, <= 0: log p_y of the true class; minus the cross-entropy."""
        return np.asarray(log_softmax(self.logits, axis=1)[np.arange(len(self.labels)), self.labels])

    @property
    def score(self) -> FloatArray:
        """What the audit's primary statistics rest on: :attr:`confidence`."""
        return self.confidence

    @property
    def latent(self) -> FloatArray:
        """Where the model puts each item, ``[N, F]``: :attr:`features`."""
        return self.features


def class_kl(wanted: Tensor, found: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(wanted/T) ‖ softmax(found/T))·T² of each item, ``[B]`` nats, from logits ``[B, C]``.

    The factor T² keeps gradients on one scale (Hinton et al. 2015).
    """
    target, answer = (logits.div(temperature).log_softmax(-1) for logits in (wanted, found))
    return temperature**2 * (target.exp() * (target - answer)).sum(-1)


class ClassifierTask:
    """Labelled items, and how a :class:`~scforget.models.classifiers.Classifier` is asked about them.

    Parameters
    ----------
    inputs : ``[N, …]``
        Of every prepared item: images ``[N, channels, H, W]`` uint8, or vectors ``[N, F]`` float32 as the net takes
        them.
    labels : ``[N]``
        Class codes, 0 to C − 1.
    classes
        Names of the C classes.
    settings
        Architecture of new models.
    augmentation
        Of training batches.
    weights : ``[C]``, optional
        Of each class in the loss, > 0.
    donors : ``[N]``, optional
        Whose each item is, where that is known.
    """

    def __init__(  # noqa: PLR0917
        self, inputs: npt.NDArray[Any], labels: IntArray, classes: Sequence[str], settings: NetSettings,
        augmentation: AugmentationSettings, weights: FloatArray | None = None,
        donors: npt.NDArray[np.str_] | None = None,
    ) -> None:  # fmt: skip
        self.inputs, self.labels, self.classes = inputs, labels, tuple(classes)
        self.settings, self.augmentation, self.donors = settings, augmentation, donors
        self.weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float32)
        self.temperature = 1.0

    @property
    def is_image(self) -> bool:
        """Whether items are pictures."""
        return self.inputs.ndim == 4

    @cached_property
    def _stored(self) -> tuple[Tensor, Tensor]:
        """All items as they are kept, and their labels, on the device."""
        stored, labels = torch.from_numpy(self.inputs), torch.from_numpy(self.labels)
        return stored.to(engine.device()), labels.to(engine.device())

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process gets: not what it puts on its own device."""
        return {name: value for name, value in vars(self).items() if name != "_stored"}

    def softened(self, temperature: float) -> ClassifierTask:
        """Return this task with divergences of probabilities softened by a temperature T > 0, see :func:`class_kl`."""
        other = copy.copy(self)
        other.temperature = temperature
        return other

    def new_model(self, seed: int) -> Classifier:
        """Return a freshly initialised net; equal seeds give equal parameters."""
        with seeding.scope(seed, "initialise"):
            return build(self.settings, self.inputs.shape[1:], len(self.classes)).to(engine.device())

    def batch(self, cells: IntArray, noise: torch.Generator | None = None) -> ClassBatch:
        """Return the given items on the device: as they are, or, with a stream, one random view of each."""
        which = torch.from_numpy(cells).to(engine.device())
        stored, labels = (tensor.index_select(0, which) for tensor in self._stored)
        if self.is_image:
            if noise is not None:
                stored = self._moved(stored, noise)
            stored = stored.float().sub_(_PIXEL_CENTRE).div_(_PIXEL_SCALE).to(memory_format=torch.channels_last)
        if noise is not None and self.augmentation.noise:
            stored = stored + self.augmentation.noise * engine.normal(stored.shape, noise)
        return ClassBatch(stored, labels)

    def _moved(self, images: Tensor, noise: torch.Generator) -> Tensor:
        """Cut a window from each image with a black border, and mirror half of them."""
        B, _, H, W = images.shape
        border = self.augmentation.crop
        if border:
            down, right = torch.randint(2 * border + 1, (2, B), generator=noise).to(images.device)
            rows = down[:, None] + torch.arange(H, device=images.device)
            columns = right[:, None] + torch.arange(W, device=images.device)
            each = torch.arange(B, device=images.device)[:, None, None]
            wide = pad(images, (border,) * 4)
            # the slice between indices comes last: [B, H, W, channels]
            images = wide[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        if self.augmentation.flip:
            mirrored = torch.rand(B, generator=noise).to(images.device) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images

    def loss(self, model: Classifier, batch: ClassBatch, noise: torch.Generator | None = None) -> ClassLoss:  # noqa: ARG002
        """Return the cross-entropy of each item, ``[B]`` nats; ``noise`` is not used: the loss draws nothing."""
        return ClassLoss(self.cross_entropy(model(batch.inputs), batch.labels))

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each item from its logits ``[B, C]``, ``[B]`` nats."""
        found = cross_entropy(logits.float(), labels, reduction="none")
        return found if self.weights is None else found * self.weights.to(found.device)[labels]

    def divergence(self, student: Classifier, teacher: Classifier, batch: ClassBatch) -> ClassDivergence:
        """KL(teacher ‖ student) of the class probabilities, see :func:`class_kl`; differentiable in the student."""
        with torch.no_grad():
            wanted = teacher(batch.inputs)
        return ClassDivergence(class_kl(wanted.float(), student(batch.inputs).float(), self.temperature))

    def outputs(self, model: Classifier, batch: ClassBatch) -> Tensor:
        """What an adversary sees of each item, ``[B, 2 C]``: logits, and the label's one-hot (P3's G(x) | y)."""
        logits: Tensor = model(batch.inputs).float()
        return torch.cat([logits, one_hot(batch.labels, len(self.classes)).to(logits.dtype)], 1)

    @torch.no_grad()
    def signals(self, model: Classifier, cells: IntArray) -> ClassSignals:
        """Score items in eval mode; see :class:`ClassSignals`."""
        model.eval()
        width = len(self.classes)
        logits, features = [torch.zeros(0, width)], []
        for start in range(0, len(cells), _SCORING_BATCH):
            found = model.features(self.batch(cells[start : start + _SCORING_BATCH]).inputs)
            features.append(found.float().cpu())
            logits.append(model.output(found).float().cpu())
        seen = torch.cat(features) if features else torch.zeros(0, 0)
        return ClassSignals(cells, self.labels[cells], torch.cat(logits).double().numpy(), seen.double().numpy())

    def error(self, model: Classifier, cells: IntArray) -> float:
        """Mean cross-entropy of items in eval mode, nats per item, classes unweighted."""
        return -float(self.signals(model, cells).log_prob.mean())

    def accuracy(self, model: Classifier, cells: IntArray) -> float:
        """Share of items whose likeliest class is theirs, in eval mode."""
        found = self.signals(model, cells)
        return float((found.logits.argmax(axis=1) == found.labels).mean())

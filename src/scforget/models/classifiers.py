"""Classifiers: of cells by their expression (or any vectors) and of images, all of one form.

Every net is a linear layer on features, so that a method may ask any of them for its features, its logits and its
layers in order without knowing which it is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from scforget.errors import DataError
from scforget.models.layers import Dropout
from scforget.settings import Settings

Width = Annotated[int, Field(gt=0)]


class MLPSettings(Settings):
    """A multilayer perceptron.

    Attributes
    ----------
    hidden
        Widths of the hidden layers, input side first; empty for a linear probe.
    dropout
        Probability in every hidden block.
    """

    kind: Literal["mlp"]
    hidden: list[Width]
    dropout: Annotated[float, Field(ge=0, lt=1)]


class SmallCNNSettings(Settings):
    """A small convolutional net, for CPUs.

    Attributes
    ----------
    widths
        Channels after each convolution, input side first; every one is followed by a halving of the image.
    hidden
        Width of the hidden layer after them.
    """

    kind: Literal["small_cnn"]
    widths: Annotated[list[Width], Field(min_length=1)]
    hidden: Width


class ResNet18Settings(Settings):
    """The residual net of 18 layers.

    Attributes
    ----------
    stem
        ``imagenet`` begins with two halvings of the image (7×7 convolution of stride 2, max-pooling), as published for
        photographs; ``cifar`` with one 3×3 convolution, for images of some 32 pixels.
    """

    kind: Literal["resnet18"]
    stem: Literal["cifar", "imagenet"]


NetSettings = Annotated[MLPSettings | SmallCNNSettings | ResNet18Settings, Field(discriminator="kind")]


class Classifier(nn.Module, ABC):
    """A net that ends in one linear layer, ``output``, on its features."""

    output: nn.Linear

    @abstractmethod
    def features(self, inputs: Tensor) -> Tensor:
        """Return what the output layer sees, ``[B, F]``."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Return the net's parts from the input to the output layer; together they hold every parameter once."""

    def forward(self, inputs: Tensor) -> Tensor:
        """``[B, …]`` → logits ``[B, C]``."""
        logits: Tensor = self.output(self.features(inputs))
        return logits


class MLP(Classifier):
    """Hidden blocks Linear → LayerNorm → ReLU → Dropout, as the VAE's encoder has them, and a Linear to C logits.

    Parameters
    ----------
    features
        F, the width of the input; images are laid out as vectors.
    hidden
        Widths of the hidden layers; without any it is a linear probe.
    classes
        C.
    dropout
        Probability in every hidden block, in [0, 1).

    Notes
    -----
    The probe from 32 latent means to 14 classes has 462 parameters and the net 2000-512-128-14 has 1,093,262, as P0's.
    The submodules ``hidden`` and ``output`` are P0's "shared" and "class-specific" parameters.
    """

    def __init__(self, features: int, hidden: Sequence[int], classes: int, dropout: float) -> None:
        super().__init__()
        widths = [features, *hidden]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU(), Dropout(dropout)]
        self.hidden = nn.Sequential(*layers)
        self.output = nn.Linear(widths[-1], classes)

    def features(self, inputs: Tensor) -> Tensor:
        """``[B, …]`` → the last hidden layer, ``[B, F]``; the input itself where there is none."""
        features: Tensor = self.hidden(inputs.flatten(1))
        return features

    def blocks(self) -> list[nn.Module]:
        """Hidden blocks, then the output layer."""
        return [*(self.hidden[start : start + 4] for start in range(0, len(self.hidden), 4)), self.output]


def _halving(inputs: int, outputs: int) -> nn.Sequential:
    # the rectifier commutes with the maximum, and after it has a quarter of the work
    layers = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.MaxPool2d(2)
    return nn.Sequential(*layers, nn.ReLU(inplace=True))


class SmallCNN(Classifier):
    """Blocks Conv 3×3 → BatchNorm → ReLU → MaxPool 2×2, a hidden layer on all that is left, a Linear to C logits.

    Parameters
    ----------
    shape
        Channels, height and width of the images; every block halves the last two, rounding down.
    classes
        C.
    widths
        Channels after each block, at least one.
    hidden
        F, the width of the hidden layer.
    """

    def __init__(self, shape: Sequence[int], classes: int, widths: Sequence[int], hidden: int) -> None:
        super().__init__()
        channels, height, width = _image(shape, 2 ** len(widths), f"{len(widths)} halvings")
        self.body = nn.Sequential(*(_halving(*pair) for pair in pairwise([channels, *widths])))
        left = widths[-1] * (height >> len(widths)) * (width >> len(widths))
        self.hidden = nn.Sequential(nn.Linear(left, hidden), nn.ReLU(inplace=True))
        self.output = nn.Linear(hidden, classes)

    def features(self, inputs: Tensor) -> Tensor:
        """``[B, channels, H, W]`` → the hidden layer, ``[B, F]``."""
        features: Tensor = self.hidden(self.body(inputs).flatten(1))
        return features

    def blocks(self) -> list[nn.Module]:
        """Convolutional blocks, the hidden layer, the output layer."""
        return [*self.body, self.hidden, self.output]


class _Residual(nn.Module):
    """Two 3×3 convolutions beside a shortcut, which is a 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if (inputs, 1) != (outputs, stride):
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, inputs: Tensor) -> Tensor:
        inner = self.norm1(self.conv1(inputs)).relu_()
        out: Tensor = (self.norm2(self.conv2(inner)) + self.shortcut(inputs)).relu_()
        return out


class ResNet18(Classifier):
    """ResNet-18 (He et al. 2016): a stem, four stages of two residual blocks, the mean over places, a Linear.

    Parameters
    ----------
    shape
        Channels, height and width of the images, which are at least 8 pixels for the stem ``cifar``, 32 for
        ``imagenet``.
    classes
        C.
    stem
        See :class:`ResNet18Settings`.
    width
        Channels of the first stage; 64 as published. The features are eight times as many.

    Notes
    -----
    Of 3 channels and 10 classes it has 11,173,962 parameters with the stem ``cifar``, 11,181,642 with ``imagenet``.
    Convolutions start as normal with variance 2/(outputs · places) (He et al. 2015, fan out), norms as the identity.
    """

    def __init__(
        self, shape: Sequence[int], classes: int, stem: Literal["cifar", "imagenet"], width: int = 64
    ) -> None:  # fmt: skip
        super().__init__()
        channels, *_ = _image(shape, 8 if stem == "cifar" else 32, f"a stem {stem}")
        large = stem == "imagenet"
        kernel, stride, padding = (7, 2, 3) if large else (3, 1, 1)
        first = nn.Conv2d(channels, width, kernel, stride, padding, bias=False)
        pool = [nn.MaxPool2d(3, 2, 1)] if large else []
        self.stem = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(inplace=True), *pool)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential()
        for stage, (inputs, outputs) in enumerate(pairwise(widths)):
            pair = _Residual(inputs, outputs, 2 if stage else 1), _Residual(outputs, outputs, 1)
            self.stages.append(nn.Sequential(*pair))
        self.output = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, inputs: Tensor) -> Tensor:
        """``[B, channels, H, W]`` → means over places, ``[B, F]``."""
        places: Tensor = self.stages(self.stem(inputs))
        return places.mean((2, 3))

    def blocks(self) -> list[nn.Module]:
        """Return the stem, the four stages, the output layer."""
        return [self.stem, *self.stages, self.output]


def _image(shape: Sequence[int], smallest: int, reason: str) -> tuple[int, int, int]:
    """Channels, height and width of images that are large enough.

    Raises
    ------
    DataError
        If inputs are no images, or too small ones.
    """
    if len(shape) != 3:
        raise DataError(
            "inputs of an image net", f"shape {tuple(shape)}", "images [channels, height, width]; or an mlp"
        )
    channels, height, width = shape
    if channels < 1 or min(height, width) < smallest:
        found = f"{channels} x {height} x {width}"
        raise DataError("images", found, f"at least {smallest} pixels a side for {reason}; or a smaller net")
    return channels, height, width


def build(settings: NetSettings, shape: Sequence[int], classes: int) -> Classifier:
    """Make a net with new weights, drawn from torch's global stream.

    Parameters
    ----------
    settings
        Which net, and its sizes.
    shape
        Of one input: ``(F,)``, or ``(channels, height, width)`` for images. An MLP takes both.
    classes
        C, at least 2.

    Returns
    -------
    Classifier
        Convolutional ones in the memory format ``channels_last``, in which the small net trains in two thirds of the
        time on a CPU.

    Raises
    ------
    DataError
        Of fewer than two classes, of an empty input, or if an image net gets vectors or images that are too small.
    """
    if classes < 2:
        raise DataError("classes of a classifier", classes, "at least 2")
    if not shape or min(shape) < 1:
        raise DataError("inputs of a classifier", f"shape {tuple(shape)}", "(features,) or (channels, height, width)")
    if isinstance(settings, MLPSettings):
        return MLP(math.prod(shape), settings.hidden, classes, settings.dropout)
    net: Classifier
    if isinstance(settings, SmallCNNSettings):
        net = SmallCNN(shape, classes, settings.widths, settings.hidden)
    else:
        net = ResNet18(shape, classes, settings.stem)
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

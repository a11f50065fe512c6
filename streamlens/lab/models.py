"""Small networks for images."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

from torch import Tensor, nn

from streamlens.errors import did_you_mean
from streamlens.lab._registry import lookup

__all__ = ["MODELS", "AlexNetMini", "FullyConnected", "make_model"]


class AlexNetMini(nn.Module):
    """A small convolutional network in the manner of AlexNet.

    Two convolutions of `width` and `2 * width` filters (3x3, padding 1), each followed by a ReLU and
    2x2 max pooling; then dropout and one linear classifier. With the defaults the classifier sees
    8 x 8 x 8 features of a 32 x 32 image, and the network has 5,538 parameters.

    Args:
        channels: Channels of an image.
        image_size: Height and width of an image in pixels, at least 4.
        classes: Number of classes.
        width: Filters of the first convolution.
        dropout: Probability of dropping a feature, in [0, 1).

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        image_size: int = 32,
        classes: int = 10,
        width: int = 4,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        _check_sizes("AlexNetMini", channels=channels, classes=classes, width=width)
        _check_dropout("AlexNetMini", dropout)
        if image_size < 4:
            raise ValueError(
                f"AlexNetMini halves an image twice: image_size must be at least 4, got {image_size}"
            )
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(2 * width * (image_size // 4) ** 2, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits, `(batch, classes)`, of images, `(batch, channels, height, width)`."""
        return cast("Tensor", self.classifier(self.features(images)))


class FullyConnected(nn.Module):
    """A multi-layer perceptron over the pixels: linear layers with ReLUs between them.

    Args:
        channels: Channels of an image.
        image_size: Height and width of an image in pixels.
        classes: Number of classes.
        hidden: Units of each hidden layer; empty for a linear classifier.
        dropout: Probability of dropping a hidden unit, in [0, 1).

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        image_size: int = 32,
        classes: int = 10,
        hidden: Sequence[int] = (128, 64),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_sizes("FullyConnected", channels=channels, image_size=image_size, classes=classes)
        for units in hidden:
            _check_sizes("FullyConnected", hidden=units)
        _check_dropout("FullyConnected", dropout)
        sizes = (channels * image_size**2, *hidden)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        layers.append(nn.Linear(sizes[-1], classes))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, `(batch, classes)`, of images, `(batch, channels, height, width)`."""
        return cast("Tensor", self.layers(images))


MODELS: Final[Mapping[str, Callable[..., nn.Module]]] = {
    "AlexNetMini": AlexNetMini,
    "FullyConnected": FullyConnected,
}
"""The models that `make_model` knows by name."""


def make_model(name: str, **options: Any) -> nn.Module:
    """Build a model by its name.

    Args:
        name: One of `MODELS`, in any case.
        **options: What the model's class takes, such as `classes=` and `image_size=`.

    Returns:
        The model, freshly initialised from PyTorch's global generator.

    Raises:
        ValueError: There is no such model, or an option is out of its range.
        TypeError: The model has no such option.

    Example:
        >>> make_model("alexnetmini", classes=3).classifier[2].out_features
        3
    """
    registered, build = lookup("model", name, MODELS)
    known = list(inspect.signature(build).parameters)
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known)
            raise TypeError(
                f"{registered} has no option {option!r}"
                + (f": {hint}" if hint else ".")
                + f" Options: {', '.join(known)}"
            )
    return build(**options)


def _check_sizes(model: str, **sizes: int) -> None:
    for option, size in sizes.items():
        if size < 1:
            raise ValueError(f"{model}: {option} must be at least 1, got {size}")


def _check_dropout(model: str, dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"{model}: dropout is a probability in [0, 1), got {dropout}")

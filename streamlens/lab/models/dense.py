"""`FullyConnected`: the purely dense network."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from streamlens.lab.models._checks import check_probability, check_sizes

__all__ = ["FullyConnected"]


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
        check_sizes("FullyConnected", channels=channels, image_size=image_size, classes=classes)
        for units in hidden:
            check_sizes("FullyConnected", hidden=units)
        check_probability("FullyConnected", dropout=dropout)
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

"""`DenseNet` with bottlenecks and compression."""

from __future__ import annotations

from typing import Final, cast

import torch
from torch import Tensor, nn

from streamlens.lab.models._checks import check_image_size, check_sizes

__all__ = ["DenseNet"]

_BLOCKS: Final = 3


class DenseNet(nn.Module):
    """DenseNet-BC: every layer of a block sees what all earlier ones made.

    Huang, Liu, van der Maaten and Weinberger, Densely Connected Convolutional Networks, CVPR 2017:
    three blocks of layers (batch norm, ReLU and 1x1 convolution to four times the growth; the same
    with a 3x3 convolution to the growth), and between them transitions that halve the channels and
    the side. 176,122 parameters with the defaults; 769,162 (the paper's 0.8 M) at depth 100.

    Args:
        channels: Channels of an image.
        image_size: Height and width of an image in pixels, at least 4.
        classes: Number of classes.
        depth: Layers that have weights, 6n + 4 for n layers a block.
        growth: Channels that each layer adds.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        image_size: int = 32,
        classes: int = 10,
        depth: int = 40,
        growth: int = 12,
    ) -> None:
        super().__init__()
        check_sizes("DenseNet", channels=channels, classes=classes, growth=growth)
        check_image_size("DenseNet", image_size, at_least=4)
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"DenseNet: depth must be 6n + 4 with n at least 1 (10, 16, 22...), got {depth}")
        width = 2 * growth
        layers: list[nn.Module] = [nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)]
        for block in range(_BLOCKS):
            for _ in range((depth - 4) // 6):
                layers.append(_Layer(width, growth))
                width += growth
            if block < _BLOCKS - 1:
                layers.append(_transition(width, width // 2))
                width //= 2
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU())
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, `(batch, classes)`, of images, `(batch, channels, height, width)`."""
        return cast("Tensor", self.classifier(self.features(images)))


class _Layer(nn.Module):
    """What it makes is put behind what it was given."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bottleneck = nn.Sequential(
            nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, 4 * growth, kernel_size=1, bias=False)
        )
        self.convolution = nn.Sequential(
            nn.BatchNorm2d(4 * growth),
            nn.ReLU(),
            nn.Conv2d(4 * growth, growth, kernel_size=3, padding=1, bias=False),
        )

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([features, self.convolution(self.bottleneck(features))], dim=1)


def _transition(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, kernel_size=1, bias=False),
        nn.AvgPool2d(2),
    )

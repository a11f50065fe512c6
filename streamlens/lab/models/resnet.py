"""`ResNet18` for small images."""

from __future__ import annotations

from typing import Final, cast

import torch
from torch import Tensor, nn

from streamlens.lab.models._checks import check_sizes

__all__ = ["ResNet18"]

_STAGES: Final = ((1, 1), (2, 2), (4, 2), (8, 2))
"""Filters as multiples of the width, and the stride of the first block."""


class ResNet18(nn.Module):
    """The residual network with 18 layers, for 32x32 images.

    He, Zhang, Ren and Sun, Deep Residual Learning for Image Recognition, CVPR 2016. As is usual for
    small images, a 3x3 convolution with stride 1 and no pooling takes the place of the 7x7 one at the
    start. 11,173,962 parameters in 62 tensors with the defaults.

    Args:
        channels: Channels of an image.
        image_size: Height and width of an image in pixels; any will do.
        classes: Number of classes.
        width: Filters of the first stage; the others have 2, 4 and 8 times as many.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self, *, channels: int = 3, image_size: int = 32, classes: int = 10, width: int = 64
    ) -> None:
        super().__init__()
        check_sizes("ResNet18", channels=channels, image_size=image_size, classes=classes, width=width)
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        inputs = width
        for multiple, stride in _STAGES:
            outputs = multiple * width
            blocks += [_Block(inputs, outputs, stride), _Block(outputs, outputs, stride=1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, `(batch, classes)`, of images, `(batch, channels, height, width)`."""
        return cast("Tensor", self.classifier(self.blocks(self.stem(images))))


class _Block(nn.Module):
    """Two convolutions beside a shortcut, which is projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, features: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(features)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(features))

"""`VGG`: the network of Simonyan and Zisserman with eight convolutions."""

from __future__ import annotations

from typing import Final, cast

from torch import Tensor, nn

from streamlens.lab.models._checks import check_image_size, check_probability, check_sizes

__all__ = ["VGG"]

_STAGES: Final = ((1,), (2,), (4, 4), (8, 8), (8, 8))
"""The convolutions between two poolings, as multiples of the width."""


class VGG(nn.Module):
    """VGG with eight convolutions, for small images.

    Configuration A of Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale Image
    Recognition, ICLR 2015: 3x3 convolutions of 64, 128, 256, 256, 512, 512, 512 and 512 filters with
    ReLUs, 2x2 max pooling after the first, second, fourth, sixth and eighth. As is usual for 32x32
    images, one linear classifier takes the place of the three large ones. Images under 32 pixels are
    pooled until one pixel is left, larger ones are averaged to it. 9,231,114 parameters with the
    defaults, 9,225,610 without batch norm.

    Args:
        channels: Channels of an image.
        image_size: Height and width of an image in pixels, at least 2.
        classes: Number of classes.
        width: Filters of the first convolution; the others have 2, 4 and 8 times as many.
        batch_norm: Whether to normalise after each convolution. The network trains badly without,
            unless it is initialised for it (`initialise(model, "kaiming_normal")`).
        dropout: Probability of dropping a feature before the classifier, in [0, 1).

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        image_size: int = 32,
        classes: int = 10,
        width: int = 64,
        batch_norm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes("VGG", channels=channels, classes=classes, width=width)
        check_image_size("VGG", image_size, at_least=2)
        check_probability("VGG", dropout=dropout)
        layers: list[nn.Module] = []
        inputs, side = channels, image_size
        for stage in _STAGES:
            for multiple in stage:
                layers.append(nn.Conv2d(inputs, multiple * width, kernel_size=3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(multiple * width))
                layers.append(nn.ReLU())
                inputs = multiple * width
            if side > 1:
                layers.append(nn.MaxPool2d(2))
                side //= 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(inputs, classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits, `(batch, classes)`, of images, `(batch, channels, height, width)`."""
        return cast("Tensor", self.classifier(self.features(images)))

"""`AlexNetMini`: the smallest convolutional network that learns images."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from streamlens.lab.models._checks import check_image_size, check_probability, check_sizes

__all__ = ["AlexNetMini"]


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
        check_sizes("AlexNetMini", channels=channels, classes=classes, width=width)
        check_probability("AlexNetMini", dropout=dropout)
        check_image_size("AlexNetMini", image_size, at_least=4)
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

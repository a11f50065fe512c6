"""`ConvNet`: the convolutional network that Adam was introduced with."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from streamlens.lab.models._checks import check_probability, check_sizes

__all__ = ["ConvNet"]


class ConvNet(nn.Module):
    """The network c64-c64-c128-1000 of Kingma and Ba, Adam: A Method for Stochastic Optimization, ICLR 2015.

    Three stages of a 5x5 convolution (64, 64 and 128 filters), a ReLU and 3x3 max pooling with stride 2;
    a layer of 1,000 rectified linear units; a linear classifier. Dropout acts on the image and on the
    1,000 units. The paper tells neither its rates nor the padding: the rates here are those of
    Srivastava et al. (JMLR 2014), and everything is padded so that each stage halves the sides, rounded
    up. The paper whitens its images: `streamlens.lab.whiten`. 2,371,266 parameters with the defaults.

    Args:
        channels: Channels of an image.
        image_size: Height and width of an image in pixels.
        classes: Number of classes.
        width: Filters of the first two convolutions; the third has twice as many.
        hidden: Units of the fully connected layer.
        dropout: Probability of dropping one of those units, in [0, 1).
        input_dropout: Probability of dropping a pixel's channel of the image, in [0, 1).

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
        hidden: int = 1000,
        dropout: float = 0.5,
        input_dropout: float = 0.2,
    ) -> None:
        super().__init__()
        check_sizes(
            "ConvNet",
            channels=channels,
            image_size=image_size,
            classes=classes,
            width=width,
            hidden=hidden,
        )
        check_probability("ConvNet", dropout=dropout, input_dropout=input_dropout)
        layers: list[nn.Module] = [nn.Dropout(input_dropout)]
        inputs, side = channels, image_size
        for outputs in (width, width, 2 * width):
            layers += [
                nn.Conv2d(inputs, outputs, kernel_size=5, padding=2),
                nn.ReLU(),
                nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            ]
            inputs, side = outputs, (side + 1) // 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs * side**2, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits, `(batch, classes)`, of images, `(batch, channels, height, width)`."""
        return cast("Tensor", self.classifier(self.features(images)))

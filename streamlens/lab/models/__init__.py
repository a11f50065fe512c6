"""Small networks for images, one file each.

All take the keyword arguments `channels`, `image_size` and `classes`, and images
`(batch, channels, height, width)`; what else they take has a default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn

from streamlens.errors import did_you_mean
from streamlens.lab._registry import lookup
from streamlens.lab.models.alexnet import AlexNetMini
from streamlens.lab.models.convnet import ConvNet
from streamlens.lab.models.dense import FullyConnected
from streamlens.lab.models.densenet import DenseNet
from streamlens.lab.models.resnet import ResNet18
from streamlens.lab.models.transformer import TransformerLM
from streamlens.lab.models.vgg import VGG

__all__ = [
    "MODELS",
    "VGG",
    "AlexNetMini",
    "ConvNet",
    "DenseNet",
    "FullyConnected",
    "ResNet18",
    "TransformerLM",
    "make_model",
]

MODELS: Final[Mapping[str, Callable[..., nn.Module]]] = {
    model.__name__: model
    for model in (AlexNetMini, ConvNet, DenseNet, FullyConnected, ResNet18, TransformerLM, VGG)
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

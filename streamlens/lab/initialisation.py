"""Initialisations of weights by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from torch import Tensor, nn

from streamlens.lab._registry import lookup

__all__ = ["INITIALISATIONS", "initialise"]

_Model = TypeVar("_Model", bound=nn.Module)

_WEIGHTED: Final = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _as_built(_: Tensor) -> None:
    """PyTorch's own: uniform, with a variance of 1 / (3 fan_in)."""


def _kaiming_normal(weight: Tensor) -> None:
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


def _kaiming_uniform(weight: Tensor) -> None:
    nn.init.kaiming_uniform_(weight, nonlinearity="relu")


def _lecun_normal(weight: Tensor) -> None:
    nn.init.kaiming_normal_(weight, nonlinearity="linear")


INITIALISATIONS: Final[Mapping[str, Callable[[Tensor], Any]]] = {
    "default": _as_built,
    "kaiming_normal": _kaiming_normal,
    "kaiming_uniform": _kaiming_uniform,
    "lecun_normal": _lecun_normal,
    "orthogonal": nn.init.orthogonal_,
    "xavier_normal": nn.init.xavier_normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
}
"""The initialisations that `initialise` knows by name.

`default` leaves a model as it was built. The others draw the weights of linear and convolutional layers
with mean 0 and, where fan_in and fan_out count the inputs and outputs of one position, a variance of

- `kaiming_*`: 2 / fan_in, for ReLUs (He et al., ICCV 2015);
- `lecun_*`: 1 / fan_in (LeCun et al., Efficient BackProp, 1998);
- `xavier_*`: 2 / (fan_in + fan_out) (Glorot and Bengio, AISTATS 2010);
- `orthogonal`: none of these, but rows or columns that are orthonormal (Saxe et al., ICLR 2014).
"""


def initialise(model: _Model, name: str) -> _Model:
    """Draw a model's weights anew, in place, from PyTorch's global generator.

    The weights of linear and convolutional layers are drawn and their biases set to 0. Norms and
    embeddings keep what they were built with.

    Args:
        model: Any model. Do it before the model is trained or observed.
        name: One of `INITIALISATIONS`, in any case.

    Returns:
        The same model.

    Raises:
        ValueError: There is no such initialisation.
    """
    registered, draw = lookup("initialisation", name, INITIALISATIONS)
    if registered == "default":
        return model
    for module in model.modules():
        if isinstance(module, _WEIGHTED):
            draw(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model

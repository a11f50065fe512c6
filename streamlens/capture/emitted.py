"""What users emit themselves: numbers, tensors, or one of these a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["emitted"]


def emitted(topic: str, value: float | Tensor | Mapping[str, Any]) -> dict[str, Tensor]:
    """Copies of the values by layer; one that is no mapping belongs to the model, `""`.

    Raises:
        TypeError: The value is no number, tensor or mapping of layers to these.
        ValueError: The layers' values differ in shape.
    """
    by_layer = value if isinstance(value, Mapping) else {"": value}
    for layer in by_layer:
        if not isinstance(layer, str):
            raise TypeError(f"emit({topic!r}): layers are named by strings, got {layer!r}")
    values = {layer: _owned(topic, entry) for layer, entry in by_layer.items()}
    if len({tensor.shape for tensor in values.values()}) > 1:
        raise ValueError(f"emit({topic!r}): the values of all layers must have one shape")
    return values


def _owned(topic: str, value: object) -> Tensor:
    """A floating-point copy of a number or tensor."""
    try:
        tensor = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"emit({topic!r}) takes a number, a tensor or a mapping of layers to these, got {value!r}"
        ) from None
    return tensor.clone() if tensor.is_floating_point() else tensor.float()

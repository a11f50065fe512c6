"""Outputs of layers as matrices: one row an example, or a place of it; one column a unit."""

from __future__ import annotations

import math
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor

from streamlens.operators._tensors import dense
from streamlens.operators._units import unit_dimension

__all__ = ["Places", "check_places", "check_unit_dim", "rows_of"]

Places: TypeAlias = Literal["each", "mean", "flatten"]
"""What becomes of the places (pixels, tokens) of an example's output."""

_PLACES: Final = ("each", "mean", "flatten")


def check_places(operator: str, places: object) -> None:
    """Raise unless it is one of them.

    Raises:
        ValueError: It is none.
    """
    if places not in _PLACES:
        raise ValueError(
            f"{operator}(places={places!r}): 'each' (every pixel or token is a row), 'mean' (their mean) or "
            "'flatten' (each is a column of its own)"
        )


def check_unit_dim(operator: str, unit_dim: object) -> None:
    """Raise unless it can be the dimension of units.

    Raises:
        ValueError: It cannot.
    """
    whole = isinstance(unit_dim, int) and not isinstance(unit_dim, bool)
    if unit_dim is not None and (not whole or unit_dim == 0):
        raise ValueError(
            f"{operator}(unit_dim={unit_dim!r}): the dimension of an output that counts the units, such as 1 "
            "for channels; dimension 0 counts the examples"
        )


def rows_of(outputs: Tensor, places: Places, unit_dim: int | None = None, most: int | None = None) -> Tensor:
    """The matrix of a layer's outputs; a view of them where it can be.

    Args:
        outputs: The outputs, the first dimension being the examples.
        places: What becomes of the dimensions that are neither examples nor units.
        unit_dim: The dimension of the units; by the number of dimensions unless given.
        most: The most rows, spread over all places alike; always the same ones of as many.

    Raises:
        ValueError: It has no such dimension, or no dimension at all.
    """
    tensor = dense(outputs.detach())
    if outputs.ndim == 0:
        raise ValueError("an output that is one number has neither examples nor units")
    dim = unit_dimension(outputs) if unit_dim is None else unit_dim
    if not -outputs.ndim <= dim < outputs.ndim:
        raise ValueError(f"an output of shape {tuple(outputs.shape)} has no dimension {dim}")
    if tensor.ndim == 1:
        rows = tensor[:, None]
    elif places == "flatten":
        rows = tensor.flatten(1)
    else:
        moved = tensor.movedim(dim, -1)
        averaged = places == "mean" and moved.ndim > 2
        rows = moved.flatten(1, -2).mean(1) if averaged else moved.flatten(0, -2)
    if most is not None and len(rows) > most:
        rows = rows[torch.arange(most, device=rows.device) * _stride(len(rows)) % len(rows)]
    return rows


def _stride(count: int) -> int:
    """Steps of which length spread over a circle of places evenly, however many are taken.

    The golden section of it, and coprime to it: a divisor of the rows of an image would fall on the same
    few columns for ever, and no place comes twice.
    """
    stride = round(count * 0.6180339887498949)
    while math.gcd(stride, count) != 1:
        stride += 1
    return stride

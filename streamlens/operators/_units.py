"""Reductions over a layer's units: which share of them is dead, or of their outputs saturated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from streamlens.reductions import Reduction

__all__ = ["DeadFraction", "UnitSaturation", "alive_units", "unit_dimension"]


def unit_dimension(outputs: Tensor) -> int:
    """The dimension of an output that counts its units: channels of images and volumes, else the last."""
    return 1 if outputs.ndim >= 4 else outputs.ndim - 1


def alive_units(outputs: Tensor, unit_dim: int | None = None) -> Tensor:
    """Which units have an output other than zero, at least once; NaN is other than zero.

    Args:
        outputs: The outputs of a batch.
        unit_dim: The dimension that counts the units; by the number of dimensions unless given.
    """
    outputs = _strided(outputs)
    if outputs.ndim == 0:
        return (outputs != 0).reshape(1)
    units = unit_dimension(outputs) if unit_dim is None else unit_dim % outputs.ndim
    others = [d for d in range(outputs.ndim) if d != units]
    if not others or not outputs.numel() or outputs.is_complex():
        return (outputs != 0).any(dim=others) if others else outputs != 0
    # A unit is zero throughout where its greatest and its least output are: no mask of all outputs is made,
    # which takes five times as long and more.
    return (outputs.amax(dim=others) != 0) | (outputs.amin(dim=others) != 0)


@dataclass(frozen=True)
class DeadFraction(Reduction):
    """The share of a layer's units whose output is zero for every example and place.

    Attributes:
        unit_dim: The dimension that counts the units; by the number of dimensions if None.
        by_module: What the modules say of it, by layer, where they do.
    """

    unit_dim: int | None = None
    by_module: Mapping[str, int] = field(default_factory=dict, hash=False)

    by_layer: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """`dead_fraction`."""
        return "dead_fraction"

    def reduce(self, tensors: Sequence[Tensor]) -> Tensor:
        """Shares in [0, 1]; NaN for an output without units or examples. NaN counts as alive."""
        return torch.stack([_dead(tensor, self.unit_dim) for tensor in tensors])

    def reduce_layer(self, layer: str, tensor: Tensor) -> Tensor:
        """The share of the units that the layer's module has."""
        dim = self.unit_dim
        if dim is None and tensor.ndim >= 3:
            dim = self.by_module.get(layer.partition("@")[0])
        with torch.no_grad():
            return _dead(tensor, dim)


def _dead(outputs: Tensor, unit_dim: int | None) -> Tensor:
    if outputs.numel() == 0:
        return outputs.new_full((), torch.nan, dtype=torch.float32)
    return 1 - alive_units(outputs, unit_dim).float().mean()


@dataclass(frozen=True)
class UnitSaturation(Reduction):
    """The share of outputs that lie near an end of the activation's range.

    Attributes:
        lower: The lower end.
        upper: The upper end.
        margin: How near, as a share of the range.
    """

    lower: float
    upper: float
    margin: float = 0.01

    @property
    def name(self) -> str:
        """`unit_saturation`."""
        return "unit_saturation"

    def reduce(self, tensors: Sequence[Tensor]) -> Tensor:
        """Shares in [0, 1]; NaN for an output without elements. NaN counts as not saturated."""
        near = self.margin * (self.upper - self.lower)
        whole = map(_strided, tensors)
        return torch.stack(
            [((t <= self.lower + near) | (t >= self.upper - near)).float().mean() for t in whole]
        )


def _strided(tensor: Tensor) -> Tensor:
    """The tensor with its zeros, which a sparse one leaves out and cannot be compared without."""
    return tensor if tensor.layout is torch.strided else tensor.to_dense()

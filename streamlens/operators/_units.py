"""Reductions over a layer's units: which share of them is dead, or of their outputs saturated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamlens.reductions import Reduction

__all__ = ["DeadFraction", "UnitSaturation", "unit_dimension"]


def unit_dimension(outputs: Tensor) -> int:
    """The dimension of an output that counts its units: channels of images and volumes, else the last."""
    return 1 if outputs.ndim >= 4 else outputs.ndim - 1


@dataclass(frozen=True)
class DeadFraction(Reduction):
    """The share of a layer's units whose output is zero for every example and place."""

    @property
    def name(self) -> str:
        """`dead_fraction`."""
        return "dead_fraction"

    def reduce(self, tensors: Sequence[Tensor]) -> Tensor:
        """Shares in [0, 1]; NaN for an output without units or examples. NaN counts as alive."""
        return torch.stack([_dead(tensor) for tensor in tensors])


def _dead(outputs: Tensor) -> Tensor:
    if outputs.numel() == 0:
        return outputs.new_full((), torch.nan, dtype=torch.float32)
    if outputs.ndim == 0:
        return (outputs == 0).float()
    units = unit_dimension(outputs)
    others = [d for d in range(outputs.ndim) if d != units]
    alive = (outputs != 0).any(dim=others) if others else outputs != 0
    return 1 - alive.float().mean()


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
        return torch.stack(
            [((t <= self.lower + near) | (t >= self.upper - near)).float().mean() for t in tensors]
        )

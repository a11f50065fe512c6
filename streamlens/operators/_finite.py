"""`FiniteProbe`: whether a tensor is finite, from a sample of it that costs next to nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from streamlens.reductions import Reduction, flat_real

__all__ = ["SAMPLED", "FiniteProbe"]

SAMPLED: Final = 1 << 14
"""Elements of a tensor that are looked at; a smaller one is looked at whole."""
_RUN: Final = 16
"""Neighbours that are looked at together: of float32, what one line of a cache holds."""


@dataclass(frozen=True)
class FiniteProbe(Reduction):
    """0 where what is looked at of a tensor is finite, else NaN.

    Up to 16,384 elements are looked at, all of a smaller tensor; of a larger one, 1,024 runs
    of 16 neighbours at even distances over the whole of its memory, so that every example of a batch of up to
    512 is among them.
    """

    adds: ClassVar[bool] = True
    tells_finite: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """`norm2`, which it stands for: it is finite where that is."""
        return "norm2"

    def describe(self) -> str:
        """How it shows in a plan."""
        return "finite_probe"

    def reduce(self, tensors: Sequence[Tensor]) -> Tensor:
        """0 or NaN a tensor, in float32, without waiting for a device; 0 for an empty one."""
        if len(tensors) == 1:
            return _probe(tensors[0]).reshape(1)
        return torch.stack([_probe(tensor) for tensor in tensors])

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole is finite where all of its parts are."""
        return torch.stack(list(parts)).sum(dim=0)


_FINITE: Final = torch.zeros(())


def _probe(tensor: Tensor) -> Tensor:
    flat = flat_real(tensor)
    if not flat.is_floating_point():
        return torch.zeros((), device=flat.device)
    if len(flat) > SAMPLED:
        distance = -(-len(flat) * _RUN // SAMPLED)
        runs = (len(flat) - _RUN) // distance + 1
        flat = flat.as_strided((runs, _RUN), (distance * flat.stride(0), flat.stride(0)))
    if flat.device.type == "cpu" and math.isfinite(flat.sum(dtype=torch.float32).item()):
        # A finite sum has finite terms only; nothing waits for it here.
        return _FINITE
    # Zero times whatever is not finite is NaN, and no finite number is too large for it.
    return (flat * 0).sum(dtype=torch.float32)

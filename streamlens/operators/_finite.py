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


_FINITE: Final = torch.zeros(())


@dataclass(frozen=True)
class FiniteProbe(Reduction):
    """0 where what is looked at of a tensor is finite, else NaN.

    Up to 16,384 elements are looked at, all of a smaller tensor; of a larger one, 1,024 runs
    of 16 neighbours at even distances over the whole of its memory, so that every example of a batch of up to
    512 is among them.
    """

    adds: ClassVar[bool] = True
    tells_finite: ClassVar[bool] = True
    unremarkable: ClassVar[Tensor | None] = _FINITE

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

    def reduce_one(self, tensor: Tensor) -> Tensor:
        """0 or NaN."""
        return _probe(tensor)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole is finite where all of its parts are."""
        return torch.stack(list(parts)).sum(dim=0)


def _probe(tensor: Tensor) -> Tensor:
    # Looking at it as a vector costs as much again as summing it up.
    simple = type(tensor) is Tensor and tensor.is_contiguous() and not tensor.is_complex()
    flat = tensor.detach() if simple else flat_real(tensor.detach())
    if not flat.is_floating_point():
        return torch.zeros((), device=flat.device)
    elements = flat.numel()
    if elements > SAMPLED:
        # Of what is one block of memory, whatever its shape.
        distance = -(-elements * _RUN // SAMPLED)
        flat = flat.as_strided(((elements - _RUN) // distance + 1, _RUN), (distance, 1))
    if flat.is_cpu and math.isfinite(flat.sum(dtype=torch.float32).item()):
        # A finite sum has finite terms only; nothing waits for it here.
        return _FINITE
    # Zero times whatever is not finite is NaN, and no finite number is too large for it.
    return (flat * 0).sum(dtype=torch.float32)

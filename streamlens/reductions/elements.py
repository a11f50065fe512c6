"""The elements of a tensor of any kind as flat real numbers, in pieces that fit the cache."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

__all__ = [
    "CHUNK",
    "TINY",
    "all_elements",
    "chunks_of",
    "double_where_known",
    "flat_real",
    "precise",
    "real_size",
]

CHUNK: Final = 1 << 16
"""Elements handled at once on the CPU: 256 kB of float32, so that a pass of several operations over
one piece finds it in the second-level cache."""

TINY: Final = 1e-30
"""A float32 sum of squares below this may have lost elements to underflow."""


def flat_real(tensor: Tensor) -> Tensor:
    """The elements of a tensor as one real vector, without a copy where memory allows it.

    Sparse tensors give their coalesced values, complex ones real and imaginary parts, a
    DTensor its local shard; the order of elements is that of memory, not of the indices.
    """
    if type(tensor) is Tensor and tensor.layout is torch.strided and tensor.is_contiguous():
        return torch.view_as_real(tensor.resolve_conj()).view(-1) if tensor.is_complex() else tensor.view(-1)
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if tensor.layout is not torch.strided:
        tensor = tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor.values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.is_contiguous():
        return tensor.view(-1)
    # A permuted but dense tensor (channels_last) is one block of memory; order does not matter.
    order = sorted(range(tensor.ndim), key=lambda d: tensor.stride(d), reverse=True)
    return tensor.permute(order).reshape(-1)


def all_elements(tensor: Tensor) -> Tensor:
    """The same with the zeros that a sparse tensor does not hold."""
    return flat_real(tensor if tensor.layout is torch.strided else tensor.to_dense())


def double_where_known(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has none."""
    return torch.float64 if device.type in ("cuda", "cpu", "meta", "xpu") else torch.float32


def precise(flat: Tensor) -> Tensor:
    """float32, or float64: of the values if they are, and for whole numbers that float32 does not know."""
    if flat.dtype in (torch.float32, torch.float64):
        return flat
    small = flat.is_floating_point() or flat.element_size() <= 2
    return flat.to(torch.float32 if small else double_where_known(flat.device))


def real_size(tensor: Tensor) -> int:
    """Real numbers in a tensor: a complex one has two an element, a sparse one its zeros too."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def chunks_of(flat: Tensor, size: int = CHUNK) -> tuple[Tensor, ...]:
    """Pieces of a flat tensor, by default such that several operations find one in the cache."""
    return (flat,) if flat.numel() <= size else flat.split(size)

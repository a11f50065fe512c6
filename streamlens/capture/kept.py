"""`Kept`: a copy of one parameter, from which its update is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from streamlens.reductions import chunks_of, flat_real

__all__ = ["Kept"]


class Kept:
    """A copy of one parameter as it was before the update."""

    __slots__ = ("_pieces", "address", "buffer", "valid", "version")

    def __init__(self, parameter: Tensor) -> None:
        self.buffer = torch.empty_like(parameter, requires_grad=False).detach()
        self.valid = False
        self.version = -1
        self.address = 0
        self._pieces: tuple[tuple[Tensor, Tensor], ...] | None = None

    def is_current(self, parameter: Tensor) -> bool:
        """Whether the copy is still what the parameter holds."""
        return self.valid and parameter._version == self.version and parameter.data_ptr() == self.address

    def fits(self, parameter: Tensor) -> bool:
        """Whether the buffer has the parameter's shape, type and place."""
        b = self.buffer
        return b.shape == parameter.shape and b.dtype == parameter.dtype and b.device == parameter.device

    def copy(self, parameter: Tensor) -> None:
        """Take a copy now."""
        self.buffer.copy_(parameter.detach())
        self.accept(parameter)

    def change(self, parameter: Tensor) -> Tensor:
        """How much the parameter has changed, over the copy, which is one no longer."""
        self.valid = False
        value, wide = parameter.detach(), _wide(parameter.dtype)
        if wide is None:
            return torch.sub(value, self.buffer, out=self.buffer)
        return value.to(wide) - self.buffer.to(wide)

    def accept(self, parameter: Tensor) -> None:
        """Note that the buffer holds the parameter's value."""
        self.valid = True
        self.version = parameter._version
        if parameter.data_ptr() != self.address:
            self.address = parameter.data_ptr()
            self._pieces = None

    def pieces(self, parameter: Tensor) -> tuple[tuple[Tensor, Tensor], ...] | None:
        """Cache-sized pieces of (parameter, buffer), both in memory order; None if they differ in layout."""
        if self._pieces is None or parameter.data_ptr() != self.address:
            value = parameter.detach()
            if value.stride() != self.buffer.stride() or value.is_complex() or _wide(value.dtype) is not None:
                return None
            flat, kept = flat_real(value), flat_real(self.buffer)
            if flat.data_ptr() != value.data_ptr() or kept.data_ptr() != self.buffer.data_ptr():
                return None
            self.address = parameter.data_ptr()
            self._pieces = tuple(zip(chunks_of(flat), chunks_of(kept), strict=True))
        return self._pieces


def _wide(dtype: torch.dtype) -> torch.dtype | None:
    """The type in which a difference is taken where its own has no subtraction, or one that wraps around."""
    if dtype.is_complex or (dtype.is_floating_point and dtype.itemsize > 1):
        return None
    return torch.float64 if dtype.itemsize > 2 else torch.float32

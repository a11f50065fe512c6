"""Small float32 parameters on the CPU, of which only 2-norms are wanted.

There calls cost more than arithmetic. NumPy's calls cost a third of torch's, and up to the size that
counts as small its dot product uses one thread; the arrays are views of the parameters' own memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from streamlens.capture.table import Needs
from streamlens.reductions import TINY, Statistic

if TYPE_CHECKING:
    from streamlens.capture.model import ParameterEntry

__all__ = ["SQUARES", "Small", "Squares", "changes_of", "is_small", "squares_of", "squares_of_flat"]

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
Squares: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"

SQUARES: Final = (Statistic("sum_of_squares"),)
"""What the 2-norm needs, which has passes of its own."""

_SMALL: Final = 1 << 13
"""Elements up to which a parameter is small; BLAS libraries start threads for longer vectors."""


def is_small(entry: ParameterEntry, needs: Needs) -> bool:
    """Whether a parameter is handled here."""
    parameter = entry.tensor
    return (
        not needs.others
        and needs.statistics == SQUARES
        and 0 < parameter.numel() <= _SMALL
        and parameter.dtype == torch.float32
        and parameter.device.type == "cpu"
        and parameter.is_contiguous()
        and not hasattr(parameter, "to_local")
    )


@dataclass(eq=False)
class _Views:
    """Arrays over the memory of some tensors, good for as long as that stays where it is."""

    addresses: list[int]
    arrays: list[Array]


@dataclass(eq=False)
class Small:
    """Small parameters, with arrays over their memory."""

    entries: tuple[ParameterEntry, ...]
    orders: tuple[int, ...]
    sizes: Mapping[Any, int]
    tensors: tuple[Tensor, ...]
    places: frozenset[int]
    _weights: _Views = field(default_factory=lambda: _Views([], []))
    _buffers: _Views = field(default_factory=lambda: _Views([], []))

    @classmethod
    def of(cls, entries: Iterable[ParameterEntry]) -> Small:
        """These parameters, with what a table wants to know of them."""
        chosen = tuple(entries)
        orders = tuple(e.order for e in chosen)
        sizes = {e.order: e.tensor.numel() for e in chosen}
        return cls(chosen, orders, sizes, tuple(e.tensor for e in chosen), frozenset(orders))

    def weights(self) -> list[Array] | None:
        """The parameters as flat arrays; None if one is not what it was when this was planned."""
        tensors = self.tensors
        addresses = [t.data_ptr() for t in tensors]
        if addresses != self._weights.addresses:
            if not all(is_small(e, Needs(SQUARES)) for e in self.entries):
                return None
            self._weights = _Views(addresses, [t.detach().numpy().reshape(-1) for t in tensors])
        return self._weights.arrays

    def buffers(self, tensors: Sequence[Tensor]) -> list[Array]:
        """The kept copies as flat arrays."""
        addresses = [t.data_ptr() for t in tensors]
        if addresses != self._buffers.addresses:
            self._buffers = _Views(addresses, [t.numpy().reshape(-1) for t in tensors])
        return self._buffers.arrays


def squares_of(arrays: Sequence[Array]) -> Squares:
    """The sum of squares of each array, of any shape and strides."""
    with np.errstate(all="ignore"):
        return _checked(np.fromiter((np.vdot(a, a) for a in arrays), np.float64, len(arrays)), arrays)


def squares_of_flat(arrays: Sequence[Array]) -> Squares:
    """The same for flat arrays, in four fifths of the time."""
    with np.errstate(all="ignore"):
        return _checked(np.fromiter((np.dot(a, a) for a in arrays), np.float64, len(arrays)), arrays)


def changes_of(weights: Sequence[Array], buffers: Sequence[Array], *, keep_next: bool) -> Squares:
    """The sum of squares of how much each weight has changed.

    Args:
        weights: What the parameters are now, flat.
        buffers: What they were, flat; overwritten.
        keep_next: Whether the buffers are to hold what the parameters are now.
    """
    with np.errstate(all="ignore"):
        for weight, buffer in zip(weights, buffers, strict=True):
            np.subtract(weight, buffer, out=buffer)
        squares = squares_of_flat(buffers)
        if keep_next:
            for weight, buffer in zip(weights, buffers, strict=True):
                np.copyto(buffer, weight)
    return squares


def _checked(squares: Squares, arrays: Sequence[Array]) -> Squares:
    """The numbers themselves; those at the edge of float32's range are computed again in double."""
    # Not (a and b), so that a NaN among them is looked at too.
    if not (squares.min() >= TINY and squares.max() < np.inf):
        for i, square in enumerate(squares.tolist()):
            if square < TINY or square == np.inf:
                wide = arrays[i].astype(np.float64)
                squares[i] = np.vdot(wide, wide)
    return squares

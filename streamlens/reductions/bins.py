"""`Bins`: fixed bins that numbers are counted in, and the names by which sinks and views know them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor

from streamlens.reductions.elements import CHUNK, chunks_of, double_where_known

__all__ = ["Bins", "bin_edges"]

Edges = np.ndarray[Any, np.dtype[np.float32]]

_ON_DEVICE: Final = 1 << 22
"""Elements counted together on a device."""

_BELOW, _ABOVE, _NAN = "-inf", "inf", "nan"


@dataclass(frozen=True)
class Bins:
    """Bins whose edges are numbers of single precision, so that everybody means the same by them.

    Bins of equal width hold their lower edge, and the last its upper one too, as NumPy's do.
    Logarithmic ones have edges at equal ratios on both sides of zero, hold the edge nearer to zero,
    the outermost their outer one too, and leave one bin around zero. What lies beyond the range, both
    infinities and NaN have bins of their own, so that every element is counted once.

    Attributes:
        low: Where the range begins; of logarithmic bins, in magnitude.
        high: Where it ends.
        number: How many bins the range has; logarithmic ones, on each side of zero.
        log: Whether the bins are logarithmic.
    """

    low: float
    high: float
    number: int
    log: bool = False

    @property
    def edges(self) -> Edges:
        """The edges of the range's bins, ascending; of logarithmic ones, those above zero."""
        return _edges(self)

    @property
    def resolved(self) -> bool:
        """Whether single precision tells the edges apart, with room for the rounding of a position."""
        edges = self.edges
        if not np.isfinite(edges).all():
            return False
        coarsest = float(np.spacing(np.abs(edges)).max()) if not self.log else np.spacing(edges[1:])
        return bool((np.diff(edges.astype(np.float64)) >= 16 * coarsest).all())

    @property
    def components(self) -> tuple[str, ...]:
        """The names of all bins, ascending, such as `[0.5,1)`; those of infinities and NaN at the ends."""
        return _components(self)

    def count(self, flats: Sequence[Tensor]) -> Tensor:
        """How many elements of each tensor lie in each bin.

        On the CPU large tensors are read a piece at a time while it is in the cache, and small ones
        together; elsewhere all that fit are taken together, and nothing is waited for.

        Args:
            flats: Elements of single or double precision.

        Returns:
            One row a tensor, one number a component, in double precision where there is.
        """
        counts: list[Tensor] = []
        home = flats[0].device
        for group in _groups(flats):
            flat = group[0] if len(group) == 1 else torch.cat(list(group))
            on_host = flat.device.type == "cpu"
            if on_host and len(group) == 1:
                found = sum(self._counted(piece, on_host=True) for piece in chunks_of(flat))
            else:
                found = self._counted(flat, [one.numel() for one in group], on_host=on_host)
            counts.append(cast("Tensor", found).to(home, non_blocking=True))
        return torch.cat(counts).to(double_where_known(home))

    def _counted(self, flat: Tensor, sizes: Sequence[int] = (), *, on_host: bool) -> Tensor:
        """Counts of tensors of some sizes that lie one behind the other; without sizes, of one."""
        finite = on_host and math.isfinite(flat.sum().item())
        places = self._places(flat) if finite else self._places_of_all(flat)
        rows, width = max(1, len(sizes)), len(self.components)
        if rows > 1:
            starts, repeats = torch.arange(rows, dtype=torch.int32) * width, torch.tensor(sizes)
            if flat.is_cuda:
                starts, repeats = starts.pin_memory(), repeats.pin_memory()
            starts, repeats = (t.to(flat.device, non_blocking=True) for t in (starts, repeats))
            places += starts.repeat_interleave(repeats, output_size=flat.numel())
        if on_host:
            return torch.bincount(places, minlength=rows * width).view(rows, width)
        counts = torch.zeros(rows * width, dtype=torch.int64, device=flat.device)
        ones = torch.ones_like(places, dtype=torch.int64)
        return counts.scatter_add_(0, places.long(), ones).view(rows, width)

    def _places_of_all(self, flat: Tensor) -> Tensor:
        """The bin of each element, whatever it is."""
        last = len(self.components) - 1
        places = self._places(flat).masked_fill_(flat == -math.inf, 0)
        return places.masked_fill_(flat == math.inf, last - 1).masked_fill_(flat.isnan(), last)

    def _places(self, flat: Tensor) -> Tensor:
        """The bin of each finite element: which edge is nearest, and on which side of it."""
        edges = _edges_beside(self, flat.dtype, flat.device)
        size = flat.abs() if self.log else flat.clone()
        if self.log:
            steps = self.number / (math.log2(self.high) - math.log2(self.low))
            near = size.log2().sub_(math.log2(self.low)).mul_(steps)
        else:
            near = flat.sub(edges[0]).mul_(self.number / (self.high - self.low))
        near.round_().nan_to_num_(0.0).clamp_(0, self.number)
        places = near.add_(size.ge_(edges.index_select(0, near.int())))
        if self.log:
            # From the outermost on the negative side, past the one around zero, to the outermost.
            places = places.copysign_(flat).add_(self.number + 1)
        return places.int().add_(1)


def _groups(flats: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours that are counted together: there calls cost more than a copy."""
    groups: list[list[Tensor]] = []
    held = 0
    for flat in flats:
        most = CHUNK if flat.device.type == "cpu" else _ON_DEVICE
        last = groups[-1][-1] if groups else None
        alike = last is not None and (last.dtype, last.device) == (flat.dtype, flat.device)
        if alike and held + flat.numel() <= most:
            groups[-1].append(flat)
            held += flat.numel()
        else:
            groups.append([flat])
            held = flat.numel()
    return groups


@functools.lru_cache(maxsize=64)
def _edges(bins: Bins) -> Edges:
    spread = np.geomspace if bins.log else np.linspace
    with np.errstate(over="ignore"):  # what is infinite in single precision is found by `resolved`
        return spread(bins.low, bins.high, bins.number + 1).astype(np.float32)


@functools.lru_cache(maxsize=64)
def _edges_beside(bins: Bins, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The edges where they are compared; the last just beyond itself, since its bin holds it."""
    edges = torch.from_numpy(bins.edges.astype(np.float64)).to(dtype)
    edges[-1] = edges[-1].nextafter(torch.tensor(math.inf, dtype=dtype))
    if device.type == "cuda":
        return edges.pin_memory().to(device, non_blocking=True)
    return edges.to(device)


@functools.lru_cache(maxsize=64)
def _components(bins: Bins) -> tuple[str, ...]:
    # The shortest decimals that single precision reads as these edges.
    edges = [str(edge).removesuffix(".0") for edge in bins.edges]
    inner = [f"[{low},{high})" for low, high in itertools.pairwise(edges)]
    inner[-1] = f"[{edges[-2]},{edges[-1]}]"
    beyond = f"({edges[-1]},inf)"
    if not bins.log:
        return (_BELOW, f"(-inf,{edges[0]})", *inner, beyond, _ABOVE, _NAN)
    negative = [f"(-{high},-{low}]" for low, high in itertools.pairwise(edges)]
    negative[-1] = f"[-{edges[-1]},-{edges[-2]}]"
    around = f"(-{edges[0]},{edges[0]})"
    return (_BELOW, f"(-inf,-{edges[-1]})", *negative[::-1], around, *inner, beyond, _ABOVE, _NAN)


_LEAST: Final = 4
"""Infinities, NaN, and at least one interval."""


@functools.lru_cache(maxsize=64)
def bin_edges(components: Sequence[str]) -> tuple[tuple[float, float], ...] | None:
    """The edges that a histogram's components name.

    Args:
        components: The components of a frame, as a tuple.

    Returns:
        A lower and an upper edge a component: the two are equal for an infinity's own bin, and NaN for
        that of NaN. None if the components are no bins.
    """
    if len(components) < _LEAST or (components[0], *components[-2:]) != (_BELOW, _ABOVE, _NAN):
        return None
    found: list[tuple[float, float]] = []
    for name in components:
        parts = name.strip("[]()").split(",")
        try:
            found.append((float(parts[0]), float(parts[-1])))
        except ValueError:
            return None
    return tuple(found)

"""The reduction to order statistics: all elements sorted, or a stratified sample of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from streamlens.reductions import Reduction, all_elements, precise

__all__ = ["Quantiles", "sample_positions"]

_FEW: Final = 2
"""Up to so many places of the order are selected one by one; more are found by sorting, which is slower."""

_TOGETHER: Final = 1 << 16
"""Elements up to which tensors of one size are taken together: beyond, calls cost less than memory."""


@dataclass(frozen=True)
class Quantiles(Reduction):
    """Quantiles of all elements, interpolated linearly between the two nearest.

    Attributes:
        levels: The shares of elements that lie below, each in [0, 1].
        label: The name of the result.
        components: Names of the levels; none gives the first level as a number.
        sample: How many elements of a larger tensor are read; None reads all.
    """

    levels: tuple[float, ...]
    label: str
    components: tuple[str, ...] = ()
    sample: int | None = None

    @property
    def name(self) -> str:
        """The label."""
        return self.label

    def describe(self) -> str:
        """The label, and the size of the sample if there is one."""
        return self.label if self.sample is None else f"{self.label} of {self.sample} elements"

    def reduce(self, tensors: Sequence[Tensor]) -> Tensor:
        """The quantiles of each tensor, stacked; NaN where an element read is, or none is there."""
        flats = [precise(all_elements(tensor.detach())) for tensor in tensors]
        results: list[Tensor] = [torch.empty(0)] * len(flats)
        for group in _alike(flats):
            for i, row in zip(group, self._of([flats[i] for i in group]), strict=True):
                results[i] = row
        if not results:
            return torch.empty((0, len(self.levels)) if self.components else 0)
        home = results[0].device
        rows = torch.stack([row.to(home, non_blocking=True) for row in results])
        return rows if self.components else rows[:, 0]

    def _of(self, flats: Sequence[Tensor]) -> Tensor:
        """The quantiles of tensors of one size, type and device."""
        size, device = flats[0].numel(), flats[0].device
        if not size:
            return flats[0].new_full((len(flats), len(self.levels)), math.nan)
        if self.sample is None or size <= self.sample:
            return _quantiles(torch.stack(list(flats)), self.levels)
        places = sample_positions(size, self.sample, device)
        found = _quantiles(torch.stack([flat.index_select(0, places) for flat in flats]), self.levels)
        # The ends cannot be seen in a sample, and need no sorting.
        for i, level in enumerate(self.levels):
            if level in (0.0, 1.0):
                found[:, i] = torch.stack([flat.amin() if level == 0.0 else flat.amax() for flat in flats])
        return found


def _alike(flats: Sequence[Tensor]) -> list[list[int]]:
    """Which tensors are taken together."""
    groups: dict[Any, list[int]] = {}
    for i, flat in enumerate(flats):
        small = flat.numel() <= _TOGETHER
        groups.setdefault((flat.numel(), flat.dtype, flat.device) if small else i, []).append(i)
    return list(groups.values())


@functools.lru_cache(maxsize=128)
def sample_positions(size: int, sample: int, device: torch.device) -> Tensor:
    """Which elements of a flat tensor are read: one at a random place of each of as many equal parts.

    The same ones at every step, from a generator of their own: what changes between steps is the
    tensor, and the run's random numbers stay as they are. No pattern of the tensor's layout can fall
    into step with the sample, as it could if every n-th element were read.

    Args:
        size: How many elements there are.
        sample: How many are read.
        device: Where the tensor lies.

    Returns:
        Distinct positions in ascending order.
    """
    draw = torch.Generator().manual_seed(size)
    edges = torch.arange(sample + 1, dtype=torch.float64).mul_(size / sample).floor_()
    width = edges.diff()
    inside = torch.rand(sample, generator=draw, dtype=torch.float64).mul_(width).floor_()
    places = (edges[:-1] + torch.minimum(inside, width - 1)).long()
    if device.type == "cuda":
        return places.pin_memory().to(device, non_blocking=True)
    return places.to(device)


def _quantiles(rows: Tensor, levels: Sequence[float]) -> Tensor:
    """Quantiles of each row, which has elements; the rows are overwritten."""
    last = rows.shape[1] - 1
    places = [level * last for level in levels]
    below = [min(int(place), last) for place in places]
    above = [min(i + 1, last) for i in below]
    wanted = sorted({*below, *above})
    picked = (_picked_on_host if rows.device.type == "cpu" else _picked)(rows, wanted)
    at = dict(zip(wanted, picked, strict=True))
    low, high = (torch.stack([at[i] for i in found], 1) for found in (below, above))
    shares = [place - i for place, i in zip(places, below, strict=True)]
    share = torch.tensor(shares, dtype=rows.dtype, pin_memory=rows.is_cuda).to(rows.device, non_blocking=True)
    # Also where both are infinite, or where infinity has no share.
    return torch.where((low == high) | (share == 0), low, low * (1 - share) + high * share)


def _picked_on_host(rows: Tensor, places: Sequence[int]) -> Sequence[Tensor]:
    """The elements at some places of each row's order, through NumPy, whose sorting is vectorised."""
    values = rows.numpy()
    missing = torch.from_numpy(np.isnan(values.max(1)))
    if len(places) <= _FEW:
        values.partition(places[0], axis=1)
        # The neighbour above is the least of what lies above.
        found = [values[:, places[0]], *(values[:, place:].min(1) for place in places[1:])]
    else:
        values.sort(axis=1)
        found = [values[:, place] for place in places]
    return [torch.from_numpy(column).masked_fill(missing, math.nan) for column in found]


def _picked(rows: Tensor, places: Sequence[int]) -> Sequence[Tensor]:
    """The same on a device, without waiting for it: NaN is sorted last."""
    ordered = rows.sort(1).values
    return [ordered[:, place].masked_fill(ordered[:, -1].isnan(), math.nan) for place in places]

"""Statistics of many parts, merged in messages of one place a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from streamlens.capture.table import Rows
from streamlens.distributed.layout import Item, Layout, Mine, added
from streamlens.reductions import Statistic, centred_about

__all__ = ["AllReduce", "later_rounds"]

_SUM: Final = Statistic("sum")
_SIGN: Final = {"minimum": -1.0, "maximum": 1.0, "absmax": 1.0}


class AllReduce(Protocol):
    """Adds up what all processes have in a buffer, or takes the largest, in place."""

    def __call__(self, buffer: Tensor, *, largest: bool = False) -> None:
        """Do it."""
        ...


def later_rounds(
    layout: Layout, items: Sequence[Item], first: Tensor, all_reduce: AllReduce, *, on_host: bool
) -> list[tuple[Item, Rows]]:
    """Merge what takes more than one message, once the first is there.

    Args:
        layout: Where everything is.
        items: What this process has.
        first: The first message, added up over all processes.
        all_reduce: Sends another one.
        on_host: Whether it is about numbers on the host or on a device.
    """
    found = layout.in_rounds(items, on_host=on_host)
    sums = torch.zeros(layout.later[on_host], dtype=first.dtype, device=first.device)
    extremes = torch.full_like(sums, -math.inf)
    for item, mine in found:
        _write(item, mine, first, sums, extremes)
    all_reduce(sums)
    all_reduce(extremes, largest=True)
    return [(item, _read(item, mine, first, sums, extremes)) for item, mine in found if mine.numbers]


def _regions(mine: Mine, first: Tensor, *later: Tensor) -> tuple[Tensor, ...]:
    block = mine.block
    return block.region(first, block.offset)[0], *(block.region(one, block.later)[0] for one in later)


def _statistics(item: Item) -> tuple[Statistic, ...]:
    assert isinstance(item.rows.what, tuple)
    return item.rows.what


def _write(item: Item, mine: Mine, first: Tensor, sums: Tensor, extremes: Tensor) -> None:
    statistics = _statistics(item)
    merged, of_sums, of_extremes = _regions(mine, first, sums, extremes)
    rows, _, places = mine.given
    own = dict(zip(statistics, item.rows.values.index_select(1, rows).to(first.dtype), strict=False))
    counts = item.rows.values[-1].index_select(0, rows).to(first.dtype)
    centred = {s: values for s, values in own.items() if s.name == "centred"}
    if centred:
        mean = (merged[statistics.index(_SUM)] / merged[-1]).index_select(0, places)
        for statistic, powers in centred_about(centred, own[_SUM], counts, mean).items():
            of_sums[statistics.index(statistic), places] = powers
    for place, statistic in enumerate(statistics):
        sign = _SIGN.get(statistic.name)
        if sign is not None:
            # Whether there is a NaN adds up; what is the largest with one among them is up to the backend.
            values, there = own[statistic], counts > 0
            of_sums[place, places] = (values.isnan() & there).to(first.dtype)
            of_extremes[place, places] = torch.where(there & ~values.isnan(), values * sign, -math.inf)


def _read(item: Item, mine: Mine, first: Tensor, sums: Tensor, extremes: Tensor) -> Rows:
    merged, of_sums, of_extremes = _regions(mine, first, sums, extremes)
    nothing = merged[-1] == 0
    values: list[Tensor] = []
    for place, statistic in enumerate(_statistics(item)):
        sign = _SIGN.get(statistic.name)
        if added((statistic,)):
            values.append(merged[place])
        elif sign is None:
            values.append(of_sums[place].masked_fill(nothing, math.nan))
        else:
            values.append((of_extremes[place] * sign).masked_fill(nothing | (of_sums[place] > 0), math.nan))
    whole = torch.stack([*values, merged[-1]]).index_select(1, mine.places)
    keys = item.rows.keys
    return Rows(item.rows.what, (*(keys[i] for i in mine.kept), *mine.foreign), whole)

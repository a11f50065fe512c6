"""The statistics of whole tensors: piece by piece on the CPU, without waiting on a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from streamlens.reductions.elements import all_elements, double_where_known, flat_real, real_size
from streamlens.reductions.pieces import statistics_of
from streamlens.reductions.rows import row_statistics
from streamlens.reductions.statistic import OF_MAGNITUDES, Statistic, Statistics

__all__ = ["columns", "summarise", "summarise_on_device"]


def summarise(tensors: Sequence[Tensor], statistics: Sequence[Statistic]) -> tuple[Statistics, Tensor]:
    """The statistics of several tensors, each as a vector with one entry a tensor, and their sizes.

    On the CPU each tensor is read piece by piece, accumulating in double precision; elsewhere
    everything stays on the device and nothing is waited for.
    """
    if not tensors:
        empty = torch.empty(0)
        return dict.fromkeys(statistics, empty), empty
    if all(t.device.type == "cpu" for t in tensors):
        counts = torch.tensor([real_size(t) for t in tensors], dtype=torch.float64)
        return columns([statistics_of(t, statistics) for t in tensors], statistics), counts
    return summarise_on_device(tensors, statistics)


def columns(rows: Sequence[Sequence[float]], statistics: Sequence[Statistic]) -> Statistics:
    """Host numbers, one row a tensor, as one vector a statistic.

    In double precision until the reduction is finished: a float32 square may overflow where its
    root does not.
    """
    if not statistics:
        return {}
    if len(statistics) == 1:
        return {statistics[0]: torch.tensor([row[0] for row in rows], dtype=torch.float64)}
    table = torch.tensor(rows, dtype=torch.float64)
    return {statistic: table[:, i] for i, statistic in enumerate(statistics)}


def summarise_on_device(
    tensors: Sequence[Tensor], statistics: Sequence[Statistic]
) -> tuple[Statistics, Tensor]:
    """The same on whatever device the tensors lie on, by multi-tensor calls where there are some.

    Nothing is fetched: numbers that describe each tensor are stacked where the tensors are. Squares and
    other powers of single precision are summed in it, so that elements beyond 1e19 make them infinite.
    """
    flats = [all_elements(t) for t in tensors]
    home = next((f.device for f in flats if f.device.type != "cpu"), flats[0].device)
    wide = double_where_known(home)
    table: dict[Statistic, Tensor] = {}
    magnitudes = [s for s in statistics if s.name in OF_MAGNITUDES]
    for group in (magnitudes, [s for s in statistics if s not in magnitudes]):
        of = flats
        if group is magnitudes:
            of = [flat_real(t.abs()) if t.is_complex() else f for t, f in zip(tensors, flats, strict=True)]
        found = _one_by_one(of, group)
        for statistic in group:
            values = [one[statistic].to(home, wide, non_blocking=True) for one in found]
            table[statistic] = torch.stack(values)
            if statistic.name == "sum_of_squares":
                table[statistic].square_()
    sizes = torch.tensor([float(f.numel()) for f in flats], dtype=wide, pin_memory=home.type == "cuda")
    return {s: table[s] for s in statistics}, sizes.to(home, non_blocking=True)


_NORMS = {"sum_of_squares": 2.0, "absmax": math.inf}
"""Statistics that one multi-tensor call gives; of the sum of squares the root, which float32 can hold."""


def _one_by_one(flats: Sequence[Tensor], statistics: Sequence[Statistic]) -> list[dict[Statistic, Tensor]]:
    """The statistics of each tensor, on its device."""
    found: list[dict[Statistic, Tensor]] = [{} for _ in flats]
    rest = [s for s in statistics if s.name not in _NORMS]
    for statistic in statistics:
        if statistic.name in _NORMS:
            for table, value in zip(found, _norms(flats, _NORMS[statistic.name]), strict=True):
                table[statistic] = value
    if rest:
        for table, flat in zip(found, flats, strict=True):
            table.update({s: values[0] for s, values in row_statistics(flat[None], rest).items()})
    return found


def _norms(flats: Sequence[Tensor], order: float) -> list[Tensor]:
    alike: dict[Any, list[int]] = {}
    # The largest of no magnitudes is none, and so asked for raises.
    out = [flat.new_full((), math.nan, dtype=torch.float32) for flat in flats]
    for i, flat in enumerate(flats):
        if flat.numel() or order != math.inf:
            alike.setdefault((flat.device, flat.dtype), []).append(i)
    for (_, dtype), index in alike.items():
        group = [flats[i] if flats[i].is_floating_point() else flats[i].float() for i in index]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for i, norm in zip(index, torch._foreach_norm(group, order, dtype=wide), strict=True):
            out[i] = norm
    return out

"""Statistics of the rows of a matrix, on any device and without waiting for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from streamlens.reductions.elements import double_where_known
from streamlens.reductions.merging import moved
from streamlens.reductions.statistic import Statistic, Statistics

__all__ = ["row_statistics"]


def row_statistics(rows: Tensor, statistics: Sequence[Statistic]) -> Statistics:
    """The statistics of each row, in float32 or wider.

    Args:
        rows: Real numbers of any type, shape `[rows, elements]`.
        statistics: What is wanted.

    Returns:
        A vector a statistic, with one entry a row.
    """
    orders = [int(s.order) for s in statistics if s.name == "centred"]
    centred = _row_deviations(rows, max(orders)) if orders else []
    return {s: centred[int(s.order)] if s.name == "centred" else _row_statistic(rows, s) for s in statistics}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _row_statistic(rows: Tensor, statistic: Statistic) -> Tensor:
    name, order, wide = statistic.name, statistic.order, _wide(rows.dtype)
    match name:
        case "count":
            return rows.new_full((len(rows),), float(rows.shape[1]), dtype=wide)
        case "sum":
            return rows.sum(1, dtype=wide)
        case "sum_of_squares":
            return rows.to(wide).square().sum(1)
        case "sum_of_powers" if order:
            return rows.to(wide).abs().pow(order).sum(1)
        case "sum_of_powers" | "nonzero":
            return (rows != 0).sum(1).to(wide)
        case "nonfinite":
            return torch.isfinite(rows).logical_not_().sum(1).to(wide)
        case "minimum" | "maximum" | "absmax" if not rows.shape[1]:
            return rows.new_full((len(rows),), math.nan, dtype=wide)
        case "minimum":
            return rows.amin(1).to(wide)
        case "maximum":
            return rows.amax(1).to(wide)
        case "absmax":
            return rows.to(wide).abs().amax(1)
    raise ValueError(f"{statistic} is not known")


def _row_deviations(rows: Tensor, highest: int) -> list[Tensor]:
    """Sums of powers of deviations from each row's mean, by order; NaN for rows without elements."""
    count = rows.shape[1]
    double = double_where_known(rows.device)
    if not count:
        return [rows.new_full((len(rows),), math.nan, dtype=double)] * (highest + 1)
    wide = rows.to(_wide(rows.dtype))
    off = wide - wide.mean(1, keepdim=True)
    least, greatest = torch.aminmax(off, dim=1, keepdim=True)
    unit = torch.maximum(-least, greatest)
    # In units of the largest no power leaves the range; equal elements deviate by rounding only.
    off = off.div_(unit.masked_fill(unit == 0, 1.0))
    unit = unit.masked_fill(least == greatest, 0.0)[:, 0].to(double)
    # The sums of the powers of what was subtracted are exact for its deviation from the mean too.
    powers = [torch.full_like(unit, float(count)), off.sum(1).to(double)]
    power = off
    for _ in range(2, highest + 1):
        power = power * off
        powers.append(power.sum(1).to(double))
    shift = -powers[1] / count
    return [*powers[:2], *(moved(powers, shift, k) * unit**k for k in range(2, highest + 1))]

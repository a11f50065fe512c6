"""Statistics of one tensor on the CPU: read piece by piece, all of them while a piece is in the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Final

import numpy as np
import torch
from torch import Tensor

from streamlens.reductions.elements import CHUNK, TINY, chunks_of, flat_real
from streamlens.reductions.merging import ADDED, merge_stacked, moved, statistics_to_merge
from streamlens.reductions.statistic import OF_MAGNITUDES, OF_VALUES, Statistic

__all__ = ["accumulate", "square_of", "statistics_of"]

_LONGEST: Final = 1 << 18
"""Elements summed in float32 at most, before sums go on in double precision."""

_READ_ONCE: Final = frozenset({"sum", "sum_of_squares"})


def statistics_of(tensor: Tensor, statistics: Sequence[Statistic]) -> list[float]:
    """The statistics of one CPU tensor."""
    if tensor.layout is not torch.strided and not all(s.name in OF_VALUES for s in statistics):
        tensor = tensor.to_dense()
    if tensor.is_complex() and any(s.name in OF_MAGNITUDES for s in statistics):
        magnitudes = tensor.abs()
        return [
            accumulate(chunks_of(flat_real(magnitudes if s.name in OF_MAGNITUDES else tensor)), (s,))[0]
            for s in statistics
        ]
    # What is read once needs no cache, but sums in float32 should not become too long.
    size = _LONGEST if len(statistics) == 1 and statistics[0].name in _READ_ONCE else CHUNK
    return accumulate(chunks_of(flat_real(tensor), size), statistics)


def accumulate(pieces: Sequence[Tensor], statistics: Sequence[Statistic]) -> list[float]:
    """The statistics of one tensor on the CPU, given as flat pieces."""
    if len(statistics) == 1 and statistics[0].name == "sum_of_squares":
        total = 0.0
        for piece in pieces:
            total += square_of(piece)
        return [total]
    wanted = statistics_to_merge(statistics) if len(pieces) > 1 else statistics
    highest = int(max((s.order for s in wanted if s.name == "centred"), default=0))
    rows = [[read.value(s) for s in wanted] for read in (_Piece(piece, highest) for piece in pieces)]
    if len(rows) == 1:
        return rows[0]
    if all(s.name in ADDED for s in wanted):
        return [sum(column) for column in zip(*rows, strict=True)]
    table = torch.tensor(rows, dtype=torch.float64)
    counts = torch.tensor([[float(p.numel())] for p in pieces], dtype=torch.float64)
    merged = merge_stacked({s: table[:, i : i + 1] for i, s in enumerate(wanted)}, counts)
    return [merged[s].item() for s in statistics]


def square_of(piece: Tensor) -> float:
    """The sum of squares of one flat piece, in double where float32 cannot hold the squares."""
    wide = _widen(piece)
    part: float = torch.dot(wide, wide).item()
    if (part < TINY or part == math.inf) and piece.numel():
        # Squares may have left float32's range although the elements have not.
        double = piece.double()
        part = torch.dot(double, double).item()
    return part


def _widen(piece: Tensor) -> Tensor:
    return piece if piece.dtype in (torch.float32, torch.float64) else piece.float()


def _sum_of(wide: Tensor) -> float:
    total: float = wide.sum().item()
    # The sum of numbers in range may be out of it.
    return total if math.isfinite(total) else wide.sum(dtype=torch.float64).item()


class _Piece:
    """Some elements, and what has been read of them so far.

    Args:
        elements: Flat and real.
        highest: The highest power of deviations that will be asked for.
    """

    def __init__(self, elements: Tensor, highest: int) -> None:
        self._elements = elements
        self._count = elements.numel()
        self._highest = highest

    def value(self, statistic: Statistic) -> float:
        """One statistic of these elements."""
        match statistic.name:
            case "count":
                return float(self._count)
            case "sum":
                return self._powers[1] if self._highest and self._count else self._sum
            case "centred":
                return self._powers[int(statistic.order)] if self._count else math.nan
            case "sum_of_squares":
                return square_of(self._wide)
            case "sum_of_powers" if statistic.order:
                return float(self._wide.abs().double().pow_(statistic.order).sum().item())
            case "sum_of_powers" | "nonzero":
                return float(torch.count_nonzero(self._elements).item())
            case "nonfinite":
                # A finite sum has finite terms only, and is read much faster than a mask is made.
                if math.isfinite(self._sum):
                    return 0.0
                return self._count - float(torch.isfinite(self._wide).sum().item())
            case "minimum":
                return self._extremes[0]
            case "maximum":
                return self._extremes[1]
            case "absmax":
                return max(-self._extremes[0], self._extremes[1])
        raise ValueError(f"{statistic} is not known")

    @cached_property
    def _powers(self) -> list[float]:
        return _moments(self._wide, self._sum, self._highest)

    @cached_property
    def _wide(self) -> Tensor:
        return _widen(self._elements)

    @cached_property
    def _sum(self) -> float:
        return _sum_of(self._wide)

    @cached_property
    def _extremes(self) -> tuple[float, float]:
        if not self._count:
            return math.nan, math.nan
        least, greatest = torch.aminmax(self._elements)
        return float(least.item()), float(greatest.item())


def _moments(wide: Tensor, total: float, order: int) -> list[float]:
    """Count, sum, and sums of the second and higher powers of deviations from the mean, up to an order."""
    count = wide.numel()
    mean = total / count
    if not math.isfinite(mean):
        return [count, total, *([math.nan] * (order - 1))]
    if wide.dtype == torch.float32:
        # The number that is subtracted has to be one that float32 knows.
        mean = float(np.float32(mean))
    off = wide - mean
    square = torch.dot(off, off).item()
    if wide.dtype == torch.float32 and (square < TINY or square == math.inf):
        # As for sums of squares: the deviation may be in range where its square is not.
        off = wide.double() - mean
        square = torch.dot(off, off).item()
    rounding = 8 * torch.finfo(wide.dtype).eps * mean
    if square <= count * rounding * rounding and wide.min() == wide.max():
        # Equal elements deviate by the rounding of their mean only.
        return [count, count * wide[0].item(), *([0.0] * (order - 1))]
    rest = off.sum().item()
    powers = [count, rest, square]
    if order > 2:
        # In units of their own size no power leaves the range.
        unit = math.sqrt(square / count) or 1.0
        off.div_(unit)
        squares = off * off
        powers.append(torch.dot(squares, off).item() * unit * unit * unit)
        if order > 3:
            powers.append(torch.dot(squares, squares).item() * unit * unit * unit * unit)
    shift = -rest / count
    return [count, count * mean + rest, *(moved(powers, shift, k) for k in range(2, order + 1))]

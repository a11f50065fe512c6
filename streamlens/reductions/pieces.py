"""Statistics of one tensor on the CPU: read piece by piece, all of them while a piece is in the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from streamlens.reductions.elements import CHUNK, TINY, chunks_of, flat_real
from streamlens.reductions.merging import moved
from streamlens.reductions.statistic import OF_MAGNITUDES, OF_VALUES, Statistic

__all__ = ["accumulate", "square_of", "statistics_of"]

_LONGEST: Final = 1 << 18
"""Elements summed in float32 at most, before sums go on in double precision."""


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
    if len(statistics) == 1 and statistics[0].name in _READ_ONCE:
        read = _READ_ONCE[statistics[0].name]
        total = 0.0
        for piece in pieces:
            total += read(piece)
        return [total]
    reading = _Reading(statistics)
    for piece in pieces:
        if piece.numel():
            reading.read(piece)
    return [reading.value(s) for s in statistics]


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


def _sum_of(piece: Tensor) -> float:
    wide = _widen(piece)
    total: float = wide.sum().item()
    # The sum of numbers in range may be out of it.
    return total if math.isfinite(total) else wide.sum(dtype=torch.float64).item()


_READ_ONCE: Final = {"sum": _sum_of, "sum_of_squares": square_of}
"""What one operation gives."""

_EXTREMES: Final = frozenset({"minimum", "maximum", "absmax"})


class _Reading:
    """What has been read of a tensor so far, when several statistics are wanted of it.

    Powers of deviations are summed about the mean of the first piece, and moved to that of the whole in
    the end: one pass over memory, and no more than the spread of the pieces' means to lose by it.
    """

    def __init__(self, statistics: Sequence[Statistic]) -> None:
        self._highest = int(max((s.order for s in statistics if s.name == "centred"), default=0))
        self._extreme = any(s.name in _EXTREMES for s in statistics)
        self._summed = [
            s
            for s in statistics
            if s.name not in _EXTREMES and s.name != "centred" and not (self._highest and s.name == "sum")
        ]
        self._sums = [0.0] * len(self._summed)
        self._powers = [0.0] * (self._highest + 1)
        self._centre: float | None = None
        self._least, self._greatest = math.inf, -math.inf
        self._count = 0

    def read(self, piece: Tensor) -> None:
        """Read some more elements, at least one."""
        self._count += piece.numel()
        wide = _widen(piece)
        if self._highest:
            self._read_powers(wide)
        if self._extreme:
            least, greatest = (end.item() for end in torch.aminmax(piece))
            # Not a NaN that was found before; one found now compares as false.
            self._least = self._least if self._least <= least or self._least != self._least else least
            self._greatest = (
                self._greatest if self._greatest >= greatest or self._greatest != self._greatest else greatest
            )
        for i, statistic in enumerate(self._summed):
            self._sums[i] += _summed(piece, wide, statistic)

    def value(self, statistic: Statistic) -> float:
        """A statistic of all that was read."""
        match statistic.name:
            case "centred":
                if not self._count:
                    return math.nan
                value = moved(self._powers, -self._powers[1] / self._count, int(statistic.order))
                return 0.0 if statistic.order == 2 and value < 0 else value
            case "sum" if self._highest:
                return self._count * (self._centre or 0.0) + self._powers[1]
            case "minimum" if self._count:
                return float(self._least)
            case "maximum" if self._count:
                return float(self._greatest)
            case "absmax" if self._count:
                return float(max(-self._least, self._greatest))
            case "minimum" | "maximum" | "absmax":
                return math.nan
        return self._sums[self._summed.index(statistic)]

    def _read_powers(self, wide: Tensor) -> None:
        count, total = wide.numel(), math.nan
        if self._centre is None:
            total = _sum_of(wide)
            self._centre = _known_to(wide.dtype, total / count)
        off = wide - self._centre
        square = torch.dot(off, off).item()
        if wide.dtype == torch.float32 and (square < TINY or square == math.inf):
            # As for sums of squares: the deviation may be in range where its square is not.
            off = wide.double() - self._centre
            square = torch.dot(off, off).item()
        rounding = _ROUNDING[wide.dtype] * self._centre
        if total == total and square <= count * rounding * rounding and wide.min() == wide.max():
            # Equal elements deviate from the rounding of their mean only.
            self._centre = wide[0].item()
            off, square = off.zero_(), 0.0
        # Where the mean is small it has lost nothing to rounding, and the deviations add up as it says.
        small = self._centre * self._centre * count <= square
        rest = total - count * self._centre if small else math.nan
        parts = [count, rest if math.isfinite(rest) else off.sum().item(), square]
        if self._highest > 2:
            # In units of their own size no power leaves the range.
            unit = math.sqrt(square / count) or 1.0
            off.div_(unit)
            squares = off * off
            parts.append(torch.dot(squares, off).item() * unit * unit * unit)
            parts.append(torch.dot(squares, squares).item() * unit * unit * unit * unit)
        for k in range(self._highest + 1):
            self._powers[k] += parts[k]


_ROUNDING: Final = {dtype: 8 * torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


def _known_to(dtype: torch.dtype, mean: float) -> float:
    """A number to subtract that the type knows exactly; nothing where there is no mean."""
    if not math.isfinite(mean):
        return 0.0
    return float(np.float32(mean)) if dtype == torch.float32 else mean


def _summed(piece: Tensor, wide: Tensor, statistic: Statistic) -> float:
    """A statistic of some elements that adds up over all."""
    match statistic.name:
        case "sum":
            return _sum_of(wide)
        case "sum_of_squares":
            return square_of(wide)
        case "count":
            return float(piece.numel())
        case "sum_of_powers" if statistic.order:
            return float(wide.abs().double().pow_(statistic.order).sum().item())
        case "sum_of_powers" | "nonzero":
            return float(torch.count_nonzero(piece).item())
        case "nonfinite":
            # A finite sum has finite terms only, and is read much faster than a mask is made.
            if math.isfinite(wide.sum().item()):
                return 0.0
            return piece.numel() - float(torch.isfinite(wide).sum().item())
    raise ValueError(f"{statistic} is not known")

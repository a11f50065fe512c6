"""The statistics of whole tensors: piece by piece on the CPU, without waiting on a device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from streamlens.reductions.elements import CHUNK, TINY, chunks_of, flat_real, real_size
from streamlens.reductions.statistic import OF_MAGNITUDES, OF_VALUES, Statistic, Statistics

__all__ = ["accumulate", "columns", "square_of", "statistics_of", "summarise"]

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
    size = _LONGEST if len(statistics) == 1 else CHUNK
    return accumulate(chunks_of(flat_real(tensor), size), statistics)


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
    return _summarise_on_device(tensors, statistics)


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


def _widen(piece: Tensor) -> Tensor:
    return piece if piece.dtype in (torch.float32, torch.float64) else piece.float()


def accumulate(pieces: Sequence[Tensor], statistics: Sequence[Statistic]) -> list[float]:
    """The statistics of one tensor on the CPU, given as flat pieces."""
    if len(statistics) == 1 and statistics[0].name == "sum_of_squares":
        return [_sum_of_squares(pieces)]
    return [_ACCUMULATORS[s.name](pieces, s) for s in statistics]


def _sum_of_squares(pieces: Sequence[Tensor], _: Statistic | None = None) -> float:
    total = 0.0
    for piece in pieces:
        total += square_of(piece)
    return total


def square_of(piece: Tensor) -> float:
    """The sum of squares of one flat piece, in double where float32 cannot hold the squares."""
    wide = _widen(piece)
    part: float = torch.dot(wide, wide).item()
    if (part < TINY or part == math.inf) and piece.numel():
        # Squares may have left float32's range although the elements have not.
        double = piece.double()
        part = torch.dot(double, double).item()
    return part


def _sum(pieces: Sequence[Tensor], _: Statistic | None = None) -> float:
    total = 0.0
    for piece in pieces:
        total += _widen(piece).sum().item()
    return total


def _sum_of_powers(pieces: Sequence[Tensor], statistic: Statistic) -> float:
    total = 0.0
    for piece in pieces:
        wide = _widen(piece).abs()
        if statistic.order == 0:
            total += torch.count_nonzero(wide).item()
        else:
            total += wide.double().pow_(statistic.order).sum().item()
    return total


def _centred(pieces: Sequence[Tensor], _: Statistic) -> float:
    # Two passes: the difference of squares would cancel where the mean is large.
    count = sum(p.numel() for p in pieces)
    if count == 0:
        return math.nan
    mean = _sum(pieces) / count
    total = 0.0
    for piece in pieces:
        wide = _widen(piece) - mean
        part = torch.dot(wide, wide).item()
        if (part < TINY or part == math.inf) and piece.numel():
            # As for sums of squares: the deviation may be in range where its square is not.
            double = piece.double() - mean
            part = torch.dot(double, double).item()
        total += part
    return total


def _extreme(fn: Callable[[Tensor], Tensor], pick: Callable[..., float]) -> Callable[..., float]:
    def reduce(pieces: Sequence[Tensor], _: Statistic) -> float:
        parts = [float(fn(p).item()) for p in pieces if p.numel()]
        if not parts or any(math.isnan(p) for p in parts):
            return math.nan
        return pick(parts)

    return reduce


def _absmax(piece: Tensor) -> Tensor:
    return _widen(piece).abs().max()


def _size(pieces: Sequence[Tensor], _: Statistic) -> float:
    return float(sum(p.numel() for p in pieces))


_ACCUMULATORS: Final[Mapping[str, Callable[[Sequence[Tensor], Statistic], float]]] = {
    "count": _size,
    "sum": _sum,
    "sum_of_squares": _sum_of_squares,
    "sum_of_powers": _sum_of_powers,
    "centred": _centred,
    "minimum": _extreme(torch.min, min),
    "maximum": _extreme(torch.max, max),
    "absmax": _extreme(_absmax, max),
}


def _summarise_on_device(
    tensors: Sequence[Tensor], statistics: Sequence[Statistic]
) -> tuple[Statistics, Tensor]:
    flats = [flat_real(t if t.layout is torch.strided else t.to_dense()) for t in tensors]
    home = next(f.device for f in flats if f.device.type != "cpu")
    # A float32 square may leave the range that its root is in; not every device has float64.
    wide = torch.float64 if home.type in ("cuda", "cpu", "meta", "xpu") else torch.float32
    table: dict[Statistic, Tensor] = {}
    for statistic in statistics:
        of = flats
        if statistic.name in OF_MAGNITUDES:
            of = [flat_real(t.abs()) if t.is_complex() else f for t, f in zip(tensors, flats, strict=True)]
        values = torch.stack([v.to(home, wide, non_blocking=True) for v in _on_device(of, statistic)])
        table[statistic] = values.square() if statistic.name == "sum_of_squares" else values
    sizes = torch.tensor([float(f.numel()) for f in flats], pin_memory=home.type == "cuda")
    return table, sizes.to(home, non_blocking=True)


def _on_device(flats: Sequence[Tensor], statistic: Statistic) -> list[Tensor]:
    """One number a tensor; for the sum of squares its root, which float32 can hold."""
    if statistic.name == "sum_of_squares":
        return _foreach_norm(flats, 2.0)
    if statistic.name == "absmax":
        return _foreach_norm(flats, math.inf)
    one: dict[str, Callable[[Tensor], Tensor]] = {
        "count": lambda f: f.new_tensor(f.numel(), dtype=torch.float32),
        "sum": lambda f: f.sum(dtype=torch.float32),
        "sum_of_powers": lambda f: f.float().abs().pow(statistic.order).sum(),
        "centred": lambda f: f.float().sub(f.mean(dtype=torch.float32)).square().sum(),
        "minimum": lambda f: f.min() if f.numel() else f.new_full((), math.nan),
        "maximum": lambda f: f.max() if f.numel() else f.new_full((), math.nan),
    }
    return [one[statistic.name](f) for f in flats]


def _foreach_norm(flats: Sequence[Tensor], order: float) -> list[Tensor]:
    kept: dict[Any, list[int]] = {}
    for i, flat in enumerate(flats):
        kept.setdefault((flat.device, flat.dtype), []).append(i)
    out: list[Tensor | None] = [None] * len(flats)
    for index in kept.values():
        norms = torch._foreach_norm([flats[i] for i in index], order, dtype=torch.float32)
        for i, norm in zip(index, norms, strict=True):
            out[i] = norm
    return [n for n in out if n is not None]

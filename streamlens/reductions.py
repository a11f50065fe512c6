"""The reduction protocol: from one tensor a layer to one number (or fixed-size vector) a layer.

A `Reduction` is a hashable value, so that equal ones are computed once however many chains ask for
them. Most are finished from a few `Statistic`s (sums, sums of squares, extremes), and those are
what is shared: the 2-norm, the root mean square and the mean of one tensor need one pass together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeAlias

import torch
from torch import Tensor

__all__ = [
    "CHUNK",
    "OF_MAGNITUDES",
    "TINY",
    "FunctionReduction",
    "Reduction",
    "Statistic",
    "Statistics",
    "accumulate",
    "chunks_of",
    "columns",
    "flat_real",
    "needed_statistics",
    "real_size",
    "square_of",
    "statistics_of",
    "summarise",
]

CHUNK: Final = 1 << 16
"""Elements handled at once on the CPU: 256 kB of float32, so that a pass of several operations over
one piece finds it in the second-level cache."""

_LONGEST: Final = 1 << 18
"""Elements summed in float32 at most, before sums go on in double precision."""

TINY: Final = 1e-30
"""A float32 sum of squares below this may have lost elements to underflow."""


@dataclass(frozen=True)
class Statistic:
    """A number that is computed from all elements of a tensor and merges over parts of it.

    Attributes:
        name: One of `count`, `sum`, `sum_of_squares`, `sum_of_powers`, `centred`, `minimum`,
            `maximum` and `absmax`. `centred` is the sum of squared deviations from the mean.
        order: The exponent of `sum_of_powers`.
    """

    name: str
    order: float = 0.0


Statistics: TypeAlias = Mapping[Statistic, Tensor]
"""One vector a statistic, with one entry a layer."""


class Reduction:
    """A function of one tensor to a number or a fixed-size vector, for many tensors at once.

    Subclass it as a frozen dataclass (equal parameters must compare and hash equal) and write
    either `statistics` with `finish`, or `reduce`.
    """

    statistics: ClassVar[tuple[Statistic, ...]] = ()
    components: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What is appended to the topic: `weights` becomes `weights.<name>`."""
        raise NotImplementedError

    def needs(self) -> tuple[Statistic, ...]:
        """The statistics that `finish` reads; none means that `reduce` does the work."""
        return self.statistics

    def finish(self, statistics: Statistics, count: Tensor) -> Tensor:
        """The values of all layers from their statistics.

        Args:
            statistics: A vector a statistic named by `needs`, one entry a layer.
            count: Elements in each layer's tensor.
        """
        raise NotImplementedError

    def reduce(self, tensors: Sequence[Tensor]) -> Tensor:
        """The values of several tensors, stacked: shape `[layers, ...]`."""
        needs = self.needs()
        table, count = summarise(tensors, needs)
        return self.finish(table, count)

    def describe(self) -> str:
        """How the reduction shows in a plan."""
        return self.name


@dataclass(frozen=True)
class FunctionReduction(Reduction):
    """Any function of one tensor, applied layer by layer.

    Attributes:
        fn: Takes a detached tensor, returns a number or a tensor of a fixed shape.
        label: The name of the result.
        components: Names of the entries where the result is a vector.
    """

    fn: Callable[[Tensor], Tensor | float]
    label: str
    components: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The label."""
        return self.label

    def reduce(self, tensors: Sequence[Tensor]) -> Tensor:
        """Apply the function to each tensor and stack the results."""
        results: list[Tensor] = []
        for tensor in tensors:
            value = self.fn(tensor)
            result = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
            results.append(result if result.is_floating_point() else result.float())
        return torch.stack(results) if results else torch.empty(0)


def needed_statistics(reductions: Iterable[Reduction]) -> tuple[Statistic, ...]:
    """The union of what several reductions need, in a stable order."""
    return tuple(dict.fromkeys(s for reduction in reductions for s in reduction.needs()))


def flat_real(tensor: Tensor) -> Tensor:
    """The elements of a tensor as one real vector, without a copy where memory allows it.

    Sparse tensors give their coalesced values, complex ones real and imaginary parts, a
    DTensor its local shard; the order of elements is that of memory, not of the indices.
    """
    if type(tensor) is Tensor and tensor.layout is torch.strided and tensor.is_contiguous():
        return torch.view_as_real(tensor.resolve_conj()).view(-1) if tensor.is_complex() else tensor.view(-1)
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if tensor.layout is not torch.strided:
        tensor = tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor.values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.is_contiguous():
        return tensor.view(-1)
    # A permuted but dense tensor (channels_last) is one block of memory; order does not matter.
    order = sorted(range(tensor.ndim), key=lambda d: tensor.stride(d), reverse=True)
    return tensor.permute(order).reshape(-1)


_OF_VALUES: Final = frozenset({"sum", "sum_of_squares", "sum_of_powers", "absmax", "count"})
"""Statistics to which the zeros of a sparse tensor add nothing."""


OF_MAGNITUDES: Final = frozenset({"sum_of_powers", "absmax"})
"""Statistics of a complex tensor that are of its elements' magnitudes and not of their parts."""


def statistics_of(tensor: Tensor, statistics: Sequence[Statistic]) -> list[float]:
    """The statistics of one CPU tensor."""
    if tensor.layout is not torch.strided and not all(s.name in _OF_VALUES for s in statistics):
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


def real_size(tensor: Tensor) -> int:
    """Real numbers in a tensor: a complex one has two an element, a sparse one its zeros too."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def chunks_of(flat: Tensor, size: int = CHUNK) -> tuple[Tensor, ...]:
    """Pieces of a flat tensor, by default such that several operations find one in the cache."""
    return (flat,) if flat.numel() <= size else flat.split(size)


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

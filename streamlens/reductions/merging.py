"""Statistics of a whole from the statistics of its parts: shards, ranks, pieces of a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final, TypeVar

import torch
from torch import Tensor

from streamlens.reductions.statistic import Statistic, Statistics

__all__ = ["centred_about", "merge_statistics", "moved", "statistics_to_merge"]

_SUM: Final = Statistic("sum")
_ADDED: Final = frozenset({"count", "sum", "sum_of_squares", "sum_of_powers", "nonzero", "nonfinite"})
_PICKED: Final = {"minimum": torch.amin, "maximum": torch.amax, "absmax": torch.amax}
_NONE: Final = {"minimum": math.inf, "maximum": -math.inf, "absmax": -math.inf}


def statistics_to_merge(statistics: Iterable[Statistic]) -> tuple[Statistic, ...]:
    """These statistics and what they need to be merged, each once.

    Args:
        statistics: What is wanted of the whole.

    Returns:
        What has to be computed of each part.
    """
    wanted = tuple(statistics)
    return tuple(dict.fromkeys((*wanted, *(other for s in wanted for other in s.merges_with))))


def merge_statistics(parts: Sequence[tuple[Statistics, Tensor]]) -> tuple[Statistics, Tensor]:
    """The statistics of tensors from the statistics of their parts.

    Sums add; extremes are picked, NaN if a part's is; powers of deviations are moved from each part's
    mean to that of the whole by the binomial theorem (Chan, Golub and LeVeque 1983; Pebay 2008). A
    part without elements changes nothing. Works on any device and waits for none; its cost is a few
    operations on one number a part and layer.

    Args:
        parts: For each part its statistics and how many elements it has, one entry a layer. All have
            the same statistics, layers, precision and device; use double precision where there is.

    Returns:
        The statistics of the whole, and its numbers of elements.

    Raises:
        ValueError: There is no part, or a statistic comes without one that merging it needs
            (`Statistic.merges_with`, `statistics_to_merge`).
    """
    if not parts:
        raise ValueError("merge_statistics() takes at least one part")
    first, count = parts[0]
    for statistic in first:
        missing = [other for other in statistic.merges_with if other not in first]
        if missing:
            raise ValueError(
                f"{statistic} cannot be merged without {', '.join(map(str, missing))}: compute what "
                "statistics_to_merge() names of every part"
            )
    if len(parts) == 1:
        return dict(first), count
    counts = torch.stack([n for _, n in parts])
    stacked = {s: torch.stack([part[s] for part, _ in parts]) for s in first}
    merged = {s: _merge(s, values, counts) for s, values in stacked.items() if s.name != "centred"}
    centred = {s: values for s, values in stacked.items() if s.name == "centred"}
    if centred:
        merged.update(_merge_centred(centred, stacked[_SUM], counts))
    return {s: merged[s] for s in first}, counts.sum(0)


Number = TypeVar("Number", float, Tensor)


def moved(powers: Sequence[Number], distance: Number, k: int) -> Number:
    """Sums of powers of numbers become the sum of the k-th powers of the numbers moved by a distance.

    By the binomial theorem, sum (x + d)^k = sum_j C(k, j) d^(k-j) sum x^j.

    Args:
        powers: The sums of x^0 (the count), x^1, ..., x^k.
        distance: What is added to each number.
        k: The exponent.

    Returns:
        The sum of the k-th powers of x + distance.
    """
    # Horner's scheme, with products only: a float's ** raises where a product becomes infinite.
    total = powers[0]
    for j in range(1, k + 1):
        total = total * distance + math.comb(k, j) * powers[j]
    return total


def _merge(statistic: Statistic, values: Tensor, counts: Tensor) -> Tensor:
    if statistic.name in _ADDED:
        return values.sum(0)
    if statistic.name not in _PICKED:
        raise ValueError(f"{statistic} does not merge")
    # A part without elements has no extreme, whatever stands in its place.
    picked = _PICKED[statistic.name](values.masked_fill(counts == 0, _NONE[statistic.name]), 0)
    return picked.masked_fill(counts.sum(0) == 0, math.nan)


def _merge_centred(centred: Statistics, sums: Tensor, counts: Tensor) -> dict[Statistic, Tensor]:
    whole = counts.sum(0)
    moved_there = centred_about(centred, sums, counts, sums.sum(0) / whole)
    return {s: powers.sum(0).masked_fill(whole == 0, math.nan) for s, powers in moved_there.items()}


def centred_about(centred: Statistics, sums: Tensor, counts: Tensor, mean: Tensor) -> dict[Statistic, Tensor]:
    """Powers of deviations from the mean of a part become those from another mean, that of the whole.

    About one mean they add up over parts.

    Args:
        centred: The sums of powers of deviations from the part's own mean, with all lower orders.
        sums: The sum of the part's elements.
        counts: Their number; without any there is no deviation.
        mean: The mean of the whole.
    """
    distance = (sums / counts - mean).masked_fill(counts == 0, 0.0)
    # Means that differ by their own rounding are equal: else parts of a constant would deviate.
    rounding = 4 * torch.finfo(distance.dtype).eps * mean.abs()
    distance = distance.masked_fill(distance.abs() <= rounding, 0.0)
    # Deviations from a part's own mean add up to nothing.
    ordered = sorted(centred, key=lambda s: s.order)
    powers = [
        counts,
        torch.zeros_like(distance),
        *(centred[s].masked_fill(counts == 0, 0.0) for s in ordered),
    ]
    return {s: moved(powers, distance, int(s.order)) for s in centred}

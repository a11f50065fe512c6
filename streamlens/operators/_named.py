"""The reductions that operators take by name, over the first dimension and only over known values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

import torch
from torch import Tensor

from streamlens.errors import did_you_mean

__all__ = ["NAMED", "Reduce", "check_reduce", "over_known", "reduce_name"]

Reduce: TypeAlias = str | Callable[[Tensor], Tensor]
"""The name of a reduction, or a function of stacked values that removes the first dimension."""


def _mean(values: Tensor, known: Tensor) -> Tensor:
    return torch.where(known, values, 0).sum(0) / known.sum(0)


def _sum(values: Tensor, known: Tensor) -> Tensor:
    return torch.where(known.any(0), torch.where(known, values, 0).sum(0), math.nan)


def _max(values: Tensor, known: Tensor) -> Tensor:
    return torch.where(known.any(0), torch.where(known, values, -math.inf).amax(0), math.nan)


def _min(values: Tensor, known: Tensor) -> Tensor:
    return torch.where(known.any(0), torch.where(known, values, math.inf).amin(0), math.nan)


def _std(values: Tensor, known: Tensor) -> Tensor:
    deviations = torch.where(known, values - _mean(values, known), 0)
    return (deviations.abs().square().sum(0) / (known.sum(0) - 1).clamp(min=0)).sqrt()


def _median(values: Tensor, known: Tensor) -> Tensor:
    # Unknown values sort last; the median is the mean of the two middle ones among the known.
    ordered = torch.where(known, values, math.inf).sort(0).values
    count = known.sum(0, keepdim=True)
    low = ordered.gather(0, ((count - 1) // 2).clamp(min=0))
    high = ordered.gather(0, (count // 2).clamp(max=len(values) - 1))
    # Equal middles first: between infinities a mean would be NaN.
    middle = torch.where(low == high, low, low + (high - low) / 2)
    return torch.where(count > 0, middle, math.nan)[0]


def _first(values: Tensor, known: Tensor) -> Tensor:
    index = known.to(torch.uint8).argmax(0, keepdim=True)
    return torch.where(known.any(0), values.gather(0, index)[0], math.nan)


def _last(values: Tensor, known: Tensor) -> Tensor:
    return _first(values.flip(0), known.flip(0))


NAMED: Final[Mapping[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "mean": _mean,
    "sum": _sum,
    "max": _max,
    "min": _min,
    "std": _std,
    "median": _median,
    "last": _last,
    "first": _first,
}
"""Functions of values and of a mask of those that are known, over the first dimension."""


def over_known(values: Tensor, known: Tensor, reduce: Reduce) -> Tensor:
    """Reduce the first dimension: by name over the known values, or by a function over all."""
    if isinstance(reduce, str):
        return NAMED[reduce](values, known)
    result = reduce(values)
    if not isinstance(result, Tensor) or result.shape[:1] != values.shape[1:2]:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(
            f"{reduce_name(reduce)}() was given values of shape {tuple(values.shape)} and gave {got}: "
            "reduce the first dimension and keep the others, as values.amax(dim=0) does"
        )
    return result.detach()


def check_reduce(operator: str, reduce: object, *, among: tuple[str, ...] = tuple(NAMED)) -> None:
    """Raise unless `reduce` is a known name or a function.

    Args:
        operator: The operator, for the message.
        reduce: What was given.
        among: The names allowed.

    Raises:
        ValueError: An unknown name.
        TypeError: Neither a name nor a function.
    """
    if isinstance(reduce, str):
        if reduce not in among:
            hint = did_you_mean(reduce, among)
            raise ValueError(
                f"{operator}(reduce={reduce!r}) is unknown{': ' + hint if hint else ''}; known are "
                f"{', '.join(map(repr, among))}, or pass a function of the stacked values"
            )
    elif not callable(reduce):
        raise TypeError(
            f"{operator}(reduce={reduce!r}): pass one of {', '.join(map(repr, among))}, or a function"
        )


def reduce_name(reduce: Reduce) -> str:
    """What a reduction is called in topics and plans."""
    if isinstance(reduce, str):
        return reduce
    name = getattr(reduce, "__name__", type(reduce).__name__)
    return "function" if name == "<lambda>" else name

"""Order statistics of each layer's elements: `median`, `quantiles` and `percentile_bands`.

Exact by default. On the CPU that takes a copy of the tensor and 2 ms a million float32 elements for the
median, 5 ms for several levels, where the processor lets NumPy sort with vectors; on a device one sort,
which needs several times the tensor's memory. There is no limit to a tensor's size, tensors of one
size are taken together, and nothing is fetched from a device.

With `sample=k` only k elements of a larger tensor are read (on the CPU 0.1 ms for 10,000, whatever the
tensor's size): one at a random place of each of k equal parts of its memory, the same ones at every
step, drawn from a private generator. **The error**: what is returned for level q is the exact quantile
of a level that differs from q by a standard error of at most sqrt(q (1 - q) / k), about 0.005 for the
median of 10,000; the value's own standard error is that over the density of the elements there, for
the median of a normal distribution sigma sqrt(pi / 2 k). (The sample's distribution function at a
point is the mean of k independent draws of which the i-th falls below it with probability p_i; its
variance, sum p_i (1 - p_i) / k^2, is largest where all p_i are q.) Levels 0 and 1 are exact always:
the extremes cannot be seen in a sample, and take a pass but no sorting.

Common to all: input is any topic, of any shape and real or complex type (of a complex tensor, real and
imaginary parts are elements), half precision and whole numbers widened first. The value has the
elements' unit, float32, or float64 where the values are. It is interpolated linearly between
neighbours, as NumPy's `quantile` does by default; between a finite and an infinite neighbour it is
infinite. NaN if an element that is read is NaN, or if there is none. The cost is a copy and a selection or
sort of the tensor, or the reading of k elements with `sample=k`, and no wait for a GPU. Order statistics
of parts do not merge into those of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from streamlens.operators._base import is_number, is_whole
from streamlens.operators._quantiles import Quantiles
from streamlens.operators.statistics import reduction_operator
from streamlens.stream import Operator

__all__ = ["median", "percentile_bands", "quantiles"]

_BANDS: Final = (0.0, 5.0, 25.0, 50.0, 75.0, 95.0, 100.0)


def median(topic: str | None = None, *, sample: int | None = None) -> Operator:
    """The median of each layer's elements, as topic `<topic>.median`.

    Of an even number of elements it is the mean of the middle two. With `sample=k` the value is that of a
    level that differs from 0.5 by a standard error of at most 0.5 / sqrt(k).

    Args:
        topic: The topic to select; the stream as it is unless given.
        sample: How many elements of a larger tensor are read; all unless given.

    Returns:
        The operator.

    Raises:
        ValueError: The sample is no whole number from 1 on.
    """
    reduction = Quantiles((0.5,), "median", (), _checked_sample(sample, "median"))
    return reduction_operator(reduction, topic, "median")


def quantiles(
    topic: str | None = None, *, q: Sequence[float] = (0.25, 0.5, 0.75), sample: int | None = None
) -> Operator:
    """The values below which given shares of each layer's elements lie, as topic `<topic>.quantiles`.

    One component a level, named `q0.25` and so on.

    Args:
        topic: The topic to select; the stream as it is unless given.
        q: The levels, each from 0 to 1.
        sample: How many elements of a larger tensor are read; all unless given. Of k elements the value for
            level q is that of a level which differs by a standard error of at most sqrt(q (1 - q) / k).

    Returns:
        The operator.

    Raises:
        TypeError: `q` is no sequence of numbers.
        ValueError: There is no level, one is twice there or not from 0 to 1, or the sample is no
            whole number from 1 on.
    """
    levels = _checked_levels(q, 1.0, "quantiles(q=")
    reduction = Quantiles(
        levels, "quantiles", tuple(f"q{level:.12g}" for level in levels), _checked_sample(sample, "quantiles")
    )
    return reduction_operator(reduction, topic, "quantiles")


def percentile_bands(
    topic: str | None = None, *, percentiles: Sequence[float] = _BANDS, sample: int | None = None
) -> Operator:
    """How each layer's elements spread, as a few percentiles: topic `<topic>.percentile_bands`.

    By default the least and greatest element, the middle 90 % and the middle half, and the median.
    One component a percentile, named `p0`, `p5`, ..., `p100`, in ascending order: neighbours in the
    list are the edges of a band.

    Args:
        topic: The topic to select; the stream as it is unless given.
        percentiles: The percentiles, each from 0 to 100.
        sample: How many elements of a larger tensor are read; all unless given. Of k elements the value for
            level q is that of a level which differs by a standard error of at most sqrt(q (1 - q) / k).

    Returns:
        The operator.

    Raises:
        TypeError: `percentiles` is no sequence of numbers.
        ValueError: There is no percentile, one is twice there or not from 0 to 100, or the sample is
            no whole number from 1 on.
    """
    chosen = tuple(sorted(_checked_levels(percentiles, 100.0, "percentile_bands(percentiles=")))
    reduction = Quantiles(
        tuple(p / 100 for p in chosen),
        "percentile_bands",
        tuple(f"p{p:.12g}" for p in chosen),
        _checked_sample(sample, "percentile_bands"),
    )
    return reduction_operator(reduction, topic, "percentile_bands")


def _checked_levels(given: object, greatest: float, argument: str) -> tuple[float, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise TypeError(f"{argument}{given!r}): pass a sequence of numbers from 0 to {greatest:g}")
    for level in given:
        number = is_number(level)
        if not number or math.isnan(level) or not 0 <= level <= greatest:
            raise ValueError(f"{argument}{given!r}): {level!r} is no number from 0 to {greatest:g}")
    levels = tuple(float(level) for level in given)
    if not levels or len(set(levels)) < len(levels):
        raise ValueError(f"{argument}{given!r}): pass at least one number, each of them once")
    return levels


def _checked_sample(sample: object, operator: str) -> int | None:
    if sample is None:
        return None
    if not is_whole(sample) or sample < 1:
        raise ValueError(
            f"{operator}(sample={sample!r}): the sample is how many elements are read, a whole number from "
            "1 on, or None to read all"
        )
    return sample

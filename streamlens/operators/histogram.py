"""`histogram`: how the elements of each layer are distributed, counted in fixed bins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from streamlens.operators._base import is_number, is_whole
from streamlens.operators.statistics import reduction_operator
from streamlens.reductions import Bins, Reduction, all_elements, precise
from streamlens.stream import Operator

__all__ = ["histogram"]

_WIDTHS: Final = 64
_RATIOS: Final = 48
_MAGNITUDES: Final = (1e-9, 1e3)


@dataclass(frozen=True)
class Histogram(Reduction):
    """Numbers of elements by bin.

    Attributes:
        bins: What is counted.
    """

    bins: Bins
    adds: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """`histogram`."""
        return "histogram"

    @property
    def components(self) -> tuple[str, ...]:  # type: ignore[override]
        """The names of the bins."""
        return self.bins.components

    def describe(self) -> str:
        """The bins."""
        kind = "logarithmic bins a sign" if self.bins.log else "bins"
        return f"histogram of {self.bins.number} {kind} from {self.bins.low:g} to {self.bins.high:g}"

    def reduce(self, tensors: Sequence[Tensor]) -> Tensor:
        """The counts of each tensor, stacked."""
        if not tensors:
            return torch.empty(0, len(self.components))
        flats = [precise(all_elements(tensor.detach())) for tensor in tensors]
        wide = torch.float64 if any(flat.dtype == torch.float64 for flat in flats) else torch.float32
        return self.bins.count(flats).to(wide)

    def merge(self, parts: Sequence[Tensor]) -> Tensor:
        """Counts of parts add up."""
        return torch.stack(list(parts)).sum(0)


def histogram(
    topic: str | None = None,
    *,
    bins: int | None = None,
    range: tuple[float, float] | None = None,  # noqa: A002 - what NumPy, Matplotlib and JAX call it
    log: bool | None = None,
) -> Operator:
    """How many of each layer's elements lie in each of some fixed bins, as topic `<topic>.histogram`.

    With `range=(low, high)`, `bins` bins of equal width, each with its lower edge and the last with its
    upper one too, as NumPy's. Without a range (`log=True`), signed logarithmic bins: `bins` a sign, at
    equal ratios from 1e-9 to 1e3 in magnitude, four a decade, and one around zero; with both, from low
    to high in magnitude. The bins are fixed, so that steps and layers compare, histograms of shards
    and steps add up, and nothing has to be known of the values beforehand.

    One component a bin, named after its edges: `[0.5,1)`; `bin_edges(frame.components)` of
    `streamlens.reductions` reads them. What lies below and above the range, `-inf`, `inf` and `nan` are
    components of their own, so that the counts add up to the number of elements. TensorBoard shows the
    whole as a histogram; in a table or a store of runs each bin is a component.

    The input is any topic, of any shape; half precision and whole numbers are widened first, of a
    complex tensor real and imaginary parts are elements, and the zeros that a sparse one does not hold
    count. The value is a number of elements, as float32 (exact up to 16,777,216 a bin), or float64
    where the elements are. The edges are numbers of single precision, compared exactly. The cost is
    one pass over memory, 4 to 5 ms a million elements on the CPU; layers
    smaller than the cache, or on a device than 4 million elements, share a dozen calls, and nothing is
    fetched from a device. Parts merge by adding.

    Args:
        topic: The topic to select; the stream as it is unless given.
        bins: How many bins the range has, a sign if logarithmic; 64, or 48 if logarithmic.
        range: Where the first bin begins and the last one ends; in magnitude if logarithmic.
        log: Logarithmic bins on both sides of zero; by default where no range is given.

    Returns:
        The operator.

    Raises:
        TypeError: The range is no pair of numbers.
        ValueError: The number of bins is no whole number from 1 on; the range is empty, not finite or,
            if logarithmic, not above zero; the bins are too narrow for single precision to tell their
            edges apart; or bins of equal width are asked for without a range.
    """
    logarithmic = range is None if log is None else bool(log)
    if range is None and not logarithmic:
        raise ValueError(
            "histogram(log=False): bins of equal width need range=(low, high); without a range the bins "
            "are logarithmic"
        )
    low, high = _checked_range(_MAGNITUDES if range is None else range, logarithmic)
    number = (_RATIOS if logarithmic else _WIDTHS) if bins is None else bins
    if not is_whole(number) or number < 1:
        raise ValueError(f"histogram(bins={bins!r}): the number of bins is a whole number from 1 on")
    fixed = Bins(low, high, number, logarithmic)
    if not fixed.resolved:
        raise ValueError(
            f"histogram(bins={number}, range={(low, high)}): single precision cannot tell these edges apart; "
            "pass fewer bins or a wider range"
        )
    return reduction_operator(Histogram(fixed), topic, "histogram")


def _checked_range(given: object, logarithmic: bool) -> tuple[float, float]:
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 2:
        raise TypeError(f"histogram(range={given!r}): pass the pair (low, high)")
    for end in given:
        if not is_number(end):
            raise TypeError(f"histogram(range={given!r}): {end!r} is no number; pass the pair (low, high)")
    low, high = float(given[0]), float(given[1])
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"histogram(range={given!r}): the range begins below its end, and both are finite")
    if logarithmic and low <= 0:
        raise ValueError(
            f"histogram(range={given!r}, log=True): logarithmic bins range over magnitudes, which are "
            "above 0; both signs are counted"
        )
    return low, high

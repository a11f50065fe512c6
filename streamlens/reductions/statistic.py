"""`Statistic`: a number that is computed from all elements of a tensor and merges over parts of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from torch import Tensor

__all__ = ["OF_MAGNITUDES", "OF_VALUES", "Statistic", "Statistics"]

OF_MAGNITUDES: Final = frozenset({"sum_of_powers", "absmax"})
"""Statistics of a complex tensor that are of its elements' magnitudes and not of their parts."""

OF_VALUES: Final = frozenset(
    {"sum", "sum_of_squares", "sum_of_powers", "absmax", "count", "nonzero", "nonfinite"}
)
"""Statistics to which the zeros of a sparse tensor add nothing."""


@dataclass(frozen=True)
class Statistic:
    """A number that is computed from all elements of a tensor and merges over parts of it.

    Attributes:
        name: One of `count`, `sum`, `sum_of_squares`, `sum_of_powers`, `centred`, `minimum`,
            `maximum`, `absmax`, `nonzero` and `nonfinite`. `centred` is the sum of powers of
            deviations from the mean; the last two are numbers of elements.
        order: The exponent of `sum_of_powers` and of `centred`, there 2, 3 or 4.
    """

    name: str
    order: float = 0.0

    @property
    def merges_with(self) -> tuple[Statistic, ...]:
        """The statistics, beside the count, without which this one cannot be merged over parts.

        Most merge by themselves. Deviations are from a part's own mean, so that they need the sum,
        and the lower powers of deviations too.
        """
        if self.name != "centred":
            return ()
        return (Statistic("sum"), *(Statistic("centred", float(k)) for k in range(2, int(self.order))))


Statistics: TypeAlias = Mapping[Statistic, Tensor]
"""One vector a statistic, with one entry a layer."""

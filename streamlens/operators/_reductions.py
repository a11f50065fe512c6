"""The reductions that one pass over a tensor gives: norms, moments and extremes, as hashable values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from streamlens.frame import Frame
from streamlens.operators._base import relabelled, widened
from streamlens.reductions import OF_MAGNITUDES, Reduction, Statistic, Statistics, row_statistics

__all__ = [
    "AbsMax",
    "Kurtosis",
    "Maximum",
    "Mean",
    "Minimum",
    "Nonfinite",
    "Norm",
    "RootMeanSquare",
    "Skewness",
    "Std",
    "Total",
    "Var",
    "ZeroFraction",
    "reduce_frame",
    "reduce_values",
]

_SUM: Final = Statistic("sum")
_SQUARES: Final = Statistic("sum_of_squares")
_CENTRED: Final = Statistic("centred", 2.0)
_CUBES: Final = Statistic("centred", 3.0)
_FOURTHS: Final = Statistic("centred", 4.0)
_MINIMUM: Final = Statistic("minimum")
_MAXIMUM: Final = Statistic("maximum")
_ABSMAX: Final = Statistic("absmax")
_NONZERO: Final = Statistic("nonzero")
_NONFINITE: Final = Statistic("nonfinite")
_DOUBLE: Final = frozenset({torch.float64, torch.complex128})


@dataclass(frozen=True)
class Norm(Reduction):
    """The p-norm of all elements.

    Attributes:
        order: The exponent p; 0 counts what is not zero, infinity takes the largest magnitude.
    """

    order: float = 2.0

    @property
    def name(self) -> str:
        """`norm2`, `norm1`, `norminf`."""
        return f"norm{self.order:g}"

    def needs(self) -> tuple[Statistic, ...]:
        """The sum of squares, the largest magnitude, or the sum of powers."""
        if self.order == 2:
            return (_SQUARES,)
        if math.isinf(self.order):
            return (_ABSMAX,)
        return (Statistic("sum_of_powers", self.order),)

    def finish(self, statistics: Statistics, count: Tensor) -> Tensor:
        """The root of the sum of powers; 0 for a tensor without elements."""
        (statistic,) = self.needs()
        value = statistics[statistic]
        if self.order == 2:
            return value.sqrt()
        if math.isinf(self.order):
            # The largest of no magnitudes is 0, as for every other norm.
            return torch.where(count == 0, torch.zeros_like(value), value)
        return value if self.order in {0, 1} else value.pow(1.0 / self.order)


@dataclass(frozen=True)
class Mean(Reduction):
    """The arithmetic mean of all elements."""

    statistics: ClassVar[tuple[Statistic, ...]] = (_SUM,)

    @property
    def name(self) -> str:
        """`mean`."""
        return "mean"

    def finish(self, statistics: Statistics, count: Tensor) -> Tensor:
        """The sum over the count; NaN for a tensor without elements."""
        return statistics[_SUM] / count


@dataclass(frozen=True)
class Total(Reduction):
    """The sum of all elements."""

    statistics: ClassVar[tuple[Statistic, ...]] = (_SUM,)

    @property
    def name(self) -> str:
        """`total`."""
        return "total"

    def finish(self, statistics: Statistics, count: Tensor) -> Tensor:
        """The statistic itself."""
        return statistics[_SUM]


@dataclass(frozen=True)
class Var(Reduction):
    """The variance of all elements.

    Attributes:
        unbiased: Divide by n - 1 (the sample's estimate) and not by n.
    """

    unbiased: bool = True
    statistics: ClassVar[tuple[Statistic, ...]] = (_CENTRED,)

    @property
    def name(self) -> str:
        """`var`, or `population_var` when divided by n."""
        return "var" if self.unbiased else "population_var"

    def finish(self, statistics: Statistics, count: Tensor) -> Tensor:
        """The squared deviations over their degrees of freedom; NaN where there are none."""
        return statistics[_CENTRED] / ((count - 1).clamp(min=0) if self.unbiased else count)


@dataclass(frozen=True)
class Std(Reduction):
    """The standard deviation of all elements.

    Attributes:
        unbiased: Divide by n - 1 and not by n.
    """

    unbiased: bool = True
    statistics: ClassVar[tuple[Statistic, ...]] = (_CENTRED,)

    @property
    def name(self) -> str:
        """`std`, or `population_std` when divided by n."""
        return "std" if self.unbiased else "population_std"

    def finish(self, statistics: Statistics, count: Tensor) -> Tensor:
        """The root of the variance."""
        return Var(self.unbiased).finish(statistics, count).sqrt()


@dataclass(frozen=True)
class RootMeanSquare(Reduction):
    """The root of the mean of the squares of all elements."""

    statistics: ClassVar[tuple[Statistic, ...]] = (_SQUARES,)

    @property
    def name(self) -> str:
        """`rms`."""
        return "rms"

    def finish(self, statistics: Statistics, count: Tensor) -> Tensor:
        """The root; NaN for a tensor without elements."""
        return (statistics[_SQUARES] / count).sqrt()


@dataclass(frozen=True)
class Minimum(Reduction):
    """The smallest element."""

    statistics: ClassVar[tuple[Statistic, ...]] = (_MINIMUM,)

    @property
    def name(self) -> str:
        """`minimum`."""
        return "minimum"

    def finish(self, statistics: Statistics, count: Tensor) -> Tensor:
        """The statistic itself."""
        return statistics[_MINIMUM]


@dataclass(frozen=True)
class Maximum(Reduction):
    """The largest element."""

    statistics: ClassVar[tuple[Statistic, ...]] = (_MAXIMUM,)

    @property
    def name(self) -> str:
        """`maximum`."""
        return "maximum"

    def finish(self, statistics: Statistics, count: Tensor) -> Tensor:
        """The statistic itself."""
        return statistics[_MAXIMUM]


@dataclass(frozen=True)
class AbsMax(Reduction):
    """The largest magnitude of an element."""

    statistics: ClassVar[tuple[Statistic, ...]] = (_ABSMAX,)

    @property
    def name(self) -> str:
        """`absmax`."""
        return "absmax"

    def finish(self, statistics: Statistics, count: Tensor) -> Tensor:
        """The statistic itself; NaN for a tensor without elements."""
        return torch.where(count == 0, torch.full_like(count, math.nan), statistics[_ABSMAX])


@dataclass(frozen=True)
class Skewness(Reduction):
    """The third standardised moment of all elements."""

    statistics: ClassVar[tuple[Statistic, ...]] = (_CENTRED, _CUBES)

    @property
    def name(self) -> str:
        """`skewness`."""
        return "skewness"

    def finish(self, statistics: Statistics, count: Tensor) -> Tensor:
        """The mean cube over the variance to the power of 1.5; NaN where nothing deviates."""
        variance = statistics[_CENTRED] / count
        return (statistics[_CUBES] / count / variance.pow(1.5)).masked_fill(variance == 0, math.nan)


@dataclass(frozen=True)
class Kurtosis(Reduction):
    """The fourth standardised moment of all elements, less that of a normal distribution."""

    statistics: ClassVar[tuple[Statistic, ...]] = (_CENTRED, _FOURTHS)

    @property
    def name(self) -> str:
        """`kurtosis`."""
        return "kurtosis"

    def finish(self, statistics: Statistics, count: Tensor) -> Tensor:
        """The mean fourth power over the squared variance, less 3; NaN where nothing deviates."""
        variance = statistics[_CENTRED] / count
        return (statistics[_FOURTHS] / count / variance.square() - 3).masked_fill(variance == 0, math.nan)


@dataclass(frozen=True)
class ZeroFraction(Reduction):
    """The share of elements that are exactly zero."""

    statistics: ClassVar[tuple[Statistic, ...]] = (_NONZERO,)

    @property
    def name(self) -> str:
        """`zero_fraction`."""
        return "zero_fraction"

    def finish(self, statistics: Statistics, count: Tensor) -> Tensor:
        """What is not nonzero, over the count; NaN for a tensor without elements."""
        return (count - statistics[_NONZERO]) / count


@dataclass(frozen=True)
class Nonfinite(Reduction):
    """The number of elements that are NaN or infinite."""

    statistics: ClassVar[tuple[Statistic, ...]] = (_NONFINITE,)

    @property
    def name(self) -> str:
        """`nonfinite`."""
        return "nonfinite"

    def finish(self, statistics: Statistics, count: Tensor) -> Tensor:
        """The statistic itself."""
        return statistics[_NONFINITE]


def reduce_frame(
    frame: Frame, reduction: Reduction, on_error: Callable[[str, Exception], None]
) -> Frame | None:
    """A frame with the reduction of each layer's value, named `<topic>.<reduction>`.

    Stacked values are reduced row by row at once. The result is float32, or float64 where the
    values are.

    Args:
        frame: The frame, raw or stacked.
        reduction: What becomes of each layer's value.
        on_error: Receives the layers on which the reduction fails; the others go on.

    Returns:
        The reduced frame; None if it failed on every layer.
    """
    values = frame.values
    layers = frame.layers
    try:
        reduced = None if reduction.by_layer else reduce_values(values, reduction)
    except Exception:
        reduced = None
    if reduced is None:
        # One layer must not take the others with it; whose fault it was shows one by one.
        results: dict[str, Tensor] = {}
        for layer, value in frame.items():
            try:
                by_layer = reduction.by_layer
                one = reduction.reduce_layer(layer, value) if by_layer else reduction.reduce([value])[0]
                results[layer] = one
            except Exception as error:
                on_error(layer, error)
        if not results:
            return None
        layers, reduced = tuple(results), _as_wide_as(values, torch.stack(list(results.values())))
    topic = f"{frame.topic}.{reduction.name}"
    return relabelled(frame, topic, reduced, layers=layers, components=reduction.components)


def reduce_values(values: Tensor | tuple[Tensor, ...], reduction: Reduction) -> Tensor:
    """The reduction of each layer's value: float32, or float64 where the values are."""
    reduced = _reduce_rows(values, reduction) if isinstance(values, Tensor) else reduction.reduce(values)
    return _as_wide_as(values, reduced)


def _as_wide_as(values: Tensor | tuple[Tensor, ...], reduced: Tensor) -> Tensor:
    double = any(v.dtype in _DOUBLE for v in ((values,) if isinstance(values, Tensor) else values))
    return reduced.to(torch.float64 if double else torch.float32)


def _reduce_rows(values: Tensor, reduction: Reduction) -> Tensor:
    needs = reduction.needs()
    if not needs:
        return reduction.reduce(values.unbind(0))
    rows = values
    if values.is_complex():
        of_magnitudes = all(s.name in OF_MAGNITUDES for s in needs)
        rows = values.abs() if of_magnitudes else torch.view_as_real(values.resolve_conj())
    rows = widened(rows).reshape(len(values), -1)
    if rows.device.type == "cpu":
        # As for raw tensors: a float32 square may overflow where its root does not.
        rows = rows.double()
    count = torch.full((len(rows),), float(rows.shape[1]), dtype=rows.dtype, device=rows.device)
    return reduction.finish(row_statistics(rows, needs), count)

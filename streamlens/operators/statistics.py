"""One number a layer: norms, moments, extremes, counts, and `reduce` for your own function.

On a Lens they are computed where the tensor is taken, once a step however many chains ask, those
of one tensor together. On any other stream they reduce the frames that come.

Common to all: the input is any topic, of any shape; half precision is accumulated in float32 or
wider; the result is float32, or float64 where the values are, in the unit of the elements (its square
for variances), or without unit where it is a count, a share or a shape. Sums and moments of float32 elements
are good to 1e-5 of the sum of their terms' magnitudes, mostly to 1e-6. Norms and `absmax` of a complex
tensor are of the magnitudes of its elements; to the other statistics its elements are their real and
imaginary parts. NaN and inf pass through, except where they are what is counted. The cost is one pass
over the tensor for all that is asked of it together (on a device a few kernels each) and no wait for a
GPU. All of them merge over the parts of a tensor (`streamlens.reductions.merge_statistics`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from reactivex import Observable
from torch import Tensor

from streamlens.frame import Frame
from streamlens.lens import Lens
from streamlens.nodes import frame_operator
from streamlens.operators._base import checked_source, is_number
from streamlens.operators._reductions import (
    AbsMax,
    Kurtosis,
    Maximum,
    Mean,
    Minimum,
    Nonfinite,
    Norm,
    RootMeanSquare,
    Skewness,
    Std,
    Total,
    Var,
    ZeroFraction,
    reduce_frame,
)
from streamlens.operators.selection import topic as select
from streamlens.reductions import FunctionReduction, Reduction
from streamlens.stream import Operator

__all__ = [
    "absmax",
    "check_order",
    "kurtosis",
    "maximum",
    "mean",
    "minimum",
    "nonfinite",
    "norm",
    "reduce",
    "reduction_operator",
    "rms",
    "skewness",
    "std",
    "total",
    "var",
    "zero_fraction",
]


def reduction_operator(reduction: Reduction, topic: str | None, operator: str) -> Operator:
    """The operator that applies a reduction: pushed down into a Lens, or frame by frame.

    Args:
        reduction: What becomes of each layer's value.
        topic: The topic to select first; None takes the stream as it is.
        operator: The operator's name, for plans and messages.

    Returns:
        The operator.

    Raises:
        TypeError: The topic is not a name.
    """
    if topic is not None and not (isinstance(topic, str) and topic):
        raise TypeError(
            f"the first argument of {operator}() is a topic such as 'weights', got {topic!r}; "
            "other arguments are passed by name"
        )

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        if topic is not None:
            source = select(topic)(source)
        if isinstance(source, Lens) and source.reducible:
            return source.narrow(reduction=reduction)
        stream = checked_source(source)
        plan = reduction.describe()

        def left_out(layer: str, error: Exception) -> None:
            stream.runtime.report(error, f"{plan} of layer {layer!r}")

        return frame_operator(stream, lambda frame: reduce_frame(frame, reduction, left_out), plan, raw=False)

    return apply


def check_order(order: object, operator: str) -> float:
    """The order of a norm as a float.

    Args:
        order: What was given.
        operator: The operator, for the message.

    Returns:
        The order.

    Raises:
        ValueError: It is negative, NaN or no number.
    """
    if not is_number(order) or math.isnan(order) or order < 0:
        raise ValueError(f"{operator}(order={order!r}): the order is a number from 0 on, or math.inf")
    return float(order)


def norm(topic: str | None = None, *, order: float = 2) -> Operator:
    """The p-norm of each layer's elements: (sum of |x|^p)^(1/p).

    Order 2 is the Euclidean (Frobenius) norm, infinity the largest magnitude, 0 the number of
    elements that are not zero. The result is topic `<topic>.norm2` (`norm1`, `norminf`), at least
    0; 0 for a tensor without elements.

    Args:
        topic: The topic to select; the stream as it is unless given.
        order: The exponent p, from 0 to `math.inf`.

    Returns:
        The operator.

    Raises:
        ValueError: The order is negative or no number.
    """
    return reduction_operator(Norm(check_order(order, "norm")), topic, "norm")


def mean(topic: str | None = None) -> Operator:
    """The mean of each layer's elements, as topic `<topic>.mean`; NaN for a tensor without elements.

    Args:
        topic: The topic to select; the stream as it is unless given.

    Returns:
        The operator.
    """
    return reduction_operator(Mean(), topic, "mean")


def total(topic: str | None = None) -> Operator:
    """The sum of each layer's elements, as topic `<topic>.total`; 0 for a tensor without elements.

    Args:
        topic: The topic to select; the stream as it is unless given.

    Returns:
        The operator.
    """
    return reduction_operator(Total(), topic, "total")


def var(topic: str | None = None, *, unbiased: bool = True) -> Operator:
    """The variance of each layer's elements: sum of (x - mean)^2 over n - 1.

    Summed from deviations, so that a large mean does not swallow it. The result is topic
    `<topic>.var` (`<topic>.population_var` when divided by n); NaN where there are too few elements.

    Args:
        topic: The topic to select; the stream as it is unless given.
        unbiased: Divide by n - 1, and not by n.

    Returns:
        The operator.
    """
    return reduction_operator(Var(bool(unbiased)), topic, "var")


def std(topic: str | None = None, *, unbiased: bool = True) -> Operator:
    """The standard deviation of each layer's elements: the root of `var`.

    The result is topic `<topic>.std` (`<topic>.population_std` when divided by n).

    Args:
        topic: The topic to select; the stream as it is unless given.
        unbiased: Divide by n - 1, and not by n.

    Returns:
        The operator.
    """
    return reduction_operator(Std(bool(unbiased)), topic, "std")


def minimum(topic: str | None = None) -> Operator:
    """The smallest of each layer's elements, as topic `<topic>.minimum`; NaN if any element is.

    Args:
        topic: The topic to select; the stream as it is unless given.

    Returns:
        The operator.
    """
    return reduction_operator(Minimum(), topic, "minimum")


def maximum(topic: str | None = None) -> Operator:
    """The largest of each layer's elements, as topic `<topic>.maximum`; NaN if any element is.

    Args:
        topic: The topic to select; the stream as it is unless given.

    Returns:
        The operator.
    """
    return reduction_operator(Maximum(), topic, "maximum")


def absmax(topic: str | None = None) -> Operator:
    """The largest magnitude of each layer's elements: max |x|, as topic `<topic>.absmax`.

    NaN if any element is, and for a tensor without elements (where `norm(order=math.inf)` is 0).

    Args:
        topic: The topic to select; the stream as it is unless given.

    Returns:
        The operator.
    """
    return reduction_operator(AbsMax(), topic, "absmax")


def skewness(topic: str | None = None) -> Operator:
    """How lopsided each layer's elements lie about their mean: m3 / m2^1.5, as topic `<topic>.skewness`.

    m_k is the population's central moment, sum of (x - mean)^k / n (SciPy's `skew` by default). It is
    without unit, of any sign, 0 for a symmetric distribution, and the same for c x with c > 0. NaN
    where no element deviates from the others, or where one is not finite. Float64 elements beyond
    1e77 in magnitude or all deviating by less than 1e-77 leave the range of the powers.

    Args:
        topic: The topic to select; the stream as it is unless given.

    Returns:
        The operator.
    """
    return reduction_operator(Skewness(), topic, "skewness")


def kurtosis(topic: str | None = None) -> Operator:
    """How heavy the tails of each layer's elements are: m4 / m2^2 - 3, as topic `<topic>.kurtosis`.

    m_k is the population's central moment, sum of (x - mean)^k / n, and 3 what a normal distribution
    has (SciPy's `kurtosis` by default: Fisher's definition, of the population). It is without unit, at
    least -2, 0 for a normal distribution, and the same for c x. NaN where no element deviates from
    the others, or where one is not finite; the range of float64 elements is as for `skewness`.

    Args:
        topic: The topic to select; the stream as it is unless given.

    Returns:
        The operator.
    """
    return reduction_operator(Kurtosis(), topic, "kurtosis")


def zero_fraction(topic: str | None = None) -> Operator:
    """The share of each layer's elements that are exactly zero, as topic `<topic>.zero_fraction`.

    In [0, 1]; both zeros count, NaN is not zero, and the zeros that a sparse tensor does not hold
    count too. NaN for a tensor without elements.

    Args:
        topic: The topic to select; the stream as it is unless given.

    Returns:
        The operator.
    """
    return reduction_operator(ZeroFraction(), topic, "zero_fraction")


def nonfinite(topic: str | None = None) -> Operator:
    """How many of each layer's elements are NaN or infinite, as topic `<topic>.nonfinite`.

    Args:
        topic: The topic to select; the stream as it is unless given.

    Returns:
        The operator.
    """
    return reduction_operator(Nonfinite(), topic, "nonfinite")


def rms(topic: str | None = None) -> Operator:
    """The root mean square of each layer's elements: sqrt(sum of x^2 / n), as topic `<topic>.rms`.

    It is the 2-norm made comparable between layers of different sizes.

    Args:
        topic: The topic to select; the stream as it is unless given.

    Returns:
        The operator.
    """
    return reduction_operator(RootMeanSquare(), topic, "rms")


def reduce(
    fn: Callable[[Tensor], Tensor | float],
    topic: str | None = None,
    *,
    name: str,
    components: Sequence[str] = (),
) -> Operator:
    """Your own function of one tensor, applied to each layer's value, as topic `<topic>.<name>`.

    A layer on which the function raises is left out of the frame and reported. The function sees
    the model's own tensor: it must not change it, nor keep it. Pass a function that is defined
    once, not a new lambda each time: equal ones are computed once for all chains.

    Args:
        fn: Takes a tensor, returns a number or a tensor of a fixed shape.
        topic: The topic to select; the stream as it is unless given.
        name: What the result is called.
        components: Names of the entries where the result is a vector.

    Returns:
        The operator.

    Raises:
        TypeError: `fn` is not callable, or the name is not a string.
    """
    if not callable(fn):
        raise TypeError(f"reduce() takes a function of one tensor, got {fn!r}")
    if not isinstance(name, str) or not name:
        raise TypeError(f"reduce(name={name!r}): the result needs a name, such as name='kurtosis'")
    return reduction_operator(FunctionReduction(fn, name, tuple(components)), topic, "reduce")

"""`ratio` and `uw_ratio`: one norm over another, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, TypeAlias

from torch import Tensor

from streamlens.errors import did_you_mean
from streamlens.operators._base import check_topics, widened
from streamlens.operators._reductions import Norm, reduce_values
from streamlens.operators.align import combine
from streamlens.operators.statistics import check_order, norm
from streamlens.stream import Operator

__all__ = ["ratio", "uw_ratio"]

Values: TypeAlias = Tensor | tuple[Tensor, ...]

_UPDATES: Final = {
    "weights": "weight_updates",
    "biases": "bias_updates",
    "parameters": "parameter_updates",
}


def divided(a: Tensor, b: Tensor) -> Tensor:
    """Quotients, and NaN where the denominator is zero.

    Args:
        a: The numerators.
        b: The denominators.

    Returns:
        The quotients.
    """
    return (a / b).masked_fill_(b == 0, math.nan)


def _norm_before(order: float) -> Callable[[Values, Values], Tensor]:
    """The function of updates and the values after them to the ratio of norms before them."""
    reduction = Norm(order)

    def ratio_to_before(updates: Values, after: Values) -> Tensor:
        pairs = zip(after, updates, strict=True)
        before = [widened(now) - widened(update) for now, update in pairs]
        return divided(reduce_values(updates, reduction), reduce_values(tuple(before), reduction))

    return ratio_to_before


def ratio(a: str, b: str, *, order: float = 2) -> Operator:
    """The norm of topic `a` over the norm of topic `b`, layer by layer: |a_l|_p / |b_l|_p.

    Input: two topics of any shapes and dtypes. The value has no unit.
    The result is topic `<a>_to_<b>`, such as `weight_gradients_to_weights`, with `.norm1` and the like
    appended for other orders than 2; at least 0. Where the norm of `b` is zero it is NaN, never inf.
    NaN passes through. The cost is one pass over each tensor, on a Lens shared with whoever else asks for
    the norms, and three operations on one number a layer; nothing waits for a GPU.

    Args:
        a: The topic above the line.
        b: The topic below it.
        order: The exponent of both norms, from 0 to `math.inf`.

    Returns:
        The operator.

    Raises:
        TypeError: `a` or `b` is no topic name.
        ValueError: The order is negative or no number.
    """
    check_topics("ratio", (a, b))
    order = check_order(order, "ratio")
    name = f"{a}_to_{b}" + _order_suffix(order)
    return combine(norm(a, order=order), norm(b, order=order), fn=divided, name=name)


def uw_ratio(*, order: float = 2, relative_to: str = "after", of: str = "weights") -> Operator:
    """The update-to-weight ratio: the norm of an update over the norm of what it updated.

    |W_k - W_{k-1}|_p / |W_k|_p a layer, where W_k are the weights after step k's update, or
    |W_{k-1}|_p below the line with `relative_to="before"`. The update is all that the optimizer
    step changed, weight decay included. Around 1e-3 is a common rule of thumb for healthy training.

    Input: the updates and what was updated, of any shapes and dtypes. The value has no unit.
    The result is topic `uw_ratio`. Where it is not the default, what it is of, the order and the
    reference are appended: `uw_ratio.parameters`, `uw_ratio.norm1`, `uw_ratio.before`. It is at
    least 0, and NaN where the weights are zero. NaN passes through.

    On a Lens `"after"` costs one pass over the weights and one persistent copy of them, the norms
    being shared with whoever else asks; `"before"` computes W_k - (W_k - W_{k-1}) and takes a further
    pass and a temporary copy. Nothing waits for a GPU.

    Args:
        order: The exponent of both norms, from 0 to `math.inf`.
        relative_to: `"after"` or `"before"` the update.
        of: `"weights"`, `"biases"`, or `"parameters"` for every parameter by its full name
            (attention and LSTM included).

    Returns:
        The operator.

    Raises:
        ValueError: An unknown option, or an order that is negative or no number.
    """
    order = check_order(order, "uw_ratio")
    for option, value, allowed in (
        ("relative_to", relative_to, ("after", "before")),
        ("of", of, tuple(_UPDATES)),
    ):
        if value not in allowed:
            hint = did_you_mean(str(value), allowed)
            known = " or ".join(map(repr, allowed))
            raise ValueError(f"uw_ratio({option}={value!r}): {hint or f'it is {known}'}")
    name = "uw_ratio" + ("" if of == "weights" else f".{of}") + _order_suffix(order)
    if relative_to == "before":
        return combine(_UPDATES[of], of, fn=_norm_before(order), name=f"{name}.before")
    return combine(norm(_UPDATES[of], order=order), norm(of, order=order), fn=divided, name=name)


def _order_suffix(order: float) -> str:
    return "" if order == 2 else f".{Norm(order).name}"

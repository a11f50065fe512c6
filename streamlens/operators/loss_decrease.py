"""`loss_decrease`: how fast the loss falls, in units of loss a step."""

from __future__ import annotations

import math

import torch
from reactivex import Observable
from torch import Tensor

from streamlens.frame import Frame
from streamlens.nodes import stateful
from streamlens.operators._base import checked_source, is_whole
from streamlens.operators._kernel import REACH, KernelNode, check_sigma
from streamlens.operators._tensors import wide
from streamlens.operators.loss import loss
from streamlens.stream import Operator

__all__ = ["loss_decrease"]


def loss_decrease(sigma: float = 10, *, lag: int = 0) -> Operator:
    """How fast the loss falls: minus the derivative of the Gaussian-smoothed loss, in loss a step.

    The loss around step s is smoothed by a straight line, fitted with the weights w_r =
    exp(-(r - s)^2 / (2 sigma^2)) up to 4 sigma away, and the value is minus that line's slope,

        -sum_r w_r (r - m) (l_r - l) / sum_r w_r (r - m)^2,

    m and l being the weighted means of the steps and of the losses. Positive: the loss falls. A line is
    measured exactly whatever the lag, also at the beginning and the end and where steps are missing.

    With `lag=0`, the default, only the past is looked at: the value is there at once and joins other topics
    of its step, and it is the slope of about 1.1 sigma steps ago. With a lag of 4 sigma both sides
    are: the line's slope is then, to a part in a thousand, the derivative of the loss convolved with a
    Gaussian (`scipy.ndimage.gaussian_filter1d(order=1)`), of step s itself and less noisy; it comes
    4 sigma steps later, so that a join needs `allowed_lateness=lag`. Lags in between are possible. In the
    end the last steps are given with what there is.

    Input: topic `loss`, averaged over micro-steps as by `loss()`. The result is topic `loss_decrease` of the
    layer `""`, in the loss's unit a step, a frame a step from the second on.
    NaN and inf are left out and counted; fewer than
    two finite losses in reach give NaN. The cost is up to 8 sigma kept numbers and a few operations on them;
    nothing waits for a GPU.

    Source: Fan and Gijbels, Local Polynomial Modelling and Its Applications, 1996.

    Args:
        sigma: The standard deviation of the Gaussian in steps, above 0.
        lag: How many steps after a step its value is given, from 0 to 4 sigma.

    Returns:
        The operator.

    Raises:
        ValueError: Sigma is not a positive number, or the lag is out of range.
        UnknownTopicError: When applied, as for `loss`.
    """
    width = check_sigma("loss_decrease", sigma)
    most = max(1, int(REACH * width + 0.5))
    if not is_whole(lag) or not 0 <= lag <= most:
        raise ValueError(
            f"loss_decrease(lag={lag!r}): a number of steps from 0 to 4 sigma, here {most}: nothing that "
            "comes later than that is looked at"
        )
    plan = f"loss_decrease({width:g}{f', lag={lag}' if lag else ''})"

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        stream = checked_source(loss()(source))

        def make() -> KernelNode:
            return KernelNode(stream.runtime, width, _decrease, lambda _: "loss_decrease", lag=lag, least=2)

        return stateful(stream, make, plan)

    return apply


def _decrease(values: Tensor, weights: Tensor, steps: Tensor) -> Tensor:
    """Minus the slope of the weighted least-squares line."""
    values, weights, steps = wide(values), wide(weights), wide(steps)
    total = weights.sum(0)
    distances = steps - (weights * steps).sum(0) / total
    deviations = values - (weights * values).sum(0) / total
    slope = (weights * distances * deviations).sum(0) / (weights * distances.square()).sum(0)
    # One value alone lies at no distance from its mean but for rounding.
    return torch.where((weights > 0).sum(0) < 2, math.nan, -slope).float()

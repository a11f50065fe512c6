"""`diff`: the change since some frames ago."""

from __future__ import annotations

import math

import torch
from reactivex import Observable
from torch import Tensor

from streamlens.frame import Frame
from streamlens.nodes import stateful
from streamlens.operators._base import checked_source, is_whole
from streamlens.operators._recurrence import RecurrenceNode
from streamlens.stream import Operator

__all__ = ["diff"]


class _Diff:
    """The last `lag` finite values of each element, oldest first, along the second dimension."""

    def __init__(self, lag: int) -> None:
        self.warm_up = lag

    def start(self, values: Tensor) -> tuple[Tensor, ...]:
        shape = (values.shape[0], self.warm_up, *values.shape[1:])
        return (values.new_full(shape, math.nan),)

    def step(self, state: tuple[Tensor, ...], values: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        (history,) = state
        finite = values.isfinite()
        out = torch.where(finite, values - history[:, 0], math.nan)
        moved = torch.cat([history[:, 1:], values.unsqueeze(1)], dim=1)
        return (torch.where(finite.unsqueeze(1), moved, history),), out, finite


def diff(lag: int = 1) -> Operator:
    """The difference between each layer's value and its own value `lag` frames before.

    ::

        --1--4--9--16-->
             diff()
        -----3--5--7--->

    The result is topic `<topic>.diff` (`<topic>.diff5` for lag 5). A layer's first `lag` frames give
    nothing; a layer that is missing from a frame is compared with its own last value later. NaN and
    inf give NaN, are counted, and are never what a later value is compared with.

    On a Lens, micro-step frames are averaged over their step first. Raw frames work too, and keep
    `lag` copies of each tensor. The cost is five tensor operations a frame.

    Args:
        lag: How many frames before, at least 1.

    Returns:
        The operator.

    Raises:
        ValueError: The lag is not a positive integer.
    """
    if not is_whole(lag) or lag < 1:
        raise ValueError(f"diff(lag={lag!r}): the lag is a positive number of frames")
    suffix = "diff" if lag == 1 else f"diff{lag}"

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        stream = checked_source(source)
        return stateful(
            stream, lambda: RecurrenceNode(stream.runtime, _Diff(lag), suffix), f"diff({lag})", per_step=True
        )

    return apply

"""`smooth`: a Gaussian moving average over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from reactivex import Observable
from torch import Tensor

from streamlens.frame import Frame
from streamlens.nodes import Emitted, stateful
from streamlens.operators._base import OperatorNode, TopicKey, checked_source, relabelled
from streamlens.operators._rows import Rows, reduce_rows
from streamlens.runtime import Runtime
from streamlens.stream import Operator

__all__ = ["smooth"]

_REACH: Final = 4.0
"""Standard deviations after which the kernel is cut off; less than 1e-4 of it lies beyond."""


class _Smooth(OperatorNode):
    """Keeps the frames within the kernel's reach; weighs them by their distance in steps."""

    def __init__(self, runtime: Runtime, sigma: float) -> None:
        super().__init__(runtime)
        self._sigma = sigma
        self._reach = max(1, int(_REACH * sigma + 0.5))
        self._topics: dict[TopicKey, Rows] = {}

    def on_frame(self, frame: Frame) -> Emitted:
        if not frame.layers:
            return None
        rows = self._topics.setdefault((frame.source, frame.topic), Rows())
        if rows and frame.step < rows.frames[-1].step:
            self.count("late")
            return None
        rows.drop_before(frame.step - self._reach)
        repeated = rows.insert(frame)
        self.count("duplicate", len(repeated))
        known = frozenset(repeated)
        wanted = tuple(name for name in frame.layers if name not in known) if known else frame.layers
        if not wanted:
            return None
        values = frame.values
        for value in (values,) if isinstance(values, Tensor) else values:
            self.count_finite(value.isfinite())
        kernel = [math.exp(-0.5 * ((frame.step - r.step) / self._sigma) ** 2) for r in rows.frames]
        layers, smoothed = reduce_rows(rows.frames, lambda v: _weighted(v, kernel), layers=wanted)
        return relabelled(
            frame, f"{frame.topic}.smooth", smoothed, layers=layers, components=frame.components
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "topics": [
                {"source": source, "topic": topic, "rows": rows.state_dict()}
                for (source, topic), rows in self._topics.items()
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._topics = {}
        for saved in state["topics"]:
            rows = self._topics[saved["source"], saved["topic"]] = Rows()
            rows.load_state_dict(saved["rows"])


def _weighted(values: Tensor, kernel: list[float]) -> Tensor:
    """The weighted mean over the first dimension of what is finite."""
    weights = torch.tensor(kernel, dtype=values.dtype.to_real()).to(values.device, non_blocking=True)
    weights = weights.reshape(-1, *[1] * (values.ndim - 1)) * values.isfinite()
    return (torch.where(weights > 0, values, 0) * weights).sum(0) / weights.sum(0)


def smooth(sigma: float) -> Operator:
    """A Gaussian moving average over steps, of the past only.

    The value at step s is the mean of the layer's values at steps r <= s with weights
    exp(-(s - r)^2 / (2 sigma^2)), cut off at 4 sigma. It looks back only, so that it is there at once
    and can be joined to other topics of its step; the price is a lag of about 0.8 sigma steps.
    Weights follow the distance in steps, so that a missing step does not shift the others, and are
    normalised to what is there, so that the beginning is not pulled towards zero.

    The result is topic `<topic>.smooth`, a frame for each frame. NaN and inf are left out and
    counted; a layer without any finite value in reach gives NaN. On a Lens, micro-step frames are
    averaged over their step first. The cost is 4 sigma kept frames (raw ones are copied), one stack
    of them and a few tensor operations a frame; `ema` does it with one kept value.

    Args:
        sigma: The standard deviation of the kernel in steps, above 0.

    Returns:
        The operator.

    Raises:
        ValueError: Sigma is not a positive number.
    """
    number = isinstance(sigma, int | float) and not isinstance(sigma, bool)
    if not number or not 0 < sigma < math.inf:
        raise ValueError(f"smooth({sigma!r}): sigma is a positive number of steps, such as smooth(5)")

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        stream = checked_source(source)
        return stateful(
            stream, lambda: _Smooth(stream.runtime, float(sigma)), f"smooth({sigma:g})", per_step=True
        )

    return apply

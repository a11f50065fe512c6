"""`KernelNode`: a value at each step from the values around it, weighted by a Gaussian of their distance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from streamlens.frame import Frame
from streamlens.nodes import Emitted
from streamlens.operators._base import OperatorNode, TopicKey, is_number, relabelled
from streamlens.operators._rows import Rows, reduce_rows
from streamlens.runtime import Runtime

__all__ = ["REACH", "Estimate", "KernelNode", "check_sigma"]

REACH: Final = 4.0
"""Standard deviations after which the kernel is cut off; less than 1e-4 of it lies beyond."""

Estimate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A function of values [time, layers, ...], of their weights, zero where a value is not finite, and of their
distances in steps, both of a shape that goes with them."""


def check_sigma(operator: str, sigma: object) -> float:
    """The standard deviation of a kernel as a float.

    Raises:
        ValueError: It is not a positive number.
    """
    if not is_number(sigma) or not 0 < sigma < math.inf:
        raise ValueError(f"{operator}({sigma!r}): sigma is a positive number of steps, such as {operator}(5)")
    return float(sigma)


class KernelNode(OperatorNode):
    """Keeps the frames within the kernel's reach; gives a step's value `lag` steps later.

    Args:
        runtime: The stream's runtime.
        sigma: The kernel's standard deviation in steps.
        estimate: What is computed.
        topic: What the result is called, from the topic.
        lag: How many steps after a step its value is given.
        least: The fewest steps with which there is a value.
    """

    def __init__(
        self,
        runtime: Runtime,
        sigma: float,
        estimate: Estimate,
        topic: Callable[[str], str],
        *,
        lag: int = 0,
        least: int = 1,
    ) -> None:
        super().__init__(runtime)
        self._sigma = sigma
        self._estimate = estimate
        self._topic = topic
        self._lag = lag
        self._least = least
        self._reach = max(1, int(REACH * sigma + 0.5))
        self._topics: dict[TopicKey, Rows] = {}
        self._given: dict[TopicKey, int] = {}
        """The last step whose value was given, where that is not at once."""

    def on_frame(self, frame: Frame) -> Emitted:
        """The values of the steps that have what they wait for."""
        if not frame.layers:
            return None
        key = (frame.source, frame.topic)
        rows = self._topics.setdefault(key, Rows())
        if rows and frame.step < rows.frames[-1].step:
            self.count("late")
            return None
        out = self._due(key, rows, frame.step - 1)
        rows.drop_before(frame.step - self._lag - self._reach)
        repeated = rows.insert(frame)
        self.count("duplicate", len(repeated))
        known = frozenset(repeated)
        wanted = tuple(name for name in frame.layers if name not in known) if known else frame.layers
        if not wanted:
            return out
        values = frame.values
        for value in (values,) if isinstance(values, Tensor) else values:
            self.count_finite(value.isfinite())
        if self._lag:
            return out + self._due(key, rows, frame.step)
        return self._at(rows, frame, wanted)

    def _due(self, key: TopicKey, rows: Rows, now: float) -> list[Frame]:
        """The values of the steps that are to be given once this step has come."""
        if not self._lag:
            return []
        given = self._given.get(key, -1)
        ready = [f for f in rows.frames if given < f.step <= now - self._lag]
        out: list[Frame] = []
        for frame in ready:
            self._given[key] = frame.step
            out += self._at(rows, frame, frame.layers)
        return out

    def _at(self, rows: Rows, at: Frame, layers: tuple[str, ...]) -> list[Frame]:
        near = [r for r in rows.frames if abs(r.step - at.step) <= self._reach]
        if len(near) < self._least:
            return []
        distances = [float(r.step - at.step) for r in near]
        kernel = [math.exp(-0.5 * (d / self._sigma) ** 2) for d in distances]

        def reduce(values: Tensor) -> Tensor:
            both = torch.tensor([kernel, distances], dtype=values.dtype.to_real())
            both = both.to(values.device, non_blocking=True)
            weights, steps = both.reshape(2, -1, *[1] * (values.ndim - 1))
            weights = weights * values.isfinite()
            return self._estimate(torch.where(weights > 0, values, 0), weights, steps)

        names, values = reduce_rows(near, reduce, layers=layers)
        return [relabelled(at, self._topic(at.topic), values, layers=names, components=at.components)]

    def on_completed(self) -> Emitted:
        """What still waited for later steps, from those that there are."""
        return [f for key, rows in self._topics.items() for f in self._due(key, rows, math.inf)]

    def state_dict(self) -> dict[str, Any]:
        """The kept frames of each topic."""
        return {
            "topics": [
                {
                    "source": key[0],
                    "topic": key[1],
                    "rows": rows.state_dict(),
                    "given": self._given.get(key, -1),
                }
                for key, rows in self._topics.items()
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._topics, self._given = {}, {}
        for saved in state["topics"]:
            key = (saved["source"], saved["topic"])
            rows = self._topics[key] = Rows()
            rows.load_state_dict(saved["rows"])
            self._given[key] = saved["given"]

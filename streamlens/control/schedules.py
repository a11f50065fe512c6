"""Schedules: numbers that follow the step, for targets and for rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from reactivex import Observable

from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.lens import Lens
from streamlens.nodes import frame_operator
from streamlens.stream import Operator, as_stream

__all__ = ["Constant", "ExponentialDecay", "Schedule", "scheduled"]

Schedule: TypeAlias = Callable[[int], float]
"""A function of the step to a number."""


@dataclass(frozen=True)
class Constant:
    """The same number at every step.

    Args:
        value: The number.
    """

    value: float

    def __call__(self, step: int) -> float:
        """The number at a step."""
        return self.value


@dataclass(frozen=True)
class ExponentialDecay:
    """start * decay^step, and not below `floor`.

    Args:
        start: The value at step 0, above 0.
        decay: The factor a step, in (0, 1].
        floor: What it does not fall below.

    Raises:
        ValueError: One of them is out of its range.
    """

    start: float
    decay: float
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.start < math.inf:
            raise ValueError(f"ExponentialDecay(start={self.start!r}): it is a finite number above 0")
        if not 0 < self.decay <= 1:
            raise ValueError(f"ExponentialDecay(decay={self.decay!r}): the factor a step lies in (0, 1]")
        if not 0 <= self.floor <= self.start:
            raise ValueError(f"ExponentialDecay(floor={self.floor!r}): it lies between 0 and start")

    def __call__(self, step: int) -> float:
        """The value at a step."""
        return max(self.start * self.decay**step, self.floor)


def scheduled(schedule: Schedule, *, name: str = "schedule") -> Operator:
    """A schedule as a stream: for each frame of step k, its value for the next update, k + 1.

    Ended in `SetRate` it is what a scheduler of `torch.optim.lr_scheduler` is, stepped once an update:
    `lens.pipe(scheduled(ExponentialDecay(0.1, 0.999))).subscribe(SetRate())`. As with any stream,
    operators may stand in between.

    On a lens with no topic selected it comes once an update. The result is topic `schedule`, float64,
    of the model's layer `""`, and costs nothing else.

    Args:
        schedule: A function of the step to a number, such as `ExponentialDecay`.
        name: The topic.

    Returns:
        The operator.

    Raises:
        TypeError: The schedule cannot be called.
    """
    if not callable(schedule):
        raise TypeError(
            f"scheduled() takes a function of the step such as ExponentialDecay, got {schedule!r}"
        )

    def value(frame: Frame) -> Frame:
        number = schedule(frame.step + 1)
        if not isinstance(number, int | float):
            raise StreamlensError(f"scheduled(): the schedule gave {number!r}, which is no number")
        values = torch.tensor([number], dtype=torch.float64)
        return frame.replace(topic=name, layers=("",), values=values, components=())

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        stream = as_stream(source)
        if isinstance(stream, Lens) and not stream.topics:
            stream = stream.narrow(topics=("update_finished",))
        return frame_operator(stream, value, f"scheduled({schedule!r})", raw=False)

    return apply

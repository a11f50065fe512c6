"""`ema`: the exponential moving average."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from reactivex import Observable
from torch import Tensor

from streamlens.frame import Frame
from streamlens.nodes import stateful
from streamlens.operators._base import checked_source, is_number
from streamlens.operators._recurrence import Recurrence, RecurrenceNode
from streamlens.stream import Operator

__all__ = ["ema"]


@dataclass(frozen=True)
class _Ema:
    """s <- decay * s + (1 - decay) * x, from the first finite value on."""

    decay: float
    warm_up: int = 0

    def start(self, values: Tensor) -> tuple[Tensor, ...]:
        return (torch.full_like(values, math.nan, memory_format=torch.contiguous_format),)

    def step(self, state: tuple[Tensor, ...], values: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        (average,) = state
        finite = values.isfinite()
        moved = torch.lerp(average, values, 1.0 - self.decay)
        # NaN marks an element without a value yet: its first finite one is where it starts.
        moved = torch.where(average.isnan(), values, moved)
        average = torch.where(finite, moved, average)
        return (average,), average, finite


@dataclass(frozen=True)
class _CorrectedEma:
    """m <- decay * m + (1 - decay) * x from zero, given as m / (1 - decay^t)."""

    decay: float
    warm_up: int = 0

    def start(self, values: Tensor) -> tuple[Tensor, ...]:
        zeros = torch.zeros_like(values, memory_format=torch.contiguous_format)
        return zeros, torch.zeros_like(zeros, dtype=torch.int32)

    def step(self, state: tuple[Tensor, ...], values: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        moment, count = state
        finite = values.isfinite()
        moment = torch.where(finite, torch.lerp(moment, values, 1.0 - self.decay), moment)
        count = count + finite
        # Through expm1: 1 - decay^t cancels where the decay is near one.
        weight = -torch.expm1(count.to(moment.dtype.to_real()) * math.log(self.decay))
        return (moment, count), moment / weight, finite


def ema(
    decay: float | None = None, *, half_life: float | None = None, bias_correction: bool = False
) -> Operator:
    """The exponential moving average of each layer's value: s <- decay * s + (1 - decay) * x.

    It starts at the first value, or with `bias_correction=True` at zero, divided by
    1 - decay^t (as Adam does). The result is topic `<topic>.ema`, a frame for each frame, float32
    (or float64 where the values are). NaN and inf are left out of the average and counted; the
    average stands still there (NaN before the first finite value). A layer that is missing from a
    frame keeps its average. If a topic's values change their shape, its average starts afresh.

    On a Lens, micro-step frames are averaged over their step first. Raw frames work too and keep
    one tensor a layer. The cost is some seven tensor operations a frame, whatever the number of
    layers; nothing waits for a GPU.

    Args:
        decay: The weight of the past, in (0, 1): about 1 / (1 - decay) frames are remembered.
        half_life: In place of the decay, the frames after which a value's weight has halved.
        bias_correction: Start at zero and correct for it.

    Returns:
        The operator.

    Raises:
        TypeError: Neither or both of `decay` and `half_life`.
        ValueError: A decay outside (0, 1), or a half-life that is not positive.

    Example:
        `lens.pipe(uw_ratio(), ema(0.9))`
    """
    rate = _checked_decay(decay, half_life)
    plan = f"ema({decay!r}" if half_life is None else f"ema(half_life={half_life:g}"
    plan += ", bias_correction=True)" if bias_correction else ")"
    recurrence: Recurrence = _CorrectedEma(rate) if bias_correction else _Ema(rate)

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        stream = checked_source(source)
        return stateful(
            stream, lambda: RecurrenceNode(stream.runtime, recurrence, "ema"), plan, per_step=True
        )

    return apply


def _checked_decay(decay: float | None, half_life: float | None) -> float:
    if decay is not None and half_life is None:
        if not is_number(decay) or not 0 < decay < 1:
            raise ValueError(f"ema({decay!r}): the decay lies between 0 and 1, both excluded, such as 0.9")
        return float(decay)
    if half_life is None or decay is not None:
        raise TypeError("ema() needs either a decay, such as ema(0.9), or a half_life in frames")
    if not is_number(half_life) or not 0 < half_life < math.inf:
        raise ValueError(f"ema(half_life={half_life!r}): the half-life is a positive number of frames")
    rate = 0.5 ** (1.0 / half_life)
    if not 0 < rate < 1:
        raise ValueError(
            f"ema(half_life={half_life!r}): the half-life is too short or too long to compute with"
        )
    return float(rate)

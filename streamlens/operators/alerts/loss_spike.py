"""`loss_spike`: a loss that jumps far above where it was."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np

from streamlens.operators._base import is_whole
from streamlens.operators.alerts._inputs import LOSS, Input
from streamlens.operators.alerts._losses import Tracked
from streamlens.operators.alerts._rule import Judge, Rule, Verdict, number

__all__ = ["loss_spike"]

_LEAST: Final = 20
"""Looks that there must have been before one is judged."""


class _Recent:
    """The last numbers, in the order in which they came and by size."""

    def __init__(self, length: int) -> None:
        self._length = length
        self.inorder: deque[float] = deque()
        self._by_size: list[float] = []

    def __len__(self) -> int:
        return len(self.inorder)

    def append(self, number: float) -> None:
        if len(self.inorder) == self._length:
            del self._by_size[bisect_left(self._by_size, self.inorder.popleft())]
        self.inorder.append(number)
        insort(self._by_size, number)

    def clear(self) -> None:
        self.inorder.clear()
        self._by_size.clear()

    @property
    def median(self) -> float:
        n = len(self._by_size)
        return (self._by_size[(n - 1) // 2] + self._by_size[n // 2]) / 2

    @property
    def largest(self) -> float:
        return self._by_size[-1]


class _Spike(Tracked):
    """The last losses; one that is a spike stays out of them."""

    def __init__(self, window: int, share: float, factor: float) -> None:
        super().__init__(half_life=1.0)
        self._window, self._share, self._factor = window, share, factor
        self._recent: dict[str, _Recent] = {}
        self._spikes: dict[str, int] = {}

    def judge(self, name: str, loss: float) -> tuple[float, bool, float] | None:
        if not math.isfinite(loss):
            return (math.nan, False, math.nan)
        track = self.track(name)
        recent = self._recent.get(name)
        if recent is None:
            recent = self._recent[name] = _Recent(self._window)
        if len(recent) < _LEAST:
            track.take(loss)
            recent.append(loss)
            return None
        middle = recent.median
        jump = self._share * max(abs(track.initial), abs(middle))
        threshold = max(middle + jump, middle + self._factor * (recent.largest - middle))
        bad = loss > threshold
        self._spikes[name] = self._spikes.get(name, 0) + 1 if bad else 0
        if self._spikes[name] >= self._window:
            # It has stayed up for so long that this is how it is now.
            recent.clear()
            self._spikes[name] = 0
        if not bad:
            recent.append(loss)
        return loss, bad, threshold

    def state_dict(self) -> dict[str, Any]:
        recent = {name: list(losses.inorder) for name, losses in self._recent.items()}
        return {**super().state_dict(), "recent": recent, "spikes": dict(self._spikes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._recent = {}
        for name, losses in state["recent"].items():
            self._recent[name] = _Recent(self._window)
            for loss in losses:
                self._recent[name].append(loss)
        self._spikes = dict(state["spikes"])


@dataclass(frozen=True)
class _LossSpike(Rule):
    window: int = 100
    share: float = 0.4
    factor: float = 1.5
    every: int = 1
    start: tuple[int, int] = (1, 1)
    end: int = 5

    name: ClassVar[str] = "loss_spike"

    def check(self) -> None:
        if not is_whole(self.window) or self.window < _LEAST:
            raise ValueError(f"loss_spike(window={self.window!r}): a whole number from {_LEAST} on")
        self.check_positive(share=self.share, factor=self.factor)

    def inputs(self) -> tuple[Input, ...]:
        return (LOSS,)

    def judge(self) -> Judge:
        return _Spike(self.window, self.share, self.factor)

    def meaning(self, verdict: Verdict, index: Sequence[int]) -> str:
        return (
            f"The loss has jumped to {number(verdict.values[0])}, above "
            f"{number(float(np.max(verdict.threshold)))}, which is beyond what its last {self.window} looks "
            "make likely"
        )

    @property
    def advice(self) -> str:
        return (
            "Look at the batch of this step for broken examples; if spikes come back, clip gradients, lower "
            "the learning rate or, with Adam, beta2"
        )


def loss_spike(
    *,
    window: int = 100,
    share: float = 0.4,
    factor: float = 1.5,
    every: int = 1,
    start: tuple[int, int] = (1, 1),
    end: int = 5,
) -> Rule:
    """Alert where the loss jumps far above where it was.

    Value: `loss`. Bad where it is above the median of its last `window` looks (spikes left out) both by
    `share` of the loss at the start (or of that median, if larger) and by `factor` times what the
    largest of them was above it. The first keeps small losses silent, whose batches differ by factors;
    the second losses of small batches, which scatter widely. There must have been 20 looks.

    The topic is `alerts.loss_spike`, of the model itself; several watched losses are judged each by
    itself, named in `meta["of"]`. Cost: one number a step. NaN and inf are left out.

    Args:
        window: Looks that the loss is compared with, at least 20.
        share: How far above their median it may be, in shares of the loss at the start.
        factor: How many times as far above their median as the largest of them it may be.
        every: Looks at steps divisible by this.
        start: `(n, m)`: an alert starts once n of the last m looks were bad.
        end: It ends after as many good looks in a row.

    Returns:
        The rule, an operator for a Lens or for a stream with `loss`.

    Raises:
        ValueError: A parameter out of range.
    """
    return _LossSpike(window=window, share=share, factor=factor, every=every, start=start, end=end)

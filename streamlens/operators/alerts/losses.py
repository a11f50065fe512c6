"""`loss_not_decreasing` and `diverging`: where the training loss goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from streamlens.operators.alerts._inputs import LOSS, Input
from streamlens.operators.alerts._losses import Tracked
from streamlens.operators.alerts._rule import Judge, Rule, Severity, Verdict, number

__all__ = ["diverging", "loss_not_decreasing"]


class _NotDecreasing(Tracked):
    def __init__(self, patience: int, fall: float) -> None:
        super().__init__(half_life=patience / 15)
        self._patience, self._fall = patience, fall

    def judge(self, name: str, loss: float) -> tuple[float, bool, float] | None:
        track = self.track(name)
        if not math.isfinite(loss):
            return (math.nan, False, math.nan)
        track.take(loss)
        if track.looks < self._patience:
            return None
        wanted = track.initial - self._fall * abs(track.initial)
        return track.average, track.least > wanted, wanted


@dataclass(frozen=True)
class _LossNotDecreasing(Rule):
    patience: int = 300
    fall: float = 0.02
    every: int = 1
    start: tuple[int, int] = (1, 1)
    end: int = 1

    name: ClassVar[str] = "loss_not_decreasing"

    def check(self) -> None:
        self.check_count(patience=self.patience)
        self.check_share(fall=self.fall)

    def inputs(self) -> tuple[Input, ...]:
        return (LOSS,)

    def judge(self) -> Judge:
        return _NotDecreasing(self.patience, self.fall)

    def meaning(self, verdict: Verdict, index: Sequence[int]) -> str:
        return (
            f"The loss is {number(verdict.values[0])} after {self.patience} looks and has never come below "
            f"{number(float(np.max(verdict.threshold)))}: nothing has been learnt yet"
        )

    @property
    def advice(self) -> str:
        return (
            "Check that labels belong to their inputs, that the optimizer has the model's parameters and "
            "that gradients reach them; then try another learning rate, or first one batch alone"
        )


def loss_not_decreasing(
    *,
    patience: int = 300,
    fall: float = 0.02,
    every: int = 1,
    start: tuple[int, int] = (1, 1),
    end: int = 1,
) -> Rule:
    """Alert where the loss has not fallen since the run began.

    Value: the moving average of `loss` (half-life a fifteenth of the patience). Bad, once `patience`
    looks have passed, while its least value so far is above (1 - fall) times the loss at the start
    (the median of the first five). It says that nothing has been learnt at all; a plateau that comes
    later is silent, for nothing tells it from the end of learning. Ordinary runs fall by more
    than a tenth within 100 steps (`docs/alerts.md`).

    The topic is `alerts.loss_not_decreasing`, of the model itself; several watched losses are judged
    each by itself, named in `meta["of"]`. Cost: one number a step. NaN and inf are left out.

    Args:
        patience: Looks before it is judged.
        fall: By what share of its start the loss must have fallen.
        every: Looks at steps divisible by this.
        start: `(n, m)`: an alert starts once n of the last m looks were bad.
        end: It ends after as many good looks in a row.

    Returns:
        The rule, an operator for a Lens or for a stream with `loss`.

    Raises:
        ValueError: A parameter out of range.
    """
    return _LossNotDecreasing(patience=patience, fall=fall, every=every, start=start, end=end)


class _Diverging(Tracked):
    def __init__(self, rise: float) -> None:
        super().__init__(half_life=5)
        self._rise = rise

    def judge(self, name: str, loss: float) -> tuple[float, bool, float] | None:
        if math.isnan(loss):
            return (math.nan, False, math.nan)
        track = self.track(name)
        limit = min(track.least, track.initial) + self._rise * abs(track.initial)
        if loss == math.inf:
            return loss, True, limit
        settled = track.settled
        track.take(loss)
        return (track.average, track.average > limit, limit) if settled else None


@dataclass(frozen=True)
class _DivergingRule(Rule):
    rise: float = 0.5
    every: int = 1
    start: tuple[int, int] = (10, 10)
    end: int = 20

    name: ClassVar[str] = "diverging"
    severity: ClassVar[Severity] = "critical"

    def check(self) -> None:
        self.check_positive(rise=self.rise)

    def inputs(self) -> tuple[Input, ...]:
        return (LOSS,)

    def judge(self) -> Judge:
        return _Diverging(self.rise)

    def meaning(self, verdict: Verdict, index: Sequence[int]) -> str:
        return (
            f"The loss has risen to {number(verdict.values[0])} and stays above "
            f"{number(float(np.max(verdict.threshold)))}: training undoes what it had learnt"
        )

    @property
    def advice(self) -> str:
        return "Go back to an earlier checkpoint; try a lower learning rate, a warm-up or clipped gradients"


def diverging(*, rise: float = 0.5, every: int = 1, start: tuple[int, int] = (10, 10), end: int = 20) -> Rule:
    """Alert where the loss rises and stays up.

    Value: the moving average of `loss` (half-life 5 looks). Bad where it is above the least that it has
    been (at most the loss at the start, the median of the first five looks) by `rise` of the loss at the
    start; inf is bad. A single spike is over before ten looks in a row are bad, and ordinary runs stay
    below 1.5 times their start (`docs/alerts.md`).

    The topic is `alerts.diverging`, of the model itself; several watched losses are judged each by
    itself, named in `meta["of"]`. Cost: one number a step. NaN is left out (see `nonfinite_values`).

    Args:
        rise: How far the average may rise, in shares of the loss at the start.
        every: Looks at steps divisible by this.
        start: `(n, m)`: an alert starts once n of the last m looks were bad.
        end: It ends after as many good looks in a row.

    Returns:
        The rule, an operator for a Lens or for a stream with `loss`.

    Raises:
        ValueError: A parameter out of range.
    """
    return _DivergingRule(rise=rise, every=every, start=start, end=end)

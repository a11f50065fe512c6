"""`learning_rate_too_high` and `learning_rate_too_low`: updates against what they achieve."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import numpy as np

from streamlens.operators.alerts._inputs import LOSS, UPDATE_RATIO, Input
from streamlens.operators.alerts._losses import LossTrack
from streamlens.operators.alerts._rule import Judge, Look, Rule, Verdict, number

__all__ = ["learning_rate_too_high", "learning_rate_too_low"]

_ROUNDING: Final = 1e-6
_LOSS: Final = replace(LOSS, needed=False, remedy="")


class _Progress(Judge):
    """The median ratio of all layers, and whether the loss has fallen."""

    def __init__(self, fall: float) -> None:
        self._fall = fall
        self._loss = LossTrack(half_life=10)

    def look(self, look: Look) -> Iterable[Verdict]:
        if look.topic == _LOSS.name:
            loss = sum(look.numbers)
            if math.isfinite(loss):
                self._loss.take(loss)
            return []
        # What was zero before the update has a ratio of exactly 1, whatever the rate.
        known = look.values[~np.isnan(look.values) & (np.abs(look.values - 1) > _ROUNDING)]
        ratio = float(np.median(known)) if len(known) else math.nan
        bad, threshold = self.judge(ratio)
        return [Verdict(("",), np.array([ratio]), np.array([bad]), threshold)]

    @property
    def fallen(self) -> bool | None:
        """Whether the loss has fallen since the start; None where nobody knows."""
        if not self._loss.settled:
            return None
        initial = self._loss.initial
        return self._loss.average < initial - self._fall * abs(initial)

    def judge(self, ratio: float) -> tuple[bool, float]:
        """Whether a ratio is bad, and the threshold."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self._loss.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._loss.load_state_dict(state["loss"])


class _High(_Progress):
    def __init__(self, above: float, at_once: float, fall: float) -> None:
        super().__init__(fall)
        self._above, self._at_once = above, at_once

    def judge(self, ratio: float) -> tuple[bool, float]:
        limit = self._above if self.fallen is False else self._at_once
        return ratio > limit, limit


class _Low(_Progress):
    def __init__(self, below: float, fall: float) -> None:
        super().__init__(fall)
        self._below = below

    def judge(self, ratio: float) -> tuple[bool, float]:
        return ratio < self._below and not self.fallen, self._below


@dataclass(frozen=True)
class _TooHigh(Rule):
    above: float = 0.1
    at_once: float = 0.3
    fall: float = 0.1
    every: int = 10
    start: tuple[int, int] = (1, 1)
    end: int = 3

    name: ClassVar[str] = "learning_rate_too_high"

    def check(self) -> None:
        self.check_positive(above=self.above, at_once=self.at_once)
        self.check_share(fall=self.fall)

    def inputs(self) -> tuple[Input, ...]:
        return (_LOSS, UPDATE_RATIO)

    def cadence(self, entry: Input, every: int) -> int:
        return 1 if entry is _LOSS else every

    def judge(self) -> Judge:
        return _High(self.above, self.at_once, self.fall)

    def meaning(self, verdict: Verdict, index: Sequence[int]) -> str:
        unpaid = ", and the loss has not come down by it" if verdict.threshold == self.above else ""
        return (
            f"Updates change the weights by a share of {number(verdict.values[0])} a step (median of the "
            f"layers, above {number(float(np.max(verdict.threshold)))}){unpaid}"
        )

    @property
    def advice(self) -> str:
        return "Try a learning rate three to ten times lower, or a warm-up; a ratio of about 0.001 is usual"


def learning_rate_too_high(
    *,
    above: float = 0.1,
    at_once: float = 0.3,
    fall: float = 0.1,
    every: int = 10,
    start: tuple[int, int] = (1, 1),
    end: int = 3,
) -> Rule:
    """Alert where updates are large and the loss has not fallen.

    Value: the median over the layers of `uw_ratio`. Bad above `above` while the moving average of `loss`
    (half-life 10 looks) is not yet `fall` below the loss at the start, and above `at_once` in any case:
    Adam's first ratios are large at usual rates too (0.13 at a rate of 0.01), and only the loss tells
    whether they are too large. Ordinary ratios before the loss has fallen stay below 0.05
    (`docs/alerts.md`). Without a loss only `at_once` counts. A layer that was zero before the update, whose
    ratio is exactly 1, is left out.

    The topic is `alerts.learning_rate_too_high`, of the model itself. Cost: that of `uw_ratio()` at each
    look, and the loss. NaN is left out; a run that blows up within a few steps is told by
    `nonfinite_values` and `diverging`.

    Args:
        above: The ratio above which a loss must have fallen.
        at_once: The ratio that is too high in any case.
        fall: By what share of its start the loss must have fallen.
        every: Looks at steps divisible by this.
        start: `(n, m)`: an alert starts once n of the last m looks were bad.
        end: It ends after as many good looks in a row.

    Returns:
        The rule, an operator for a Lens or for a stream with `uw_ratio`, or with the norms it consists of.

    Raises:
        ValueError: A parameter out of range.
    """
    return _TooHigh(above=above, at_once=at_once, fall=fall, every=every, start=start, end=end)


@dataclass(frozen=True)
class _TooLow(Rule):
    below: float = 1e-6
    fall: float = 0.1
    every: int = 10
    start: tuple[int, int] = (5, 5)
    end: int = 3

    name: ClassVar[str] = "learning_rate_too_low"

    def check(self) -> None:
        self.check_positive(below=self.below)
        self.check_share(fall=self.fall)

    def inputs(self) -> tuple[Input, ...]:
        return (_LOSS, UPDATE_RATIO)

    def cadence(self, entry: Input, every: int) -> int:
        return 1 if entry is _LOSS else every

    def judge(self) -> Judge:
        return _Low(self.below, self.fall)

    def meaning(self, verdict: Verdict, index: Sequence[int]) -> str:
        return (
            f"Updates change the weights by a share of only {number(verdict.values[0])} a step (median of "
            f"the layers, below {number(self.below)}), and the loss has hardly moved"
        )

    @property
    def advice(self) -> str:
        return "Try a learning rate ten or a hundred times higher; a ratio of about 0.001 is usual"


def learning_rate_too_low(
    *,
    below: float = 1e-6,
    fall: float = 0.1,
    every: int = 10,
    start: tuple[int, int] = (5, 5),
    end: int = 3,
) -> Rule:
    """Alert where updates are tiny although the loss has hardly fallen.

    Value: the median over the layers of `uw_ratio`. Bad below `below` while the moving average of `loss`
    (half-life 10 looks) is not `fall` below the loss at the start, so that the end of training, where
    updates become small because little is left to learn or a schedule ends, is silent. At 1e-6 a
    step, 10,000 steps move the weights by a hundredth. Without a loss the ratio alone counts.

    The topic is `alerts.learning_rate_too_low`, of the model itself. Cost: that of `uw_ratio()` at each
    look, and the loss. NaN is left out.

    Args:
        below: The ratio below which a loss must have fallen.
        fall: By what share of its start the loss must have fallen.
        every: Looks at steps divisible by this.
        start: `(n, m)`: an alert starts once n of the last m looks were bad.
        end: It ends after as many good looks in a row.

    Returns:
        The rule, an operator for a Lens or for a stream with `uw_ratio`, or with the norms it consists of.

    Raises:
        ValueError: A parameter out of range.
    """
    return _TooLow(below=below, fall=fall, every=every, start=start, end=end)

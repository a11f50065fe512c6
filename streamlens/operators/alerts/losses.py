"""`loss_not_decreasing`, `loss_spike` and `diverging`: what the training loss does."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar, Final

import numpy as np

from streamlens.operators.alerts._inputs import LOSS, Input
from streamlens.operators.alerts._rule import Judge, Look, Rule, Severity, Verdict, number

__all__ = ["LossTrack", "diverging", "loss_not_decreasing", "loss_spike"]

_FIRST: Final = 5
"""Looks whose median is the loss at the start."""


class LossTrack:
    """One loss over time: where it started, its moving average, and the least that this has been.

    Args:
        half_life: Looks after which the weight of a loss in the average has halved.
    """

    def __init__(self, half_life: float) -> None:
        self._rate = 1 - 0.5 ** (1 / half_life)
        self.looks = 0
        self.average = math.nan
        self.least = math.inf
        self._first: list[float] = []

    @property
    def initial(self) -> float:
        """The loss at the start: the median of the first five."""
        return median(self._first) if self._first else math.nan

    @property
    def settled(self) -> bool:
        """Whether the start is known."""
        return len(self._first) == _FIRST

    def take(self, loss: float) -> None:
        """Take in a finite loss."""
        self.looks += 1
        if len(self._first) < _FIRST:
            self._first.append(loss)
        rate = max(self._rate, 1 / self.looks)
        self.average = loss if self.looks == 1 else self.average + rate * (loss - self.average)
        if self.settled:
            self.least = min(self.least, self.average)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "looks": self.looks,
            "average": self.average,
            "least": self.least,
            "first": list(self._first),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.looks, self.average = state["looks"], state["average"]
        self.least, self._first = state["least"], list(state["first"])


class LossJudge(Judge):
    """Judges each loss that is watched by itself."""

    def look(self, look: Look) -> Iterator[Verdict]:
        """A verdict a loss."""
        for name, loss in zip(look.components or ("",), look.values.ravel().tolist(), strict=False):
            found = self.judge(name, loss)
            if found is None:
                continue
            value, bad, threshold = found
            yield Verdict(("",), np.array([value]), np.array([bad]), threshold, group=name)

    def judge(self, name: str, loss: float) -> tuple[float, bool, float] | None:
        """The value judged, whether it is bad, and the threshold; None if it is too early."""
        raise NotImplementedError


class _Tracked(LossJudge):
    """A judge that goes by each loss's track."""

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self._tracks: dict[str, LossTrack] = {}

    def track(self, name: str) -> LossTrack:
        track = self._tracks.get(name)
        if track is None:
            track = self._tracks[name] = LossTrack(self._half_life)
        return track

    def state_dict(self) -> dict[str, Any]:
        return {"tracks": {name: track.state_dict() for name, track in self._tracks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._tracks = {}
        for name, saved in state["tracks"].items():
            self.track(name).load_state_dict(saved)


class _NotDecreasing(_Tracked):
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


class _Spike(_Tracked):
    """The last losses; one that is a spike stays out of them."""

    def __init__(self, window: int, share: float, factor: float) -> None:
        super().__init__(half_life=1.0)
        self._window, self._share, self._factor = window, share, factor
        self._recent: dict[str, deque[float]] = {}
        self._spikes: dict[str, int] = {}

    def judge(self, name: str, loss: float) -> tuple[float, bool, float] | None:
        if not math.isfinite(loss):
            return (math.nan, False, math.nan)
        track = self.track(name)
        recent = self._recent.setdefault(name, deque(maxlen=self._window))
        if len(recent) < 20:
            track.take(loss)
            recent.append(loss)
            return None
        middle = float(np.median(recent))
        jump = self._share * max(abs(track.initial), abs(middle))
        threshold = max(middle + jump, middle + self._factor * (max(recent) - middle))
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
        recent = {name: list(losses) for name, losses in self._recent.items()}
        return {**super().state_dict(), "recent": recent, "spikes": dict(self._spikes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._recent = {n: deque(losses, maxlen=self._window) for n, losses in state["recent"].items()}
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
        self.check_count(window=self.window)
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
        window: Looks that the loss is compared with.
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


class _Diverging(_Tracked):
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

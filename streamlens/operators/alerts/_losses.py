"""What the rules on losses share: where a loss started, its moving average, one judge a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any, Final

import numpy as np

from streamlens.operators.alerts._rule import Judge, Look, Verdict

__all__ = ["LossJudge", "LossTrack", "Tracked"]

_FIRST: Final = 5
"""Looks whose median is the loss at the start."""


class LossTrack:
    """One loss over time: where it started, its moving average, and the least that this has been.

    Args:
        half_life: Looks after which the weight of a loss in the average has halved.

    Attributes:
        looks: Losses taken in.
        average: Their moving average.
        least: The least that this has been since the start is known.
        initial: The loss at the start: the median of the first five.
    """

    def __init__(self, half_life: float) -> None:
        self._rate = 1 - 0.5 ** (1 / half_life)
        self.looks = 0
        self.average = math.nan
        self.least = math.inf
        self.initial = math.nan
        self._first: list[float] = []

    @property
    def settled(self) -> bool:
        """Whether the start is known."""
        return len(self._first) == _FIRST

    def take(self, loss: float) -> None:
        """Take in a finite loss."""
        self.looks += 1
        if len(self._first) < _FIRST:
            self._first.append(loss)
            self.initial = median(self._first)
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
        self.initial = median(self._first) if self._first else math.nan


class LossJudge(Judge):
    """Judges each loss that is watched by itself."""

    def look(self, look: Look) -> list[Verdict]:
        """A verdict a loss."""
        verdicts: list[Verdict] = []
        for name, loss in zip(look.components or ("",), look.numbers, strict=False):
            found = self.judge(name, loss)
            if found is None:
                continue
            value, bad, threshold = found
            if not (bad or math.isnan(value)) and self.calm(name):
                # What every look of a healthy run comes to.
                continue
            verdicts.append(Verdict(("",), np.array([value]), np.array([bad]), threshold, group=name))
        return verdicts

    def judge(self, name: str, loss: float) -> tuple[float, bool, float] | None:
        """The value judged, whether it is bad, and the threshold; None if it is too early."""
        raise NotImplementedError


class Tracked(LossJudge):
    """A judge that goes by each loss's track."""

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self._tracks: dict[str, LossTrack] = {}

    def track(self, name: str) -> LossTrack:
        """The track of a loss."""
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

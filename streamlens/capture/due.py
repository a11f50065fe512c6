"""`Schedule`: which demands are due at a step, found once for all steps that are alike."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Final

from streamlens.capture.view import Demand, View

__all__ = ["Schedule"]

_LONGEST: Final = 10_000
"""Steps after which cadences must repeat, all taken together, to be worth remembering."""


class Schedule:
    """The demands that are due, step by step.

    What is due depends on where a step lies between the demands' beginnings and ends, and on its remainder
    by what their cadences have in common: it is looked up rather than asked of every demand again.

    Args:
        demands: All of them.
    """

    def __init__(self, demands: Sequence[Demand] = ()) -> None:
        self._demands = tuple(demands)
        views = [demand.view for demand in self._demands]
        self._period = math.lcm(*(view.every for view in views))
        self._bounds = sorted({view.start for view in views} | {v.stop for v in views if v.stop is not None})
        self._known: dict[tuple[int, int], tuple[Demand, ...]] = {}
        self._same: dict[tuple[Demand, ...], tuple[Demand, ...]] = {}
        self.ends = frozenset(view.stop for view in views if view.stop is not None)
        """The steps before which some demand ends."""

    def at(self, step: int) -> tuple[Demand, ...]:
        """The demands due at a step; the same ones are always the same tuple, under which plans are kept."""
        key = (bisect_right(self._bounds, step), step % self._period)
        due = self._known.get(key)
        if due is None:
            due = self._one(tuple([d for d in self._demands if d.view.due(step)]))
            if self._period <= _LONGEST:
                self._known[key] = due
        return due

    def admitted(self, step: int, admits: Callable[[View], bool]) -> tuple[Demand, ...]:
        """Those of them that are admitted, which may change from step to step."""
        return self._one(tuple([demand for demand in self.at(step) if admits(demand.view)]))

    def _one(self, due: tuple[Demand, ...]) -> tuple[Demand, ...]:
        if len(self._same) > _LONGEST:
            self._same.clear()
        return self._same.setdefault(due, due)

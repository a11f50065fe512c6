"""A topic whose numbers belong together at each step, such as a histogram: kept at evenly spaced steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Sampled"]

_MOST_STEPS: Final = 200


class Sampled:
    """Whole frames of the first layer, at most 200 of them.

    Where there would be more, every other one goes, and of those to come likewise.

    Attributes:
        layer: The layer that is kept; None before there is one.
        taken: How many frames were taken in.
        bad: Whether some number was not finite.
    """

    def __init__(self) -> None:
        self.layer: str | None = None
        self.taken = 0
        self.bad = False
        self._stride = 1
        self._steps: list[tuple[int, int]] = []
        self._rows: list[NDArray[np.float64]] = []
        self._components: tuple[str, ...] = ()

    def add(
        self,
        step: int,
        epoch: int,
        layers: tuple[str, ...],
        components: tuple[str, ...],
        values: NDArray[np.float64],
    ) -> None:
        """Take a frame in.

        Args:
            step: Its step.
            epoch: Its epoch.
            layers: Its layers.
            components: What its numbers are.
            values: A row of numbers a layer.
        """
        if self.layer is None:
            self.layer = layers[0]
        if self.layer not in layers:
            return
        if components != self._components:
            self._steps, self._rows, self._components = [], [], components
        self.taken += 1
        if (self.taken - 1) % self._stride:
            return
        row = np.array(values[layers.index(self.layer)], dtype=np.float64)
        self.bad = self.bad or not np.isfinite(row).all()
        self._steps.append((step, epoch))
        self._rows.append(row)
        if len(self._rows) > _MOST_STEPS:
            self._steps, self._rows = self._steps[::2], self._rows[::2]
            self._stride *= 2

    def cut(self, step: int) -> None:
        """Forget what lies beyond a step."""
        kept = [i for i, (at, _) in enumerate(self._steps) if at <= step]
        self._steps = [self._steps[i] for i in kept]
        self._rows = [self._rows[i] for i in kept]

    def table(self) -> pd.DataFrame:
        """The frames as rows that a view takes."""
        count = len(self._components)
        return pd.DataFrame(
            {
                "step": np.repeat(np.array([step for step, _ in self._steps], dtype=np.int64), count),
                "epoch": np.repeat(np.array([epoch for _, epoch in self._steps], dtype=np.int64), count),
                "layer": self.layer or "",
                "component": np.tile(np.array(self._components, dtype=object), len(self._rows)),
                "value": np.concatenate(self._rows) if self._rows else np.zeros(0),
            }
        )

"""`Chart`: what a figure of a run shows, kept small, without anything that draws."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from streamlens.frame import Frame
from streamlens.runs.downsample import extremes
from streamlens.sinks._values import drawn_edges, host_values, number_cells

__all__ = ["Bars", "Chart", "Line"]

_POINTS: Final = 2000
"""Points that a line is thinned to when it has twice as many."""
_BINS: Final = 64


@dataclass
class Line:
    """One number over steps: of a layer, or of a layer's component."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, step: int, value: float) -> None:
        """Append a point; where there are too many, those go that nobody would see."""
        self.steps.append(step)
        self.values.append(value)
        if len(self.values) >= 2 * _POINTS:
            self.steps, self.values = (kept.tolist() for kept in self.thinned(_POINTS))

    def thinned(self, points: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Steps and values of at most so many points that draw the same line; infinities are NaN."""
        values = np.array(self.values, dtype=np.float64)
        values[np.isinf(values)] = np.nan
        kept = extremes(values, points)
        return np.array(self.steps, dtype=np.int64)[kept], values[kept]


@dataclass
class Bars:
    """The latest histogram of a layer.

    Attributes:
        step: Its step.
        edges: The edges of its bins, ascending, one more than there are bins.
        shares: The share of the elements in each bin, of those that are finite.
        missing: How many elements are not.
    """

    step: int
    edges: NDArray[np.float64]
    shares: NDArray[np.float64]
    missing: int


@dataclass
class Chart:
    """The lines and histograms of a run by topic, and the steps of its alerts.

    Attributes:
        title: What stands above all.
        lines: By topic and label.
        bars: By topic and layer.
        alerts: Steps at which a sentence came.
    """

    title: str = ""
    lines: dict[str, dict[str, Line]] = field(default_factory=dict)
    bars: dict[str, dict[str, Bars]] = field(default_factory=dict)
    alerts: list[int] = field(default_factory=list)

    @property
    def topics(self) -> list[str]:
        """The topics that have something to show, in the order of their first frames."""
        return [*self.lines, *(topic for topic in self.bars if topic not in self.lines)]

    def add(self, frame: Frame) -> None:
        """Take a frame in. One that carries a sentence is an alert."""
        if "text" in frame.meta:
            self.alerts = sorted({*self.alerts, frame.step})[-_POINTS:]
            return
        edges = drawn_edges(frame.components)
        if edges is not None:
            for layer, counts in host_values(frame):
                shown = counts.astype(np.float64)
                self._put(frame, layer, _of_counts(frame.step, edges, shown))
            return
        for layer, component, value in number_cells(frame):
            if isinstance(value, np.ndarray):
                self._put(frame, layer, _of_elements(frame.step, value))
                continue
            label = " ".join(part for part in (layer, component) if part)
            series = self.lines.setdefault(frame.topic, {})
            series.setdefault(label, Line()).add(frame.step, float(value))

    def cut(self, step: int) -> None:
        """Forget what lies beyond a step."""
        for line in self._all_lines():
            kept = [i for i, at in enumerate(line.steps) if at <= step]
            line.steps = [line.steps[i] for i in kept]
            line.values = [line.values[i] for i in kept]
        for topic, bars in self.bars.items():
            self.bars[topic] = {layer: bar for layer, bar in bars.items() if bar.step <= step}
        self.alerts = [at for at in self.alerts if at <= step]

    def _all_lines(self) -> Iterator[Line]:
        return (line for series in self.lines.values() for line in series.values())

    def _put(self, frame: Frame, layer: str, bars: Bars | None) -> None:
        if bars is not None:
            self.bars.setdefault(frame.topic, {})[layer] = bars


def _of_counts(step: int, edges: NDArray[np.float64], counts: NDArray[np.float64]) -> Bars | None:
    """Counts in bins, of which those of infinities and NaN stand at the ends."""
    missing = int(counts[0] + counts[-2:].sum()) if np.isfinite(counts).all() else 0
    counts = counts[1:-2]
    held = np.flatnonzero(counts > 0)
    if not held.size or not np.isfinite(counts).all():
        return None
    first, last = held[0], held[-1] + 1
    bounds = np.append(edges[first:last, 0], edges[last - 1, 1])
    return Bars(step, bounds, counts[first:last] / counts.sum(), missing)


def _of_elements(step: int, value: NDArray[Any]) -> Bars | None:
    elements = np.abs(value) if np.iscomplexobj(value) else value.astype(np.float64)
    finite = elements[np.isfinite(elements)]
    if not finite.size or not np.isfinite(float(finite.max()) - float(finite.min())):
        return None
    counts, bounds = np.histogram(finite, bins=_BINS)
    return Bars(step, bounds.astype(np.float64), counts / finite.size, int(elements.size - finite.size))

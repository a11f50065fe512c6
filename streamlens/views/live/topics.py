"""What is kept of a run for its live charts: numbers by topic, and what rules and controllers said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from streamlens.frame import to_numpy
from streamlens.reductions import bin_edges
from streamlens.views.actions import SUFFIX, actions
from streamlens.views.alerts import Alert, alerts
from streamlens.views.live.envelope import Envelope
from streamlens.views.live.sampled import Sampled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from streamlens.frame import Frame

__all__ = ["Topics"]

_HALF_LIFE: Final = 25
"""Steps after which a loss's weight in its moving average has halved."""

_ENOUGH: Final = 500
"""Stretches of steps that a chart can show; more would be narrower than a pixel or two."""

_MOST_SAID: Final = 400
"""Sentences kept of each topic, the first of them."""

_MOST_LAYERS: Final = 20
"""Layers kept of one sentence."""


class Topics:
    """Everything that the charts of a run may draw, bounded.

    Args:
        most_points: The most points, of all topics of numbers together.

    Attributes:
        numbers: Topics of numbers.
        samples: Topics of distributions.
        said: How many sentences came.
        changes: How often the largest learning rate became another.
    """

    def __init__(self, most_points: int) -> None:
        self.numbers: dict[str, Envelope] = {}
        self.samples: dict[str, Sampled] = {}
        self.said = 0
        self.changes = 0
        self._rates: dict[str, float] = {}
        self._most = most_points
        self._sentences: dict[str, list[dict[str, Any]]] = {}
        self._averages: dict[str, _Average] = {}

    def __contains__(self, topic: object) -> bool:
        return topic in self.numbers or topic in self.samples

    def __iter__(self) -> Iterator[str]:
        yield from self.numbers
        yield from self.samples

    def add(self, frame: Frame) -> str | None:
        """Take a frame in.

        Args:
            frame: A frame on the host.

        Returns:
            The topic, if it is one of numbers.
        """
        topic = frame.topic
        if "text" in frame.meta:
            self._hear(topic, frame)
            return None
        numbers = _numbers(frame)
        if numbers is None:
            return None
        components, values = numbers
        if _is_distribution(components):
            kept = self.samples.setdefault(topic, Sampled())
            kept.add(frame.step, frame.epoch, frame.layers, components, values)
            return topic
        self._put(topic, frame, components, values)
        if topic.rpartition("/")[2] == "learning_rate":
            rate = float(values.max())
            self.changes += not np.isclose(rate, self._rates.setdefault(topic, rate), rtol=1e-6, atol=0)
            self._rates[topic] = rate
        if topic == "loss" or topic.endswith("/loss"):
            self._average(topic, frame, components, values)
        elif self._averages.pop(topic.removesuffix(".ema"), None) is not None:
            # The run has an average of its own.
            del self.numbers[topic]
            self._put(topic, frame, components, values)
        return topic

    def _put(
        self, topic: str, frame: Frame, components: tuple[str, ...], values: NDArray[np.float64]
    ) -> None:
        kept = self.numbers.get(topic)
        if kept is None:
            kept = self.numbers[topic] = Envelope(self._most)
        series = len(kept.series)
        kept.add(frame.step, frame.epoch, frame.layers, components, values)
        if len(kept.series) != series:
            self._share()

    def _share(self) -> None:
        """Divide the points: few series get what they can use, and the others what is left."""
        left = self._most
        wanting = sorted(self.numbers.values(), key=lambda kept: len(kept.series))
        for i, kept in enumerate(wanting):
            most = min(left // (len(wanting) - i), len(kept.series) * 2 * _ENOUGH)
            kept.limit(most)
            left -= most

    def _average(
        self, topic: str, frame: Frame, components: tuple[str, ...], values: NDArray[np.float64]
    ) -> None:
        smooth = f"{topic}.ema"
        if smooth in self.numbers and topic not in self._averages:
            return
        average = self._averages.setdefault(topic, _Average())
        self._put(smooth, frame, components, average(frame.layers + components, values))

    def _hear(self, topic: str, frame: Frame) -> None:
        rows = self._sentences.setdefault(topic, [])
        if len(rows) < _MOST_SAID:
            self.said += 1
            rows += [
                {**frame.meta, "step": frame.step, "layer": layer} for layer in frame.layers[:_MOST_LAYERS]
            ]

    def table(self, topic: str, *, cells: bool = False) -> pd.DataFrame:
        """A topic as the rows that a view takes.

        Args:
            topic: One that there is.
            cells: Whether a heatmap takes them.
        """
        if topic in self.samples:
            return self.samples[topic].table()
        kept = self.numbers[topic]
        return kept.cell_table() if cells else kept.line_table()

    @property
    def alerts(self) -> list[Alert]:
        """The alerts so far."""
        return alerts({topic: pd.DataFrame(rows) for topic, rows in self._sentences.items()})

    @property
    def actions(self) -> pd.DataFrame:
        """What controllers did so far."""
        return actions({t: pd.DataFrame(rows) for t, rows in self._sentences.items() if t.endswith(SUFFIX)})

    def cut(self, step: int) -> None:
        """Forget what lies beyond a step.

        Args:
            step: The last one that is kept.
        """
        for numbers in self.numbers.values():
            numbers.cut(step)
        for samples in self.samples.values():
            samples.cut(step)
        for topic, rows in self._sentences.items():
            self._sentences[topic] = [row for row in rows if row["step"] <= step]


class _Average:
    """The exponential moving average of numbers; what is not finite is NaN and leaves it as it was."""

    def __init__(self) -> None:
        self._of: dict[tuple[str, ...], NDArray[np.float64]] = {}

    def __call__(self, key: tuple[str, ...], values: NDArray[np.float64]) -> NDArray[np.float64]:
        state = self._of.get(key)
        if state is None or state.shape != values.shape:
            state = np.full(values.shape, np.nan)
        finite = np.isfinite(values)
        decay = 0.5 ** (1.0 / _HALF_LIFE)
        moved = np.where(np.isnan(state), values, decay * state + (1.0 - decay) * values)
        state = self._of[key] = np.where(finite, moved, state)
        return np.where(finite, state, np.nan)


def _numbers(frame: Frame) -> tuple[tuple[str, ...], NDArray[np.float64]] | None:
    """A frame's components and its numbers, a row a layer; None if it holds something else."""
    stacked = frame.values
    if isinstance(stacked, tuple) or not len(frame):
        return None
    values = to_numpy(stacked)
    components: tuple[str, ...] = ()
    if values.ndim == 1:
        values = values[:, np.newaxis]
    elif values.ndim == 2 and values.shape[1] == len(frame.components):
        components = frame.components
    else:
        return None
    if np.iscomplexobj(values):
        parts = [f"{name}.{part}".lstrip(".") for name in components or ("",) for part in ("real", "imag")]
        components = tuple(parts)
        values = np.stack([values.real, values.imag], axis=-1).reshape(len(values), -1)
    return components, np.asarray(values, dtype=np.float64)


def _is_distribution(components: tuple[str, ...]) -> bool:
    """Whether components are bins, or percentiles: together they are one thing."""
    if len(components) < 2:
        return False
    known = _DISTRIBUTIONS.get(components)
    if known is None:
        if len(_DISTRIBUTIONS) > 100:
            _DISTRIBUTIONS.clear()
        known = _DISTRIBUTIONS[components] = bin_edges(components) is not None or all(
            name[:1] == "p" and name[1:].replace(".", "", 1).isdigit() for name in components
        )
    return known


_DISTRIBUTIONS: Final[dict[tuple[str, ...], bool]] = {}

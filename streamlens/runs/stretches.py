"""Statistics of series over stretches of steps: how they are made, merged, and kept as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from streamlens.runs.codec import Layout, array_of

__all__ = ["Stretches", "encoded", "nothing", "of_frames", "of_rollups", "together"]

_Array: TypeAlias = np.ndarray[Any, Any]


@dataclass
class Stretches:
    """What several stretches of one layout and level amount to: a row a stretch, a column a series.

    Attributes:
        numbers: Which stretch of its level each is.
        frames: How many frames each has.
        epochs: The epoch of the first frame of each.
        times: When the first frame of each was emitted.
        low: Minima; NaN where all values are NaN.
        high: Maxima, likewise.
        total: Sums of the values that are not NaN.
        counts: How many values are not NaN; None where all are.
    """

    numbers: _Array
    frames: _Array
    epochs: _Array
    times: _Array
    low: _Array
    high: _Array
    total: _Array
    counts: _Array | None

    def __getitem__(self, rows: slice) -> Stretches:
        """Some of the stretches."""
        return Stretches(
            self.numbers[rows],
            self.frames[rows],
            self.epochs[rows],
            self.times[rows],
            self.low[rows],
            self.high[rows],
            self.total[rows],
            None if self.counts is None else self.counts[rows],
        )

    def coarser(self, factor: int) -> Stretches:
        """Stretches `factor` times as long; these must be in the order of their numbers."""
        numbers = self.numbers // factor
        starts = _starts(numbers)
        if len(starts) == len(numbers):
            return replace(self, numbers=numbers)
        counts = None if self.counts is None else _reduced(np.add, self.counts, starts)
        # Infinities of both signs have no sum, which is then NaN as it is in NumPy.
        with np.errstate(invalid="ignore", over="ignore"):
            return Stretches(
                numbers[starts],
                np.add.reduceat(self.frames, starts),
                self.epochs[starts],
                self.times[starts],
                _reduced(np.fmin, self.low, starts),
                _reduced(np.fmax, self.high, starts),
                _reduced(np.add, self.total, starts),
                counts,
            )

    def merged(self, later: Stretches) -> Stretches:
        """One stretch out of two with the same number, of which this one was stored first."""
        counts = None
        if self.counts is not None or later.counts is not None:
            counts = self.known() + later.known()
        with np.errstate(invalid="ignore", over="ignore"):
            return Stretches(
                self.numbers,
                self.frames + later.frames,
                self.epochs,
                self.times,
                np.fmin(self.low, later.low),
                np.fmax(self.high, later.high),
                self.total + later.total,
                counts,
            )

    def known(self) -> _Array:
        """How many values are not NaN."""
        if self.counts is not None:
            return self.counts
        return np.repeat(self.frames[:, None], self.low.shape[1], axis=1)

    def mean(self) -> _Array:
        """Means of the values that are not NaN; NaN where there is none."""
        with np.errstate(invalid="ignore", divide="ignore"):
            counts = self.frames[:, None] if self.counts is None else self.counts
            return np.asarray(self.total / counts)


def nothing() -> Stretches:
    """No stretch of no series."""
    none, empty = np.empty(0, np.int64), np.empty((0, 0), np.float32)
    return Stretches(none, none, none, none.astype(np.float64), empty, empty, empty.astype(np.float64), None)


def together(parts: Sequence[Stretches]) -> Stretches:
    """Several of one layout and level in the order of their numbers; equal ones are not joined yet."""
    if len(parts) == 1:
        return parts[0]
    numbers = np.concatenate([part.numbers for part in parts])
    order = np.argsort(numbers, kind="stable")
    counts = None
    if any(part.counts is not None for part in parts):
        counts = np.concatenate([part.known() for part in parts])[order]
    return Stretches(
        numbers[order],
        np.concatenate([part.frames for part in parts])[order],
        np.concatenate([part.epochs for part in parts])[order],
        np.concatenate([part.times for part in parts])[order],
        np.concatenate([part.low for part in parts])[order],
        np.concatenate([part.high for part in parts])[order],
        np.concatenate([part.total for part in parts])[order],
        counts,
    )


def of_frames(
    layout: Layout, steps: Sequence[int], epochs: Sequence[int], times: Sequence[float], data: bytes
) -> Stretches:
    """Frames of one layout as stretches of one step each, not yet joined where steps are equal.

    Args:
        layout: One that `rolls`.
        steps: Of each frame, ascending.
        epochs: Of each frame.
        times: When each was emitted.
        data: Their values, frame after frame.
    """
    values = array_of(layout.tensors[0][0], data).reshape(len(steps), -1)
    if values.dtype != np.float32:
        values = values.astype(np.float64)
    missing = np.isnan(values)
    counts, total = None, values
    if missing.any():
        counts = (~missing).astype(np.int64)
        total = np.where(missing, 0, values)
    frames = np.ones(len(steps), np.int64)
    return Stretches(
        np.array(steps, np.int64),
        frames,
        np.array(epochs, np.int64),
        np.array(times, np.float64),
        values,
        values,
        total.astype(np.float64),
        counts,
    )


def of_rollups(layout: Layout, rows: Sequence[Sequence[Any]]) -> Stretches:
    """Rows of the store with data, as `(number, frames, epoch, wall_time, data)`.

    Raises:
        ValueError: A row is damaged.
    """
    number = _numbers(layout)
    width, size = number.itemsize, layout.series
    data = [row[4] for row in rows]
    extra = [len(entry) != 3 * width * size for entry in data]
    counts = None
    frames = np.array([row[1] for row in rows], np.int64)
    if any(extra):
        counts = np.repeat(frames[:, None], size, axis=1)
        for i in np.flatnonzero(extra).tolist():
            if len(data[i]) != (3 * width + 4) * size:
                raise ValueError(f"a roll-up of {len(data[i])} bytes where {3 * width * size} belong")
            counts[i] = np.frombuffer(data[i][3 * width * size :], "<u4")
        data = [entry[: 3 * width * size] for entry in data]
    parts = np.frombuffer(b"".join(data), number).reshape(len(rows), 3, size)
    weights = frames[:, None] if counts is None else counts
    with np.errstate(invalid="ignore", over="ignore"):
        # Where no value is known the mean is NaN, and nothing to the sum.
        total = np.where(weights == 0, 0.0, parts[:, 2].astype(np.float64) * weights)
    return Stretches(
        np.array([row[0] for row in rows], np.int64),
        frames,
        np.array([row[2] for row in rows], np.int64),
        np.array([row[3] for row in rows], np.float64),
        parts[:, 0],
        parts[:, 1],
        total,
        counts,
    )


def encoded(layout: Layout, one: Stretches) -> bytes:
    """One stretch as bytes: minima, maxima and means, and counts where some are NaN."""
    number = _numbers(layout)
    with np.errstate(over="ignore"):
        parts = [np.asarray(part, number).tobytes() for part in (one.low, one.high, one.mean())]
    if one.counts is not None and (one.counts != one.frames[:, None]).any():
        parts.append(one.counts.astype("<u4").tobytes())
    return b"".join(parts)


def _numbers(layout: Layout) -> np.dtype[Any]:
    """In which type a layout's roll-ups are stored: float32 where that holds every value."""
    name, _ = layout.tensors[0]
    narrow = name in ("float32", "float16", "bfloat16") or name.startswith("float8")
    return np.dtype("<f4" if narrow else "<f8")


def _starts(numbers: _Array) -> _Array:
    """Where a run of equal numbers begins."""
    return np.flatnonzero(np.concatenate(([True], numbers[1:] != numbers[:-1])))


def _reduced(function: np.ufunc, values: _Array, starts: _Array) -> _Array:
    """What `function.reduceat(values, starts, axis=0)` gives, some times as fast for groups of one size."""
    sizes = np.diff(starts, append=len(values))
    joined = np.flatnonzero(sizes > 1)
    if 4 * len(joined) < len(starts):
        # As where pieces that were read one after the other meet: few are to be made one.
        found = values[starts]
        for place in joined.tolist():
            found[place] = function.reduce(values[starts[place] :][: sizes[place]], axis=0)
        return found
    sizes = sizes[:-1]
    if len(sizes) < 2 or (sizes[1:] != sizes[1]).any():
        return np.asarray(function.reduceat(values, starts, axis=0))
    # Only the first and the last may be cut off.
    middle = values[starts[1] : starts[-1]].reshape(len(sizes) - 1, sizes[1], *values.shape[1:])
    first, last = values[: starts[1]], values[starts[-1] :]
    return np.concatenate(
        [
            function.reduce(first, axis=0)[None],
            function.reduce(middle, axis=1),
            function.reduce(last, axis=0)[None],
        ]
    )

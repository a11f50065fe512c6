"""Minima, means and maxima of a topic over stretches of steps: charts of runs of any length."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from streamlens.runs.codec import Layout
from streamlens.runs.rollups import LEVELS, reaches, read_rollups
from streamlens.runs.rows import FRAMES
from streamlens.runs.schema import version_of
from streamlens.runs.stretches import Stretches, of_frames
from streamlens.runs.tidy import categories, checked_row, merge_orders

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["envelope"]

_Array: TypeAlias = np.ndarray[Any, Any]
_Laid: TypeAlias = tuple[int, Stretches]
"""The number of a layout, and stretches of its frames."""

_READ: Final = 3
"""Rows that are read at most for each stretch wanted; where there are more, coarser roll-ups are read."""
_CHUNK: Final = 512


def envelope(
    db: sqlite3.Connection,
    topic: int,
    layouts: Mapping[int, Layout],
    layers: Sequence[str],
    bounds: tuple[int | None, int | None],
    max_points: int,
) -> pd.DataFrame:
    """Read a topic's envelope from an open store, inside a transaction.

    Args:
        db: The store.
        topic: The number of the topic.
        layouts: Its layouts, all of which roll.
        layers: The layers wanted.
        bounds: The first and the last step wanted; None for open.
        max_points: The most stretches.

    Raises:
        ValueError: The store is damaged.
    """
    first, last = _span(db, topic, bounds)
    level, width = _resolution(db, topic, layouts, first, last, max_points)
    parts: Iterator[_Laid]
    if level == 1:
        parts = _frames(db, topic, layouts, first, last)
    else:
        parts = (
            (number, part)
            for number, layout in layouts.items()
            for part in read_rollups(db, topic, number, layout, level, first, last)
        )
    drawn = [(number, part.coarser(width // level)) for number, part in parts]
    return _table(drawn, layouts, layers, width, first)


def _span(db: sqlite3.Connection, topic: int, bounds: tuple[int | None, int | None]) -> tuple[int, int]:
    """The first and the last step wanted that there is."""
    low, high = (
        db.execute(f"SELECT {end}(step) FROM frames WHERE topic = ?", (topic,)).fetchone()[0]
        for end in ("min", "max")
    )
    if low is None:
        return 0, -1
    first, last = bounds
    return (low if first is None else max(first, low)), (high if last is None else min(last, high))


def _resolution(
    db: sqlite3.Connection, topic: int, layouts: Mapping[int, Layout], first: int, last: int, max_points: int
) -> tuple[int, int]:
    """The level to read (1 for the frames themselves), and the steps a stretch."""
    most = _READ * max_points
    (frames,) = db.execute(
        "SELECT count(*) FROM (SELECT 1 FROM frames WHERE topic = ? AND step BETWEEN ? AND ? LIMIT ?)",
        (topic, first, last, most + 1),
    ).fetchone()
    if frames <= max_points:
        return 1, 1
    level = 1
    if frames > most and version_of(db) > 1 and all(reaches(number, last) for number in layouts):
        level = next((n for n in LEVELS if last // n - first // n < most), LEVELS[-1])
    width = level
    while last // width - first // width >= max_points:
        # A stretch more than the span would need may be begun, as stretches are aligned to step 0.
        width = max(width + level, level * ((last - first) // (level * max_points)))
    return level, width


def _frames(
    db: sqlite3.Connection, topic: int, layouts: Mapping[int, Layout], first: int, last: int
) -> Iterator[_Laid]:
    cursor = db.execute(f"{FRAMES} AND step BETWEEN ? AND ? ORDER BY step", (topic, first, last))
    while rows := cursor.fetchmany(_CHUNK):
        groups: dict[int, list[tuple[int, int, float, bytes]]] = {}
        for row in rows:
            step, _, epoch, wall_time, number, _, data = checked_row(row, str(topic), layouts)
            groups.setdefault(number, []).append((step, epoch, wall_time, data))
        for number, group in groups.items():
            steps, epochs, times, values = zip(*group, strict=True)
            yield number, of_frames(layouts[number], steps, epochs, times, b"".join(values)).coarser(1)


def _series(
    layout: Layout, layers: Mapping[str, int], components: Mapping[str, int]
) -> tuple[_Array, _Array]:
    """Of each number of a frame, the codes of its layer and component; -1 for none wanted and for none."""
    inner = layout.series // len(layout.layers)
    named = len(layout.components) == inner
    own = [components[name] for name in layout.components] if named else [-1] * inner
    codes = np.array([layers.get(name, -1) for name in layout.layers])
    return np.repeat(codes, inner), np.tile(np.array(own), len(codes))


def _table(
    parts: Sequence[_Laid], layouts: Mapping[int, Layout], layers: Sequence[str], width: int, first: int
) -> pd.DataFrame:
    import pandas as pd

    components = merge_orders(layout.components for layout in layouts.values())
    layer_codes = {name: code for code, name in enumerate(layers)}
    component_codes = {name: code for code, name in enumerate(components)}
    numbers = np.unique(np.concatenate([part.numbers for _, part in parts] or [np.empty(0, np.int64)]))
    keys: dict[int, _Array] = {}
    for number in dict.fromkeys(number for number, _ in parts):
        layer, component = _series(layouts[number], layer_codes, component_codes)
        keys[number] = np.where(layer < 0, -1, layer * (len(components) + 1) + component + 1)
    series = np.unique(np.concatenate([key[key >= 0] for key in keys.values()] or [np.empty(0, np.int64)]))
    shape = (len(numbers), len(series))
    wide = any(part.low.dtype != np.float32 for _, part in parts)
    low = np.full(shape, np.nan, np.float64 if wide else np.float32)
    high, total = low.copy(), np.zeros(shape)
    counts, seen = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    epochs = np.full(len(numbers), np.iinfo(np.int64).max)
    times = np.full(len(numbers), np.inf)
    for number, part in parts:
        wanted = np.flatnonzero(keys[number] >= 0)
        rows = np.searchsorted(numbers, part.numbers)
        place = np.ix_(rows, np.searchsorted(series, keys[number][wanted]))
        low[place] = np.fmin(low[place], part.low[:, wanted])
        high[place] = np.fmax(high[place], part.high[:, wanted])
        with np.errstate(invalid="ignore", over="ignore"):
            total[place] += part.total[:, wanted]
        counts[place] += part.known()[:, wanted]
        seen[place] += part.frames[:, None]
        epochs[rows] = np.minimum(epochs[rows], part.epochs)
        times[rows] = np.minimum(times[rows], part.times)
    row, column = np.nonzero(seen)
    chosen = (row, column) if len(row) < seen.size else slice(None)

    def drawn(values: _Array) -> _Array:
        return values[chosen].reshape(-1)

    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / counts
    columns: dict[str, Any] = {
        "step": np.maximum(numbers * width, first)[row],
        "epoch": epochs[row],
        "layer": pd.Categorical.from_codes(
            (series // (len(components) + 1))[column], categories=categories(layers)
        ),
    }
    if components:
        codes = (series % (len(components) + 1) - 1)[column]
        columns["component"] = pd.Categorical.from_codes(codes, categories=categories(components))
    columns |= {"min": drawn(low), "mean": drawn(mean), "max": drawn(high)}
    columns |= {"count": drawn(counts), "missing": drawn(seen - counts), "wall_time": times[row]}
    return pd.DataFrame(columns, copy=False)

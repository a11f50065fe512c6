"""Minima, means and maxima of a topic over stretches of steps: charts of runs of any length."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from streamlens.runs.codec import Layout
from streamlens.runs.rollups import LEVELS, reaches, read_rollups
from streamlens.runs.rows import FRAMES
from streamlens.runs.schema import version_of
from streamlens.runs.stretches import Stretches, nothing, of_frames, together
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
    drawn = ((number, part.coarser(width // level)) for number, part in parts)
    return _table(_joined(drawn), layouts, layers, width, first)


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


def _joined(parts: Iterable[_Laid]) -> dict[int, Stretches]:
    """The parts of each layout as one, each stretch once."""
    by_layout: dict[int, list[Stretches]] = {}
    for number, part in parts:
        by_layout.setdefault(number, []).append(part)
    return {number: together(mine).coarser(1) for number, mine in by_layout.items()}


@dataclass
class _Grid:
    """A row a stretch, a column a series."""

    numbers: _Array
    series: _Array
    epochs: _Array
    times: _Array
    low: _Array
    mean: _Array
    high: _Array
    counts: _Array
    seen: _Array


def _one(part: Stretches, keys: _Array) -> _Grid:
    """The grid of the one layout that there mostly is."""
    order = np.argsort(keys, kind="stable")
    order = order[keys[order] >= 0]
    whole = len(order) == len(keys) and bool((order == np.arange(len(keys))).all())
    columns: Any = slice(None) if whole else order
    seen = np.repeat(part.frames[:, None], len(order), axis=1)
    return _Grid(
        part.numbers,
        keys[order],
        part.epochs,
        part.times,
        part.low[:, columns],
        part.mean()[:, columns],
        part.high[:, columns],
        seen if part.counts is None else part.counts[:, columns],
        seen,
    )


def _several(parts: Mapping[int, Stretches], keys: Mapping[int, _Array]) -> _Grid:
    """The grid of layouts that came and went, whose series may meet within a stretch."""
    numbers = np.unique(np.concatenate([part.numbers for part in parts.values()]))
    series = np.unique(np.concatenate([key[key >= 0] for key in keys.values()]))
    shape = (len(numbers), len(series))
    wide = any(part.low.dtype != np.float32 for part in parts.values())
    low = np.full(shape, np.nan, np.float64 if wide else np.float32)
    high, total = low.copy(), np.zeros(shape)
    counts, seen = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    epochs, times = np.full(len(numbers), np.iinfo(np.int64).max), np.full(len(numbers), np.inf)
    for number, part in parts.items():
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
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / counts
    return _Grid(numbers, series, epochs, times, low, mean, high, counts, seen)


def _table(
    parts: Mapping[int, Stretches],
    layouts: Mapping[int, Layout],
    layers: Sequence[str],
    width: int,
    first: int,
) -> pd.DataFrame:
    import pandas as pd

    components = merge_orders(layout.components for layout in layouts.values())
    layer_codes = {name: code for code, name in enumerate(layers)}
    component_codes = {name: code for code, name in enumerate(components)}
    keys: dict[int, _Array] = {}
    for number in parts:
        layer, component = _series(layouts[number], layer_codes, component_codes)
        keys[number] = np.where(layer < 0, -1, layer * (len(components) + 1) + component + 1)
    if len(parts) == 1:
        ((number, part),) = parts.items()
        grid = _one(part, keys[number])
    else:
        grid = _several(parts, keys) if parts else _one(nothing(), np.empty(0, np.int64))
    stretches, series = grid.seen.shape
    row, column = np.repeat(np.arange(stretches), series), np.tile(np.arange(series), stretches)
    present = grid.seen.reshape(-1) > 0
    everywhere = bool(present.all())
    if not everywhere:
        row, column = row[present], column[present]

    def cells(values: _Array) -> _Array:
        flat = values.reshape(-1)
        return flat if everywhere else flat[present]

    columns: dict[str, Any] = {
        "step": np.maximum(grid.numbers * width, first)[row],
        "epoch": grid.epochs[row],
        "layer": pd.Categorical.from_codes(
            (grid.series // (len(components) + 1))[column], categories=categories(layers)
        ),
    }
    if components:
        codes = (grid.series % (len(components) + 1) - 1)[column]
        columns["component"] = pd.Categorical.from_codes(codes, categories=categories(components))
    columns |= {"min": cells(grid.low), "mean": cells(grid.mean), "max": cells(grid.high)}
    columns |= {"count": cells(grid.counts), "missing": cells(grid.seen - grid.counts)}
    columns["wall_time"] = grid.times[row]
    return pd.DataFrame(columns, copy=False)

"""Roll-ups: minimum, maximum and mean of each series over every 10, 100 and 1,000 steps.

They make charts of long runs cheap: a million steps are read as a thousand rows. A stretch of `n`
steps begins where `step % n == 0`. Roll-ups are written in the transaction of their frames, so that
they say at any moment of exactly the frames that are stored, also after a crash.

A stretch with one frame has a row without data: the frame itself says it all. So a topic that comes
every 100 steps does not pay for roll-ups over 10.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from streamlens.runs.codec import Layout, checksum
from streamlens.runs.rows import FRAMES, layouts_of
from streamlens.runs.stretches import Stretches, encoded, of_frames, of_rollups
from streamlens.runs.tidy import checked_row

__all__ = ["LEVELS", "RollUps", "erase", "reaches", "read_rollups"]

LEVELS: Final = (10, 100, 1000)
"""Steps a stretch."""

# The row's key is (layout, level, stretch) in one integer: only tables keyed by an integer hold rows
# of several KB without overflow pages, and a chart's rows lie side by side.
_BITS: Final = 40
_LAST_STRETCH: Final = (1 << _BITS) - 1
_LAST_LAYOUT: Final = (1 << (62 - _BITS)) // len(LEVELS) - 1

_RAW: Final = f"{FRAMES} AND step >= ? AND step < ? AND layout = ?"
_ORDERED: Final = f"{FRAMES} AND step >= ? ORDER BY step, micro_step, sequence"
_CHUNK: Final = 1000
"""Frames that are rolled up together where a store's are rolled up anew."""


def reaches(layout: int, last: int) -> bool:
    """Whether a layout is rolled up to a step."""
    return layout <= _LAST_LAYOUT and last <= _LAST_STRETCH * LEVELS[0]


def _keys(layout: int, level: int, first: int, last: int) -> tuple[int, int] | None:
    """The keys of the stretches of `level` steps from step `first` to step `last`.

    Returns:
        The first and the last key, or None where roll-ups do not reach.
    """
    if layout > _LAST_LAYOUT or first < 0 or last // level > _LAST_STRETCH:
        return None
    base = (layout * len(LEVELS) + LEVELS.index(level)) << _BITS
    return base + first // level, base + last // level


class RollUps:
    """Keeps the roll-ups of one store up to date.

    Args:
        db: The store, inside whose transactions this writes.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        # The stretch under way of each layout and level, whose sum is kept in full precision.
        self._last: dict[tuple[int, int], tuple[int, Stretches]] = {}

    def forget(self) -> None:
        """Go by the store alone, as after a transaction that was undone."""
        self._last.clear()

    def add(
        self,
        topic: int,
        number: int,
        layout: Layout,
        rows: Sequence[tuple[int, int, float, bytes]],
    ) -> None:
        """Roll frames up that are about to be stored.

        Args:
            topic: The number of their topic.
            number: The number of their layout.
            layout: Their layout; one that does not `roll` is ignored.
            rows: Step, epoch, wall time and values of each.

        Raises:
            ValueError: What is stored already is damaged.
        """
        if not layout.rolls:
            return
        top = _LAST_STRETCH * LEVELS[0]
        rows = sorted((row for row in rows if 0 <= row[0] <= top), key=lambda row: row[0])
        if not rows or number > _LAST_LAYOUT:
            return
        steps, epochs, times, data = zip(*rows, strict=True)
        fine = of_frames(layout, steps, epochs, times, b"".join(data))
        below = 1
        for level in LEVELS:
            fine = fine.coarser(level // below)
            below = level
            self._store(topic, number, layout, level, fine)

    def rebuild(self, topic: int, first: int = 0) -> float | None:
        """Roll the stored frames of a topic up anew, from the beginning or from a step on.

        Args:
            topic: The number of the topic.
            first: A step divisible by all of `LEVELS`.

        Returns:
            When the last of these frames was emitted; None where there is none.

        Raises:
            ValueError: What is stored is damaged.
        """
        layouts = layouts_of(self._db, topic)
        erase(self._db, layouts, first)
        self.forget()
        last: float | None = None
        cursor = self._db.execute(_ORDERED, (topic, first))
        # In the order of steps, so that what a chunk leaves unfinished is the stretch under way.
        while rows := cursor.fetchmany(_CHUNK):
            groups: dict[int, list[tuple[int, int, float, bytes]]] = {}
            for row in rows:
                step, _, epoch, wall_time, number, _, data = checked_row(row, str(topic), layouts)
                groups.setdefault(number, []).append((step, epoch, wall_time, data))
                last = wall_time if last is None else max(last, wall_time)
            for number, group in groups.items():
                self.add(topic, number, layouts[number], group)
        return last

    def _store(self, topic: int, number: int, layout: Layout, level: int, found: Stretches) -> None:
        first = int(found.numbers[0]) * level
        keys = _keys(number, level, first, first)
        assert keys is not None
        base = keys[0] - int(found.numbers[0])
        rows = []
        for i in range(len(found.numbers)):
            one = found[i : i + 1]
            key = base + int(one.numbers[0])
            before = self._before(topic, number, layout, level, key, int(one.numbers[0]))
            if before is not None:
                one = before.merged(one)
            self._last[number, level] = key, one
            rows.append(_row(key, layout, one))
        self._db.executemany("INSERT OR REPLACE INTO rollups VALUES (?, ?, ?, ?, ?, ?)", rows)

    def _before(
        self, topic: int, number: int, layout: Layout, level: int, key: int, stretch: int
    ) -> Stretches | None:
        """What is stored of a stretch already."""
        known = self._last.get((number, level))
        if known is not None and known[0] == key:
            return known[1]
        start = stretch * level
        return next(read_rollups(self._db, topic, number, layout, level, start, start), None)


def erase(db: sqlite3.Connection, layouts: Iterable[int], first: int = 0) -> None:
    """Delete the roll-ups of some layouts from a step on that is divisible by all of `LEVELS`."""
    for number in layouts:
        for level in LEVELS:
            keys = _keys(number, level, first, _LAST_STRETCH * level)
            if keys is not None:
                db.execute("DELETE FROM rollups WHERE key BETWEEN ? AND ?", keys)


def read_rollups(
    db: sqlite3.Connection, topic: int, number: int, layout: Layout, level: int, first: int, last: int
) -> Iterator[Stretches]:
    """Yield the stretches of one layout that touch the steps from `first` to `last`, in order.

    Raises:
        ValueError: They are damaged.
    """
    keys = _keys(number, level, first, last)
    if keys is None:
        return
    base = keys[0] - first // level
    cursor = db.execute("SELECT * FROM rollups WHERE key BETWEEN ? AND ?", keys)
    while rows := cursor.fetchmany(_CHUNK):
        whole: list[tuple[int, int, int, float, bytes]] = []
        for key, frames, epoch, wall_time, check, data in rows:
            start = (key - base) * level
            if check != _check(key, frames, epoch, wall_time, data):
                raise ValueError(f"the roll-up of {level} steps from step {start} is not what was written")
            if data is not None:
                whole.append((key - base, frames, epoch, wall_time, data))
                continue
            (row,) = db.execute(_RAW, (topic, start, start + level, number)).fetchall()
            _, _, epoch, wall_time, _, _, raw = checked_row(row, str(topic), {number: layout})
            yield of_frames(layout, [key - base], [epoch], [wall_time], raw)
        if whole:
            yield of_rollups(layout, whole)


def _row(key: int, layout: Layout, one: Stretches) -> tuple[Any, ...]:
    frames, epoch, wall_time = int(one.frames[0]), int(one.epochs[0]), float(one.times[0])
    data = None if frames == 1 else encoded(layout, one)
    return key, frames, epoch, wall_time, _check(key, frames, epoch, wall_time, data), data


def _check(key: int, frames: int, epoch: int, wall_time: float, data: bytes | None) -> int:
    return checksum(key, frames, 0, epoch, wall_time, 0, None, data or b"")

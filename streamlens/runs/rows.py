"""Rows of a run store, as everything that reads one needs them."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, Final

from streamlens.runs.codec import Layout
from streamlens.runs.schema import untext

__all__ = ["FRAMES", "Reading", "layouts_of"]

FRAMES: Final = (
    "SELECT step, micro_step, sequence, epoch, wall_time, layout, meta, data, checksum "
    "FROM frames WHERE topic = ?"
)
"""The rows of a topic, as `checked_row` takes them; conditions may follow."""

_LAYOUTS: Final = (
    "SELECT layout, kind, source, l.names, c.names, stacked, tensors FROM layouts "
    "JOIN name_lists l ON l.list = layers JOIN name_lists c ON c.list = components "
    "WHERE topic = ? ORDER BY layout"
)


def layouts_of(db: sqlite3.Connection, topic: int) -> dict[int, Layout]:
    """The layouts of a topic, by their numbers."""
    return {
        number: Layout.from_row(kind, untext(source), *rest)
        for number, kind, source, *rest in db.execute(_LAYOUTS, (topic,))
    }


class Reading:
    """The rows of a run, at one moment.

    Args:
        db: Where they are read.
        numbers: The numbers of the run's topics.
    """

    def __init__(self, db: sqlite3.Connection, numbers: Mapping[str, int]) -> None:
        self._db = db
        self._numbers = numbers

    def topics(self) -> Mapping[str, tuple[int, dict[int, Layout]]]:
        """The number and the layouts of each topic."""
        return {topic: (number, layouts_of(self._db, number)) for topic, number in self._numbers.items()}

    def steps(self, topics: Sequence[int]) -> tuple[int, int]:
        """The first and the last step of some topics; (0, -1) where there is none."""
        found = [
            self._db.execute(f"SELECT {end}(step) FROM frames WHERE topic = ?", (topic,)).fetchone()[0]
            for topic in topics
            for end in ("min", "max")
        ]
        known = [step for step in found if step is not None]
        return (min(known), max(known)) if known else (0, -1)

    def some_steps(self, topic: int, most: int) -> list[int]:
        """Steps of at most so many frames of a topic, evenly over all that there are; all of few."""
        found = self._db.execute(
            "SELECT DISTINCT step FROM frames WHERE topic = ? ORDER BY step LIMIT ?", (topic, most + 1)
        ).fetchall()
        if len(found) <= most:
            return [step for (step,) in found]
        first, last = self.steps([topic])
        # The first frame from each of evenly spaced steps on: a look-up each, however long the run is.
        nearest = (
            self._db.execute(
                "SELECT step FROM frames WHERE topic = ? AND step >= ? ORDER BY step LIMIT 1",
                (topic, first + (last - first) * i // (most - 1)),
            ).fetchone()[0]
            for i in range(most)
        )
        return sorted(set(nearest))

    def rows(self, topic: int, start: int, stop: int) -> list[tuple[Any, ...]]:
        """The rows of a topic at the steps in `[start, stop)`, as `checked_row` takes them."""
        return self._db.execute(f"{FRAMES} AND step >= ? AND step < ?", (topic, start, stop)).fetchall()

"""Reading runs back from a run store, also while they are being written."""

from __future__ import annotations

import datetime
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from streamlens.errors import RunStoreError, UnknownTopicError, did_you_mean
from streamlens.frame import Frame
from streamlens.runs.catalogue import close, pick, readable, records, store_at
from streamlens.runs.codec import Layout, decode_frame
from streamlens.runs.downsample import MIN_POINTS
from streamlens.runs.envelope import envelope
from streamlens.runs.rows import FRAMES, Reading, layouts_of
from streamlens.runs.schema import open_for_reading, untext
from streamlens.runs.selection import Steps, select_layers, step_bounds, step_condition
from streamlens.runs.tidy import checked_row, merge_orders, tidy

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Run", "read_run"]


def read_run(path: str | os.PathLike[str], run: str | int | None = None) -> Run:
    """Open a run of a run store, also while it is being written or where nothing can be written.

    Args:
        path: The file that a `RunStore` wrote, or a folder with one such file in it or below it.
        run: The run's id, or its position among `list_runs(path)` (negative from the end). By
            default the one that was written last.

    Raises:
        RunStoreError: There is no run store at `path`, or several, it is damaged, or has no such run.
    """
    return Run(path, run)


class Run:
    """A run in a run store.

    Everything is read when it is asked for: what a run still being written has committed since
    is seen by the next call. A context manager; `close()` frees the file.

    Args:
        path: The file that a `RunStore` wrote, or a folder with one such file in it or below it.
        run: The run's id or its position in the file; by default the one that was written last.

    Raises:
        RunStoreError: There is no run store at `path`, or several, it is damaged, or has no such run.
    """

    def __init__(self, path: str | os.PathLike[str], run: str | int | None = None) -> None:
        self._path = store_at(path, run)
        self._mutex = threading.RLock()
        self._db, self._copies = open_for_reading(self._path)
        try:
            with readable(self._path):
                found = records(self._db, self._path)
            self._number, self._record = pick(self._path, found, run)
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def id(self) -> str:
        """What identifies the run, the same after it was resumed."""
        return self._record.id

    @property
    def name(self) -> str:
        """What people call the run."""
        return self._record.name

    @property
    def started(self) -> float:
        """When the run began, in seconds since 1970 (UTC)."""
        return self._record.started

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Whatever was given along with the run."""
        return self._record.metadata

    @property
    def written(self) -> float:
        """When the run had last been written as it was opened here, in seconds since 1970 (UTC)."""
        return self._record.written

    @property
    def origin(self) -> Mapping[str, Any]:
        """The process that began the run: its command, git commit, machine and versions."""
        return self._record.origin

    @property
    def topics(self) -> list[str]:
        """The topics of the run, in the order in which they first came."""
        with self._reading():
            return list(self._topics())

    @property
    def steps(self) -> tuple[int, int] | None:
        """The first and the last step of which anything is stored; None while nothing is."""
        with self.reading() as db:
            first, last = db.steps([number for number, _ in db.topics().values()])
        return (first, last) if first <= last else None

    def steps_of(self, topic: str) -> tuple[int, int]:
        """The first and the last step of a topic.

        Raises:
            UnknownTopicError: The run has no such topic.
        """
        with self.reading() as db:
            return db.steps([self._topic(topic)])

    def some_steps(self, topic: str, most: int) -> list[int]:
        """At most so many of the steps that a topic has frames of, evenly over them; all of few.

        Args:
            topic: One of `topics`.
            most: At least 2.

        Raises:
            UnknownTopicError: The run has no such topic.
            ValueError: `most` is below 2.
        """
        if most < 2:
            raise ValueError(f"most must be at least 2, for the first and the last step; got {most}")
        with self.reading() as db:
            return db.some_steps(self._topic(topic), most)

    def layers(self, topic: str) -> list[str]:
        """All layers that frames of a topic have had, in model order.

        Raises:
            UnknownTopicError: The run has no such topic.
        """
        with self._reading():
            layouts = layouts_of(self._db, self._topic(topic))
        return merge_orders(layout.layers for layout in layouts.values())

    def holds_numbers(self, topic: str) -> bool:
        """Whether all values of a topic are real numbers, one a layer, or one a layer and component.

        Raises:
            UnknownTopicError: The run has no such topic.
        """
        with self._reading():
            layouts = layouts_of(self._db, self._topic(topic))
        return all(layout.holds_numbers for layout in layouts.values())

    def rolls(self, topic: str) -> bool:
        """Whether a topic has an envelope: it holds numbers, in each frame of one type and shape.

        Raises:
            UnknownTopicError: The run has no such topic.
        """
        with self._reading():
            layouts = layouts_of(self._db, self._topic(topic))
        return all(layout.rolls or not layout.series for layout in layouts.values())

    def dataframe(
        self,
        topic: str,
        layers: str | Sequence[str] | None = None,
        steps: Steps | None = None,
        max_points: int | None = None,
    ) -> pd.DataFrame:
        """A topic as a tidy table: a row a value, ordered by step, micro-step and layer.

        Columns: `step`, `micro_step`, `epoch`, `layer` (categories in model order), `component`
        where the topic names components, `value`, `wall_time` (when it was emitted, in seconds
        since 1970), and a column for each entry of the frames' meta (an entry called as one of
        the others becomes `meta.<entry>`). Values keep their type; half precision becomes
        float32. A value that is itself a tensor without named components stays an array.

        Args:
            topic: One of `topics`.
            layers: Names or globs of layers; by default all.
            steps: One step, a slice or range of steps (without their end), a list of steps, or a pair
                of the first and the last (included; None for open).
            max_points: At most this many rows a layer and component. Minima, maxima and NaN are
                kept, so that a chart looks the same.

        Raises:
            UnknownTopicError: The run has no such topic.
            LayerNotFoundError: A name or glob that selects no layer of the topic.
            ValueError: `steps` has a negative bound in a slice, or `max_points` is below 5.
            RunStoreError: The file is damaged.
        """
        if max_points is not None and max_points < MIN_POINTS:
            raise ValueError(f"max_points must be at least {MIN_POINTS}, got {max_points}")
        condition, bounds = step_condition(steps)
        with self._reading():
            number = self._topic(topic)
            found = self._db.execute(
                f"{FRAMES}{condition} ORDER BY step, micro_step, sequence", (number, *bounds)
            ).fetchall()
            known = layouts_of(self._db, number)
            rows = [checked_row(row, topic, known) for row in found]
        keep = select_layers(topic, merge_orders(layout.layers for layout in known.values()), layers)
        return tidy(rows, known, keep, max_points)

    def envelope(
        self,
        topic: str,
        layers: str | Sequence[str] | None = None,
        steps: Steps | None = None,
        max_points: int = 1000,
    ) -> pd.DataFrame:
        """Minimum, mean and maximum of each series over stretches of steps, as a chart draws them.

        Of a long run the roll-ups over 10, 100 and 1,000 steps are read, so that its length hardly
        matters: a million steps of 600 layers take about as long as a thousand. Stretches begin
        where the step is divisible by their length; the first and last of a range count whole.

        Columns: `step` (where the stretch begins), `epoch` (then), `layer`, `component` where the
        topic names components, `min`, `mean`, `max`, `count` (values, which NaN are not), `missing`
        (NaN), and `wall_time` (when its first frame was emitted). A stretch of NaN alone has NaN.
        Minima and maxima are exact up to integers above 2**53; means are of float32 precision.

        Args:
            topic: One of `topics`; its values are numbers, one a layer or one a component.
            layers: Names or globs of layers; by default all.
            steps: One step, a slice or range without stride, or a pair of the first and the last.
            max_points: At most this many stretches.

        Raises:
            UnknownTopicError: The run has no such topic.
            LayerNotFoundError: A name or glob that selects no layer of the topic.
            ValueError: The topic holds whole tensors, `steps` has a stride or a negative bound, or
                `max_points` is below 1.
            RunStoreError: The file is damaged.
        """
        if max_points < 1:
            raise ValueError(f"max_points must be at least 1, got {max_points}")
        bounds = step_bounds(steps)
        with self._reading():
            number = self._topic(topic)
            known = layouts_of(self._db, number)
        if not self.rolls(topic):
            raise ValueError(
                f"{topic!r} holds more than one kind of numbers a layer, and has no envelope: reduce it, for "
                "example with norm(), or read it with dataframe()"
            )
        keep = select_layers(topic, merge_orders(layout.layers for layout in known.values()), layers)
        with self._reading():
            known = {
                number: layout for number, layout in layouts_of(self._db, number).items() if layout.series
            }
            return envelope(self._db, number, known, keep, bounds, max_points)

    def frames(self, topic: str | None = None) -> Iterator[Frame]:
        """Yield the frames exactly as they were stored, in the order in which they were stored.

        Types, shapes, components, kind, meta and source come back; tensors are on the host.

        Args:
            topic: One of `topics`; by default all topics.

        Raises:
            UnknownTopicError: The run has no such topic.
            RunStoreError: The file is damaged.
        """
        with self._reading():
            topics = self._topics() if topic is None else {topic: self._topic(topic)}
        return self._replay(topics)

    def _replay(self, topics: Mapping[str, int]) -> Iterator[Frame]:
        names = {number: name for name, number in topics.items()}
        layouts: dict[int, Layout] = {}
        for number, step, micro_step, sequence in self._keys(list(names)).tolist():
            # A short read each: one long one would keep the log of a run that is being written
            # from being merged into the file.
            with self._reading():
                row = self._db.execute(
                    f"{FRAMES} AND step = ? AND micro_step = ? AND sequence = ?",
                    (number, step, micro_step, sequence),
                ).fetchone()
                if row is None:
                    continue  # dropped meanwhile: the run was resumed from before it
                if row[5] not in layouts:
                    layouts.update(layouts_of(self._db, number))
                _, _, epoch, _, layout, meta, data = checked_row(row, names[number], layouts)
                frame = decode_frame(layouts[layout], names[number], step, micro_step, epoch, meta, data)
            yield frame

    def _keys(self, topics: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The keys of all frames of some topics, in the order in which they were stored."""
        marks = ", ".join("?" * len(topics))
        parts = [np.empty((0, 4), np.int64)]
        with self._reading():
            cursor = self._db.execute(
                f"SELECT topic, step, micro_step, sequence FROM frames WHERE topic IN ({marks})", topics
            )
            while batch := cursor.fetchmany(4096):
                parts.append(np.array(batch, np.int64))
        keys = np.concatenate(parts)
        return keys[np.argsort(keys[:, 3], kind="stable")]

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """Everything read inside is of one moment, whatever another process writes meanwhile."""
        with self._reading():
            yield Reading(self._db, self._topics())

    def close(self) -> None:
        """Free the file; once is enough."""
        close(self._db, self._copies)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        began = datetime.datetime.fromtimestamp(self.started).isoformat(" ", "seconds")
        try:
            topics = ", ".join(self.topics)
        except (RunStoreError, sqlite3.ProgrammingError):
            topics = "closed"
        name = f"{self.name!r}, " if self.name else ""
        return f"Run({name}id={self.id!r}, started={began!r}, path={str(self._path)!r}, topics=[{topics}])"

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Everything read inside is of one moment, whatever another process writes meanwhile."""
        with self._mutex, readable(self._path):
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def _topics(self) -> dict[str, int]:
        rows = self._db.execute(
            "SELECT name, topic FROM topics WHERE run = ? ORDER BY topic", (self._number,)
        )
        return {untext(name): number for name, number in rows}

    def _topic(self, topic: str) -> int:
        topics = self._topics()
        if topic not in topics:
            hint = did_you_mean(topic, topics)
            raise UnknownTopicError(
                f"unknown topic {topic!r} in run {self.id!r} of {self._path}: {hint}{' ' if hint else ''}"
                f"Topics: {', '.join(topics) or 'none yet'}"
            )
        return topics[topic]

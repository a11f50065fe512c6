"""Reading runs back from a run store, also while they are being written."""

from __future__ import annotations

import datetime
import json
import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from streamlens.errors import RunStoreError, UnknownTopicError, did_you_mean
from streamlens.frame import Frame
from streamlens.runs.codec import Layout, decode_frame
from streamlens.runs.downsample import MIN_POINTS
from streamlens.runs.schema import explain, open_for_reading, untext
from streamlens.runs.selection import Steps, select_layers, step_condition
from streamlens.runs.tidy import checked_row, merge_orders, tidy

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Reading", "Run", "RunRecord", "list_runs", "read_run"]

_LAYOUTS: Final = (
    "SELECT layout, kind, source, l.names, c.names, stacked, tensors FROM layouts "
    "JOIN name_lists l ON l.list = layers JOIN name_lists c ON c.list = components "
    "WHERE topic = ? ORDER BY layout"
)
_FRAMES: Final = (
    "SELECT step, micro_step, sequence, epoch, wall_time, layout, meta, data, checksum "
    "FROM frames WHERE topic = ?"
)


@dataclass(frozen=True)
class RunRecord:
    """What a run store says about one of its runs.

    Attributes:
        id: What identifies the run, the same after it was resumed.
        name: What people call it.
        started: When it began, in seconds since 1970 (UTC).
        metadata: Whatever was given along with it.
    """

    id: str
    name: str
    started: float
    metadata: Mapping[str, Any]


def list_runs(path: str | os.PathLike[str]) -> list[RunRecord]:
    """The runs in the file, in the order in which they began.

    Raises:
        RunStoreError: There is no run store at `path`, or it is damaged.
    """
    path = _absolute(path)
    db, copies = open_for_reading(path)
    try:
        with _readable(path):
            return [record for _, record in _records(db)]
    finally:
        _close(db, copies)


def read_run(path: str | os.PathLike[str], run: str | int | None = None) -> Run:
    """Open a run of a run store, also while it is being written or where nothing can be written.

    Args:
        path: The file that a `RunStore` wrote.
        run: The run's id, or its position among `list_runs(path)` (negative from the end). By
            default the one that began last.

    Raises:
        RunStoreError: There is no run store at `path`, it is damaged, or has no such run.
    """
    return Run(path, run)


class Run:
    """A run in a run store.

    Everything is read when it is asked for: what a run still being written has committed since
    is seen by the next call. A context manager; `close()` frees the file.

    Args:
        path: The file that a `RunStore` wrote.
        run: The run's id or its position in the file; by default the one that began last.

    Raises:
        RunStoreError: There is no run store at `path`, it is damaged, or has no such run.
    """

    def __init__(self, path: str | os.PathLike[str], run: str | int | None = None) -> None:
        self._path = _absolute(path)
        self._mutex = threading.RLock()
        self._db, self._copies = open_for_reading(self._path)
        try:
            with _readable(self._path):
                records = _records(self._db)
            self._number, self._record = _pick(self._path, records, run)
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
    def topics(self) -> list[str]:
        """The topics of the run, in the order in which they first came."""
        with self._reading():
            return list(self._topics())

    def layers(self, topic: str) -> list[str]:
        """All layers that frames of a topic have had, in model order.

        Raises:
            UnknownTopicError: The run has no such topic.
        """
        with self._reading():
            layouts = self._layouts_of(self._topic(topic))
        return merge_orders(layout.layers for layout in layouts.values())

    def holds_numbers(self, topic: str) -> bool:
        """Whether all values of a topic are real numbers, one a layer, or one a layer and component.

        Raises:
            UnknownTopicError: The run has no such topic.
        """
        with self._reading():
            layouts = self._layouts_of(self._topic(topic))
        return all(layout.holds_numbers for layout in layouts.values())

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
            steps: One step, a slice or range of steps (without their end), or a pair of the
                first and the last (included; None for open).
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
                f"{_FRAMES}{condition} ORDER BY step, micro_step, sequence", (number, *bounds)
            ).fetchall()
            known = self._layouts_of(number)
            rows = [checked_row(row, topic, known) for row in found]
        keep = select_layers(topic, merge_orders(layout.layers for layout in known.values()), layers)
        return tidy(rows, known, keep, max_points)

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
                    f"{_FRAMES} AND step = ? AND micro_step = ? AND sequence = ?",
                    (number, step, micro_step, sequence),
                ).fetchone()
                if row is None:
                    continue  # dropped meanwhile: the run was resumed from before it
                if row[5] not in layouts:
                    layouts.update(self._layouts_of(number))
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
            yield Reading(self._db, {t: (n, self._layouts_of(n)) for t, n in self._topics().items()})

    def close(self) -> None:
        """Free the file; once is enough."""
        _close(self._db, self._copies)

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
        with self._mutex, _readable(self._path):
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

    def _layouts_of(self, topic: int) -> dict[int, Layout]:
        return {
            number: Layout.from_row(kind, untext(source), *rest)
            for number, kind, source, *rest in self._db.execute(_LAYOUTS, (topic,))
        }


class Reading:
    """The rows of a run, at one moment."""

    def __init__(self, db: sqlite3.Connection, topics: dict[str, tuple[int, dict[int, Layout]]]) -> None:
        self._db = db
        self._topics = topics

    def topics(self) -> dict[str, tuple[int, dict[int, Layout]]]:
        """The number and the layouts of each topic."""
        return self._topics

    def steps(self, topics: Sequence[int]) -> tuple[int, int]:
        """The first and the last step of some topics; (0, -1) where there is none."""
        found = [
            self._db.execute(f"SELECT {end}(step) FROM frames WHERE topic = ?", (topic,)).fetchone()[0]
            for topic in topics
            for end in ("min", "max")
        ]
        known = [step for step in found if step is not None]
        return (min(known), max(known)) if known else (0, -1)

    def rows(self, topics: Sequence[int], start: int, stop: int) -> list[tuple[Any, ...]]:
        """The rows of some topics in `[start, stop)`: the topic's number, then what `checked_row` takes."""
        found: list[tuple[Any, ...]] = []
        for topic in topics:
            found += self._db.execute(
                "SELECT topic, step, micro_step, sequence, epoch, wall_time, layout, meta, data, checksum "
                "FROM frames WHERE topic = ? AND step >= ? AND step < ?",
                (topic, start, stop),
            )
        return found


def _absolute(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(path))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes of reading into one error that names the file."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # a closed run: no fault of the file's
    except (sqlite3.Error, ValueError, TypeError, AttributeError) as error:
        raise explain(path, error) from error


def _close(db: sqlite3.Connection, copies: tempfile.TemporaryDirectory[str] | None) -> None:
    db.close()
    if copies is not None:
        copies.cleanup()


def _records(db: sqlite3.Connection) -> list[tuple[int, RunRecord]]:
    rows = db.execute("SELECT run, id, name, started, metadata FROM runs ORDER BY run")
    return [
        (number, RunRecord(untext(key), untext(name), started, json.loads(metadata)))
        for number, key, name, started, metadata in rows
    ]


def _pick(
    path: Path, records: Sequence[tuple[int, RunRecord]], run: str | int | None
) -> tuple[int, RunRecord]:
    if not records:
        raise RunStoreError(f"{path} holds no run yet: wait until the run that writes it has begun")
    if isinstance(run, str):
        for number, record in records:
            if record.id == run:
                return number, record
    elif -len(records) <= (index := -1 if run is None else run) < len(records):
        return records[index]
    known = ", ".join(repr(record.id) for _, record in records)
    raise RunStoreError(
        f"no run {run!r} in {path}: pass an id or a position among its {len(records)} runs: {known}"
    )

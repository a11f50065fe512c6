"""Writing a run into a run store."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeAlias, cast

from streamlens.errors import RunStoreError
from streamlens.frame import Frame
from streamlens.runs.codec import Spec, checksum, describe, dump_json, encode_values, specs_of
from streamlens.runs.lock import WriterLock
from streamlens.runs.schema import SQLITE_ERRORS, explain, open_for_writing, text

__all__ = ["RunWriter"]

_Row: TypeAlias = tuple[int, int, int, int, int, float, int, int, str | None, bytes]
_LayoutKey: TypeAlias = tuple[str, str, str, int, int, Spec | tuple[Spec, ...]]

_INSERT: Final = "INSERT INTO frames VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
# Raw frames whose shapes change at every step bring a new layout each: what is remembered is
# dropped now and then rather than grown without end.
_CACHED: Final = 4096
# SQLite limits a whole row; keys and meta need a little beside the values.
_ROW_RESERVE: Final = 1 << 20

_log = logging.getLogger("streamlens")

# Resumptions that this process has already carried out, as (file, run, step): a store that is
# closed and opened again while the resumed run goes on must not lose what was written since.
_resumed: set[tuple[Path, str, int]] = set()


class _NameList(NamedTuple):
    names: tuple[str, ...]
    number: int


class RunWriter:
    """The one writer of a run store, for one run.

    Opening begins a new run in the file, made with its folder if need be, or goes on with the run
    of the same id. Other runs in the file are never touched. Not thread-safe: all calls belong to
    one thread at a time.

    Args:
        path: The file.
        run_id: What identifies the run, the same after it was resumed.
        name: What people call the run.
        metadata: Whatever goes with the run, kept as JSON.
        resumed_at: The last step of the snapshot that the run was resumed from: what the file
            holds of this run beyond it is dropped, once a process. None for a fresh run.

    Raises:
        RunStoreError: The file is no run store, damaged, of a newer version, being written by
            somebody else, or cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        run_id: str,
        *,
        name: str = "",
        metadata: Mapping[str, Any] | None = None,
        resumed_at: int | None = None,
    ) -> None:
        self._path = Path(os.path.realpath(path))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunStoreError(
                f"cannot make the folder of {self._path}: {error.strerror}; choose another path"
            ) from error
        self._lock = WriterLock(self._path)
        try:
            self._db = open_for_writing(self._path)
            try:
                self._limit = self._db.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) - _ROW_RESERVE
                self._forget()
                self._run, self._sequence = self._begin(run_id, name, metadata or {}, resumed_at)
            except BaseException:
                self._db.close()
                raise
        except BaseException:
            self._lock.release()
            raise
        self._unstorable: set[str] = set()

    @property
    def path(self) -> Path:
        """The file, symbolic links resolved."""
        return self._path

    def write(self, frames: Sequence[Frame], wall_times: Sequence[float] | None = None) -> None:
        """Store frames of host tensors, all or none of them, in one transaction.

        A frame that no store could hold (above about 1 GB) is left out and logged, once a topic.

        Args:
            frames: The frames, in the order in which they shall be replayed.
            wall_times: When each was emitted, in seconds since 1970; by default now.

        Raises:
            RunStoreError: The file cannot be written. Nothing was stored; the same call may
                succeed later, such as when a full disk has space again.
        """
        if max(len(self._layouts), len(self._name_lists)) > _CACHED:
            self._forget()
        times = [time.time()] * len(frames) if wall_times is None else wall_times
        try:
            self._db.execute("BEGIN IMMEDIATE")
            rows: list[_Row] = []
            for frame, wall_time in zip(frames, times, strict=True):
                row = self._row(frame, self._sequence + len(rows), float(wall_time))
                if row is not None:
                    rows.append(row)
            self._db.executemany(_INSERT, rows)
            end = self._sequence + len(rows)
            self._db.execute("UPDATE runs SET next_sequence = ? WHERE run = ?", (end, self._run))
            self._db.execute("COMMIT")
        except BaseException as error:
            self._roll_back()
            if isinstance(error, SQLITE_ERRORS):
                raise explain(self._path, error) from error
            raise
        self._sequence = end

    def close(self) -> None:
        """Merge the write-ahead log into the file and give up the lock; once is enough."""
        try:
            self._db.close()
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(
        self, run_id: str, name: str, metadata: Mapping[str, Any], resumed_at: int | None
    ) -> tuple[int, int]:
        """Return the number of the run in this file and the sequence of its next frame."""
        key = text(run_id)
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute(
                "INSERT OR IGNORE INTO runs (id, name, started, metadata) VALUES (?, ?, ?, ?)",
                (key, text(name), time.time(), dump_json(metadata)),
            )
            run, sequence = self._db.execute(
                "SELECT run, next_sequence FROM runs WHERE id = ?", (key,)
            ).fetchone()
            if resumed_at is not None and (self._path, run_id, resumed_at) not in _resumed:
                self._drop_beyond(run, resumed_at)
            self._db.execute("COMMIT")
        except BaseException as error:
            self._roll_back()
            if isinstance(error, SQLITE_ERRORS):
                raise explain(self._path, error) from error
            raise
        if resumed_at is not None:
            _resumed.add((self._path, run_id, resumed_at))
        return int(run), int(sequence)

    def _drop_beyond(self, run: int, step: int) -> None:
        for (topic,) in self._db.execute("SELECT topic FROM topics WHERE run = ?", (run,)).fetchall():
            self._db.execute("DELETE FROM frames WHERE topic = ? AND step > ?", (topic, step))
            # Layouts and topics are what a reader lists: those without a frame must go as well.
            self._db.execute(
                "DELETE FROM layouts WHERE topic = ?1 AND layout NOT IN "
                "(SELECT layout FROM frames WHERE topic = ?1)",
                (topic,),
            )
            self._db.execute(
                "DELETE FROM topics WHERE topic = ?1 AND NOT EXISTS (SELECT 1 FROM frames WHERE topic = ?1)",
                (topic,),
            )

    def _row(self, frame: Frame, sequence: int, wall_time: float) -> _Row | None:
        try:
            data = encode_values(frame)
            if len(data) > self._limit:
                raise RunStoreError(
                    f"its {len(data)} bytes exceed the {self._limit} that SQLite holds; reduce it "
                    "or select layers"
                )
            meta = dump_json(frame.meta) if frame.meta else None
        except Exception as error:
            if frame.topic not in self._unstorable:
                self._unstorable.add(frame.topic)
                _log.error(
                    "frames of %r cannot be stored in %s and are left out: %s", frame.topic, self._path, error
                )
            return None
        topic, layout = self._layout(frame)
        step, micro_step, epoch = int(frame.step), int(frame.micro_step), int(frame.epoch)
        check = checksum(step, micro_step, sequence, epoch, wall_time, layout, meta, data)
        return topic, step, micro_step, sequence, epoch, wall_time, layout, check, meta, data

    def _layout(self, frame: Frame) -> tuple[int, int]:
        """Return the numbers of the frame's topic and of its layout.

        Tuples of names are told apart by identity: a run's frames mostly share them, and looking
        hundreds of names up would cost as much as storing their values.
        """
        specs = specs_of(frame)
        known = self._layouts.get(_key(frame, frame.layers, frame.components, specs))
        if known is not None:
            return known
        # Equal names in a new tuple, as in frames that were relabelled: go by the first such tuple.
        # Those are kept, so that no other can come to have the identity of a collected one.
        layers, components = self._name_list(frame.layers), self._name_list(frame.components)
        key = _key(frame, layers.names, components.names, specs)
        known = self._layouts.get(key)
        if known is None:
            topic = self._intern("topics", "topic", {"run": self._run, "name": text(frame.topic)})
            row = {
                "topic": topic,
                "kind": frame.kind.value,
                "source": text(frame.source),
                "layers": layers.number,
                "components": components.number,
                "stacked": int(frame.stacked),
                "tensors": describe(specs),
            }
            known = self._layouts[key] = (topic, self._intern("layouts", "layout", row))
        return known

    def _name_list(self, names: tuple[str, ...]) -> _NameList:
        known = self._name_lists.get(names)
        if known is None:
            number = self._intern("name_lists", "list", {"names": json.dumps(names)})
            known = self._name_lists[names] = _NameList(names, number)
        return known

    def _intern(self, table: str, number: str, row: Mapping[str, int | str | bytes]) -> int:
        """Return the number of a row, which is added if the table lacks it."""
        values = tuple(row.values())
        condition = " AND ".join(f"{column} = ?" for column in row)
        found = self._db.execute(f"SELECT {number} FROM {table} WHERE {condition}", values).fetchone()
        if found is not None:
            return int(found[0])
        columns, marks = ", ".join(row), ", ".join("?" * len(row))
        added = self._db.execute(f"INSERT INTO {table} ({columns}) VALUES ({marks})", values).lastrowid
        return cast("int", added)

    def _roll_back(self) -> None:
        """Undo the open transaction, and forget the numbers that it handed out."""
        self._forget()
        try:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        except SQLITE_ERRORS as error:
            _log.debug("rolling back in %s: %s", self._path, error)

    def _forget(self) -> None:
        self._layouts: dict[_LayoutKey, tuple[int, int]] = {}
        self._name_lists: dict[tuple[str, ...], _NameList] = {}


def _key(
    frame: Frame, layers: tuple[str, ...], components: tuple[str, ...], specs: Spec | tuple[Spec, ...]
) -> _LayoutKey:
    return frame.topic, frame.kind.value, frame.source, id(layers), id(components), specs

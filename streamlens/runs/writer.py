"""Writing a run into a run store."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeAlias, cast

from streamlens.errors import RunStoreError
from streamlens.frame import Frame
from streamlens.runs.codec import (
    Layout,
    Spec,
    checksum,
    describe,
    dump_json,
    encode_values,
    layout_of,
    specs_of,
)
from streamlens.runs.lock import WriterLock
from streamlens.runs.migrations import open_store
from streamlens.runs.rollups import LEVELS, RollUps
from streamlens.runs.schema import SQLITE_ERRORS, explain, text

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
            holds of this run beyond it is dropped. None for a fresh run.
        resumption: What tells this loading of a snapshot from every other. The file remembers it,
            so that a store that is closed and opened again while the resumed run goes on keeps
            what was written since. Without one, each opening drops.
        origin: What is known of the process that begins the run, kept as JSON.

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
        resumption: str = "",
        origin: Mapping[str, Any] | None = None,
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
            self._db = open_store(self._path)
            try:
                self._identity = self._path.stat()
                self._limit = self._db.getlimit(sqlite3.SQLITE_LIMIT_LENGTH) - _ROW_RESERVE
                self._rollups = RollUps(self._db)
                self._forget()
                self._run, self._sequence = self._begin(run_id, name, metadata or {}, origin or {})
                if resumed_at is not None:
                    self._resume(resumed_at, resumption)
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

    @property
    def removed(self) -> bool:
        """Whether the file was removed or replaced meanwhile; moved with its folder it is not."""
        try:
            return not os.path.samestat(self._path.stat(), self._identity)
        except FileNotFoundError:
            return self._lock.stayed
        except OSError:
            return False  # nobody can tell, and what is open can be written

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
        with self._transaction():
            rows: list[_Row] = []
            for frame, wall_time in zip(frames, times, strict=True):
                row = self._row(frame, self._sequence + len(rows), float(wall_time))
                if row is not None:
                    rows.append(row)
            self._roll_up(rows)
            self._db.executemany(_INSERT, rows)
            end = self._sequence + len(rows)
            self._db.execute(
                "UPDATE runs SET next_sequence = ?, written = ? WHERE run = ?", (end, time.time(), self._run)
            )
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

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """What is written inside is written whole or not at all."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            self._roll_back()
            if isinstance(error, SQLITE_ERRORS):
                raise explain(self._path, error) from error
            raise

    def _begin(
        self, run_id: str, name: str, metadata: Mapping[str, Any], origin: Mapping[str, Any]
    ) -> tuple[int, int]:
        """Return the number of the run in this file and the sequence of its next frame."""
        key, now = text(run_id), time.time()
        with self._transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO runs (id, name, started, metadata, origin) VALUES (?, ?, ?, ?, ?)",
                (key, text(name), now, dump_json(metadata), dump_json(origin)),
            )
            self._db.execute("UPDATE runs SET written = ? WHERE id = ?", (now, key))
            run, sequence = self._db.execute(
                "SELECT run, next_sequence FROM runs WHERE id = ?", (key,)
            ).fetchone()
        return int(run), int(sequence)

    def _resume(self, step: int, resumption: str) -> None:
        """Drop what the run holds beyond a step, unless this resumption has done so."""
        with self._transaction():
            done = "SELECT resumption FROM runs WHERE run = ?"
            if resumption and self._db.execute(done, (self._run,)).fetchone()[0] == resumption:
                return
            self._drop_beyond(self._run, step)
            self._db.execute("UPDATE runs SET resumption = ? WHERE run = ?", (resumption, self._run))

    def _drop_beyond(self, run: int, step: int) -> None:
        # From the beginning of the longest stretch that reaches beyond the step.
        first = (step + 1) // LEVELS[-1] * LEVELS[-1]
        for (topic,) in self._db.execute("SELECT topic FROM topics WHERE run = ?", (run,)).fetchall():
            self._db.execute("DELETE FROM frames WHERE topic = ? AND step > ?", (topic, step))
            self._rollups.rebuild(topic, max(first, 0))
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

    def _roll_up(self, rows: Sequence[_Row]) -> None:
        groups: dict[tuple[int, int], list[tuple[int, int, float, bytes]]] = {}
        for topic, step, _, _, epoch, wall_time, layout, _, _, data in rows:
            groups.setdefault((topic, layout), []).append((step, epoch, wall_time, data))
        for (topic, layout), group in groups.items():
            try:
                self._rollups.add(topic, layout, self._laid_out[layout], group)
            except ValueError as error:
                raise explain(self._path, error) from error

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
            self._laid_out[known[1]] = layout_of(frame, specs)
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
        self._laid_out: dict[int, Layout] = {}
        self._name_lists: dict[tuple[str, ...], _NameList] = {}
        self._rollups.forget()


def _key(
    frame: Frame, layers: tuple[str, ...], components: tuple[str, ...], specs: Spec | tuple[Spec, ...]
) -> _LayoutKey:
    return frame.topic, frame.kind.value, frame.source, id(layers), id(components), specs

"""The run store's file: its tables, how it is opened, and what its errors mean.

A run store is one SQLite file. All runs of the file share these tables:

- `runs`: one row a run, keyed by the id that the run keeps when it is resumed. `written` is when it
  was last written, `resumption` which loading of a snapshot it last went back for, `origin` the
  process that began it;
- `topics`: one row a topic and run, in the order in which the topics first came;
- `name_lists`: tuples of layer or component names, as JSON arrays, each stored once;
- `layouts`: what frames of one topic have in common: kind, source, layers, components, and the
  type and shape of their tensors. Stacked frames have `["float32", [200]]`, others one such pair
  a layer;
- `frames`: one row a frame, clustered by (topic, step, micro_step, sequence), so that one topic
  is read over all its steps without touching another. `sequence` counts the frames of a run in
  the order in which they were stored. `data` is the raw little-endian bytes of all values,
  `checksum` the CRC-32 of the row;
- `rollups`: minima, maxima and means over 10, 100 and 1,000 steps: see `runs/rollups.py`.

`sequence` is never given twice, also where a resumed run drops frames: a key that a reader took
earlier leads to the frame that had it, or to none.
"""

from __future__ import annotations

import logging
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import Final

from streamlens.errors import RunStoreError

__all__ = [
    "APPLICATION_ID",
    "ROLLUPS",
    "SCHEMA_VERSION",
    "SQLITE_ERRORS",
    "explain",
    "is_run_store",
    "open_for_reading",
    "open_for_writing",
    "text",
    "untext",
    "version_of",
]

APPLICATION_ID: Final = 0x534C454E  # "SLEN": marks the file as a run store, also for file(1)
SCHEMA_VERSION: Final = 2

# A frame of a few thousand values fits into one page: with SQLite's default of 4 KiB most frames
# spill into overflow pages, which halves the speed and doubles the file.
_PAGE_SIZE: Final = 16384
_BUSY_TIMEOUT: Final = 5.0
_MAGIC: Final = b"SQLite format 3\0"

ROLLUPS: Final = """CREATE TABLE rollups (
    key INTEGER PRIMARY KEY,
    frames INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    wall_time REAL NOT NULL,
    checksum INTEGER NOT NULL,
    data BLOB
)"""
"""The table of `runs/rollups.py`, which version 1 did not have."""

_TABLES: Final = (
    """CREATE TABLE runs (
        run INTEGER PRIMARY KEY,
        id TEXT NOT NULL UNIQUE,
        name TEXT NOT NULL,
        started REAL NOT NULL,
        metadata TEXT NOT NULL,
        next_sequence INTEGER NOT NULL DEFAULT 0,
        written REAL NOT NULL DEFAULT 0,
        resumption TEXT NOT NULL DEFAULT '',
        origin TEXT NOT NULL DEFAULT '{}'
    )""",
    """CREATE TABLE topics (
        topic INTEGER PRIMARY KEY,
        run INTEGER NOT NULL REFERENCES runs,
        name TEXT NOT NULL,
        UNIQUE (run, name)
    )""",
    """CREATE TABLE name_lists (
        list INTEGER PRIMARY KEY,
        names TEXT NOT NULL UNIQUE
    )""",
    """CREATE TABLE layouts (
        layout INTEGER PRIMARY KEY,
        topic INTEGER NOT NULL REFERENCES topics,
        kind TEXT NOT NULL,
        source TEXT NOT NULL,
        layers INTEGER NOT NULL REFERENCES name_lists,
        components INTEGER NOT NULL REFERENCES name_lists,
        stacked INTEGER NOT NULL,
        tensors TEXT NOT NULL,
        UNIQUE (topic, kind, source, layers, components, stacked, tensors)
    )""",
    """CREATE TABLE frames (
        topic INTEGER NOT NULL REFERENCES topics,
        step INTEGER NOT NULL,
        micro_step INTEGER NOT NULL,
        sequence INTEGER NOT NULL,
        epoch INTEGER NOT NULL,
        wall_time REAL NOT NULL,
        layout INTEGER NOT NULL REFERENCES layouts,
        checksum INTEGER NOT NULL,
        meta TEXT,
        data BLOB NOT NULL,
        PRIMARY KEY (topic, step, micro_step, sequence)
    ) WITHOUT ROWID""",
    ROLLUPS,
)

SQLITE_ERRORS: Final = (sqlite3.Error, UnicodeDecodeError)
"""What SQLite raises, also where its message quotes a damaged file."""

_log = logging.getLogger("streamlens")


def text(value: str) -> str | bytes:
    """Return what SQLite can hold of a string: itself, or bytes where it has lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogatepass")
    return value


def untext(value: str | bytes) -> str:
    """Undo `text`."""
    return value if isinstance(value, str) else value.decode("utf-8", "surrogatepass")


def explain(path: Path, error: Exception) -> RunStoreError:
    """Return the error that says which file `error` concerns, what is wrong and what to do."""
    # Errors that Python's module raises by itself have no code; those seen in reading are data
    # that cannot be what was written, such as text that is not UTF-8.
    code = (getattr(error, "sqlite_errorcode", None) or sqlite3.SQLITE_CORRUPT) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return RunStoreError(
            f"cannot write {path}: the disk is full ({error}); free some space and writing goes on"
        )
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return RunStoreError(
            f"cannot use {path}: {error}; check the permissions of the file and of its folder, "
            "or choose another path"
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return RunStoreError(
            f"cannot use {path}: another program holds it locked ({error}); close that program"
        )
    if code == sqlite3.SQLITE_IOERR:
        return RunStoreError(f"cannot use {path}: {error}; check that the disk is neither full nor failing")
    if code == sqlite3.SQLITE_NOTADB:
        return RunStoreError(f"{path} is not a run store ({error}): choose another path")
    return RunStoreError(
        f"{path} is damaged ({error}): move it away and choose another path; "
        "what is left of it can be rescued with the command `sqlite3 FILE .recover`"
    )


def is_run_store(path: Path) -> bool:
    """Return whether a file is marked as a run store, of whatever version and in whatever state."""
    try:
        with path.open("rb") as file:
            header = file.read(100)
    except OSError:
        return False
    return header.startswith(_MAGIC) and int.from_bytes(header[68:72], "big") == APPLICATION_ID


def _check_header(path: Path) -> bool:
    """Return whether a run store lies at `path` (False: nothing there); read the file, never write.

    SQLite itself is asked only afterwards: merely opening another program's file with it may
    write there (it replays a journal left by a crash).
    """
    try:
        with path.open("rb") as file:
            header = file.read(100)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise RunStoreError(f"cannot read {path}: {error.strerror}; choose the path of a file") from error
    if not header:
        return False
    if len(header) < 100 or not header.startswith(_MAGIC):
        raise RunStoreError(f"{path} is not a run store (it is no SQLite file): choose another path")
    version = int.from_bytes(header[60:64], "big", signed=True)
    _check_version(path, int.from_bytes(header[68:72], "big"), version)
    # SQLite takes what is missing of a last page for zeros. With a journal beside the file, an
    # incomplete page is a crash that SQLite will mend.
    page_size = int.from_bytes(header[16:18], "big")
    if path.stat().st_size % (65536 if page_size == 1 else max(page_size, 1)) and not _journals(path):
        raise explain(path, ValueError("the file has been cut off"))
    return True


def _journals(path: Path) -> list[Path]:
    """The files beside a store that a crash left and that complete it."""
    beside = [Path(f"{path}-wal"), Path(f"{path}-journal")]
    return [file for file in beside if file.exists() and file.stat().st_size]


def _check_version(path: Path, application: int, version: int) -> None:
    if application != APPLICATION_ID:
        raise RunStoreError(f"{path} is not a run store (another program's SQLite file): choose another path")
    if version > SCHEMA_VERSION:
        raise RunStoreError(
            f"{path} was written by a newer streamlens (run store version {version}; this one knows "
            f"{SCHEMA_VERSION}): upgrade streamlens, or choose another path"
        )
    if version < 1:
        raise RunStoreError(f"{path} is damaged (run store version {version}): choose another path")


def _pragma(db: sqlite3.Connection, name: str) -> int:
    return int(db.execute(f"PRAGMA {name}").fetchone()[0])


def version_of(db: sqlite3.Connection) -> int:
    """The version of an open store, which may change while it is read."""
    return _pragma(db, "user_version")


def _connect(uri: str) -> sqlite3.Connection:
    # A store may be opened by one thread and closed by another; SQLite serialises its own calls.
    return sqlite3.connect(
        uri, uri=True, timeout=_BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
    )


def open_for_writing(path: Path) -> sqlite3.Connection:
    """Open the run store at `path`, or make one; the caller holds its writer lock.

    Raises:
        RunStoreError: The file is no run store, is damaged, is of a newer version or cannot be
            written. It was not changed.
    """
    _check_header(path)
    db: sqlite3.Connection | None = None
    try:
        db = _connect(f"{path.as_uri()}?mode=rwc")
        if _pragma(db, "page_count") == 0:
            _create(db)
        _check_version(path, _pragma(db, "application_id"), _pragma(db, "user_version"))
        _use_wal(db, path)
        db.execute("PRAGMA synchronous=NORMAL")
        db.execute("SELECT count(*) FROM runs").fetchone()
    except BaseException as error:
        if db is not None:
            db.close()
        if isinstance(error, SQLITE_ERRORS):
            raise explain(path, error) from error
        raise
    return db


def _create(db: sqlite3.Connection) -> None:
    """Make the tables in one transaction: a crash leaves either an empty file or a run store.

    Done before WAL is switched on, so that the marks are in the file's own header at once.
    """
    db.execute(f"PRAGMA page_size={_PAGE_SIZE}")
    db.execute("BEGIN IMMEDIATE")
    for table in _TABLES:
        db.execute(table)
    db.execute(f"PRAGMA application_id={APPLICATION_ID}")
    db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    db.execute("COMMIT")


def _use_wal(db: sqlite3.Connection, path: Path) -> None:
    try:
        mode = db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in (
            sqlite3.SQLITE_IOERR,
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_PROTOCOL,
        ):
            raise
        mode = str(error)
    if mode != "wal":
        db.execute("PRAGMA journal_mode=DELETE")
        _log.warning(
            "the file system of %s cannot share SQLite's write-ahead log: writing with a rollback journal, "
            "which is slower and makes readers wait; a local disk avoids it",
            path,
        )


def open_for_reading(path: Path) -> tuple[sqlite3.Connection, tempfile.TemporaryDirectory[str] | None]:
    """Open the run store at `path` for reading, also while another process writes it.

    A file in a folder that cannot be written is read as immutable. Where a crash left a journal
    beside it, file and journal are copied into a temporary folder, returned with the connection:
    only with its journal the file is complete, and taking it in needs write access.

    Raises:
        RunStoreError: There is no run store, it is damaged or of a newer version.
    """
    if not _check_header(path):
        raise RunStoreError(
            f"there is no run store at {path}: check the path (a RunStore sink makes the file)"
        )
    try:
        # Not mode=ro: a reader that may write cleans up the log's files when it is the last to close.
        return _open_checked(path, f"{path.as_uri()}?mode=rw"), None
    except SQLITE_ERRORS as error:
        code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
        if code not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            raise explain(path, error) from error
    try:
        journals = _journals(path)
        if not journals:
            return _open_checked(path, f"{path.as_uri()}?mode=ro&immutable=1"), None
        copies = tempfile.TemporaryDirectory(prefix="streamlens-")
        for file in (path, *journals):
            shutil.copyfile(file, Path(copies.name) / file.name)
        return _open_checked(path, f"{(Path(copies.name) / path.name).as_uri()}?mode=rw"), copies
    except SQLITE_ERRORS as error:
        raise explain(path, error) from error


def _open_checked(path: Path, uri: str) -> sqlite3.Connection:
    db = _connect(uri)
    try:
        db.execute("PRAGMA query_only=1")
        _check_version(path, _pragma(db, "application_id"), _pragma(db, "user_version"))
        db.execute("SELECT count(*) FROM runs").fetchone()
    except BaseException:
        db.close()
        raise
    return db

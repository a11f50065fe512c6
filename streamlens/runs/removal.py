"""Taking a run out of its file."""

from __future__ import annotations

import logging
import os
import sqlite3
from pathlib import Path
from typing import Final

from streamlens.errors import RunStoreError
from streamlens.runs.catalogue import absolute, pick, readable, records
from streamlens.runs.lock import WriterLock
from streamlens.runs.migrations import open_store
from streamlens.runs.rollups import erase
from streamlens.runs.schema import SQLITE_ERRORS, is_run_store

__all__ = ["remove_run"]

_BESIDE: Final = ("", "-wal", "-shm", "-journal")
_UNUSED_NAMES: Final = (
    "DELETE FROM name_lists WHERE list NOT IN "
    "(SELECT layers FROM layouts UNION SELECT components FROM layouts)"
)

_log = logging.getLogger("streamlens")


def remove_run(path: str | os.PathLike[str], run: str | int) -> None:
    """Remove a run and everything that is stored of it; there is no way back.

    The last run of a file goes with the file. Otherwise the file becomes smaller by what the run
    took, for which there must be room on the disk for a second one; it stays as large otherwise.

    Args:
        path: The file.
        run: The run's id, or its position among `list_runs(path)`.

    Raises:
        RunStoreError: There is no run store at `path`, it is damaged, being written, or has no
            such run.
    """
    path = absolute(path)
    if not is_run_store(path):
        raise RunStoreError(f"there is no run store at {path}: check the path")
    lock = WriterLock(path)
    try:
        db = open_store(path)
        try:
            with readable(path):
                found = records(db, path)
                number, _ = pick(path, found, run)
                if len(found) > 1:
                    _remove(db, number)
        finally:
            db.close()
        if len(found) == 1:
            for suffix in _BESIDE:
                Path(f"{path}{suffix}").unlink(missing_ok=True)
    except OSError as error:
        raise RunStoreError(f"cannot remove {path}: {error.strerror}; check the permissions") from error
    finally:
        lock.release()


def _remove(db: sqlite3.Connection, run: int) -> None:
    db.execute("BEGIN IMMEDIATE")
    try:
        for (topic,) in db.execute("SELECT topic FROM topics WHERE run = ?", (run,)).fetchall():
            layouts = db.execute("SELECT layout FROM layouts WHERE topic = ?", (topic,)).fetchall()
            erase(db, (number for (number,) in layouts))
            for table in ("frames", "layouts", "topics"):
                db.execute(f"DELETE FROM {table} WHERE topic = ?", (topic,))
        db.execute("DELETE FROM runs WHERE run = ?", (run,))
        db.execute(_UNUSED_NAMES)
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    try:
        db.execute("VACUUM")
    except SQLITE_ERRORS as error:
        _log.warning("a run was removed, but its file could not be made smaller: %s", error)

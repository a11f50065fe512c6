"""Run stores of earlier versions, brought up to the present one.

Readers read every version as it is and change nothing; the first writer that opens an older file
migrates it, in one transaction: a crash leaves the old version or the new one.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from streamlens.runs.rollups import RollUps
from streamlens.runs.schema import (
    ROLLUPS,
    SCHEMA_VERSION,
    SQLITE_ERRORS,
    explain,
    open_for_writing,
    version_of,
)

__all__ = ["open_store"]

_log = logging.getLogger("streamlens")


def open_store(path: Path) -> sqlite3.Connection:
    """Open the run store at `path` for writing, or make one, and migrate it if it is of an earlier version.

    The caller holds its writer lock.

    Raises:
        RunStoreError: The file is no run store, is damaged, is of a newer version or cannot be
            written. It was not changed.
    """
    db = open_for_writing(path)
    try:
        version = version_of(db)
        if version < SCHEMA_VERSION:
            _migrate(db, version)
            _log.info("%s was brought from run store version %d to %d", path, version, SCHEMA_VERSION)
    except BaseException as error:
        db.close()
        if isinstance(error, (*SQLITE_ERRORS, ValueError, TypeError)):
            raise explain(path, error) from error
        raise
    return db


def _migrate(db: sqlite3.Connection, version: int) -> None:
    db.execute("BEGIN IMMEDIATE")
    try:
        for old in range(version, SCHEMA_VERSION):
            _MIGRATIONS[old](db)
        db.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _from_1_to_2(db: sqlite3.Connection) -> None:
    """Roll-ups, and what is known of a run beside its metadata."""
    for column in (
        "written REAL NOT NULL DEFAULT 0",
        "resumption TEXT NOT NULL DEFAULT ''",
        "origin TEXT NOT NULL DEFAULT '{}'",
    ):
        db.execute(f"ALTER TABLE runs ADD COLUMN {column}")
    db.execute("UPDATE runs SET written = started")
    db.execute(ROLLUPS)
    rollups = RollUps(db)
    for run, topic in db.execute("SELECT run, topic FROM topics").fetchall():
        last = rollups.rebuild(topic)
        if last is not None:
            db.execute("UPDATE runs SET written = max(written, ?) WHERE run = ?", (last, run))


_MIGRATIONS: Final[Mapping[int, Callable[[sqlite3.Connection], None]]] = {1: _from_1_to_2}
"""What brings a file of a version to the next one."""

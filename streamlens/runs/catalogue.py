"""Which runs there are, in a file or in a folder of files."""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from streamlens.errors import RunStoreError
from streamlens.runs.schema import explain, is_run_store, open_for_reading, untext, version_of

__all__ = [
    "RunRecord",
    "absolute",
    "close",
    "list_runs",
    "pick",
    "readable",
    "records",
    "run_stores",
    "store_at",
]

_SHORT: Final = 8
"""Letters of an id that are shown."""

_RUNS: Final = "SELECT run, id, name, started, metadata, written, origin FROM runs ORDER BY run"
_RUNS_OF_1: Final = "SELECT run, id, name, started, metadata, started, '{}' FROM runs ORDER BY run"


@dataclass(frozen=True)
class RunRecord:
    """What a run store says about one of its runs.

    Attributes:
        id: What identifies the run, the same after it was resumed.
        name: What people call it.
        started: When it began, in seconds since 1970 (UTC).
        metadata: Whatever was given along with it: the model, the hyper-parameters.
        written: When it was last written, in seconds since 1970 (UTC).
        origin: The process that began it: `command`, `folder`, `git_commit`, `machine` and versions.
        path: The file that holds it.
    """

    id: str
    name: str
    started: float
    metadata: Mapping[str, Any]
    written: float
    origin: Mapping[str, Any]
    path: Path

    @property
    def short(self) -> str:
        """The beginning of the id."""
        return self.id[:_SHORT]

    @property
    def title(self) -> str:
        """What people call the run: its name, else its folder, else the beginning of its id."""
        folder = self.path.parent.name if self.path.stem == "run" else self.path.stem
        return self.name or folder or self.short


def list_runs(path: str | os.PathLike[str]) -> list[RunRecord]:
    """The runs in a file, in the order in which they began, or those of all run stores in a folder.

    Args:
        path: A run store's file; or a folder, which is searched to its depths.

    Raises:
        RunStoreError: There is no run store at `path`, or one is damaged.
    """
    path = absolute(path)
    if path.is_dir():
        return [record for file in run_stores(path) for record in list_runs(file)]
    db, copies = open_for_reading(path)
    try:
        with readable(path):
            return [record for _, record in records(db, path)]
    finally:
        close(db, copies)


def run_stores(folder: str | os.PathLike[str]) -> list[Path]:
    """The run stores in a folder and in those inside it, by name; told by their first bytes."""
    found: list[Path] = []
    for base, folders, files in os.walk(absolute(folder)):
        folders.sort()
        found += [path for name in sorted(files) if is_run_store(path := Path(base) / name)]
    return found


def store_at(path: str | os.PathLike[str], run: str | int | None = None) -> Path:
    """The run store that a path means: a file, or the only one in a folder that holds the run asked for.

    Args:
        path: A file, or a folder.
        run: A run's id, where several files in a folder are to be told by it.

    Raises:
        RunStoreError: The folder has none, or several.
    """
    path = absolute(path)
    if not path.is_dir():
        return path
    stores = run_stores(path)
    if not stores:
        raise RunStoreError(f"no run store is in the folder {path}: choose the path of a file")
    if isinstance(run, str):
        stores = [file for file in stores if any(record.id == run for record in list_runs(file))]
        if not stores:
            raise RunStoreError(f"no run store in the folder {path} has a run {run!r}: list_runs has them")
    if len(stores) > 1:
        some = ", ".join(str(file.relative_to(path)) for file in stores[:8])
        more = f" and {len(stores) - 8} more" if len(stores) > 8 else ""
        raise RunStoreError(f"the folder {path} has several run stores: choose one of {some}{more}")
    return stores[0]


def absolute(path: str | os.PathLike[str]) -> Path:
    """The path with symbolic links resolved."""
    return Path(os.path.realpath(path))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes of reading into one error that names the file."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # a closed run: no fault of the file's
    except (sqlite3.Error, ValueError, TypeError, AttributeError) as error:
        raise explain(path, error) from error


def close(db: sqlite3.Connection, copies: tempfile.TemporaryDirectory[str] | None) -> None:
    """Free what `open_for_reading` took."""
    db.close()
    if copies is not None:
        copies.cleanup()


def records(db: sqlite3.Connection, path: Path) -> list[tuple[int, RunRecord]]:
    """The runs of an open store with their numbers, in the order in which they began."""
    rows = db.execute(_RUNS_OF_1 if version_of(db) < 2 else _RUNS)
    return [
        (
            number,
            RunRecord(untext(key), untext(name), start, json.loads(metadata), last, json.loads(origin), path),
        )
        for number, key, name, start, metadata, last, origin in rows
    ]


def pick(path: Path, found: Sequence[tuple[int, RunRecord]], run: str | int | None) -> tuple[int, RunRecord]:
    """The run that an id or a position means; by default the one written last.

    Raises:
        RunStoreError: There is none.
    """
    if not found:
        raise RunStoreError(f"{path} holds no run yet: wait until the run that writes it has begun")
    if run is None:
        # Of equals the one that began last, hence from the end.
        return max(reversed(found), key=lambda entry: entry[1].written)
    if isinstance(run, str):
        for number, record in found:
            if record.id == run:
                return number, record
    elif -len(found) <= run < len(found):
        return found[run]
    known = ", ".join(repr(record.id) for _, record in found)
    raise RunStoreError(
        f"no run {run!r} in {path}: pass an id or a position among its {len(found)} runs: {known}"
    )

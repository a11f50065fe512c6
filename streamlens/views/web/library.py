"""Which runs a page may show: those of one run store, or of all in a folder, each by an id of its own."""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from streamlens.errors import RunStoreError
from streamlens.runs import Run, RunRecord, list_runs, read_run
from streamlens.runs.catalogue import absolute, run_stores
from streamlens.runs.lock import is_written

__all__ = ["Entry", "Library", "Look", "State", "state_of"]

State: TypeAlias = tuple[int, ...]
"""What changes whenever a file is written."""

_KEY: Final = 16


@dataclass(frozen=True, slots=True)
class Entry:
    """A run that may be shown.

    Attributes:
        key: By which the page asks for it; the same as long as the run and its place are.
        record: What its store says about it.
        last_step: The last step of which anything is stored.
        place: Its file, as seen from the folder.
        live: Whether it is being written.
    """

    key: str
    record: RunRecord
    last_step: int | None
    place: str
    live: bool


@dataclass(frozen=True, slots=True)
class Look:
    """What was there at one moment.

    Attributes:
        entries: The runs, the one written last first.
        problems: What is wrong with files that could not be read, a sentence each.
    """

    entries: tuple[Entry, ...]
    problems: tuple[str, ...]


class Library:
    """The runs in a file or folder, looked for again at each call; a file that did not change is not read.

    Nothing that a page sends is ever a part of a path: it asks by keys, and a key is looked up among those
    of the last look. A file that a symbolic link leads to out of the folder is not among them.

    May be used from several threads.

    Args:
        root: A run store, or a folder with run stores in it or below it.

    Raises:
        RunStoreError: There is nothing at `root`.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = absolute(root)
        if not self.root.exists():
            raise RunStoreError(f"there is no run store and no folder at {self.root}: check the path")
        self._lock = threading.Lock()
        self._known: dict[Path, tuple[State, tuple[Entry, ...] | str]] = {}

    def look(self) -> Look:
        """The runs that there are now."""
        with self._lock:
            return self._look()

    def _look(self) -> Look:
        files, problems = self._files()
        found: dict[str, Entry] = {}
        self._known = {file: self._of(file) for file in files}
        for _, read in self._known.values():
            if isinstance(read, str):
                problems.append(read)
            else:
                found.update((entry.key, entry) for entry in read)
        newest = sorted(found.values(), key=lambda entry: entry.record.written, reverse=True)
        return Look(tuple(newest), tuple(problems))

    def _files(self) -> tuple[list[Path], list[str]]:
        if not self.root.is_dir():
            return [self.root], []
        inside: list[Path] = []
        problems = []
        for file in run_stores(self.root):
            real = absolute(file)
            if real.is_relative_to(self.root):
                inside.append(real)
            else:
                place = file.relative_to(self.root)
                problems.append(f"{place} is a link out of the folder, and is not shown")
        return list(dict.fromkeys(inside)), problems

    def _of(self, file: Path) -> tuple[State, tuple[Entry, ...] | str]:
        state = state_of(file)
        known = self._known.get(file)
        if known is not None and known[0] == state:
            return known
        try:
            return state, self._read(file)
        except RunStoreError as error:
            return state, str(error)

    def _read(self, file: Path) -> tuple[Entry, ...]:
        records = list_runs(file)
        writing = is_written(file)
        # A store has one writer: what is written is the run that was written last.
        newest = max(records, key=lambda record: record.written, default=None)
        entries = []
        for record in records:
            with read_run(file, record.id) as run:
                steps = run.steps
            last = None if steps is None else steps[1]
            place = str(file.relative_to(self.root)) if file != self.root else file.name
            entries.append(Entry(_key(place, record), record, last, place, writing and record is newest))
        return tuple(entries)

    def open(self, entry: Entry) -> Run:
        """A run, for reading; it must be closed.

        Args:
            entry: One of the last look.

        Raises:
            RunStoreError: It is no longer there, or damaged.
        """
        return read_run(entry.record.path, entry.record.id)


def state_of(file: Path) -> State:
    """What changes whenever a run store is written, begins to be or ends.

    Args:
        file: The run store.
    """
    return (*_stat(file), *_stat(Path(f"{file}-wal")), is_written(file))


def _stat(file: Path) -> State:
    try:
        found = file.stat()
    except OSError:
        return (0, 0)
    # A reader alone makes an empty log, and takes it away.
    return (found.st_size, found.st_mtime_ns) if found.st_size else (0, 0)


def _key(place: str, record: RunRecord) -> str:
    text = f"{place}\0{record.id}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()[:_KEY]

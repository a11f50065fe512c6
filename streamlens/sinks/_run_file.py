"""Finding the file of a run: its own goes on, another run's is never touched."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple, TypeAlias, TypeVar

from streamlens.runs.lock import try_lock
from streamlens.sink import RunInfo
from streamlens.sinks._append_file import AppendFile

__all__ = ["Record", "first_claimed", "has_gone_back", "must_go_back", "open_run_file"]

T = TypeVar("T")

_CHUNK: Final = 1 << 20
_log = logging.getLogger("streamlens")

_resumed: Final[set[tuple[Path, str]]] = set()
"""Files of which this process has dropped what lay beyond a snapshot, and which loading of it: a sink that
is closed and opened again while the run goes on must not lose what was written since."""


class Record(NamedTuple):
    """A whole record of a file.

    Attributes:
        data: Its bytes, the end of its last line included.
        run: The id of the run that it belongs to.
        step: Its step.
    """

    data: bytes
    run: str
    step: int


Reader: TypeAlias = Callable[[BinaryIO], Iterator[Record]]
"""Reads the whole records of an open file; others, such as one that a crash cut off, are left out."""


def open_run_file(wanted: Path, run: RunInfo, header: bytes, read: Reader) -> AppendFile:
    """The file that a run is appended to: a new one, or the one in which it has begun.

    A file that is there and holds another run, or anything else, stays as it is: the next number
    is tried, which is logged. So is one that somebody else is writing. What the run's own file has
    beyond the step of a snapshot is dropped, once each time the run goes back to one.

    Args:
        wanted: The file's name; its folder is made if need be.
        run: The run.
        header: What a new file begins with.
        read: Reads the records of such a file.

    Returns:
        The open file, locked.

    Raises:
        OSError: It cannot be made or written.
    """

    def claim(path: Path) -> AppendFile | None:
        try:
            return _new(path, header)
        except FileExistsError:
            return _reopened(path, run, header, read)

    return first_claimed(wanted, claim)[1]


def first_claimed(wanted: Path, claim: Callable[[Path], T | None]) -> tuple[Path, T]:
    """The first of a path and those with a number that can be had; logged if it is not the first of all.

    Args:
        wanted: The path; the folder that it lies in is made if need be.
        claim: Makes what is to be at a path, or opens it. None where there is something else.

    Returns:
        The path, symbolic links resolved, and what `claim` gave.

    Raises:
        OSError: Nothing can be made there.
    """
    wanted = Path(os.path.realpath(wanted))
    wanted.parent.mkdir(parents=True, exist_ok=True)
    numbered = (wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}") for number in itertools.count(2))
    path, claimed = next(
        (path, claimed)
        for path in itertools.chain([wanted], numbered)
        if (claimed := claim(path)) is not None
    )
    if path != wanted:
        _log.warning("%s is in use or holds something else: this run is written to %s", wanted, path)
    return path, claimed


def must_go_back(path: Path, run: RunInfo) -> bool:
    """Whether a file may still hold what its run had beyond the snapshot that it went back to.

    Args:
        path: The file, symbolic links resolved.
        run: The run.
    """
    return run.resumed_at is not None and (path, run.resumption) not in _resumed


def has_gone_back(path: Path, run: RunInfo) -> None:
    """Note that a file holds nothing of the kind any more.

    Args:
        path: The file, symbolic links resolved.
        run: The run.
    """
    _resumed.add((path, run.resumption))


def _new(path: Path, header: bytes) -> AppendFile:
    file = AppendFile.create(path)
    try_lock(file.fileno())
    try:
        file.append(header)
    except OSError:
        file.close()
        path.unlink()
        raise
    return file


def _reopened(path: Path, run: RunInfo, header: bytes, read: Reader) -> AppendFile | None:
    """The file, if it is this run's and nobody else's."""
    try:
        file = AppendFile.reopen(path)
    except OSError:
        return None
    try:
        if not try_lock(file.fileno()) or _owner(path, header, read) != run.id:
            file.close()
            return None
        if run.resumed_at is not None and must_go_back(path, run):
            file = _cut(file, run.resumed_at, header, read)
            has_gone_back(path, run)
    except BaseException:
        file.close()
        raise
    return file


def _owner(path: Path, header: bytes, read: Reader) -> str | None:
    """The run of the file's first record, if it is such a file and has one."""
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            return None
        return next((record.run for record in read(file)), None)


def _cut(file: AppendFile, step: int, header: bytes, read: Reader) -> AppendFile:
    """The file without what lies beyond a step, and without what a crash left of its last record."""
    with file.path.open("rb") as whole:
        whole.seek(len(header))
        kept_bytes = len(header) + sum(len(record.data) for record in read(whole) if record.step <= step)
        if kept_bytes == file.size:
            return file
        beside = file.path.with_name(f".{file.path.name}.{os.getpid()}")
        beside.unlink(missing_ok=True)
        cut = AppendFile.create(beside)
        try:
            try_lock(cut.fileno())
            cut.append(header)
            whole.seek(len(header))
            for piece in _pieces(record.data for record in read(whole) if record.step <= step):
                cut.append(piece)
            shutil.copymode(file.path, beside)
            # Atomic: whoever reads, or crashes, has either the file before or the one after.
            beside.replace(file.path)
        except BaseException:
            cut.close()
            beside.unlink(missing_ok=True)
            raise
    cut.path = file.path
    file.close()
    return cut


def _pieces(records: Iterable[bytes]) -> Iterator[bytes]:
    held: list[bytes] = []
    size = 0
    for record in records:
        held.append(record)
        size += len(record)
        if size >= _CHUNK:
            yield b"".join(held)
            held.clear()
            size = 0
    yield b"".join(held)

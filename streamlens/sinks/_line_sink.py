"""`LineSink`: what the sinks of text lines have in common."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, ClassVar

from streamlens.errors import SinkError
from streamlens.frame import Frame
from streamlens.sink import RunInfo, Sink
from streamlens.sinks._append_file import AppendFile, say_removed
from streamlens.sinks._run_file import Record, open_run_file

__all__ = ["LineSink"]


class LineSink(Sink):
    """A sink of one text file, in which each frame is one or several whole lines.

    Lines are written once a second, unbuffered: readers see them, and they survive the death of the
    process. A write that fails, as on a full disk, leaves no half line. Where the file is removed meanwhile,
    a new one is begun.

    Args:
        path: The file; it and its folder are made if need be.

    Attributes:
        path: The file that is written: the one asked for, or, where that is there already and not of
            this run, the next with a number.
    """

    header: ClassVar[bytes] = b""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # Made absolute at once: the worker may open the file after the program changed its folder.
        self.path = self._wanted = Path(path).absolute()
        self._run = ""
        self._info: RunInfo | None = None
        self._file: AppendFile | None = None

    def open(self, run: RunInfo) -> None:
        """Begin a new file, or go on with the one in which this run has begun.

        Raises:
            OSError: It cannot be written.
        """
        self._info = run
        again = self._wanted if run.id != self._run else self.path
        self._file = open_run_file(again, run, self.header, self._records)
        self._run, self.path = run.id, self._file.path

    def write(self, frames: Sequence[Frame]) -> None:
        """Append frames, all or none of them.

        Raises:
            OSError: They could not be written; the file is as before then.
            SinkError: The sink is closed.
        """
        if self._info is None:
            raise SinkError(f"{self!r} was given frames while it was closed: call open(run) first")
        if self._file is not None and self._file.removed:
            say_removed(self.path)
            self._shut()
        if self._file is None:
            self.open(self._info)
        assert self._file is not None
        times = self.wall_times(frames)
        lines = [self._lines(frame, at) for frame, at in zip(frames, times, strict=True)]
        self._file.append("".join(lines).encode(errors="backslashreplace"))

    def close(self) -> None:
        """Close the file."""
        self._info = None
        self._shut()

    def _shut(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    @abstractmethod
    def _lines(self, frame: Frame, wall_time: float) -> str:
        """A frame as whole lines."""

    @staticmethod
    @abstractmethod
    def _records(file: BinaryIO) -> Iterator[Record]:
        """The whole records of a file, from where it stands."""

"""`AppendFile`: a file that grows by whole pieces, each written wholly or not at all."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import BinaryIO, Final, Self

__all__ = ["AppendFile", "say_removed"]

_log: Final = logging.getLogger("streamlens")


def say_removed(path: Path) -> None:
    """Log that a file went while a run wrote it, for the sink that begins another in its place."""
    _log.warning("%s was removed while a run wrote it: a new file has what comes from now on", path)


class AppendFile:
    """An open file that is appended to. `create` and `reopen` make it.

    Nothing is buffered: a forked child inherits nothing to write, readers see each piece at once,
    and what was appended survives the death of the process.

    Attributes:
        path: Where it lies.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file
        self._size = file.seek(0, 2)

    @classmethod
    def create(cls, path: Path) -> Self:
        """A new, empty file.

        Args:
            path: Where; its folder exists.

        Raises:
            FileExistsError: There is something of that name.
            OSError: It cannot be made.
        """
        return cls(path, open(path, "x+b", buffering=0))

    @classmethod
    def reopen(cls, path: Path) -> Self:
        """A file that exists, to be read and to be appended to.

        Args:
            path: Where.

        Raises:
            OSError: It cannot be opened.
        """
        return cls(path, open(path, "r+b", buffering=0))

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return self._size

    def fileno(self) -> int:
        """The operating system's number of the open file."""
        return self._file.fileno()

    @property
    def removed(self) -> bool:
        """Whether it lies in no folder any more, so that nobody will ever read what is appended."""
        return os.fstat(self._file.fileno()).st_nlink == 0

    def append(self, data: bytes) -> None:
        """Append a piece; if that fails, the file ends where it did before.

        Args:
            data: The piece.

        Raises:
            OSError: It could not be written, for example for lack of space.
        """
        view = memoryview(data)
        try:
            self._file.seek(self._size)
            while view:
                view = view[self._file.write(view) or 0 :]
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size += len(data)

    def close(self) -> None:
        """Close it; once is enough."""
        self._file.close()

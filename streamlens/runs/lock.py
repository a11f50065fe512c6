"""The lock that keeps a second writer out of a run store.

SQLite alone would let two processes take turns, and their frames would be mixed. The lock is the
operating system's, on a file of its own beside the store: it never makes a reader wait, and it
ends with the process that holds it, also when that process is killed.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
from pathlib import Path

from streamlens.errors import RunStoreError

__all__ = ["WriterLock", "is_written", "try_lock"]

_HELD = {errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}

_log = logging.getLogger("streamlens")

if sys.platform == "win32":
    import msvcrt

    _FAR = 1 << 60

    def _lock(descriptor: int) -> None:
        # Windows locks bytes against reading too: a byte far behind all that others read.
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

    def _unlock(descriptor: int) -> None:
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def try_lock(descriptor: int) -> bool:
    """Lock an open file against everybody else who locks it, until it is closed.

    Args:
        descriptor: The open file. Other ways in which it is opened, also by this process, are others.

    Returns:
        Whether it is ours now; also True on a file system that has no locks.

    Raises:
        OSError: The file cannot be locked, for another reason.
    """
    try:
        _lock(descriptor)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno not in _NO_LOCKS:
            raise
    return True


def is_written(store: Path) -> bool:
    """Whether somebody writes a run store now, as far as can be seen without touching the lock.

    Trying the lock would keep out a writer that begins at that moment. Instead the note is read that its
    holder left, and the process looked for; one of another machine is taken to be there.

    Args:
        store: The run store's path, symbolic links resolved.
    """
    try:
        holder = Path(f"{store}-lock").read_text(errors="replace").split()
    except OSError:
        return False
    if len(holder) != 2 or not holder[0].isdigit():
        return False
    if holder[1] != socket.gethostname() or sys.platform == "win32":
        return True
    try:
        os.kill(int(holder[0]), 0)
    except PermissionError:
        return True  # somebody else's
    except (OSError, OverflowError):
        return False
    return True


class WriterLock:
    """The right to write one run store, held from construction until `release()`.

    Args:
        store: The run store's path, symbolic links resolved. The lock is the file `<store>-lock`,
            which is removed on release; one left by a killed process is taken over.

    Raises:
        RunStoreError: Another writer holds the store, or the folder cannot be written.
    """

    def __init__(self, store: Path) -> None:
        self._file = Path(f"{store}-lock")
        self._process = os.getpid()
        self._descriptor = self._acquire(store)

    def _acquire(self, store: Path) -> int:
        while True:
            try:
                descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise RunStoreError(
                    f"cannot write {store}: {error.strerror}; check the permissions of the folder "
                    f"{store.parent}, or choose another path"
                ) from error
            try:
                _lock(descriptor)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    holder = self._holder()
                    os.close(descriptor)
                    raise RunStoreError(self._refusal(store, holder)) from error
                _log.warning(
                    "the file system of %s has no locks: see to it that only one run writes there", store
                )
            # The holder before us may have removed the file after we opened it: then the lock
            # that we hold is on a file nobody else will ever see.
            if self._is_current(descriptor):
                break
            os.close(descriptor)
        self._sign(descriptor)
        return descriptor

    @property
    def stayed(self) -> bool:
        """Whether its file is where it was, or in no folder at all: it was not moved elsewhere."""
        return os.fstat(self._descriptor).st_nlink == 0 or self._is_current(self._descriptor)

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self._file.stat())
        except FileNotFoundError:
            return False

    @staticmethod
    def _sign(descriptor: int) -> None:
        """Leave a note on who holds the lock, for the other writer's error message."""
        try:
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
        except OSError:
            pass  # a full disk: the lock holds without the note

    def _holder(self) -> list[str]:
        try:
            return self._file.read_text(errors="replace").split()
        except OSError:
            return []

    @staticmethod
    def _refusal(store: Path, holder: list[str]) -> str:
        if holder == [str(os.getpid()), socket.gethostname()]:
            return (
                f"{store} is already being written by another sink of this process: end all chains in "
                "that one RunStore, or give this one another path"
            )
        who = f"process {holder[0]} on {holder[1]}" if len(holder) == 2 else "another process"
        return (
            f"{store} is being written by {who}, and a run store has one writer: choose another path, or "
            "wait until that run has ended"
        )

    def release(self) -> None:
        """Give the lock up and remove its file; once is enough."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        # A forked child (a data loader's worker) shares the lock: it must not end its parent's.
        if os.getpid() == self._process:
            try:
                # Windows removes no open file; another's that came in its place is not ours to remove.
                if sys.platform != "win32" and self._is_current(descriptor):
                    self._file.unlink(missing_ok=True)
                _unlock(descriptor)
            except OSError:
                pass  # closing ends the lock too, and the file left behind holds nobody up
        os.close(descriptor)

"""What workers share with the process: its exit, SIGTERM, and forks of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Final, Protocol

__all__ = ["current_generation", "finish_at_exit", "restore_sigterm", "worker_ended", "worker_started"]

_EXIT_TIMEOUT: Final = 10.0
"""Seconds that sinks get at exit to write what is queued."""
_SIGTERM_TIMEOUT: Final = 5.0
"""Seconds that sinks get on SIGTERM: process managers kill after about ten."""


class _Worker(Protocol):
    """A channel whose thread runs."""

    def end(self) -> None:
        """Close once everything queued is written."""

    def finish(self, deadline: float) -> bool:
        """Wait for that until `deadline`; give up what is left then."""


class _State:
    """Everything of this module that a forked child starts without."""

    def __init__(self) -> None:
        # No lock: the SIGTERM handler may interrupt whoever holds it. Single operations on the
        # set are atomic, and only the main thread touches the flag.
        self.workers: set[_Worker] = set()
        self.handler_installed = False


_state = _State()
_generation = 0


def current_generation() -> int:
    """How many forks lie between this process and the one that imported streamlens.

    What was made in another generation belongs to the parent and stays silent here.
    """
    return _generation


def worker_started(worker: _Worker) -> None:
    """See to it that `worker` gets to write what it holds when the process ends."""
    _state.workers.add(worker)
    if (
        threading.current_thread() is threading.main_thread()
        and not _state.handler_installed
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    ):
        signal.signal(signal.SIGTERM, _on_sigterm)
        _state.handler_installed = True


def worker_ended(worker: _Worker) -> None:
    """Forget a worker whose thread is about to end."""
    _state.workers.discard(worker)


def restore_sigterm() -> None:
    """Put SIGTERM's default back once no worker is left; only the main thread is able to."""
    if (
        threading.current_thread() is threading.main_thread()
        and _state.handler_installed
        and not _state.workers
    ):
        if signal.getsignal(signal.SIGTERM) is _on_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _state.handler_installed = False


def _finish_all(timeout: float) -> None:
    deadline = time.monotonic() + timeout
    workers = tuple(_state.workers)
    for worker in workers:
        worker.end()
    for worker in workers:
        worker.finish(deadline)


def finish_at_exit() -> None:
    """Have every sink write what is queued and close; `streamlens.sink` registers this."""
    _finish_all(_EXIT_TIMEOUT)
    restore_sigterm()


def _on_sigterm(signum: int, _frame: FrameType | None) -> None:
    try:
        _finish_all(_SIGTERM_TIMEOUT)
    finally:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)


def _in_child() -> None:
    # Threads do not survive a fork and locks may be held for ever in the child: what the parent
    # had is not mended but left behind.
    global _generation, _state
    _generation += 1
    if _state.handler_installed and signal.getsignal(signal.SIGTERM) is _on_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _state = _State()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)

"""Closing engines whose model is gone, at a moment when that is safe.

A model that is part of a reference cycle dies in the garbage collector, which runs wherever memory
is allocated: perhaps while this thread holds a lock that closing needs. Engines that lose their
model there wait here until the next update of another model, the next `observe`, or the exit.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine

__all__ = ["bury", "close_orphans"]

_waiting: Final[deque[Engine]] = deque()
_collecting: Final[set[int]] = set()
"""Threads that are in the garbage collector."""


def _watch_collector(phase: str, _: dict[str, Any]) -> None:
    if phase == "start":
        _collecting.add(threading.get_ident())
    else:
        _collecting.discard(threading.get_ident())


gc.callbacks.append(_watch_collector)


def bury(engine: Engine) -> None:
    """Close an engine whose model is gone: now, or at the next safe moment."""
    here = threading.current_thread()
    if threading.get_ident() in _collecting or here.name.startswith("streamlens-"):
        _waiting.append(engine)
    else:
        _close(engine)


def close_orphans() -> None:
    """Close the engines that wait; called where no lock is held."""
    while _waiting:
        _close(_waiting.popleft())


def _close(engine: Engine) -> None:
    with contextlib.suppress(Exception):
        engine.shut_down(timeout=5.0)

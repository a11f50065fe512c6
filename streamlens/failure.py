"""What wants to know that training has raised, before anything is closed."""

from __future__ import annotations

import contextlib
import logging
import sys
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

from reactivex.abc import DisposableBase
from reactivex.disposable import Disposable

from streamlens.runtime import Runtime

__all__ = ["failed", "on_failure"]

Listener = Callable[[BaseException], None]
_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]

_listeners: Final[weakref.WeakKeyDictionary[Runtime, list[Listener]]] = weakref.WeakKeyDictionary()

log: Final = logging.getLogger("streamlens")


def on_failure(runtime: Runtime, listener: Listener) -> DisposableBase:
    """Call a function when training raises: out of `with lens:`, or out of the program.

    Args:
        runtime: The run.
        listener: Called with the exception.

    Returns:
        What ends that.
    """
    _listeners.setdefault(runtime, []).append(listener)
    _hook.install()

    def remove() -> None:
        listeners = _listeners.get(runtime, [])
        with contextlib.suppress(ValueError):
            listeners.remove(listener)
        if not any(_listeners.values()):
            _hook.remove()

    return Disposable(remove)


def failed(runtime: Runtime, error: BaseException) -> None:
    """Say that training has raised; what the listeners raise is logged and goes no further."""
    for listener in tuple(_listeners.get(runtime, ())):
        try:
            listener(error)
        except Exception:
            log.exception("what should have happened on %s failed", type(error).__name__)


class _ExceptHook:
    """Stands in front of `sys.excepthook` while somebody listens."""

    def __init__(self) -> None:
        self._previous: _Hook | None = None

    def install(self) -> None:
        """Take the place in front, unless it is taken already."""
        if self._previous is None:
            self._previous, sys.excepthook = sys.excepthook, self

    def remove(self) -> None:
        """Give the place back; somebody who has come in front since keeps us, and we pass on."""
        if sys.excepthook is self and self._previous is not None:
            sys.excepthook, self._previous = self._previous, None

    def __call__(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            for runtime in tuple(_listeners):
                failed(runtime, error)
        finally:
            (self._previous or sys.__excepthook__)(kind, error, trace)


_hook: Final = _ExceptHook()

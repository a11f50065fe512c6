"""A window that shows a chart while training goes on: in a process of its own, whose main thread it has.

Toolkits want the main thread, and a loop that runs on it; a training script has given its own to
training. The process stays until the window is closed, also when the run has ended.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import queue
import struct
import subprocess
import sys
import threading
from typing import Final

from streamlens.errors import SinkError
from streamlens.sinks._chart import Chart

__all__ = ["Window", "has_screen", "main"]

_LENGTH: Final = struct.Struct("<Q")
_DRAWN_ONLY: Final = frozenset({"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"})
"""Backends of matplotlib that have no windows."""
_TURN: Final = 0.1
"""Seconds that the window handles its events before it looks for news."""

_running: Final[list[subprocess.Popen[bytes]]] = []
"""Kept, since a window outlives the sink that opened it."""


def has_screen() -> bool:
    """Whether a window can be expected to open."""
    backend = os.environ.get("MPLBACKEND", "").lower()
    if backend:
        return backend not in _DRAWN_ONLY and "inline" not in backend
    return sys.platform in {"win32", "darwin"} or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )


class Window:
    """A window, open from the first chart on."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def show(self, chart: Chart) -> None:
        """Show a chart in place of the one before; nothing, once somebody has closed the window.

        Raises:
            SinkError: No window can be opened. Nothing is shown from then on.
        """
        if self._closed:
            return
        if self._process is None:
            self._process = _start()
            _running.append(self._process)
        assert self._process.stdin is not None
        data = pickle.dumps(chart)
        try:
            self._process.stdin.write(_LENGTH.pack(len(data)) + data)
            self._process.stdin.flush()
        except OSError as error:
            self._closed = True
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            if self._process.wait() != 0:
                raise SinkError(
                    "no window can be opened to show the run in, for the reason above: pass a path, such "
                    "as Matplotlib('run.png')",
                    retry=False,
                ) from error


def _start() -> subprocess.Popen[bytes]:
    # Of the same modules as this process, whatever was done to its path; not of its main module, which
    # would train once more. A session of its own, so that Ctrl-C in a terminal ends the run alone.
    start = "from streamlens.sinks._window import main; main(open(0, 'rb', buffering=0))"
    program = f"import sys; sys.path[:] = {sys.path!r}; {start}"
    return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, start_new_session=True)


def main(source: io.RawIOBase) -> None:
    """Show the charts that come until the window is closed.

    Args:
        source: Where pickled charts come from, each after its length. Without a buffer, whose lock the
            thread that reads would hold when this process ends.
    """
    import matplotlib
    import matplotlib.pyplot as plt

    from streamlens.sinks._drawing import draw

    figure = plt.figure("streamlens")
    if matplotlib.get_backend().lower() in _DRAWN_ONLY:
        sys.exit("matplotlib has no backend with windows here: install one, such as PyQt6 or tkinter")
    news: queue.SimpleQueue[Chart] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(source, news), daemon=True).start()
    plt.show(block=False)
    while plt.fignum_exists(figure.number):
        chart = None
        while not news.empty():
            chart = news.get()
        if chart is not None:
            width, height = figure.get_size_inches()
            draw(figure, chart)
            figure.set_size_inches(width, height, forward=False)  # as large as the window is
            figure.canvas.draw_idle()
        figure.canvas.start_event_loop(_TURN)


def _read(source: io.RawIOBase, news: queue.SimpleQueue[Chart]) -> None:
    while head := _exactly(source, _LENGTH.size):
        news.put(pickle.loads(_exactly(source, _LENGTH.unpack(head)[0])))


def _exactly(source: io.RawIOBase, size: int) -> bytes:
    """So many bytes; none at the end."""
    data = b""
    while len(data) < size:
        piece = source.read(size - len(data))
        if not piece:
            return b""
        data += piece
    return data

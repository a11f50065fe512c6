"""`Matplotlib`: lines and histograms of a run, as a picture, in a window or in a notebook."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from streamlens.errors import missing_package
from streamlens.frame import Frame
from streamlens.notebook import notebook_shell
from streamlens.sink import RunInfo, Sink, ValueKind
from streamlens.sinks._chart import Chart
from streamlens.sinks._run_file import first_claimed
from streamlens.sinks._window import Window, has_screen

__all__ = ["Matplotlib"]

_FORMATS: Final = ("pdf", "png", "svg")
_SHARE: Final = 20
"""Drawing takes a twentieth of the time at most, whatever it costs."""
_DPI: Final = 110


class Matplotlib(Sink):
    """Draws a run with matplotlib, a panel a topic: while it runs, and with or without a screen.

    - A number a layer, or a layer and named component, is a line over steps. A line has all its
      spikes and gaps, though of a long run not all of its points; where a number is not finite, there
      is a mark at the panel's foot.
    - A histogram (the operator `histogram`) and any other tensor (64 bins of equal width) are the
      latest distribution of each layer.
    - An alert, or anything else that carries a sentence, is a dashed line at its step.

    With a `path` the picture is written anew every few seconds, and when the run ends; no screen is
    needed. A picture that is there already stays as it is: the next free name with a number
    (`run-2.png`) is taken, with a log line. A resumed run begins a picture of its own, since the earlier
    steps are not in its memory; one that goes back to a snapshot in the same process forgets what lay
    beyond it.

    Live, the picture is in the notebook's cell that made the sink, or in a window, which has a process of
    its own and stays until somebody closes it.

    Args:
        path: The picture: `.png`, `.svg` or `.pdf`; it and its folder are made if need be.
        live: Whether to show it while the run goes on; by default only where no path is given.
        seconds: How often it is drawn anew; more seldom where drawing would take more than a twentieth
            of the time.

    Attributes:
        path: The picture that is written, if any.

    Raises:
        ImportError: The `matplotlib` package is missing.
        ValueError: The path has another suffix, there is nothing to show it in, or `seconds` is not
            positive.

    Example:
        >>> lens.pipe(uw_ratio()).subscribe(Matplotlib("runs/first/run.png"))  # doctest: +SKIP
    """

    kinds: ClassVar[frozenset[ValueKind]] = frozenset({"scalar", "vector", "text"})

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, live: bool | None = None, seconds: float = 2.0
    ) -> None:
        if not seconds > 0:
            raise ValueError(f"Matplotlib(seconds=) is a number of seconds above 0; got {seconds!r}")
        if path is not None and Path(path).suffix.lower().lstrip(".") not in _FORMATS:
            raise ValueError(
                f"Matplotlib(path) is a picture such as 'run.png', or .svg or .pdf; got {str(path)!r}"
            )
        try:
            # No pyplot here: it would choose a backend, and that is the user's to choose.
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise missing_package("Matplotlib", "matplotlib", "mpl") from error
        self._figure: Any = Figure(dpi=_DPI)
        FigureCanvasAgg(self._figure)
        self.path = self._wanted = None if path is None else Path(path).absolute()
        self._seconds = self.max_latency = seconds
        self._chart = Chart()
        self._stale = False
        self._run = RunInfo(id="")
        self._written = False
        self._cell: Any = None
        self._window: Window | None = None
        if live or (live is None and path is None):
            self._cell = _display()
            if self._cell is None:
                if not has_screen():
                    raise ValueError(
                        "Matplotlib has neither a notebook nor a screen to draw on here: pass a path, "
                        "such as Matplotlib('run.png')" + (", without live=True" if live else "")
                    )
                self._window = Window()

    @staticmethod
    def can_show() -> bool:
        """Whether there is something to draw on live: a notebook or, as far as is known, a screen."""
        return notebook_shell() is not None or has_screen()

    def open(self, run: RunInfo) -> None:
        """Begin a picture, or go on with the one of this run."""
        if run.id != self._run.id:
            self._chart = Chart(title=run.name)
            self.path, self._written = self._wanted, False
        elif run.resumed_at is not None and run.resumption != self._run.resumption:
            self._chart.cut(run.resumed_at)
        self._run = run

    def write(self, frames: Sequence[Frame]) -> None:
        """Take frames into the picture."""
        for frame in frames:
            self._chart.add(frame)
        self._stale = True

    def flush(self) -> None:
        """Draw the picture anew if something has come.

        Raises:
            OSError: It cannot be written; the next flush tries again.
            SinkError: No window can be opened.
        """
        if not self._stale:
            return
        start = time.monotonic()
        if self._window is not None:
            self._window.show(self._chart)
        if self._wanted is not None or self._cell is not None:
            self._draw()
        self._stale = False
        self.max_latency = max(self._seconds, _SHARE * (time.monotonic() - start))

    def close(self) -> None:
        """Draw what is not drawn yet, and let go of the figure's parts.

        Raises:
            OSError: The picture cannot be written.
        """
        try:
            self.flush()
        finally:
            self._figure.clear()

    def __repr__(self) -> str:
        return f"Matplotlib({'' if self.path is None else repr(str(self.path))})"

    def _draw(self) -> None:
        from streamlens.sinks._drawing import draw

        draw(self._figure, self._chart)
        if self._cell is not None:
            self._cell.update(_Picture(self._rendered("png")))
        if self._wanted is not None:
            self._save(self._wanted)

    def _rendered(self, kind: str) -> bytes:
        data = io.BytesIO()
        self._figure.savefig(data, format=kind)
        return data.getvalue()

    def _save(self, wanted: Path) -> None:
        data = self._rendered(wanted.suffix.lower().lstrip("."))
        if not self._written:
            self.path, _ = first_claimed(wanted, _new)
            self._written = True
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)  # it may have been removed
        # Beside its place first: whoever looks finds a whole picture.
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            beside.write_bytes(data)
            beside.replace(self.path)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise


class _Picture:
    """What a notebook shows as the picture."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def _repr_png_(self) -> bytes:
        return self._data

    def __repr__(self) -> str:
        return "a run, as streamlens draws it"


class _Waiting:
    """What a notebook shows before there is a picture."""

    def __repr__(self) -> str:
        return "streamlens draws the run here"


def _new(path: Path) -> Path | None:
    """The path, if nothing is there; it is taken then."""
    try:
        path.open("xb").close()
    except FileExistsError:
        return None
    return path


def _display() -> Any:
    """A place in the notebook's cell that is running, to be filled from any thread; None elsewhere."""
    if notebook_shell() is None:
        return None
    display: Any = importlib.import_module("IPython.display").display
    return display(_Waiting(), display_id=True)

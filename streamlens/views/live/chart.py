"""`LiveChart`: charts in a notebook's cell that move while the run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar, Final, Literal

from streamlens.errors import StreamlensError, missing_package
from streamlens.frame import Frame
from streamlens.notebook import CellKey, current_cell, notebook_shell
from streamlens.runtime import log
from streamlens.sink import RunInfo, Sink, ValueKind
from streamlens.views.live.board import Board
from streamlens.views.live.panel import Panel
from streamlens.views.live.place import Output, Place, Widget, has_widgets

__all__ = ["LiveChart"]

Host = Literal["auto", "widget", "output"]

_SETTLING: Final = 3.0
"""Seconds in which a widget's front end may still be starting, and is told everything each time."""

_SECONDS: Final = 2.0
"""How often an output is replaced where there are no widgets."""

_OUTPUT_SHARE: Final = 20
"""Replacing an output takes a twentieth of the time at most, whatever it costs."""

_PATIENCE: Final = 5.0
"""Seconds that the end of a cell waits for what is still queued."""

_charts: Final[set[LiveChart]] = set()
"""Those that a cell which runs again would end; kept until they have left their picture."""


class LiveChart(Sink):
    """Charts of what it is given, in the notebook's cell that makes it, while the run goes on.

    A topic that a shipped view draws has that view's chart (`loss`, `uw_ratio`, also its moving average),
    any other metric a line a layer, histograms and percentiles their first layer's. Alerts and
    controllers' actions stand in them as marks, with their sentences. Rows are appended several times a
    second, without drawing a chart anew and without anything on the training thread. A chart has at
    most a few thousand points, however long the run is; extremes, NaN and infinities are among them.

    When a cell has ended, its output is a picture that a saved notebook keeps: a Vega-Lite chart, and
    a PNG where vl-convert is installed. It goes on moving with the next frames. A cell that is run again
    ends the charts that it made before.

    Args:
        hz: How often rows are appended, a second.
        host: `"widget"` needs the package anywidget, which JupyterLab and the classic notebook can show;
            `"output"` replaces the cell's output every two seconds, which any front end can. `"auto"` takes
            the widget but in Colab and VS Code, and where anywidget is missing.
        panels: The charts there are from the start; topics that none of them draws get one of their own.

    Attributes:
        board: What the charts hold.

    Raises:
        ValueError: `hz` is not between 0 and 20, or there is no such host.
        ImportError: `host` is `"widget"`, and anywidget is missing.
        StreamlensError: This is no notebook.

    Example:
        >>> lens.pipe(uw_ratio(), ema(0.9)).subscribe(LiveChart())  # doctest: +SKIP
    """

    kinds: ClassVar[frozenset[ValueKind]] = frozenset({"scalar", "text"})

    def __init__(self, *, hz: float = 5.0, host: Host = "auto", panels: Sequence[Panel] = ()) -> None:
        if isinstance(hz, bool) or not isinstance(hz, int | float) or not 0 < hz <= 20:
            raise ValueError(f"LiveChart(hz=) is a number above 0 and at most 20, such as 5; got {hz!r}")
        if host not in ("auto", "widget", "output"):
            raise ValueError(f"LiveChart(host={host!r}): use 'auto', 'widget' or 'output'")
        shell = notebook_shell()
        if shell is None:
            raise StreamlensError(_NO_NOTEBOOK)
        self.max_latency = 1.0 / hz
        self.board = Board(panels)
        self._run = RunInfo(id="")
        self._cell = current_cell()
        self._chains: list[Callable[[], None]] = []
        self._shell: Any = shell
        self._ended = False
        self._over = False
        self._pictured = True
        self._due = 0.0
        _end_earlier(self._cell)
        self._place: Place = _place(host, self.board)
        self._born = time.monotonic()
        self._watch()

    def subscribed(self, dispose: Callable[[], None]) -> None:
        """Note what ends a chain, for the time when the charts end first."""
        self._chains.append(dispose)

    def open(self, run: RunInfo) -> None:
        """Begin to show a run, or forget what it will do again since it went back."""
        if run.id == self._run.id and run.resumed_at is not None and run.resumption != self._run.resumption:
            self.board.cut(run.resumed_at)
        self._run = run
        self._over = False
        if not self._ended:
            self._watch()

    def write(self, frames: Sequence[Frame]) -> None:
        """Take frames in."""
        if not self._ended:
            self.board.take(frames)

    def flush(self) -> None:
        """Show what has come."""
        if self._ended:
            return
        if isinstance(self._place, Output):
            self._replace()
            return
        message = self.board.changes()
        if message is None:
            return
        self._pictured = False
        if time.monotonic() - self._born < _SETTLING:
            message = self.board.whole()
        self._place.tell(message)

    def close(self) -> None:
        """The last chain has ended: the cell that runs leaves the picture when it ends."""
        self._over = True

    def end(self) -> None:
        """End the chains that end here, and leave a picture. Does nothing the second time."""
        if self._ended:
            return
        self.rest()
        if self.board.empty:
            # A widget that is closed is an error in a notebook that is opened later.
            self._place.rest(None)
        self._let_go()

    def rest(self) -> None:
        """Leave a picture of all that has come, for a notebook that is saved now."""
        if not self._ended:
            self.drain(_PATIENCE)
            if not self._pictured:
                self._pictured = True
                self._place.rest(self.board.picture())
            if self._over:
                self._unwatch()

    def _replace(self) -> None:
        """Replace the output, if it is time."""
        start = time.monotonic()
        if not self.board.pending:
            return
        self._pictured = False
        if start < self._due:
            return
        self.board.pending = False
        self._place.rest(self.board.picture())
        self._due = start + max(_SECONDS, _OUTPUT_SHARE * (time.monotonic() - start))

    def _watch(self) -> None:
        """Be told when a cell has ended, and when the one that made the charts runs again."""
        if self not in _charts:
            _charts.add(self)
            self._shell.events.register("post_run_cell", self._cell_ended)

    def _unwatch(self) -> None:
        if self in _charts:
            _charts.discard(self)
            self._shell.events.unregister("post_run_cell", self._cell_ended)
            self._place.close()

    def _cell_ended(self, *_: Any) -> None:
        try:
            self.rest()
        except Exception:
            log.exception("the picture of the live charts cannot be made")

    def _let_go(self) -> None:
        self._ended = True
        self._unwatch()
        for dispose in self._chains:
            dispose()
        self._chains.clear()

    def _end_for(self, later: CellKey) -> None:
        """End without a picture if the cell that made it runs again: its output is gone."""
        if self._cell is not None and self._cell.is_rerun(later):
            log.info("this notebook cell ran before: its earlier live charts have ended")
            self._let_go()

    def __repr__(self) -> str:
        return f"LiveChart({'ended' if self._ended or self._over else f'{1.0 / self.max_latency:g} Hz'})"


def _place(host: Host, board: Board) -> Place:
    if host == "widget" and find_spec("anywidget") is None:
        raise missing_package("LiveChart(host='widget')", "anywidget", "notebook")
    if host == "widget" or (host == "auto" and has_widgets()):
        return Widget(board.whole)
    return Output()


def _end_earlier(cell: CellKey | None) -> None:
    if cell is not None:
        for chart in tuple(_charts):
            chart._end_for(cell)


_NO_NOTEBOOK: Final = (
    "live charts need a notebook, and this is none. In a script: `streamlens ui run.db` shows the run that "
    "sl.sinks.RunStore('run.db') records while it goes on, `streamlens report run.db` makes a page of it "
    "afterwards, and sl.sinks.Matplotlib('run.png') keeps a picture up to date"
)

"""`Console`: the latest values and the progress of a run, in the terminal."""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Final

from streamlens.errors import missing_package
from streamlens.frame import Frame, to_numpy
from streamlens.sink import RunInfo, Sink, ValueKind

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import RenderableType
    from rich.live import Live
    from rich.progress import Progress
    from rich.table import Table

__all__ = ["Console"]

_LINE_PAUSE: Final = 1.0
"""Seconds between plain lines."""
_COLUMN_WIDTH: Final = 12
_STYLES: Final = {"critical": "bold red", "warning": "yellow", "info": "cyan"}
"""How the sentences of alerts are printed in a terminal, by their severity."""


class Console(Sink):
    """Shows the last value of each topic and layer, and a progress bar in steps.

    In a terminal this is a live table: on top what belongs to the model as a whole (losses and
    accuracies first), below it a row a layer and a column a topic. What the program prints
    meanwhile appears above it. Elsewhere (a file, a pipe, a notebook) it is plain lines: the
    model's own values, and of other topics the median over the layers. The sentence that a frame carries as
    `meta["text"]`, as alerts do, is a line of its own, at once.

    Args:
        total: How many steps the run will take, for the progress bar.
        max_rows: The most layers to show; how many more there are is said.
        every: Plain lines at steps divisible by this; by default at most one a second.
        console: The rich console to draw on; standard output's by default.

    Raises:
        ImportError: The `rich` package is missing.
        ValueError: A number is below 1.
    """

    kinds: ClassVar[frozenset[ValueKind]] = frozenset({"scalar", "text"})
    max_latency = 0.25

    def __init__(
        self,
        total: int | None = None,
        *,
        max_rows: int = 20,
        every: int | None = None,
        console: RichConsole | None = None,
    ) -> None:
        for name, number in (("total", total), ("max_rows", max_rows), ("every", every)):
            if number is not None and number < 1:
                raise ValueError(f"Console({name}=) is at least 1; got {number!r}")
        try:
            from rich.console import Console as RichConsole
        except ImportError as error:
            raise missing_package("Console", "rich", "lab") from error
        self.total = total
        self.max_rows = max_rows
        self.every = every
        self._console = console or RichConsole()
        # A notebook shows each redrawing of a live table once more.
        self._live_wanted = (
            self._console.is_terminal and not self._console.is_dumb_terminal and not self._console.is_jupyter
        )
        self._live: Live | None = None
        self._progress: Progress | None = None
        self._latest = _Latest()
        self._last_line = -math.inf
        self._unshown = False

    def open(self, run: RunInfo) -> None:
        """Start drawing."""
        self._latest = _Latest(run.name)
        self._last_line = -math.inf
        self._unshown = False
        if self._live_wanted:
            self._start_live(run)

    def write(self, frames: Sequence[Frame]) -> None:
        """Take the values in; `flush` draws them."""
        for frame in frames:
            if "text" in frame.meta:
                self._print_text(frame)
                continue
            if self.every is not None and self._live is None and self._line_due(frame.step):
                self._print_line()
            self._latest.update(frame)
            self._unshown = True

    def flush(self) -> None:
        """Redraw, or print a line if one is due."""
        if self._live is not None and self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=self._latest.steps_done)
            self._live.update(self._render(), refresh=True)
        elif self.every is None and self._unshown and time.monotonic() - self._last_line >= _LINE_PAUSE:
            self._print_line()

    def close(self) -> None:
        """Draw once more and give the terminal back."""
        try:
            if self._live is not None:
                self.flush()
            elif self._unshown:
                self._print_line()
        finally:
            live, self._live, self._progress = self._live, None, None
            if live is not None:
                live.stop()
                _drawing.discard(self)

    def _line_due(self, step: int) -> bool:
        """Whether a new step begins after one that is to be printed."""
        latest = self._latest.step
        return self._unshown and self.every is not None and step > latest and latest % self.every == 0

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        self._unshown = False
        # One write, so that lines that other threads print are not cut in two.
        self._console.file.write(self._latest.line(self.total) + "\n")
        self._console.file.flush()

    def _print_text(self, frame: Frame) -> None:
        """Print the sentence of a frame, above the table where there is one."""
        severity = str(frame.meta.get("severity", ""))
        over = frame.meta.get("state") == "end"
        label = "OVER" if over else severity.upper()
        what = str(frame.meta.get("rule", frame.topic))
        line = f"step {frame.step}  {label + ' ' if label else ''}{what}: {frame.meta['text']}"
        if self._live is None:
            self._console.file.write(line + "\n")
            self._console.file.flush()
            return
        from rich.text import Text

        style = "green" if over else _STYLES.get(severity, "")
        self._live.console.print(Text(line, style=style))

    def _start_live(self, run: RunInfo) -> None:
        from rich.live import Live
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        done = 0 if run.resumed_at is None else run.resumed_at + 1
        self._progress.add_task(run.name or "training", total=self.total, completed=done)
        # No thread of its own: this sink's worker draws.
        self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="ellipsis")
        self._live.start()
        _drawing.add(self)

    def _render(self) -> RenderableType:
        from rich.console import Group

        parts: list[RenderableType] = []
        if self._latest.own:
            parts.append(self._own_table())
        if self._latest.layered:
            parts.append(self._layer_table())
        if self._progress is not None:
            parts.append(self._progress)
        return Group(*parts)

    def _own_table(self) -> Table:
        from rich.table import Table

        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="bold")
        table.add_column(justify="right")
        for name, value in self._latest.own_values()[: self.max_rows]:
            table.add_row(name, _compact(value))
        return table

    def _layer_table(self) -> Table:
        from rich import box
        from rich.table import Table

        layers, topics = self._latest.layers, list(self._latest.layered)
        widest = max(len(layer) for layer in layers)
        room = max(1, (self._console.width - min(widest, 40) - 2) // (_COLUMN_WIDTH + 2))
        caption = []
        if len(layers) > self.max_rows:
            caption.append(f"{len(layers) - self.max_rows} more layers")
        if len(topics) > room:
            caption.append(f"{len(topics) - room} more topics")
        table = Table(box=box.SIMPLE_HEAD, caption=" and ".join(caption) or None, pad_edge=False)
        table.add_column("layer", no_wrap=True, max_width=40)
        for topic in topics[:room]:
            table.add_column(topic, justify="right", min_width=_COLUMN_WIDTH, overflow="fold")
        for layer in list(layers)[: self.max_rows]:
            values = (self._latest.layered[topic].get(layer) for topic in topics[:room])
            table.add_row(layer, *("" if value is None else _compact(value) for value in values))
        return table


class _Latest:
    """The last value of everything seen."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.step = -1
        self.steps_done = 0
        self.epoch = 0
        self.own: dict[str, float] = {}
        self.layered: dict[str, dict[str, float]] = {}
        self.layers: dict[str, None] = {}

    def update(self, frame: Frame) -> None:
        """Take a frame's values in."""
        self.step = max(self.step, frame.step)
        self.steps_done = self.step + 1
        self.epoch = max(self.epoch, frame.epoch)
        for layer, value in frame.items():
            array = to_numpy(value)
            for name, number in zip(frame.components or ("",), array.ravel().tolist(), strict=False):
                topic = f"{frame.topic}.{name}" if name and len(frame.components) > 1 else frame.topic
                if layer:
                    self.layered.setdefault(topic, {})[layer] = float(number)
                    self.layers.setdefault(layer)
                else:
                    self.own[topic] = float(number)

    def own_values(self) -> list[tuple[str, float]]:
        """The model's own values: losses, then accuracies, then the others as they came."""
        return sorted(self.own.items(), key=lambda item: _rank(item[0]))

    def line(self, total: int | None) -> str:
        """Everything in one line."""
        steps = f"{self.steps_done}/{total}" if total is not None else f"{self.steps_done}"
        parts = [f"step {steps}", f"epoch {self.epoch}"]
        parts += [f"{name} {_compact(value)}" for name, value in self.own_values()]
        for topic, values in self.layered.items():
            finite = [value for value in values.values() if math.isfinite(value)]
            middle = statistics.median(finite) if finite else math.nan
            parts.append(f"{topic} {_compact(middle)} (median of {len(values)})")
        return "  ".join(([self.name] if self.name else []) + parts)


def _rank(topic: str) -> int:
    if "loss" in topic:
        return 0
    return 1 if "accuracy" in topic else 2


def _compact(value: float) -> str:
    """Four significant digits, in few characters."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return f"{value:.2e}"


_drawing: weakref.WeakSet[Console] = weakref.WeakSet()


def _give_output_back() -> None:
    """Let a forked child print as if nothing were drawn: the table is the parent's."""
    for name in ("stdout", "stderr"):
        original = getattr(getattr(sys, name), "rich_proxied_file", None)
        if _drawing and original is not None:
            setattr(sys, name, original)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_give_output_back)

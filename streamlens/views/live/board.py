"""`Board`: the charts of a run while it goes on, and what a browser has to be told of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from streamlens.frame import Frame
from streamlens.runtime import log
from streamlens.views.live.panel import Panel, panel_of
from streamlens.views.live.picture import together
from streamlens.views.live.topics import Topics

__all__ = ["Board", "Message"]

MOST_POINTS: Final = 8_000
"""Points on the screen, in all charts together: so many a browser redraws five times a second."""

_MOST_PANELS: Final = 24
_SHARE: Final = 0.01
"""Drawing charts anew takes this share of the time at most."""

_ALLOWANCE: Final = 1.0
"""Seconds of drawing that are free, so that charts appear at once."""

_Key: TypeAlias = tuple[str, str]
"""A topic and the kind of its rows: those of lines, or of cells."""


@dataclass(frozen=True)
class Message:
    """What a browser is told.

    Attributes:
        content: Plain containers.
        numbers: The rows that `content` speaks of, column after column.
    """

    content: dict[str, Any]
    numbers: bytes


class Board:
    """Takes frames in and says what changed.

    May be used from several threads.

    Args:
        panels: The charts; a topic that none of them draws gets one of its own.
        most_points: The most points on the screen, in all charts together.
    """

    def __init__(self, panels: Sequence[Panel] = (), most_points: int = MOST_POINTS) -> None:
        self.panels = list(panels)
        self._lock = threading.RLock()
        self._topics = Topics(most_points)
        self._known: set[str] = set()
        self._sent: set[_Key] = set()
        self._number = 0
        self._born = time.monotonic()
        self._spent = 0.0
        self.pending = False

    def take(self, frames: Sequence[Frame]) -> None:
        """Take frames in.

        Args:
            frames: Frames on the host, oldest first.
        """
        with self._lock:
            for frame in frames:
                topic = self._topics.add(frame)
                if topic is not None and topic not in self._known:
                    self._known.add(topic)
                    self._place(topic)
            self.pending = True

    def _place(self, topic: str) -> None:
        if any(panel.claims(topic) for panel in self.panels) or len(self.panels) >= _MOST_PANELS:
            return
        made = panel_of(topic)
        if all(panel.key != made.key for panel in self.panels):
            self.panels.append(made)

    def cut(self, step: int) -> None:
        """Forget what lies beyond a step: the run has gone back there.

        Args:
            step: The last one that is kept.
        """
        with self._lock:
            self._topics.cut(step)
            self.pending = True

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        with self._lock:
            return not any(panel.present(self._topics) for panel in self.panels)

    # -- what is told ------------------------------------------------------------------------

    def changes(self, *, all_of_it: bool = False) -> Message | None:
        """What has changed since the last call; None if nothing has.

        Args:
            all_of_it: Draw charts anew that need it, whatever that costs.
        """
        with self._lock:
            drawn = self._redraw(free=all_of_it)
            self.pending = False
            rows, numbers = self._rows(self._wanted(), whole=False)
            for kept in self._topics.numbers.values():
                kept.settle()
            if not drawn and not rows:
                return None
            self._number += 1
            return self._message("update", drawn, rows, numbers)

    def whole(self) -> Message:
        """All of it, as of the last `changes`: for a browser that was not there."""
        with self._lock:
            drawn = [panel for panel in self.panels if panel.specification is not None]
            return self._message("whole", drawn, *self._rows(self._wanted(), whole=True))

    def picture(self) -> dict[str, Any] | None:
        """All charts as one specification with its data, as things stand; None where there are none."""
        with self._lock:
            shown = [panel for panel in self.panels if panel.present(self._topics)]
            if not shown:
                return None
            rows = {topic: of for panel in shown for topic, of in panel.rows(self._topics).items()}
            charts = [(panel.title, panel.chart(self._topics)) for panel in shown]
        return together(charts, rows)

    def _redraw(self, *, free: bool) -> list[Panel]:
        drawn = []
        for panel in tuple(self.panels):
            if not panel.due(self._topics):
                continue
            allowed = _ALLOWANCE + _SHARE * (time.monotonic() - self._born)
            if self._spent > allowed and not free and panel.specification is not None:
                continue
            start = time.thread_time()
            try:
                panel.draw(self._topics)
            except Exception:
                # One chart that cannot be drawn must not keep the others from it.
                log.exception("the chart %r cannot be drawn and is left out", panel.key)
                self.panels.remove(panel)
            else:
                drawn.append(panel)
            self._spent += time.thread_time() - start
        return drawn

    def _wanted(self) -> dict[_Key, None]:
        return {
            (binding.topic, "cell" if binding.form in ("cell", "bad") else "line"): None
            for panel in self.panels
            for binding in panel.bindings or ()
        }

    def _rows(self, wanted: dict[_Key, None], *, whole: bool) -> tuple[list[dict[str, Any]], bytes]:
        told: list[dict[str, Any]] = []
        parts: list[bytes] = []
        for topic, form in wanted:
            kept = self._topics.numbers[topic]
            fresh = whole or (topic, form) not in self._sent
            stretch = 0 if fresh else kept.changed
            if stretch is None:
                continue
            columns = kept.cells(stretch) if form == "cell" else kept.lines(stretch)
            told.append(
                {
                    "topic": topic,
                    "form": form,
                    "since": kept.begin(stretch),
                    "count": columns.shape[1],
                    "columns": columns.shape[0],
                }
            )
            parts.append(np.ascontiguousarray(columns, dtype="<f8").tobytes())
            if not whole:
                self._sent.add((topic, form))
        return told, b"".join(parts)

    def _message(
        self, kind: str, panels: Sequence[Panel], rows: list[dict[str, Any]], numbers: bytes
    ) -> Message:
        charts = [
            {
                "key": panel.key,
                "title": panel.title,
                "reading": panel.reading,
                "specification": panel.specification,
                "datasets": panel.datasets,
                "bindings": [binding.to_dict() for binding in panel.bindings or ()],
            }
            for panel in panels
        ]
        order = [panel.key for panel in self.panels]
        content = {"kind": kind, "number": self._number, "order": order, "charts": charts, "rows": rows}
        return Message(content, numbers)

"""Where live charts stand in a notebook: a widget that rows are sent to, or an output that is replaced."""

from __future__ import annotations

import importlib
import os
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from typing import Any, Final

from streamlens.views.live.board import Message
from streamlens.views.live.picture import ALT, bundle
from streamlens.views.theme import vega_config

__all__ = ["Output", "Place", "Widget", "has_widgets"]

_WIDGET: Final = "application/vnd.jupyter.widget-view+json"
_BEGUN: Final = {"text/plain": "streamlens draws the run here"}

# The bundle and the charts' host set globals; the page may have others of these names.
_HEAD: Final = """\
const streamlensBefore = ["vega", "vegaLite", "vegaEmbed", "streamlensCharts"].map(
  (name) => [name, globalThis[name]],
);
"""
_BETWEEN: Final = """
const { vega, vegaEmbed, streamlensCharts } = globalThis;
for (const [name, value] of streamlensBefore) {
  if (value === undefined) delete globalThis[name];
  else globalThis[name] = value;
}
"""


class Place(ABC):
    """An output of a notebook's cell that is running."""

    def __init__(self) -> None:
        self._display: Any = importlib.import_module("IPython.display")
        self._id = uuid.uuid4().hex

    def _show(self, data: dict[str, Any], *, update: bool) -> None:
        metadata = {"image/png": {"alt": ALT}} if "image/png" in data else {}
        self._display.display(data, metadata=metadata, raw=True, display_id=self._id, update=update)

    @abstractmethod
    def tell(self, message: Message) -> None:
        """Show what has changed."""

    def rest(self, picture: dict[str, Any] | None) -> None:
        """Leave a picture that a saved notebook keeps.

        Args:
            picture: A specification with its data; None for nothing to show.
        """
        self._show(bundle(picture), update=True)

    @abstractmethod
    def close(self) -> None:
        """Let go of the front end; what is shown stays."""


class Widget(Place):
    """A widget that keeps its charts and has rows sent to it.

    While nothing comes, its output is a picture: whoever saves the notebook then keeps that. It wakes with
    the next message.

    Args:
        whole: Gives all there is to show, for a front end that asks.
    """

    def __init__(self, whole: Callable[[], Message]) -> None:
        super().__init__()
        self._whole = whole
        self._widget: Any = _widget_class()(whole)
        self._resting = False
        self._show(self._view, update=False)

    @property
    def _view(self) -> dict[str, Any]:
        model = {"version_major": 2, "version_minor": 1, "model_id": self._widget.model_id}
        return {_WIDGET: model, **_BEGUN}

    def tell(self, message: Message) -> None:
        """Send what has changed."""
        if self._widget is None:
            # It is told everything when it is made.
            self._widget = _widget_class()(self._whole)
        else:
            self._widget.send(message.content, [message.numbers])
        if self._resting:
            self._resting = False
            self._show(self._view, update=True)

    def rest(self, picture: dict[str, Any] | None) -> None:
        """Leave a picture."""
        super().rest(picture)
        self._resting = True

    def close(self) -> None:
        """Close the widget, and leave nothing of its code in a notebook that keeps widgets."""
        widget, self._widget, self._resting = self._widget, None, True
        if widget is not None:
            widget.end()


class Output(Place):
    """An output that is replaced by a new chart, for front ends that have no widgets of ours."""

    def __init__(self) -> None:
        super().__init__()
        self._show(_BEGUN, update=False)

    def tell(self, message: Message) -> None:
        """Nothing: rows cannot be sent there."""

    def close(self) -> None:
        """Nothing: the output is the notebook's."""


def has_widgets() -> bool:
    """Whether the front end is one in which our widget is known to work, and anywidget is there."""
    if "google.colab" in sys.modules or "VSCODE_PID" in os.environ:
        return False
    return find_spec("anywidget") is not None


@cache
def _code() -> tuple[str, str]:
    """The widget's script, with all that it needs in it, and its style sheet."""
    folder = files("streamlens.views")
    bundled = folder.joinpath("vega/vega.min.js").read_text(encoding="utf-8")
    host = folder.joinpath("page/host.js").read_text(encoding="utf-8")
    script = folder.joinpath("page/live.js").read_text(encoding="utf-8")
    style = folder.joinpath("page/live.css").read_text(encoding="utf-8")
    return f"{_HEAD}{bundled}\n{host}{_BETWEEN}{script}", style


@cache
def _widget_class() -> Any:
    """The widget, made when it is first needed: anywidget is an extra."""
    anywidget: Any = importlib.import_module("anywidget")
    traitlets: Any = importlib.import_module("traitlets")
    script, style = _code()

    class LiveCharts(anywidget.AnyWidget):  # type: ignore[misc]
        """Charts of a run."""

        _esm = script
        _css = style
        board = traitlets.Any().tag(sync=True)
        configs = traitlets.Dict().tag(sync=True)

        def __init__(self, whole: Callable[[], Message]) -> None:
            self._whole = whole
            super().__init__(configs={"light": vega_config("light"), "dark": vega_config("dark")})
            self.on_msg(self._asked)

        def get_state(self, key: Any = None, drop_defaults: bool = False) -> dict[str, Any]:
            """The state, with the charts as they are when somebody asks: a page that was loaded anew does."""
            state: dict[str, Any] = super().get_state(key, drop_defaults)
            if "board" in state:
                whole = self._whole()
                state["board"] = {"content": whole.content, "numbers": whole.numbers}
            return state

        def _asked(self, _: Any, content: Any, __: Any) -> None:
            if isinstance(content, dict) and content.get("kind") == "whole":
                whole = self._whole()
                self.send(whole.content, [whole.numbers])

        def end(self) -> None:
            """Close all of it; the script goes from the state that notebooks may save."""
            self._esm = ""
            self.layout.close()
            self.close()

    return LiveCharts

"""What stays in a saved notebook: the charts as one Vega-Lite chart, and as a picture."""

from __future__ import annotations

import base64
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import altair as alt

from streamlens.views.marks import WIDTH
from streamlens.views.sources import AnyChart, filled
from streamlens.views.stack import stack
from streamlens.views.theme import themed

__all__ = ["ALT", "MIME", "bundle", "together"]

MIME: Final = "application/vnd.vegalite.v5+json"
"""What JupyterLab, Notebook 7 and VS Code draw by themselves; nbclassic and Colab show the PNG."""

ALT: Final = "streamlens: charts of a run"
"""What is read out in place of the picture."""

_SCHEMA: Final = "https://vega.github.io/schema/vega-lite/v5.json"
"""Says which version the specification is written in; nobody loads it."""

_WIDTH: Final = 600
"""Pixels a chart is wide beside its labels."""


def together(
    charts: Sequence[tuple[str, AnyChart]], rows: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Charts, one below the other, as one specification with its data.

    Args:
        charts: Title and chart of each.
        rows: The rows of topics that charts have only the names of.
    """
    titled = [
        cast("alt.LayerChart", chart.properties(title=title) if title else chart) for title, chart in charts
    ]
    specification = filled(themed(stack(*titled)), rows)
    specification["$schema"] = _SCHEMA
    _narrow(specification)
    return specification


def _narrow(part: Any) -> None:
    """Make charts of the shipped views' width as narrow as a notebook's cell is."""
    if isinstance(part, dict):
        if part.get("width") == WIDTH:
            part["width"] = _WIDTH
        for key in ("layer", "vconcat"):
            _narrow(part.get(key))
    elif isinstance(part, list):
        for entry in part:
            _narrow(entry)


def bundle(specification: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a notebook's output holds of the charts, by kind.

    Args:
        specification: What `together` made; None where there is nothing to show.

    Returns:
        The Vega-Lite chart, a PNG where vl-convert is installed, and words.
    """
    if specification is None:
        return {"text/plain": "streamlens: nothing has come to be drawn"}
    shown: dict[str, Any] = {MIME: specification, "text/plain": ALT}
    png = _png(specification)
    if png is None:
        shown["text/plain"] += " (a picture comes with pip install 'streamlens[export]')"
    else:
        shown["image/png"] = base64.b64encode(png).decode("ascii")
    return shown


def _png(specification: Mapping[str, Any]) -> bytes | None:
    try:
        vl_convert = importlib.import_module("vl_convert")
    except ImportError:
        return None
    own = {key: value for key, value in specification.items() if key != "$schema"}
    return cast("bytes", vl_convert.vegalite_to_png(own))

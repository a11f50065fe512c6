"""A strip of rows below a chart over steps: shares of each layer, under the same step axis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import altair as alt
import numpy as np
import pandas as pd

from streamlens.views.heatmap import cells
from streamlens.views.marks import WIDTH, Limits, step_axis
from streamlens.views.series import Series
from streamlens.views.theme import NOT_FINITE

__all__ = ["with_strip"]

_GAP: Final = 30
"""Pixels between the chart and the strip, with the strip's title."""

_ROW: Final = 13
_LEAST_ROW: Final = 3
_MOST_HEIGHT: Final = 130
_LETTERS: Final = 21


def with_strip(
    chart: alt.LayerChart,
    lines: Sequence[Series],
    *,
    title: str,
    limits: Limits | None,
    max_cells: int,
) -> alt.LayerChart:
    """A chart with a heatmap of shares below it, a row a layer, that pans and zooms along with it.

    Both are one chart with one step axis at the foot, so that a host can give it any width. A cell holds
    the mean over its steps; one NaN among them makes it magenta.

    Args:
        chart: A chart over steps, of a height of its own.
        lines: One or more series of shares in [0, 1] that are not empty, the first for the top row.
        title: What the colours stand for.
        limits: The first and last step of the axis.
        max_cells: The most cells drawn.
    """
    table = cells(lines, max_cells, log=False)
    names = list(dict.fromkeys(table["layer"].tolist()))
    above = float(chart.height)
    row = float(np.clip(_MOST_HEIGHT / len(names), _LEAST_ROW, _ROW))
    top = (above + _GAP + row * np.arange(len(names))).round(1)
    place = pd.Categorical(table["layer"], categories=names).codes
    table = table.assign(top=top[place], bottom=(top[place] + row - (row > 8)).round(1))
    strip = [_shares(table[~table["bad"]], title, limits)]
    if table["bad"].any():
        strip.append(_bad(table[table["bad"]], limits))
    strip.append(_labels(names, (top + row / 2).round(1), row))
    strip.append(_title(title, above + _GAP - 7))
    whole = chart.copy(deep=True)
    for layer in whole.layer:
        _raise(layer, above)
    whole.height = round(above + _GAP + row * len(names))
    for layer in strip:
        whole += layer
    return whole


def _raise(layer: Any, height: float) -> None:
    """Keep a layer above a height that was its foot."""
    y: Any = layer.encoding.y
    if isinstance(y, alt.YValue):
        y["value"] = height if y["value"] == "height" else y["value"]
        return
    # Bands are laid out from the top, values grow from the foot.
    ordinal = y.to_dict().get("type") == "ordinal"
    y["scale"]["range"] = [0, height] if ordinal else [height, 0]


def _at(column: str) -> dict[str, Any]:
    """A place in pixels from the top, which no scale is to change."""
    return {"field": column, "type": "quantitative", "scale": None, "axis": None}


def _shares(table: pd.DataFrame, title: str, limits: Limits | None) -> alt.Chart:
    fill = alt.Fill(
        "value:Q",
        scale=alt.Scale(domain=[0, 1], range="heatmap", interpolate="lab"),
        legend=alt.Legend(title=title, format="~%", gradientLength=120, gradientThickness=10, tickCount=2),
    )
    base = alt.Chart(table.drop(columns="bad"), width=WIDTH)
    rectangles: alt.Chart = base.mark_rect(clip=True, x2Offset=0.6)
    return rectangles.encode(
        x=step_axis(limits),
        x2="end:Q",
        y=alt.Y(**_at("top")),
        y2="bottom:Q",
        fill=fill,
        tooltip=[*_cell(), alt.Tooltip("value:Q", title=title, format=".3~%")],
    )


def _bad(table: pd.DataFrame, limits: Limits | None) -> alt.Chart:
    rows = table.drop(columns=["bad", "value"]).assign(holds="NaN")
    marks: alt.Chart = alt.Chart(rows, width=WIDTH).mark_rect(color=NOT_FINITE, clip=True)
    return marks.encode(
        x=step_axis(limits),
        x2="end:Q",
        y=alt.Y(**_at("top")),
        y2="bottom:Q",
        tooltip=[*_cell(), alt.Tooltip("holds:N")],
    )


def _cell() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("layer:N"),
        alt.Tooltip("step:Q", title="from step", format=","),
        alt.Tooltip("last:Q", title="to step", format=","),
    ]


def _labels(names: Sequence[str], middle: Any, row: float) -> alt.Chart:
    """The layers' names beside their rows, as many as there is room for."""
    shown = list(range(0, len(names), int(np.ceil(12 / row))))
    short = [name if len(name) <= _LETTERS else f"…{name[1 - _LETTERS :]}" for name in names]
    rows = pd.DataFrame({"name": [short[i] for i in shown], "middle": [middle[i] for i in shown]})
    text: alt.Chart = alt.Chart(rows, width=WIDTH).mark_text(
        align="right", color="gray", fontSize=11, clip=False
    )
    return text.encode(x=alt.value(-4), y=alt.Y(**_at("middle")), text="name:N")


def _title(title: str, y: float) -> alt.Chart:
    text: alt.Chart = alt.Chart(pd.DataFrame({"title": [title]}), width=WIDTH).mark_text(
        align="left", baseline="alphabetic", color="gray", fontSize=11, fontWeight=500
    )
    return text.encode(x=alt.value(0), y=alt.value(y), text="title:N")

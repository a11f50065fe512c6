"""Any metric over steps, a line a layer and component."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import altair as alt
import numpy as np
import pandas as pd

from streamlens.views.heatmap import heatmap
from streamlens.views.marks import LEGEND_LINES, Limits, chart_of_lines, nothing, value_axis
from streamlens.views.series import Series, draw_table, split

__all__ = ["metric"]

_FEWEST_POINTS: Final = 40
"""Where a line would have to do with fewer points, a heatmap of all layers shows more."""

_DECADES: Final = 1.5
"""Values all above zero that span more decades than this have a logarithmic axis."""


def metric(
    rows: pd.DataFrame,
    *,
    title: str,
    value_title: str = "value",
    layers: Sequence[str] | None = None,
    log: bool | None = None,
    limits: Limits | None = None,
    max_points: int = 1200,
) -> alt.LayerChart:
    """The values of a topic over steps: a line a layer, or a line a layer and component.

    Up to 12 lines have a legend, a click in which picks one out; pointing at one of more brings it
    out. So many lines that each would be left fewer than 40 points are drawn as a heatmap of logarithms
    where no value is below zero; else as many of them as there are points for, from first to last.
    NaN, infinities and, on a logarithmic axis, zero are magenta marks.

    Args:
        rows: Any topic that holds numbers.
        title: What the values are, with their unit.
        value_title: What a value is called where it is pointed at.
        layers: The layers in model order; by default in order of appearance.
        log: Whether the value axis is logarithmic; by default where all finite values are above zero and
            span more than a decade and a half.
        limits: The first and last step of the axis; by default those of the data.
        max_points: The most points drawn, in all lines together.

    Raises:
        ValueError: A column is missing.
    """
    lines = _lines(rows, layers)
    if not lines:
        return nothing(f"no {title} was recorded")
    values = np.concatenate([line.values for line in lines])
    finite = values[np.isfinite(values)]
    room = max_points // min(_FEWEST_POINTS, max(map(len, lines)))
    if len(lines) > room:
        if len(finite) and (finite >= 0).all() and (finite > 0).any():
            return heatmap(lines, title=title, limits=limits, max_cells=max_points)
        chosen = np.linspace(0, len(lines) - 1, max(1, room)).round().astype(int).tolist()
        title = f"{title}, {len(chosen)} of {len(lines)} lines"
        lines = [lines[i] for i in chosen]
    if log is None:
        log = _spans_decades(finite)
    elif log:
        log = bool((finite > 0).any())
    points, flags = draw_table(lines, max_points, log=log)
    many = len(lines) > LEGEND_LINES
    return chart_of_lines(
        points,
        flags,
        names=[line.name for line in lines],
        y=value_axis(f"{title} (first dark, last light)" if many else title, log=log),
        limits=limits,
        series_title="layer",
        value_title=value_title,
        with_points=max(map(len, lines)) <= _FEWEST_POINTS,
        height=240,
    )


def _lines(rows: pd.DataFrame, layers: Sequence[str] | None) -> list[Series]:
    if "component" not in rows.columns:
        return [_named(line, line.name) for line in split(rows, order=layers) if len(line)]
    found: list[Series] = []
    for name, of_layer in rows.groupby(rows["layer"].astype(str), sort=False):
        label = f"{name} " if name else ""
        found += [_named(line, f"{label}{line.name}") for line in split(of_layer, "component") if len(line)]
    if layers is None:
        return found
    place = {layer: i for i, layer in enumerate(layers)}
    # Stable: the components of a layer stay in their order.
    return sorted(found, key=lambda line: place.get(line.name.rpartition(" ")[0], len(place)))


def _named(line: Series, name: str) -> Series:
    return Series(name or "model", line.steps, line.epochs, line.values)


def _spans_decades(finite: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> bool:
    if not len(finite) or not (finite > 0).all():
        return False
    return bool(np.log10(finite.max()) - np.log10(finite.min()) > _DECADES)

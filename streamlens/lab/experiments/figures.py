"""Charts that experiments share: means over seeds with their intervals, as curves and as points."""

from __future__ import annotations

from typing import Final, TypeAlias

import altair as alt
import pandas as pd

from streamlens.lab.experiments.results import interval

__all__ = ["Figure", "curves", "points"]

Figure: TypeAlias = alt.Chart | alt.LayerChart | alt.FacetChart | alt.VConcatChart | alt.HConcatChart
"""What a figure may be."""

_SIZE: Final = (220, 160)


def curves(
    rows: pd.DataFrame,
    *,
    color: str,
    x: str = "step",
    row: str | None = None,
    column: str | None = None,
    log: bool = False,
    bounds: tuple[float, float] | None = None,
    title: str = "value",
    free: bool = False,
    size: tuple[int, int] = _SIZE,
) -> alt.LayerChart | alt.FacetChart:
    """A value over steps: the mean over seeds as a line, its 95% interval as a band.

    Args:
        rows: A row a run and place on the axis, with the columns named here and `value`.
        color: What the lines are told apart by.
        x: The axis.
        row: What the rows of charts are.
        column: What the columns of charts are.
        log: For values above 0 that differ by factors: a logarithmic axis, and geometric means.
        bounds: For values between two numbers: those of their intervals, as for `interval`.
        title: Of the value axis.
        free: Whether each chart has a value axis of its own.
        size: Width and height of a chart in pixels.
    """
    facets = [name for name in (row, column) if name is not None]
    if log:
        rows = rows[rows.value > 0]
    table = interval(rows, [*facets, color, x], log=log, bounds=bounds)
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False)
    base = alt.Chart(table, width=size[0], height=size[1]).encode(
        x=alt.X(f"{x}:Q", title=x, axis=alt.Axis(tickCount=5)),
        color=alt.Color(f"{color}:N", sort=None, legend=alt.Legend(columns=4, symbolOpacity=1)),
    )
    band = base.mark_area(opacity=0.2, clip=True).encode(
        y=alt.Y("low:Q", title=title, scale=scale), y2="high:Q"
    )
    line = base.mark_line(strokeWidth=1.6, clip=True).encode(y=alt.Y("mean:Q", title=title, scale=scale))
    return _facetted(alt.layer(band, line), row, column, free=free)


def points(
    table: pd.DataFrame,
    *,
    x: str,
    color: str,
    row: str | None = None,
    column: str | None = None,
    log: bool = False,
    title: str = "value",
    free: bool = False,
    size: tuple[int, int] = _SIZE,
) -> alt.LayerChart | alt.FacetChart:
    """Means with their 95% intervals, side by side for each condition.

    Args:
        table: What `interval` or `paired` gave.
        x: The conditions on the axis.
        color: What the points at one place are told apart by.
        row: What the rows of charts are.
        column: What the columns of charts are.
        log: A logarithmic value axis.
        title: Of the value axis.
        free: Whether each chart has a value axis of its own.
        size: Width and height of a chart in pixels.
    """
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False)
    base = alt.Chart(table, width=size[0], height=size[1]).encode(
        x=alt.X(f"{x}:N", title=x, sort=None, axis=alt.Axis(labelAngle=0)),
        xOffset=alt.XOffset(f"{color}:N", sort=None),
        color=alt.Color(f"{color}:N", sort=None, legend=alt.Legend(columns=4, symbolOpacity=1)),
    )
    bars = base.mark_rule(strokeWidth=2).encode(y=alt.Y("low:Q", title=title, scale=scale), y2="high:Q")
    dots = base.mark_point(filled=True, size=45, opacity=1).encode(
        y=alt.Y("mean:Q", title=title, scale=scale)
    )
    return _facetted(alt.layer(bars, dots), row, column, free=free)


def _facetted(
    chart: alt.LayerChart | alt.FacetChart, row: str | None, column: str | None, *, free: bool
) -> alt.LayerChart | alt.FacetChart:
    if (row is None and column is None) or isinstance(chart, alt.FacetChart):
        return chart
    facets = chart.facet(
        row=alt.Undefined if row is None else alt.Row(f"{row}:N", title=row, sort=None),
        column=alt.Undefined if column is None else alt.Column(f"{column}:N", title=column, sort=None),
    )
    resolved: alt.FacetChart = facets.resolve_scale(y="independent" if free else "shared")
    return resolved

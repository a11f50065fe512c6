"""The largest eigenvalues of the loss's Hessian against what the learning rate can bear."""

from __future__ import annotations

from typing import Final

import altair as alt
import numpy as np
import pandas as pd

from streamlens.views.marks import WIDTH, Limits, chart_of_lines, nothing, step_axis, value_axis
from streamlens.views.rates import largest_rate
from streamlens.views.series import Series, draw_table, split

__all__ = ["hessian_eigenvalues"]

_BOUND: Final = "2 / learning rate"
_SUBSCRIPTS: Final = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_FARTHEST: Final = 3
"""On a linear axis, how many times as high as the eigenvalues the bound may stand."""


def hessian_eigenvalues(
    rows: pd.DataFrame,
    learning_rate: pd.DataFrame | None = None,
    *,
    limits: Limits | None = None,
    max_points: int = 1000,
) -> alt.LayerChart:
    """The Hessian's eigenvalues over steps, with 2 / learning rate as a dashed line.

    The axis is logarithmic where every finite eigenvalue is positive; else it is linear, and the dashed
    line is left out where it stands more than three times as high as all eigenvalues. NaN and infinities are
    magenta triangles at the foot of the chart.

    Args:
        rows: The topic `hessian_eigenvalues`, a row an eigenvalue and step, numbered by `component`.
        learning_rate: The topic `learning_rate`, a row a layer and step; the largest rate of a step counts.
        limits: The first and last step of the axis; by default those of the data.
        max_points: The most points drawn, a fifth of them for the dashed line.

    Raises:
        ValueError: A column is missing.
    """
    lines = [
        Series(f"λ{line.name}".translate(_SUBSCRIPTS), line.steps, line.epochs, line.values)
        for line in split(rows, "component" if "component" in rows.columns else "layer")
    ]
    if not any(len(line) for line in lines):
        return nothing("no Hessian eigenvalue was recorded")
    finite = np.concatenate([line.values[np.isfinite(line.values)] for line in lines])
    log = bool(len(finite)) and bool((finite > 0).all())
    bound = None if learning_rate is None or not len(learning_rate) else _bound(learning_rate, lines)
    if bound is not None and not log:
        too_high = bound.values > _FARTHEST * np.abs(finite).max(initial=0.0)
        bound = bound.take(np.flatnonzero(~too_high))
    points, flags = draw_table(lines, max_points - max_points // 5, log=log)
    dashed = bound is not None and len(bound) > 0
    y = value_axis("eigenvalue" + (f" (dashed: {_BOUND})" if dashed else ""), log=log)
    chart = chart_of_lines(
        points,
        flags,
        names=[line.name for line in lines],
        y=y,
        limits=limits,
        series_title="eigenvalue",
        value_title="value",
        # A few evaluations are points first and lines second.
        with_points=max(map(len, lines)) <= 60,
        height=220,
    )
    if bound is not None and dashed:
        chart.layer.append(_dashed(bound, y, limits, max(5, max_points // 5), log=log))
    return chart


def _bound(rates: pd.DataFrame, lines: list[Series]) -> Series:
    """2 over the largest rate of each step, where there are eigenvalues."""
    first = min(int(line.steps[0]) for line in lines if len(line))
    last = max(int(line.steps[-1]) for line in lines if len(line))
    (rate,) = split(largest_rate(rates))
    rate = rate.take(np.flatnonzero((rate.steps >= first) & (rate.steps <= last) & (rate.values > 0)))
    return Series(_BOUND, rate.steps, rate.epochs, 2 / rate.values)


def _dashed(bound: Series, y: alt.Y, limits: Limits | None, most: int, *, log: bool) -> alt.Chart:
    points, _ = draw_table([bound], most, log=log)
    line: alt.Chart = alt.Chart(points, width=WIDTH).mark_line(
        strokeDash=[6, 4], strokeWidth=1.6, color="gray", interpolate="step-after"
    )
    return line.encode(
        x=step_axis(limits),
        y=y,
        tooltip=[
            alt.Tooltip("series:N", title="bound"),
            alt.Tooltip("step:Q", format=","),
            alt.Tooltip("value:Q", format=".4~g"),
        ],
    )

"""The learning rate of each layer."""

from __future__ import annotations

import altair as alt
import numpy as np
import pandas as pd

from streamlens.views.marks import Limits, chart_of_lines, nothing, value_axis
from streamlens.views.series import Series, draw_table, split

__all__ = ["largest_rate", "learning_rate"]


def learning_rate(
    rows: pd.DataFrame, *, limits: Limits | None = None, max_points: int = 500
) -> alt.LayerChart:
    """The learning rate over steps; layers that share a schedule share a line.

    The axis is logarithmic where the rates are positive and span a factor of ten or more.

    Args:
        rows: The topic `learning_rate`, a row a layer and step.
        limits: The first and last step of the axis; by default those of the data.
        max_points: The most points drawn.

    Raises:
        ValueError: A column is missing.
    """
    lines = _schedules(split(rows))
    if not lines:
        return nothing("no learning rate was recorded")
    finite = np.concatenate([line.values[np.isfinite(line.values)] for line in lines])
    log = bool(len(finite)) and finite.min() > 0 and finite.max() >= 10 * finite.min()
    points, flags = draw_table(lines, max_points, log=log)
    return chart_of_lines(
        points,
        flags,
        names=[line.name for line in lines],
        y=value_axis("learning rate", log=log, zero=True),
        limits=limits,
        series_title="layers",
        value_title="learning rate",
        interpolate="step-after",
        height=120,
    )


def _schedules(lines: list[Series]) -> list[Series]:
    """One series for each distinct schedule, named after the layers that follow it."""
    groups: dict[tuple[bytes, bytes], list[Series]] = {}
    for line in lines:
        if len(line):
            groups.setdefault((line.steps.tobytes(), line.values.tobytes()), []).append(line)
    merged = []
    for members in groups.values():
        name = members[0].name + (f" and {len(members) - 1} more" if len(members) > 1 else "")
        if len(groups) == 1:
            name = "all layers"
        merged.append(Series(name, members[0].steps, members[0].epochs, members[0].values))
    return merged


def largest_rate(rows: pd.DataFrame) -> pd.DataFrame:
    """The largest rate of each step, as rows of the model itself.

    Args:
        rows: The topic `learning_rate`, a row a layer and step.
    """
    return rows.groupby("step", as_index=False, sort=True).max(numeric_only=True).assign(layer="")

"""Training and test accuracy."""

from __future__ import annotations

from collections.abc import Mapping

import altair as alt
import pandas as pd

from streamlens.views.marks import Limits, chart_of_lines, nothing, value_axis
from streamlens.views.series import Series, draw_table, split

__all__ = ["accuracies"]


def accuracies(
    curves: Mapping[str, pd.DataFrame], *, limits: Limits | None = None, max_points: int = 600
) -> alt.LayerChart:
    """Accuracies over steps, one line for each data set they were measured on.

    Args:
        curves: Name of the data set (`"training"`, `"test"`) to the rows of its topic; values are
            shares in [0, 1].
        limits: The first and last step of the axis; by default those of the data.
        max_points: The most points drawn.

    Raises:
        ValueError: A column is missing.
    """
    lines: list[Series] = []
    for name, rows in curves.items():
        lines += [Series(name, s.steps, s.epochs, s.values) for s in split(rows)[:1]]
    if not any(len(line) for line in lines):
        return nothing("no accuracy was recorded")
    points, flags = draw_table(lines, max_points, log=False)
    return chart_of_lines(
        points,
        flags,
        names=[line.name for line in lines],
        y=value_axis("accuracy (share of examples)", log=False, number_format="~%"),
        limits=limits,
        series_title="measured on",
        value_title="accuracy",
        value_format=".2%",
        # A few measurements, as one an epoch gives, are points first and a line second.
        with_points=max(map(len, lines)) <= 60,
        height=180,
    )

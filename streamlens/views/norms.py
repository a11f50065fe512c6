"""Norms of gradients and weights, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import numpy as np
import pandas as pd

from streamlens.views.heatmap import heatmap
from streamlens.views.marks import LEGEND_LINES, Limits, chart_of_lines, nothing, value_axis
from streamlens.views.series import draw_table, split

__all__ = ["gradient_norms", "weight_norms"]

_FEWEST_POINTS = 40
"""Where a line would have to do with fewer points, a heatmap of all layers shows more."""


def gradient_norms(
    rows: pd.DataFrame,
    *,
    layers: Sequence[str] | None = None,
    limits: Limits | None = None,
    max_points: int = 1500,
) -> alt.LayerChart:
    """The 2-norm of each layer's weight gradient over steps, on a logarithmic axis.

    Up to 12 layers have a legend, a click in which picks one out; pointing at one of more brings
    it out. So many layers that each would be left fewer than 40 points are drawn as a heatmap of
    logarithms instead. A gradient that is zero, NaN or infinite is a magenta mark.

    Args:
        rows: The topic `weight_gradients.norm2`.
        layers: The layers in model order; by default in order of appearance.
        limits: The first and last step of the axis; by default those of the data.
        max_points: The most points drawn, in all layers together.

    Raises:
        ValueError: A column is missing.
    """
    return _norms(rows, "gradient norm", layers, limits, max_points)


def weight_norms(
    rows: pd.DataFrame,
    *,
    layers: Sequence[str] | None = None,
    limits: Limits | None = None,
    max_points: int = 1200,
) -> alt.LayerChart:
    """The 2-norm of each layer's weights over steps, on a logarithmic axis.

    Drawn as `gradient_norms` draws gradients.

    Args:
        rows: The topic `weights.norm2`.
        layers: The layers in model order; by default in order of appearance.
        limits: The first and last step of the axis; by default those of the data.
        max_points: The most points drawn, in all layers together.

    Raises:
        ValueError: A column is missing.
    """
    return _norms(rows, "weight norm", layers, limits, max_points)


def _norms(
    rows: pd.DataFrame, title: str, layers: Sequence[str] | None, limits: Limits | None, max_points: int
) -> alt.LayerChart:
    lines = [line for line in split(rows, order=layers) if len(line)]
    if not lines:
        return nothing(f"no {title} was recorded")
    if max_points // len(lines) < min(_FEWEST_POINTS, max(map(len, lines))):
        return heatmap(lines, title=f"{title} (2-norm)", limits=limits, max_cells=max_points)
    values = np.concatenate([line.values for line in lines])
    log = bool((values[np.isfinite(values)] > 0).any())
    points, flags = draw_table(lines, max_points, log=log)
    many = len(lines) > LEGEND_LINES
    return chart_of_lines(
        points,
        flags,
        names=[line.name for line in lines],
        y=value_axis(f"{title} (first layer dark, last light)" if many else f"{title} (2-norm)", log=log),
        limits=limits,
        series_title="layer",
        value_title=title,
        height=240,
    )

"""Norms of gradients and weights, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd

from streamlens.views.marks import Limits
from streamlens.views.metric import metric
from streamlens.views.series import split
from streamlens.views.strip import with_strip

__all__ = ["gradient_norms", "weight_norms"]


def gradient_norms(
    rows: pd.DataFrame,
    dead_fraction: pd.DataFrame | None = None,
    *,
    layers: Sequence[str] | None = None,
    dead_layers: Sequence[str] | None = None,
    limits: Limits | None = None,
    max_points: int = 1500,
) -> alt.LayerChart:
    """The 2-norm of each layer's weight gradient over steps, on a logarithmic axis, and which units are dead.

    Up to 12 layers have a legend, a click in which picks one out; pointing at one of more brings
    it out. So many layers that each would be left fewer than 40 points are drawn as a heatmap of
    logarithms instead. A gradient that is zero, NaN or infinite is a magenta mark.

    Below the norms stands a strip with a row for each layer whose dead units were counted: a gradient that
    falls where a row turns bright is one that dead units do not pass on.

    Args:
        rows: The topic `weight_gradients.norm2`.
        dead_fraction: The topic `activations.dead_fraction`, shares in [0, 1].
        layers: The layers in model order; by default in order of appearance.
        dead_layers: Those of `dead_fraction`, likewise.
        limits: The first and last step of the axis; by default those of the data.
        max_points: The most points drawn, in all layers together, a third of them for dead units.

    Raises:
        ValueError: A column is missing.
    """
    dead = [] if dead_fraction is None else [s for s in split(dead_fraction, order=dead_layers) if len(s)]
    if not dead or not len(rows):
        return _norms(rows, "gradient norm", layers, limits, max_points)
    cells = max(len(dead), min(max_points // 3, sum(map(len, dead))))
    chart = _norms(rows, "gradient norm", layers, limits, max(5, max_points - cells))
    return with_strip(chart, dead, title="dead units", limits=limits, max_cells=cells)


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
    return metric(
        rows,
        title=f"{title} (2-norm)",
        value_title=title,
        layers=layers,
        log=True,
        limits=limits,
        max_points=max_points,
    )

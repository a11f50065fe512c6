"""How a layer's values spread over steps: bands between percentiles around the median."""

from __future__ import annotations

import re
from typing import Any, Final

import altair as alt
import numpy as np
import pandas as pd

from streamlens.views.marks import (
    WIDTH,
    Limits,
    flag_marks,
    layered,
    nearest_points,
    nearest_tooltip,
    nothing,
    step_axis,
    value_axis,
)
from streamlens.views.series import Series, draw_table, split, thin_indices

__all__ = ["are_percentiles", "percentile_bands"]

_HEIGHT: Final = 200
_PERCENTILE: Final = re.compile(r"p(\d+(?:\.\d+)?)")
_OPACITY: Final = (0.18, 0.4)
"""Of the outermost band and of the innermost, where they do not lie over each other."""

Array = np.ndarray[Any, np.dtype[np.float64]]
Steps = np.ndarray[Any, np.dtype[np.int64]]


def are_percentiles(rows: pd.DataFrame) -> bool:
    """Whether the components of a topic are percentiles, at least two: `p5`, `p95`.

    Args:
        rows: The topic.
    """
    if "component" not in rows.columns or rows["component"].isna().any():
        return False
    names = rows["component"].astype(str).unique()
    return len(names) > 1 and all(map(_PERCENTILE.fullmatch, names))


def percentile_bands(
    rows: pd.DataFrame, *, limits: Limits | None = None, max_points: int = 1000, values: str = "value"
) -> alt.LayerChart:
    """One layer's percentiles over steps: nested bands, and the middle one as a line.

    The least percentile and the greatest are the edges of the palest band, the next ones those of the band
    inside it, and so on; of an odd number the one in the middle, as a rule the median, is a line. Pointing
    at a step tells all of them. A step at which one is NaN or infinite has a magenta triangle at its foot,
    and a gap in the bands that it is an edge of.

    Args:
        rows: A topic of `percentile_bands()`, of one layer.
        limits: The first and last step of the axis; by default those of the data.
        max_points: The most points drawn, over all bands and the line together.
        values: What spreads, with its unit, for the axis.

    Raises:
        ValueError: The components are no percentiles.
    """
    if not len(rows):
        return nothing("no percentiles were recorded")
    if not are_percentiles(rows):
        raise ValueError(
            "rows whose components are no percentiles: this view takes a topic that sl.percentile_bands() "
            "made"
        )
    lines = sorted((line for line in split(rows, "component") if len(line)), key=_percentile)
    names = [line.name for line in lines]
    steps, epochs, table = _on_common_steps(lines)
    # A step is drawn once for each band, and once for the line and what is told of it.
    kept = _kept(table, max(5, max_points // (len(lines) // 2 + 1)))
    steps, epochs, table = steps[kept], epochs[kept], table[kept]
    x, y = step_axis(limits), value_axis(values, log=False)
    layers = [_areas(names, steps, table).encode(x=x, y=y)]
    told = {"step": steps, "epoch": epochs, "value": _drawable(table[:, len(lines) // 2])}
    told |= {name: _drawable(table[:, i]) for i, name in enumerate(names)}
    base = alt.Chart(pd.DataFrame(told), width=WIDTH, height=_HEIGHT).encode(x=x, y=y)
    if len(lines) % 2:
        layers.append(base.mark_line(strokeWidth=1.8))
    columns = {title: title for title in ("step", "epoch", *reversed(names))}
    formats = {"step": ","} | dict.fromkeys(names, ".4~g")
    layers.append(nearest_points(base, nearest_tooltip(columns, formats)))
    interactive = len(layers) - 1
    flags = _flags(names, steps, epochs, table)
    if len(flags):
        layers.append(flag_marks(flags, limits, "percentile"))
    return layered(layers, interactive)


def _areas(names: list[str], steps: Steps, table: Array) -> alt.Chart:
    """The bands, the outermost first: those inside lie over it."""
    bands = []
    for low in range(len(names) // 2):
        high = len(names) - 1 - low
        there = np.isfinite(table[:, low]) & np.isfinite(table[:, high])
        edges = {
            "value": _drawable(np.where(there, table[:, low], np.nan)),
            "upper": _drawable(np.where(there, table[:, high], np.nan)),
        }
        bands.append(pd.DataFrame({"band": f"{names[low]} to {names[high]}", "step": steps, **edges}))
    order = [str(band["band"].iloc[0]) for band in bands]
    opacity = alt.Opacity(
        "band:N",
        sort=order,
        scale=alt.Scale(domain=order, range=np.linspace(*_OPACITY, len(order)).round(2).tolist()),
        legend=alt.Legend(title=None, symbolType="square"),
    )
    table_of_all = pd.concat(bands, ignore_index=True)
    areas: alt.Chart = alt.Chart(table_of_all, width=WIDTH, height=_HEIGHT).mark_area(clip=True)
    return areas.encode(y2="upper:Q", opacity=opacity)


def _percentile(line: Series) -> float:
    found = _PERCENTILE.fullmatch(line.name)
    assert found is not None
    return float(found[1])


def _on_common_steps(lines: list[Series]) -> tuple[Steps, Steps, Array]:
    """All lines at the steps of any of them, (steps, lines): a long run is read thinned, each by itself."""
    steps = np.unique(np.concatenate([line.steps for line in lines]))
    epochs = np.zeros_like(steps)
    table = np.empty((len(steps), len(lines)))
    for i, line in enumerate(lines):
        finite = np.isfinite(line.values)
        table[:, i] = np.interp(steps, line.steps[finite], line.values[finite]) if finite.any() else np.nan
        place = np.searchsorted(steps, line.steps)
        table[place, i], epochs[place] = line.values, line.epochs
    return steps, epochs, table


def _kept(table: Array, most: int) -> np.ndarray[Any, Any]:
    """Which steps are drawn: those that the outermost percentiles and the middle one need."""
    if len(table) <= most:
        return np.arange(len(table))
    shown = (0, table.shape[1] // 2, table.shape[1] - 1)
    each = max(5, most // len(shown))
    return np.unique(np.concatenate([thin_indices(table[:, i], each) for i in shown]))


def _drawable(values: Array) -> list[float | None]:
    """Rounded to what a screen shows; nothing where it is not finite."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values.tolist()]


def _flags(names: list[str], steps: Steps, epochs: Steps, table: Array) -> pd.DataFrame:
    """A mark for each step at which a percentile is not finite, which names the first of them."""
    bad = ~np.isfinite(table)
    at = np.flatnonzero(bad.any(1))
    lines = [
        Series(names[first], steps[[i]], epochs[[i]], table[[i], first])
        for i, first in zip(at.tolist(), bad[at].argmax(1).tolist(), strict=True)
    ]
    return draw_table(lines, 5 * len(lines), log=False)[1]

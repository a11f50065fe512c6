"""Heatmaps of logarithms over layers and steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import altair as alt
import numpy as np
import pandas as pd

from streamlens.views.marks import POWER_OF_TEN, WIDTH, Limits, layered, nothing, step_axis
from streamlens.views.series import Series, split
from streamlens.views.theme import NOT_FINITE

__all__ = ["cells", "heatmap", "update_to_weight_ratio"]

_CELL: Final = (
    alt.Tooltip("layer:N"),
    alt.Tooltip("step:Q", title="from step", format=","),
    alt.Tooltip("last:Q", title="to step", format=","),
)

_MOST_ROWS: Final = 200
"""More layers than this share rows with their neighbours: a row would be thinner than its label."""

# A narrow page has less room for labels, and would cut off their ends, which tell layers apart.
_LETTERS: Final = "(containerSize()[0] < 600 ? 12 : 21)"
_SHORTENED: Final = (
    f"length(datum.label) > {_LETTERS} ? '…' + slice(datum.label, 1 - {_LETTERS}) : datum.label"
)


def update_to_weight_ratio(
    rows: pd.DataFrame,
    *,
    layers: Sequence[str] | None = None,
    limits: Limits | None = None,
    max_cells: int = 4800,
) -> alt.LayerChart:
    """A heatmap of the logarithm of the update-to-weight ratio, layer by step.

    Layers stand in model order, the input's at the top. The colours have their middle at 10⁻³, the
    ratio commonly aimed for; below is blue, above is orange. A cell that holds several steps shows
    the mean of their logarithms. One NaN or infinity in a cell makes it magenta; a ratio of zero
    (a layer that did not change) has the lowest colour.

    Args:
        rows: The topic `uw_ratio`.
        layers: The layers in model order; by default in order of appearance.
        limits: The first and last step of the axis; by default those of the data.
        max_cells: The most cells drawn.

    Raises:
        ValueError: A column is missing.
    """
    lines = [line for line in split(rows, order=layers) if len(line)]
    if not lines:
        return nothing("no update-to-weight ratio was recorded")
    return heatmap(lines, title="update-to-weight ratio", middle=-3, limits=limits, max_cells=max_cells)


def heatmap(
    lines: Sequence[Series],
    *,
    title: str,
    middle: int | None = None,
    limits: Limits | None = None,
    max_cells: int = 4800,
) -> alt.LayerChart:
    """A heatmap of log10 of the values of series, the first series at the top.

    Args:
        lines: One or more series that are not empty.
        title: What the colours stand for.
        middle: The exponent in the middle of diverging colours; without it they are sequential.
        limits: The first and last step of the axis.
        max_cells: The most cells drawn.
    """
    table = cells(lines, max_cells, log=True)
    names = list(dict.fromkeys(table["layer"].tolist()))
    low, high = _domain(table["value"].to_numpy(dtype=np.float64), middle)
    good = table[~table["bad"]].assign(value=table["value"].clip(lower=low - 1)).drop(columns="bad")
    row = float(np.clip(420 / len(names), 3, 24))
    x = step_axis(limits)
    y = alt.Y(
        "layer:O",
        sort=names,
        title=None,
        axis=alt.Axis(
            labelExpr=_SHORTENED,
            labelOverlap=True,
        ),
        scale=alt.Scale(domain=names, paddingInner=0.08 if row >= 8 else 0, paddingOuter=0),
    )
    # In lab, not in Vega-Lite's hcl, where the way from blue to orange leads through purple.
    scale = alt.Scale(domain=[low, high], clamp=True, interpolate="lab")
    if middle is not None:
        scale = alt.Scale(
            domain=[low, high], domainMid=middle, clamp=True, range="diverging", interpolate="lab"
        )
    whole = middle is not None or high - low >= 2
    legend = alt.Legend(
        title=title,
        labelExpr=POWER_OF_TEN if whole else "format(pow(10, datum.value), '.3~g')",
        values=np.arange(np.ceil(low), high + 1e-9).tolist() if whole else np.linspace(low, high, 3).tolist(),
        gradientLength=200,
        gradientThickness=10,
        titleLimit=260,
        offset=8,
    )
    color = alt.Color("value:Q", scale=scale, legend=legend)
    tooltip = [*_CELL, alt.Tooltip("ratio:Q", title=title, format=".2e")]
    base = alt.Chart(good, width=WIDTH, height=round(row * len(names)))
    # Reaching under the next cell leaves no seam between the two.
    drawn: alt.Chart = base.transform_calculate(ratio="pow(10, datum.value)").mark_rect(
        clip=True, x2Offset=0.6
    )
    layers = [drawn.encode(x=x, x2="end:Q", y=y, color=color, tooltip=tooltip)]
    bad = table[table["bad"]]
    if len(bad):
        rows = bad[["layer", "step", "end", "last"]].assign(holds="NaN or infinity")
        marks: alt.Chart = alt.Chart(rows, width=WIDTH).mark_rect(color=NOT_FINITE, clip=True)
        layers.append(marks.encode(x=x, x2="end:Q", y=y, tooltip=[*_CELL, alt.Tooltip("holds:N")]))
    return layered(layers, interactive=0)


def _domain(values: np.ndarray[Any, Any], middle: int | None) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if middle is None:
        low = float(finite.min()) if len(finite) else 0.0
        return low, max(low + 1e-3, float(finite.max(initial=low)))
    # Whole decades, so that two runs are likely to share their colours; outliers do not decide.
    spread = np.percentile(np.abs(finite - middle), 98) if len(finite) else 1.0
    half = float(np.clip(np.ceil(spread), 1, 3))
    return middle - half, middle + half


def cells(lines: Sequence[Series], max_cells: int, *, log: bool) -> pd.DataFrame:
    """One row a cell: layer, step, last, end, value (a mean), bad (holds NaN or infinity).

    Args:
        lines: One or more series that are not empty, the first for the top row.
        max_cells: The most cells.
        log: Whether the value is the mean of log10 of the values, and not of the values.
    """
    rows = min(len(lines), _MOST_ROWS, max_cells)
    row_of = np.arange(len(lines)) * rows // len(lines)
    first = np.searchsorted(row_of, np.arange(rows))
    last = np.searchsorted(row_of, np.arange(rows), side="right") - 1
    names = [
        lines[a].name if a == b else f"{lines[a].name} … {lines[b].name}"
        for a, b in zip(first.tolist(), last.tolist(), strict=True)
    ]
    steps = np.unique(np.concatenate([line.steps for line in lines]))
    columns = max(1, max_cells // rows)
    # Columns hold equally many recorded steps, so that a cadence leaves no holes.
    width = -(-len(steps) // columns)
    columns = -(-len(steps) // width)
    starts = steps[::width]
    lasts = steps[np.minimum(np.arange(1, columns + 1) * width, len(steps)) - 1]
    gap = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    ends = np.append(starts[1:].astype(np.float64), float(steps[-1]) + gap)

    place = np.concatenate(
        [row_of[i] * columns + np.searchsorted(steps, line.steps) // width for i, line in enumerate(lines)]
    )
    values = np.concatenate([line.values for line in lines])
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.log10(values) if log else values
    drawn = np.isfinite(values)
    # Zero has no logarithm, and yet is nothing wrong.
    bad = ~drawn & ~((values == -np.inf) & log)
    size = rows * columns
    seen = np.bincount(place, minlength=size)
    count = np.bincount(place[drawn], minlength=size)
    total = np.bincount(place[drawn], weights=values[drawn], minlength=size)
    # Cells of nothing but zeros have no logarithm: they go below the lowest colour.
    mean = np.where(count > 0, total / np.maximum(count, 1), -np.inf)
    holds_bad = np.bincount(place[bad], minlength=size) > 0
    used = np.flatnonzero(seen)
    column = used % columns
    return pd.DataFrame(
        {
            "layer": [names[i] for i in (used // columns).tolist()],
            "step": starts[column],
            "last": lasts[column],
            "end": ends[column],
            "value": np.round(mean[used], 3),
            "bad": holds_bad[used],
        }
    )

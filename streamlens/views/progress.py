"""How fast weights move against how fast the loss falls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, cast

import altair as alt
import numpy as np
import pandas as pd

from streamlens.views.marks import STEPS_SHOWN, WIDTH, nothing, power, value_axis
from streamlens.views.series import Series, split
from streamlens.views.theme import NOT_FINITE

__all__ = ["ratio_against_loss"]

_HEIGHT: Final = 260
_FEWEST: Final = 4
"""Losses that are averaged at least: two batches that differ are no progress."""

Array = np.ndarray[Any, np.dtype[np.float64]]


def ratio_against_loss(ratio: pd.DataFrame, loss: pd.DataFrame, *, max_points: int = 120) -> alt.LayerChart:
    """The update-to-weight ratio against the decrease of the loss, coloured by time.

    The run is cut into stretches of as many recorded losses. A point is one of them: how much lower the mean
    loss is than in the stretch before, over the steps from the middle of one to the middle of the other, and
    the median of the ratios of all layers in it. Early points are dark, late ones light. Right of zero the
    loss falls. The horizontal axis is linear around zero and logarithmic beyond. A stretch whose loss is not
    finite, or that has no ratio above zero, is a magenta triangle in the lower left corner.

    Args:
        ratio: The topic `uw_ratio`.
        loss: The topic `loss`; of several losses the first.
        max_points: The most points drawn.

    Raises:
        ValueError: A column is missing.
    """
    losses = split(loss, "component" if "component" in loss.columns else "layer")
    layers = [line for line in split(ratio) if len(line)]
    if not layers or not losses or not len(losses[0]):
        return nothing("no loss and update-to-weight ratio were recorded together")
    if len(losses[0]) < 2:
        return nothing("one loss alone shows no decrease")
    table = _points(losses[0], layers, max_points)
    good = table["decrease"].notna() & (table["ratio"] > 0)
    x, y = _decrease_axis(table.loc[good, "decrease"].to_numpy()), _ratio_axis()
    base = alt.Chart(table[good], width=WIDTH, height=_HEIGHT)
    zero: alt.Chart = alt.Chart(pd.DataFrame({"decrease": [0.0]}), width=WIDTH, height=_HEIGHT).mark_rule()
    points: alt.Chart = base.mark_circle(size=45)
    color = alt.Color(
        "step:Q",
        scale=alt.Scale(range="ramp"),
        legend=alt.Legend(title="step", format="~s", gradientLength=200, gradientThickness=10),
    )
    # What the other charts are zoomed to: the rest of the run steps back here.
    shown = alt.param(name=STEPS_SHOWN, value=None)
    within = f"!{STEPS_SHOWN} || ({STEPS_SHOWN}[0] <= datum.last && datum.step <= {STEPS_SHOWN}[1])"
    inside = alt.when(within).then(alt.value(0.85)).otherwise(alt.value(0.08))
    layers_drawn = [
        zero.encode(x=x, opacity=alt.value(0.4)),
        points.encode(x=x, y=y, color=color, opacity=inside, tooltip=_tooltip()),
    ]
    if not good.all():
        layers_drawn.append(_bad(table[~good]))
    return cast(alt.LayerChart, alt.layer(*layers_drawn).add_params(shown))


def _points(loss: Series, layers: Sequence[Series], most: int) -> pd.DataFrame:
    """One row a stretch but the first: step, last, decrease (of the loss, a step), ratio."""
    n = len(loss)
    width = max(min(_FEWEST, n // 2), -(-n // (most + 1)))
    starts = np.arange(0, n - n % width or n, width)
    counts = np.diff(np.append(starts, n))
    # An infinity in a mean is what the point is to show.
    with np.errstate(invalid="ignore"):
        means = np.add.reduceat(loss.values, starts) / counts
        middles = np.add.reduceat(loss.steps.astype(np.float64), starts) / counts
        decrease = -np.diff(means) / np.diff(middles)
    first, last = loss.steps[starts], loss.steps[np.append(starts[1:], n) - 1]
    steps = np.concatenate([line.steps for line in layers])
    values = np.concatenate([line.values for line in layers])
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    bounds = np.searchsorted(steps, np.append(first, last[-1] + 1))
    rows = []
    for k in range(1, len(starts)):
        mine = values[bounds[k] : bounds[k + 1]]
        if not len(mine):
            continue  # a cadence that left this stretch out
        finite = mine[np.isfinite(mine)]
        rows.append(
            {
                "step": int(first[k]),
                "last": int(last[k]),
                "decrease": _rounded(decrease[k - 1]),
                "ratio": _rounded(float(np.median(finite)) if len(finite) else math.nan),
            }
        )
    columns = ["step", "last", "decrease", "ratio"]
    return pd.DataFrame(rows, columns=columns).astype({"decrease": "float64", "ratio": "float64"})


def _rounded(value: float) -> float:
    return float(f"{value:.5g}") if np.isfinite(value) else math.nan


def _decrease_axis(values: Array) -> alt.X:
    """Linear around zero and logarithmic beyond, labelled at zero and at powers of ten."""
    sizes = np.abs(values[values != 0])
    least = math.floor(math.log10(np.quantile(sizes, 0.25))) if len(sizes) else 0
    most = math.ceil(math.log10(sizes.max())) if len(sizes) else 0
    powers = [10.0**k for k in range(least, max(least, most) + 1)]
    ticks = [*(-p for p in reversed(powers)), 0.0, *powers]
    label = f"datum.value == 0 ? '0' : (datum.value < 0 ? '−' : '') + {power(_EXPONENT)}"
    return alt.X(
        "decrease:Q",
        title="decrease of the loss (a step)",
        axis=alt.Axis(values=ticks, labelExpr=label, labelOverlap=True, grid=False),
        scale=alt.Scale(type="symlog", constant=powers[0], nice=False, padding=10),
    )


_EXPONENT: Final = "round(log(abs(datum.value)) / LN10)"


def _ratio_axis() -> alt.Y:
    axis = value_axis("update-to-weight ratio (median of layers)", log=True)
    axis["shorthand"] = "ratio:Q"
    return axis


def _tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("step:Q", title="from step", format=","),
        alt.Tooltip("last:Q", title="to step", format=","),
        alt.Tooltip("decrease:Q", title="decrease of the loss a step", format=".3~g"),
        alt.Tooltip("ratio:Q", title="update-to-weight ratio", format=".2e"),
    ]


def _bad(table: pd.DataFrame) -> alt.Chart:
    """Marks in the lower left corner, where they hide nothing, one beside the other."""
    places = 6 + 9.0 * np.arange(len(table))
    rows = table[["step", "last"]].assign(
        place=np.minimum(places, WIDTH / 3),
        holds=[
            "a loss that is not finite" if np.isnan(d) else "no ratio above zero" for d in table["decrease"]
        ],
    )
    marks: alt.Chart = alt.Chart(rows, width=WIDTH, height=_HEIGHT).mark_point(
        shape="triangle-up", filled=True, size=60, color=NOT_FINITE, opacity=1, yOffset=-5
    )
    return marks.encode(
        x=alt.X("place:Q", scale=None, axis=None),
        y=alt.YValue("height"),  # type: ignore[no-untyped-call]
        tooltip=[*_tooltip()[:2], alt.Tooltip("holds:N")],
    )

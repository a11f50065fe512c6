"""The loss at each step, and its moving average."""

from __future__ import annotations

from typing import Final

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
    series_color,
    step_axis,
    value_axis,
)
from streamlens.views.rates import largest_rate
from streamlens.views.series import Series, draw_table, exponential_average, split

__all__ = ["AVERAGE", "EACH", "loss"]

EACH: Final = "each step"
"""What the column `kind` says of the loss itself."""

AVERAGE: Final = "moving average"
"""What it says of its average."""

_MOST_CHANGES: Final = 20


def loss(
    rows: pd.DataFrame,
    smoothed: pd.DataFrame | None = None,
    learning_rate: pd.DataFrame | None = None,
    *,
    limits: Limits | None = None,
    max_points: int = 1500,
) -> alt.LayerChart:
    """The loss over steps: every step faint, its exponential moving average strong.

    The axis is logarithmic where every finite value is positive. NaN and infinities are magenta
    triangles at the foot of the chart; the average ends with the last finite loss. Dotted lines stand
    where the learning rate changed, if it did so at most 20 times; a schedule that bends all the time has
    its own chart.

    Args:
        rows: The topic `loss`; a column `component` makes one pair of lines for each loss watched.
        smoothed: The topic `loss.ema`; without it, the average is taken here, with a half-life of
            4% of the steps.
        learning_rate: The topic `learning_rate`, a row a layer and step; the largest rate of a step counts.
        limits: The first and last step of the axis; by default those of the data.
        max_points: The most points drawn, one third of them for the average.

    Raises:
        ValueError: A column is missing.
    """
    by = "component" if "component" in rows.columns else "layer"
    raw = split(rows, by)
    if not any(len(line) for line in raw):
        return nothing("no loss was recorded")
    if smoothed is not None and len(smoothed):
        average = split(smoothed, by if by in smoothed.columns else "layer")
        title = "loss"
    else:
        share = max(map(len, raw)) / 25
        half_life = max(2.0, share)
        average = [
            Series(line.name, line.steps, line.epochs, exponential_average(line.values, half_life))
            for line in raw
        ]
        # Not in steps: a title that grew with the run would have a live page draw the chart anew each time.
        title = f"loss (half-life of the average: {'4% of the' if share >= 2 else 2} recorded steps)"
    finite = np.concatenate([line.values[np.isfinite(line.values)] for line in raw])
    log = bool(len(finite)) and bool((finite > 0).all())
    average = _until_the_last_loss(average, raw)
    points, flags = draw_table(raw, max_points - max_points // 3, log=log)
    means, _ = draw_table(average, max_points // 3, log=log)
    # A gap in the average stands where the loss has its mark already.
    table = pd.concat([points.assign(kind=EACH), means.assign(kind=AVERAGE)], ignore_index=True)
    chart = _draw(table, flags, [line.name for line in raw], title, log=log, limits=limits)
    changes = pd.DataFrame() if learning_rate is None else _changes(learning_rate)
    if 0 < len(changes) <= _MOST_CHANGES:
        chart += _rules(changes, limits)
    return chart


def _until_the_last_loss(averages: list[Series], raw: list[Series]) -> list[Series]:
    """Averages without what they repeat after the last finite loss: a level line would hide the NaN."""
    last = {line.name: line.steps[np.isfinite(line.values)].max(initial=-1) for line in raw}
    return [
        line.take(np.flatnonzero(line.steps <= last[line.name])) if last.get(line.name, -1) >= 0 else line
        for line in averages
    ]


def _changes(rates: pd.DataFrame) -> pd.DataFrame:
    """The steps at which the largest rate is another than before."""
    (rate,) = split(largest_rate(rates)) if len(rates) else [None]
    if rate is None:
        return pd.DataFrame()
    known = rate.take(np.flatnonzero(np.isfinite(rate.values)))
    # Products of a schedule that stands still differ in their last digits.
    at = 1 + np.flatnonzero(~np.isclose(known.values[1:], known.values[:-1], rtol=1e-6, atol=0))
    return pd.DataFrame(
        {
            "step": known.steps[at],
            "change": [
                f"learning rate from {before:.4g} to {after:.4g}"
                for before, after in zip(
                    known.values[at - 1].tolist(), known.values[at].tolist(), strict=True
                )
            ],
        }
    )


def _rules(changes: pd.DataFrame, limits: Limits | None) -> alt.Chart:
    rules: alt.Chart = alt.Chart(changes, width=WIDTH).mark_rule(strokeDash=[1, 4], strokeWidth=1.5)
    tooltip = [alt.Tooltip("change:N"), alt.Tooltip("step:Q", format=",")]
    return rules.encode(x=step_axis(limits), tooltip=tooltip)


def _draw(
    table: pd.DataFrame,
    flags: pd.DataFrame,
    names: list[str],
    title: str,
    *,
    log: bool,
    limits: Limits | None,
) -> alt.LayerChart:
    kinds = [EACH, AVERAGE]
    legend = alt.Legend(title=None, symbolType="stroke")
    base = alt.Chart(table, width=WIDTH, height=240).encode(
        x=step_axis(limits), y=value_axis(title, log=log), detail="series:N"
    )
    if len(names) > 1:
        base = base.encode(color=series_color(names))
    # A round cap shows also a value alone between two that are not finite.
    lines: alt.Chart = base.mark_line(strokeJoin="round", strokeCap="round")
    lines = lines.encode(
        opacity=alt.Opacity("kind:O", scale=alt.Scale(domain=kinds, range=[0.45, 1.0]), legend=legend),
        strokeWidth=alt.StrokeWidth("kind:O", scale=alt.Scale(domain=kinds, range=[1.0, 2.4]), legend=legend),
    )
    tooltip = nearest_tooltip(
        {
            **({"loss": "series"} if len(names) > 1 else {}),
            "value of": "kind",
            "step": "step",
            "epoch": "epoch",
            "value": "value",
        },
        {"step": ",", "value": ".4~g"},
    )
    layers = [lines, nearest_points(base, tooltip)]
    if table["step"].nunique() == 1:
        layers.insert(1, base.mark_point(filled=True, size=28, opacity=1))
    interactive = len(layers) - 1
    if len(flags):
        layers.append(flag_marks(flags, limits, "loss"))
    return layered(layers, interactive)

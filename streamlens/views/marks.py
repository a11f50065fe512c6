"""What the charts over steps have in common: their axes, zooming, lines and marks for bad values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, cast

import altair as alt
import pandas as pd

from streamlens.views.theme import NOT_FINITE

__all__ = [
    "LEGEND_LINES",
    "POWER_OF_TEN",
    "STEPS_SHOWN",
    "WIDTH",
    "Limits",
    "chart_of_lines",
    "flag_marks",
    "layered",
    "nearest_points",
    "nearest_tooltip",
    "nothing",
    "power",
    "series_color",
    "step_axis",
    "value_axis",
]

Limits = tuple[float, float]
"""The first and the last step of the axis."""

STEPS_SHOWN: Final = "steps_shown"
"""The parameter of a chart without a step axis that a page sets to the steps the others are zoomed to, as a
pair, and to null for all."""

WIDTH: Final = 720
"""Pixels a chart is wide where its host does not say otherwise."""

Interpolation = Literal["linear", "step-after"]

LEGEND_LINES: Final = 12
"""Lines up to which a legend is of use; above, pointing at a line names it."""


def power(exponent: str) -> str:
    """Vega expression for a power of ten, as `10⁻³`.

    Args:
        exponent: Vega expression for its exponent, a whole number.
    """
    # Vega's expressions know no superscript: the digits are looked up one by one.
    digits = "'⁰¹²³⁴⁵⁶⁷⁸⁹'"
    tens = f"floor(abs({exponent}) / 10)"
    ones = f"abs({exponent}) % 10"
    return (
        f"'10' + ({exponent} < 0 ? '⁻' : '')"
        f" + ({tens} > 0 ? slice({digits}, {tens}, {tens} + 1) : '')"
        f" + slice({digits}, {ones}, {ones} + 1)"
    )


POWER_OF_TEN: Final = power("round(datum.value)")
"""Vega expression: the label `10⁻³` of an axis or legend whose values are logarithms."""

_EXPONENT: Final = "(log(datum.value) / LN10)"
_IS_POWER: Final = f"abs({_EXPONENT} - round({_EXPONENT})) < 1e-6"
_DECADES: Final = "(log(domain('y')[1] / domain('y')[0]) / LN10)"
_MANTISSA: Final = f"round(datum.value / pow(10, floor({_EXPONENT} + 1e-9)))"
# Powers of ten; in an axis too short to hold several, 1, 2 and 5 times them; in a shorter one, all.
# (Charts put together name their scales otherwise: the length is then unknown, and no comparison true.)
_LOG_LABEL: Final = (
    f"{_DECADES} < 0.8 ? format(datum.value, '~g')"
    f" : {_DECADES} >= 2.6 ? ({_IS_POWER} ? {power(f'round({_EXPONENT})')} : '')"
    f" : (indexof([1, 2, 5], {_MANTISSA}) >= 0 ? format(datum.value, '~g') : '')"
)


def layered(layers: Sequence[alt.Chart], interactive: int) -> alt.LayerChart:
    """Layers over one step axis that pans and zooms.

    Dragging pans, scrolling with Ctrl or Cmd held (a pinch on a touchpad) zooms, so that plain
    scrolling still moves the page; a double click goes back to the whole run. Charts put together
    share the selection by its name, `steps`.

    Args:
        layers: Charts with `step_axis` as their x, the lowest first.
        interactive: The position of the layer that has all selections. They must stand on one:
            Altair repeats the selections of several for each of them where charts are put together.
    """
    steps = alt.selection_interval(
        name="steps", bind="scales", encodings=["x"], zoom="wheel![event.ctrlKey || event.metaKey]"
    )
    layers = [layer.add_params(steps) if i == interactive else layer for i, layer in enumerate(layers)]
    return cast(alt.LayerChart, alt.layer(*layers))


def step_axis(limits: Limits | None) -> alt.X:
    """The step axis that every chart has, of the column `step`.

    The column's name is part of the zoom's: only charts that share it zoom together.

    Args:
        limits: Its first and last step; by default those of the data.
    """
    domain: Any = alt.Undefined if limits is None else list(limits)
    return alt.X(
        "step:Q",
        title="step (optimizer updates)",
        # Each by itself: an axis's own format would write 0k beside 10k.
        axis=alt.Axis(
            labelExpr="format(datum.value, '~s')",
            tickCount=8,
            tickMinStep=1,
            labelFlush=True,
            labelOverlap=True,
        ),
        # Inset, so that marks at the first and the last step are whole; a zoom goes without.
        scale=alt.Scale(domain=domain, zero=False, nice=False, padding=6),
    )


def value_axis(title: str, *, log: bool, zero: bool = False, number_format: str = "~g") -> alt.Y:
    """A value axis, its title set flat above it.

    Args:
        title: What is drawn, with its unit.
        log: Whether it is logarithmic; it is then labelled `10⁻³`.
        zero: Whether a linear axis must show zero.
        number_format: How a linear axis writes numbers, in d3's language.
    """
    flat: dict[str, Any] = {
        "titleAngle": 0,
        "titleAlign": "left",
        "titleAnchor": "end",
        "titleBaseline": "bottom",
        "titleX": 0,
        "titleY": -8,
    }
    if log:
        faint = {"condition": {"test": f"{_DECADES} < 0.8 || {_IS_POWER}", "value": 1}, "value": 0.35}
        axis = alt.Axis(labelExpr=_LOG_LABEL, tickCount=6, labelOverlap="greedy", gridOpacity=faint, **flat)
        scale = alt.Scale(type="log", nice=False, padding=6)
    else:
        axis = alt.Axis(format=number_format, tickCount=5, **flat)
        scale = alt.Scale(zero=zero, nice=True)
    return alt.Y("value:Q", title=title, axis=axis, scale=scale)


def chart_of_lines(
    points: pd.DataFrame,
    flags: pd.DataFrame,
    *,
    names: Sequence[str],
    y: alt.Y,
    limits: Limits | None,
    series_title: str,
    value_title: str,
    value_format: str = ".4~g",
    interpolate: Interpolation = "linear",
    with_points: bool = False,
    height: int = 200,
) -> alt.LayerChart:
    """Lines over steps with a tooltip at the nearest point and marks for what no line can show.

    Up to 12 lines have a legend, a click in which picks one out. More are coloured from the
    first to the last; pointing at one fades the others.

    Args:
        points: Rows of `draw_table`.
        flags: Its second result.
        names: The series in order.
        y: The value axis.
        limits: The first and last step.
        series_title: What a series is, such as `layer`.
        value_title: What the tooltip calls the value.
        value_format: How the tooltip writes the value, in d3's language.
        interpolate: How a line joins its points.
        with_points: Whether the points themselves are drawn; those of a single step always are.
        height: Pixels.
    """
    base = alt.Chart(points, width=WIDTH, height=height).encode(
        x=step_axis(limits), y=y, color=series_color(names)
    )
    # A round cap shows also a value alone between two that are not finite.
    lines: alt.Chart = base.mark_line(interpolate=interpolate, strokeJoin="round", strokeCap="round")
    dots: alt.Chart = base.mark_point(filled=True, size=28, opacity=1)
    tooltip = nearest_tooltip(
        {series_title: "series", "step": "step", "epoch": "epoch", value_title: "value"},
        {"step": ",", "value": value_format},
    )
    if len(names) > LEGEND_LINES:
        hover = _hover("hover_series", fields=["series"])
        lines = lines.encode(
            opacity=alt.when(hover).then(alt.value(0.9)).otherwise(alt.value(0.15)),
            strokeWidth=alt.when(hover, empty=False).then(alt.value(2.8)).otherwise(alt.value(1.4)),
        )
        near: alt.Chart = base.mark_point(opacity=0).encode(tooltip=tooltip).add_params(hover)
    else:
        near = nearest_points(base, tooltip)
    if 1 < len(names) <= LEGEND_LINES:
        pick = alt.selection_point(name="pick", fields=["series"], bind="legend")
        faded = alt.when(pick).then(alt.value(1.0)).otherwise(alt.value(0.12))
        lines, dots, near = lines.encode(opacity=faded), dots.encode(opacity=faded), near.add_params(pick)
    layers = [lines, dots, near] if with_points or points["step"].nunique() == 1 else [lines, near]
    interactive = len(layers) - 1
    if len(flags):
        layers.append(flag_marks(flags, limits, series_title))
    return layered(layers, interactive)


def series_color(names: Sequence[str]) -> alt.Color:
    """Colours of series: unrelated hues up to 8, else one sequence from first to last.

    Args:
        names: The series in order; 2 to 12 of them have a legend.
    """
    legend: Any = None
    if 1 < len(names) <= LEGEND_LINES:
        legend = alt.Legend(title=None, symbolType="stroke", symbolOpacity=1)
    domain = list(names)
    if len(names) <= 8:
        return alt.Color("series:N", scale=alt.Scale(domain=domain, range="category"), legend=legend)
    return alt.Color("series:O", scale=alt.Scale(domain=domain, range="ordinal"), legend=legend)


def nearest_points(base: alt.Chart, tooltip: alt.TooltipValue) -> alt.Chart:
    """Points that are invisible but for the one nearest to the pointer, which has the tooltip.

    Args:
        base: The chart with the data and the axes.
        tooltip: A `nearest_tooltip`.
    """
    hover = _hover("hover")
    seen = alt.when(hover, empty=False).then(alt.value(1.0)).otherwise(alt.value(0.0))
    points: alt.Chart = base.mark_point(filled=True, size=45)
    return points.encode(tooltip=tooltip, opacity=seen).add_params(hover)


def nearest_tooltip(columns: Mapping[str, str], formats: Mapping[str, str]) -> alt.TooltipValue:
    """A tooltip for a layer whose selection takes the point nearest to the pointer.

    Altair's own list of fields does not do: around each point Vega-Lite then lays a cell, whose
    data are the point's mark, and of text fields looks for them in the mark.

    Args:
        columns: What to call each column, in order.
        formats: How to write the numbers of a column, in d3's language.
    """
    row = "(datum.datum || datum)"
    entries = []
    for title, column in columns.items():
        value = f"{row}[{json.dumps(column)}]"
        if column in formats:
            value = f"format({value}, {json.dumps(formats[column])})"
        entries.append(f"{json.dumps(title)}: {value}")
    expression = alt.ExprRef("{" + ", ".join(entries) + "}")
    return alt.TooltipValue(expression)


def _hover(name: str, **projection: Any) -> alt.Parameter:
    return alt.selection_point(name=name, on="pointerover", nearest=True, clear="pointerout", **projection)


def flag_marks(flags: pd.DataFrame, limits: Limits | None, series_title: str) -> alt.Chart:
    """Triangles at the foot of the chart where a value is NaN, infinite or outside a log axis.

    Args:
        flags: Rows `series`, `step`, `epoch`, `flag`.
        limits: The first and last step.
        series_title: What a series is.
    """
    marks: alt.Chart = alt.Chart(flags, width=WIDTH).mark_point(
        shape="triangle-up", filled=True, size=60, color=NOT_FINITE, opacity=1, yOffset=-5
    )
    return marks.encode(
        x=step_axis(limits),
        y=alt.YValue("height"),  # type: ignore[no-untyped-call]
        tooltip=[
            alt.Tooltip("series:N", title=series_title),
            alt.Tooltip("step:Q", format=","),
            alt.Tooltip("flag:N", title="value"),
        ],
    )


def nothing(message: str) -> alt.LayerChart:
    """A chart that says in words why nothing is drawn.

    Args:
        message: The words.
    """
    rows = pd.DataFrame({"message": [message]})
    text: alt.Chart = alt.Chart(rows, width=WIDTH, height=60).mark_text(fontSize=13, color="gray")
    return cast(alt.LayerChart, alt.layer(text.encode(text="message:N")))

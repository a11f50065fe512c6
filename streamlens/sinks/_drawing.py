"""Drawing a `Chart` on a figure of matplotlib, whatever shows it."""

from __future__ import annotations

import itertools
import math
from typing import Any, Final

import numpy as np

from streamlens.sinks._chart import Bars, Chart, Line

__all__ = ["draw"]

_PANEL: Final = (5.4, 3.1)
"""Inches."""
_MOST_PANELS: Final = 24
_MOST_LINES: Final = 60
_LEGEND: Final = 8
_POINTS: Final = 50_000
"""Points of all lines of a panel together."""
_DECADES: Final = 1e4
_LONGEST: Final = 26
"""Characters of a label; of a longer one the end is what tells layers apart."""

# Told apart under deuteranopia, protanopia and tritanopia (after Okabe and Ito).
_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#785ef0", "#56b4e9", "#8c6d31", "#6e7781")
_ALERT: Final = "#d1242f"
_NOT_FINITE: Final = "#e6007e"


def draw(figure: Any, chart: Chart) -> None:
    """Draw a chart, a panel a topic, in place of what the figure shows.

    Lines of positive numbers that span two decades have a logarithmic axis. A step at which a
    number was not finite has a mark at the foot of its panel, one with an alert a dashed line.

    Args:
        figure: A figure of matplotlib.
        chart: What to draw.
    """
    figure.clear()
    topics = chart.topics[:_MOST_PANELS]
    title = chart.title
    if len(chart.topics) > len(topics):
        title = f"{title} (the first {len(topics)} of {len(chart.topics)} topics)".strip()
    if title:
        figure.suptitle(_plain(title), fontsize=11)
    if not topics:
        return
    columns = min(len(topics), 2 if len(topics) <= 4 else 3)
    rows = math.ceil(len(topics) / columns)
    figure.set_size_inches(columns * _PANEL[0], rows * _PANEL[1], forward=False)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, topic in itertools.zip_longest(panels, topics):
        if topic is None:
            panel.remove()
        elif topic in chart.lines:
            _draw_lines(panel, topic, chart.lines[topic], chart.alerts)
        else:
            _draw_bars(panel, topic, chart.bars[topic])


def _draw_lines(panel: Any, topic: str, series: dict[str, Line], alerts: list[int]) -> None:
    shown = _spread(list(series), _MOST_LINES)
    few = f" ({len(shown)} of {len(series)})" if len(shown) < len(series) else ""
    points = max(100, _POINTS // max(1, len(shown)))
    drawn: list[tuple[str, Any]] = []
    finite: list[Any] = []
    missing: list[Any] = []
    for i, label in enumerate(shown):
        steps, values = series[label].thinned(points)
        alone = np.count_nonzero(np.isfinite(values)) <= 1
        (line,) = panel.plot(
            steps,
            values,
            color=_colour(i, len(shown)),
            linewidth=1.1,
            marker="o" if alone else "",
            markersize=3,
        )
        drawn.append((label, line))
        finite.append(values[np.isfinite(values)])
        missing.append(steps[np.isnan(values)])
    numbers = np.concatenate(finite) if finite else np.empty(0)
    if numbers.size and numbers.min() > 0 and numbers.max() >= 100 * numbers.min():
        panel.set_yscale("log")
    gaps = np.unique(np.concatenate(missing)) if missing else np.empty(0)
    if gaps.size:
        foot = panel.get_xaxis_transform()
        panel.plot(gaps, np.zeros(gaps.size), "|", color=_NOT_FINITE, transform=foot, clip_on=False)
        few += ", not finite where marked"
    for step in alerts:
        panel.axvline(step, color=_ALERT, linewidth=0.8, linestyle="--", alpha=0.6, zorder=1)
    panel.set_xlabel("step", fontsize=8)
    _finish(panel, topic + few, drawn)


def _draw_bars(panel: Any, topic: str, bars: dict[str, Bars]) -> None:
    shown = _spread(list(bars), _LEGEND)
    few = f" ({len(shown)} of {len(bars)} layers)" if len(shown) < len(bars) else ""
    drawn = []
    for i, layer in enumerate(shown):
        bar = bars[layer]
        drawn.append(
            (layer, panel.stairs(bar.shares, bar.edges, color=_colour(i, len(shown)), linewidth=1.1))
        )
    if any(_uneven(bars[layer].edges) for layer in shown):
        # Logarithmic bins, on both sides of zero: four decades of them, the rest as one stretch.
        largest = max(float(np.abs(bars[layer].edges).max()) for layer in shown)
        panel.set_xscale("symlog", linthresh=largest / _DECADES)
        # Zero and every second decade beyond the linear stretch: more would run into each other.
        highest = math.floor(math.log10(largest))
        lowest = math.ceil(math.log10(largest / _DECADES)) + 1
        marks = [10.0**decade for decade in range(highest, lowest - 1, -2)]
        panel.set_xticks([*(-mark for mark in marks), 0.0, *marks])
    missing = sum(bar.missing for bar in bars.values())
    few += f", {missing:,} not finite" if missing else ""
    latest = max((bars[layer].step for layer in shown), default=0)
    panel.set_ylabel("share of elements", fontsize=8)
    panel.set_ylim(bottom=0)
    _finish(panel, f"{topic} at step {latest}{few}", drawn)


def _uneven(edges: Any) -> bool:
    """Whether bins differ in width by far, as logarithmic ones do."""
    widths = np.diff(edges)
    return bool(widths.max() > 100 * widths.min())


def _finish(panel: Any, title: str, drawn: list[tuple[str, Any]]) -> None:
    panel.set_title(_plain(title), fontsize=9, loc="left")
    panel.tick_params(labelsize=7)
    panel.grid(visible=True, color="#eaeef2", linewidth=0.6)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    if len(drawn) > 1 or (drawn and drawn[0][0]):
        named = _spread(drawn, _LEGEND)
        panel.legend(
            [line for _, line in named],
            [_label(label) for label, _ in named],
            loc="upper left",
            bbox_to_anchor=(1.0, 1.0),
            fontsize=7,
            frameon=False,
            handlelength=1.2,
        )


def _colour(i: int, count: int) -> Any:
    """One of few colours that nobody confuses, or one of a scale in the model's order."""
    if count <= len(_COLOURS):
        return _COLOURS[i]
    from matplotlib import colormaps

    return colormaps["viridis"](0.85 * i / (count - 1))


def _spread(entries: list[Any], most: int) -> list[Any]:
    """All entries, or as many as may be, evenly spread, the first and the last among them."""
    if len(entries) <= most:
        return entries
    return [entries[round(i * (len(entries) - 1) / (most - 1))] for i in range(most)]


def _label(text: str) -> str:
    text = text or "model"
    # What begins with an underscore would not get into a legend.
    text = f" {text}" if text.startswith("_") else text
    return _plain(text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST :]}")


def _plain(text: str) -> str:
    """Text that is no formula, and that fonts have."""
    return "".join(sign if sign.isprintable() else " " for sign in text).replace("$", r"\$")

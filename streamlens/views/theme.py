"""Colours, fonts and spacing of every chart, as Vega-Lite configurations for light and dark pages.

Views name no colours; they say what a colour stands for, and the configuration the host passes
decides. One chart so serves a light page and a dark one.
"""

from __future__ import annotations

from typing import Any, Final, Literal, TypeVar

import altair as alt

__all__ = ["ALERT", "NOT_FINITE", "PAGE", "Mode", "themed", "vega_config"]

_Chart = TypeVar("_Chart", bound=alt.TopLevelMixin)

Mode = Literal["light", "dark"]

NOT_FINITE: Final = "#e6007e"
"""Marks NaN and infinities, in both modes; no scale of the theme comes near it."""

ALERT: Final = "#d1242f"
"""Marks alerts, in both modes."""

_FONT: Final = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'DejaVu Sans', sans-serif"

# Told apart under deuteranopia, protanopia and tritanopia (after Okabe and Ito, without their yellow,
# black and pink: too faint on white, invisible on black, too near the colour of NaN).
_CATEGORY: Final[dict[Mode, list[str]]] = {
    "light": ["#0072b2", "#d55e00", "#009e73", "#e69f00", "#785ef0", "#56b4e9", "#8c6d31", "#6e7781"],
    "dark": ["#58a6e0", "#ff8a4c", "#2cc69a", "#f2b93b", "#a594ff", "#9bd7ff", "#c9a968", "#9da7b3"],
}
# Viridis without the end that would vanish into the page. As a scheme it is interpolated to as many
# colours as there are series; a list of colours would be repeated.
_SEQUENCE: Final[dict[Mode, dict[str, Any]]] = {
    "light": {"scheme": "viridis", "extent": [0.0, 0.85]},
    "dark": {"scheme": "viridis", "extent": [0.2, 1.0]},
}
# Blue for too little, orange for too much, the page's own grey in the middle.
_DIVERGING: Final[dict[Mode, list[str]]] = {
    "light": ["#08519c", "#4a90c8", "#b3d0e6", "#f1f1ee", "#f8c79b", "#e07b28", "#963c00"],
    "dark": ["#8ecbff", "#3f8fd2", "#23527c", "#2b3038", "#7a4518", "#d9782b", "#ffc48a"],
}
PAGE: Final[dict[Mode, str]] = {"light": "#ffffff", "dark": "#0d1117"}
_INK: Final[dict[Mode, dict[str, str]]] = {
    "light": {"text": "#24292f", "muted": "#57606a", "line": "#d0d7de", "grid": "#eaeef2"},
    "dark": {"text": "#e6edf3", "muted": "#9da7b3", "line": "#3d444d", "grid": "#252b33"},
}


def vega_config(mode: Mode = "light", *, label_width: int = 0) -> dict[str, Any]:
    """The Vega-Lite configuration of a mode.

    Args:
        mode: `"light"` or `"dark"`.
        label_width: Pixels kept for the labels beside every value axis, so that charts one below
            the other share the place of their step axis; 0 lets each chart take what it needs.

    Raises:
        ValueError: `mode` is neither.
    """
    if mode not in _INK:
        raise ValueError(f"unknown mode {mode!r}: use 'light' or 'dark'")
    ink = _INK[mode]
    return {
        "background": "transparent",
        "font": _FONT,
        "padding": {"left": 0, "right": 2, "top": 2, "bottom": 5},
        "view": {"stroke": None},
        "mark": {"color": _CATEGORY[mode][0]},
        "rule": {"color": ink["muted"]},
        "range": {
            "category": _CATEGORY[mode],
            "ordinal": _SEQUENCE[mode],
            "ramp": _SEQUENCE[mode],
            "heatmap": _SEQUENCE[mode],
            "diverging": _DIVERGING[mode],
        },
        "axis": {
            "labelColor": ink["muted"],
            "labelFontSize": 11,
            "titleColor": ink["muted"],
            "titleFontSize": 11,
            "titleFontWeight": 500,
            "gridColor": ink["grid"],
            "domain": False,
            "tickColor": ink["line"],
            "tickSize": 4,
            "labelPadding": 4,
        },
        "axisX": {"grid": False, "domain": True, "domainColor": ink["line"], "titlePadding": 6},
        "axisY": {"ticks": False, "labelLimit": 150, **({"minExtent": label_width} if label_width else {})},
        "legend": {
            "orient": "top",
            "labelColor": ink["text"],
            "labelFontSize": 12,
            "titleColor": ink["muted"],
            "titleFontSize": 11,
            "titleFontWeight": 500,
            "labelLimit": 200,
            "columns": 6,
            "symbolStrokeWidth": 2.5,
            "offset": 26,  # above the value axis's title
        },
        "title": {"color": ink["text"], "subtitleColor": ink["muted"], "fontSize": 13, "anchor": "start"},
    }


def themed(chart: _Chart, mode: Mode = "light") -> _Chart:
    """A copy of a view's chart with the colours of a mode, for showing or saving it by itself.

    Args:
        chart: What a view returned, or several of them put together with `&`.
        mode: `"light"` or `"dark"`.

    Raises:
        ValueError: `mode` is neither.
    """
    config = alt.Config.from_dict({**vega_config(mode), "background": PAGE[mode], "padding": 16})
    return chart.properties(config=config)

"""A run's charts as one picture, one below the other: PNG or SVG."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import altair as alt

from streamlens.errors import missing_package
from streamlens.views.heading import heading
from streamlens.views.marks import nothing
from streamlens.views.reading import read_thinned, readable
from streamlens.views.report import replace_file
from streamlens.views.sections import ReadableRun, label_width, sections
from streamlens.views.sources import AnyChart, filled, topics_of
from streamlens.views.stack import stack
from streamlens.views.summary import last_step
from streamlens.views.theme import PAGE, Mode, vega_config

__all__ = ["KINDS", "write_picture"]

KINDS: Final = ("png", "svg")
"""The kinds of picture there are."""

_SHARPNESS: Final = 2.0
"""Pixels of a PNG for each pixel of a chart."""

_VERSION: Final = alt.SCHEMA_VERSION[1:].rpartition(".")[0]


def write_picture(
    run: str | os.PathLike[str] | ReadableRun,
    out: str | os.PathLike[str],
    *,
    mode: Mode = "light",
    views: Mapping[str, AnyChart] | None = None,
) -> Path:
    """Write the charts of a report as one picture, for a paper or a place where no page can be opened.

    Needs `pip install "streamlens[export]"`. The file is replaced at once, as `write_report` does it.

    Args:
        run: The file that a `RunStore` wrote, or a run read from it.
        out: Where to write it; it ends in `.png` or `.svg`. Missing folders are made.
        mode: `"light"` or `"dark"`.
        views: Charts of your own over `sl.views.data(topic)` by their headings, shown first.

    Returns:
        The path of the picture.

    Raises:
        ValueError: `out` has another ending, or `mode` is neither.
        ImportError: The export extra is not installed.
        RunStoreError: `run` is a path at which there is no run store.
        OSError: The picture cannot be written.
    """
    out = Path(out)
    kind = out.suffix.lower().removeprefix(".")
    if kind not in KINDS:
        raise ValueError(f"a picture is written as .png or .svg, not as {out.name!r}")
    vega_config(mode)  # an unknown mode is an error before anything is read
    try:
        converter = importlib.import_module("vl_convert")
    except ImportError:
        raise missing_package("a picture of a run", "vl-convert-python", "export") from None
    with readable(run) as opened:
        spec, config = _drawn(opened, mode, views or {})
    if kind == "svg":
        content = converter.vegalite_to_svg(spec, vl_version=_VERSION, config=config).encode()
    else:
        content = converter.vegalite_to_png(spec, vl_version=_VERSION, config=config, scale=_SHARPNESS)
    return replace_file(out, content, "picture")


def _drawn(
    run: ReadableRun, mode: Mode, views: Mapping[str, AnyChart]
) -> tuple[dict[str, Any], dict[str, Any]]:
    models = read_thinned(run)
    last = last_step(models)
    charts: list[Any] = []
    rows: dict[str, Any] = {}
    for name, chart in views.items():
        there = {topic: run.dataframe(topic) for topic in topics_of(chart) if topic in run.topics}
        if there:
            charts.append(chart.properties(title=name))
            rows |= there
    for section in sections(models, (0.0, float(last + 1)) if last >= 0 else None):
        named = f"{section.model}: {section.title}" if section.model else section.title
        charts.append(section.chart.properties(title=named))
    title, _ = heading(run.metadata, [model.name for model in models if model.name])
    whole = stack(*(charts or [nothing("nothing was recorded")]))
    whole = whole.properties(title=alt.TitleParams(title, fontSize=18, offset=18), spacing=28)
    config = {
        **vega_config(mode, label_width=label_width(models)),
        "background": PAGE[mode],
        "padding": 24,
    }
    return filled(whole, rows), config

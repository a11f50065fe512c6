"""One self-contained page about a run, to be opened in any browser, with or without a network."""

from __future__ import annotations

import base64
import datetime
import hashlib
import html
import json
import os
import secrets
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import altair as alt

from streamlens.views.alerts import alert_list, no_alerts, rules_of
from streamlens.views.heading import heading
from streamlens.views.reading import read_thinned, readable
from streamlens.views.sections import ModelRows, ReadableRun, Section, label_width, sections
from streamlens.views.sources import AnyChart, filled, topics_of
from streamlens.views.summary import Tile, last_step, tiles, time_span
from streamlens.views.theme import vega_config

__all__ = ["replace_file", "write_report"]

_OWN_POINTS: Final = 4_000
"""Rows of a topic that a chart of somebody's own is given."""


def write_report(
    run: str | os.PathLike[str] | ReadableRun,
    out: str | os.PathLike[str],
    *,
    views: Mapping[str, AnyChart] | None = None,
) -> Path:
    """Write a page about a run: its settings, a summary and charts of what was recorded.

    The page is one file of about 1 MB that loads nothing from anywhere. What was not recorded is
    left out and listed at its end. Its text comes from the run, and is shown as text only. The
    file is replaced at once: whoever reads it meanwhile sees the old page or the new one. Of a run of
    any length about as many points are read as are drawn: lines keep their extremes, heatmaps and
    distributions are of means, and NaN stays visible in both.

    Args:
        run: The file that a `RunStore` wrote, or a run read from it.
        out: Where to write the page; missing folders are made.
        views: Charts of your own over `sl.views.data(topic)` by their headings, shown first; one is left
            out where the run has none of its topics.

    Returns:
        The path of the page.

    Raises:
        RunStoreError: `run` is a path at which there is no run store.
        OSError: The page cannot be written.
    """
    with readable(run) as opened:
        page = _page(opened, views or {})
    # A name that is no text, as a broken file may hold, has its place marked.
    return replace_file(Path(out), page.encode("utf-8", "replace"), "report")


def replace_file(path: Path, content: bytes, what: str) -> Path:
    """Write a file whole: whoever reads it meanwhile sees the old one or the new one.

    Args:
        path: Where; missing folders are made.
        content: What.
        what: What the file is called where it cannot be written.

    Returns:
        The path.

    Raises:
        OSError: It cannot be written.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise type(error)(error.errno, f"cannot write the {what}: {error.strerror}", str(path)) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return path


def _page(run: ReadableRun, views: Mapping[str, AnyChart]) -> str:
    models = read_thinned(run)
    last = last_step(models)
    found = sections(models, (0.0, float(last + 1)) if last >= 0 else None)
    specs = [section.chart.to_dict(validate=False) for section in found]
    own = dict(_own_specs(run, views))
    # Charts of the reader's own come first, as sections without a sentence.
    found = [*(Section(f"own-{name}", "", name, "", alt.LayerChart()) for name in own), *found]
    title, settings = heading(run.metadata, [model.name for model in models if model.name])
    # A classic script ends at the first "</script": the bundle's build makes sure it holds none.
    bundle = _asset("vega/vega.min.js")
    script = _asset("page/host.js") + _asset("page/boot.js")
    charts = [
        {"id": f"chart-{i}", "name": section.file_name, "spec": spec}
        for i, (section, spec) in enumerate(zip(found, [*own.values(), *specs], strict=True))
    ]
    width = label_width(models)
    return string.Template(_asset("page/report.html")).substitute(
        policy=_policy(bundle, script),
        title=html.escape(title),
        css=_asset("page/report.css"),
        recorded=_recorded(models),
        settings=_settings(settings),
        tiles=_tiles(tiles(models)),
        hint=_HINT if found else "",
        alerts="\n".join(alert_list(model.alerts, model.name) for model in models).strip()
        or _quiet(run.metadata, last),
        sections="\n".join(_sections(found)) if found else _EMPTY,
        missing=_missing(models) if found else "",
        charts=_json(charts),
        configs=_json({mode: vega_config(mode, label_width=width) for mode in ("light", "dark")}),
        bundle=bundle,
        script=script,
    )


def _own_specs(run: ReadableRun, views: Mapping[str, AnyChart]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Charts of somebody's own with the rows of a run, by their headings, of those that it has topics for.

    Args:
        run: The run.
        views: The charts.
    """
    for name, chart in views.items():
        rows = {topic: run.dataframe(topic) for topic in topics_of(chart) if topic in run.topics}
        if rows:
            yield name, filled(chart, rows, max_points=_OWN_POINTS)


def _asset(name: str) -> str:
    return files("streamlens.views").joinpath(name).read_text(encoding="utf-8")


def _json(data: object) -> str:
    """JSON that can stand in a script element: nothing in it can end the element or open another."""
    # json.dumps writes everything beyond ASCII as escapes, U+2028 and U+2029 among them.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.translate(_ESCAPES)


_ESCAPES: Final = {ord(char): f"\\u{ord(char):04x}" for char in "<>&"}


def _policy(*scripts: str) -> str:
    """A policy under which only these scripts run, and nothing is loaded or sent."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"


def _quiet(metadata: Mapping[str, Any], last: int) -> str:
    """What a page says of alerts where rules were on and none came."""
    rules = rules_of(metadata)
    return no_alerts(rules, last + 1) if rules else ""


def _settings(settings: Sequence[tuple[str, str]]) -> str:
    if not settings:
        return ""
    rows = "\n".join(
        f'<div title="{html.escape(value)}"><dt>{html.escape(name.replace("_", " "))}</dt>'
        f"<dd>{html.escape(value)}</dd></div>"
        for name, value in ((name[:60], value[:300]) for name, value in settings[:60])
    )
    return f'<dl class="settings">\n{rows}\n</dl>'


def _recorded(models: Sequence[ModelRows]) -> str:
    span = time_span(models)
    if span is None:
        return ""
    with suppress(ValueError, OverflowError, OSError):
        start = datetime.datetime.fromtimestamp(span[0], datetime.UTC)
        return f" · run of {start:%Y-%m-%d %H:%M} UTC"
    return ""


def _tiles(numbers: Sequence[Tile]) -> str:
    if not numbers:
        return ""
    rows = []
    for tile in numbers:
        note = f'<dd class="note {tile.verdict}">{html.escape(tile.note)}</dd>' if tile.note else ""
        label, value = html.escape(tile.label), html.escape(tile.value)
        wide = " wide" if tile.wide else ""
        rows.append(f'<div class="tile{wide}"><dt>{label}</dt><dd class="value">{value}</dd>{note}</div>')
    return '<dl class="tiles">\n' + "\n".join(rows) + "\n</dl>"


def _sections(found: Sequence[Section]) -> Iterator[str]:
    model = ""
    for i, section in enumerate(found):
        if section.model != model:
            model = section.model
            yield f"<h2>{html.escape(model)}</h2>"
        yield (
            f'<section class="card">\n<h3>{html.escape(section.title)}</h3>\n'
            f'<p>{html.escape(section.reading)}</p>\n<div class="chart" id="chart-{i}"></div>\n</section>'
        )


def _missing(models: Sequence[ModelRows]) -> str:
    recorded = {topic for model in models for topic, rows in model.rows.items() if len(rows)}
    rows = [
        f"<li>{html.escape(what)}: <code>{html.escape(how)}</code></li>"
        for topic, (what, how) in _HOW_TO_RECORD.items()
        if topic not in recorded
    ]
    if not rows:
        return ""
    return (
        '<section class="missing">\n<p>Not recorded in this run, and how to record it next time '
        "(<code>store</code> is its <code>RunStore</code>):</p>\n<ul>\n"
        + "\n".join(rows)
        + "\n</ul>\n</section>"
    )


_HINT: Final = (
    '<p class="hint">All charts share their steps: drag to move along them, scroll with Ctrl or ⌘ held to '
    "zoom, double-click to see the whole run again. Point at a line for its value.</p>"
)
_EMPTY: Final = (
    '<section class="card empty"><h3>Nothing was recorded</h3>\n<p>This run holds no frames that the report '
    "can show. Subscribe a store to a stream while training, for instance<br>"
    '<code>lens.pipe(sl.uw_ratio()).subscribe(sl.sinks.RunStore("run.db"))</code></p></section>'
)
_HOW_TO_RECORD: Final = {
    "loss": ("the loss", 'observe(model, loss=criterion).pipe(sl.topic("loss")).subscribe(store)'),
    "train_accuracy": ("the training accuracy", 'lens.emit("train_accuracy", share)'),
    "test_accuracy": ("the test accuracy", 'lens.emit("test_accuracy", share)'),
    "learning_rate": ("the learning rate", 'lens.pipe(sl.topic("learning_rate")).subscribe(store)'),
    "uw_ratio": ("the update-to-weight ratio", "lens.pipe(sl.uw_ratio()).subscribe(store)"),
    "weight_gradients.norm2": (
        "gradient norms",
        'lens.pipe(sl.norm("weight_gradients")).subscribe(store)',
    ),
    "weights.norm2": ("weight norms", 'lens.pipe(sl.norm("weights")).subscribe(store)'),
    "hessian_eigenvalues": (
        "the Hessian's largest eigenvalues",
        "lens.pipe(sl.every(500), sl.hessian_eigenvalues(loss=criterion, batch=(x, y))).subscribe(store)",
    ),
}

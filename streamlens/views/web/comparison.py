"""What a page shows of several runs: each metric in one chart, a line a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pandas as pd

from streamlens.runs import Run
from streamlens.views.actions import actions, with_action_marks
from streamlens.views.alerts import Alert, with_marks
from streamlens.views.heading import heading
from streamlens.views.marks import Limits
from streamlens.views.metric import metric
from streamlens.views.others import title_of
from streamlens.views.own import OwnView
from streamlens.views.packed import alert_rows, packed
from streamlens.views.sections import ModelRows, Section, read_models
from streamlens.views.shipped import VIEWS
from streamlens.views.summary import last_step
from streamlens.views.thinned import Thinned
from streamlens.views.web.charts import Question

__all__ = ["of_several_runs"]

_POINTS: Final = 20_000
_MOST_TOPICS: Final = 40
_ABSENT: Final = "–"
_NOT_COMPARED: Final = frozenset({"loss.ema", "epoch_finished"})
_LONGEST: Final = 120


@dataclass(frozen=True)
class _Side:
    """One of the runs."""

    label: str
    run: Run
    thinned: Thinned
    models: Mapping[str, ModelRows]


def of_several_runs(
    runs: Mapping[str, Run], question: Question, views: Sequence[OwnView] = ()
) -> dict[str, Any]:
    """What a page shows of several runs, as JSON can hold it.

    A topic with several layers chosen is compared by the median over them; where a row is asked for, by
    that layer alone.

    Args:
        runs: The runs, by what each is called in the charts.
        question: What is asked for.
        views: Charts of the user's own, shown first.
    """
    sides = [_side(label, run, question) for label, run in runs.items()]
    last = max((last_step(list(side.models.values())) for side in sides), default=-1)
    limits = (0.0, float(last + 1)) if last >= 0 else None
    found = {side.label: side.thinned for side in sides}
    own = [packed_view for view in views if (packed_view := view.of_several(found, limits)) is not None]
    made = []
    for section in _sections(sides, limits):
        spec = section.chart.to_dict(validate=False)
        _same_colours(spec, [side.label for side in sides])
        made.append(packed(section, limits, spec))
    layers = dict.fromkeys(layer for side in sides for layer in side.thinned.every_layer)
    differences = _differences(sides)
    return {
        "title": f"{len(sides)} runs compared",
        "settings": [],
        "tiles": [],
        "differences": differences if len(differences) > 1 else None,
        "alerts": [
            row
            for side in sides
            for model in side.models.values()
            for row in alert_rows(model.alerts, model.name, side.label)
        ],
        "quiet": "",
        "layers": list(layers),
        "sections": own + made,
        "detail": None,
        "thinned": any(side.thinned.thinned for side in sides),
        "steps": None if limits is None else list(limits),
        "labelWidth": 56,
    }


def _side(label: str, run: Run, question: Question) -> _Side:
    thinned = Thinned(run, pattern=question.pattern, layer=question.row, window=question.window)
    return _Side(label, run, thinned, {model.name: model for model in read_models(thinned)})


def _differences(sides: Sequence[_Side]) -> dict[str, list[str]]:
    """The settings in which the runs differ, a cell a run."""
    told: list[dict[str, str]] = []
    for side in sides:
        title, settings = heading(side.run.metadata)
        told.append({"": side.label, "model and data": title, **dict(settings)})
    rows: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for settings in told for name in settings):
        cells = [settings.get(name, _ABSENT)[:_LONGEST] for settings in told]
        if len(set(cells)) > 1 or not name:
            rows[name] = cells
    return rows


def _sections(sides: Sequence[_Side], limits: Limits | None) -> Iterator[Section]:
    topics = dict.fromkeys(
        (name, topic)
        for side in sides
        for name, model in side.models.items()
        for topic, rows in model.rows.items()
        if topic not in _NOT_COMPARED and len(rows)
    )
    order = {topic: place for place, view in enumerate(VIEWS.values()) for topic in view.topics}
    chosen = sorted(topics, key=lambda entry: (entry[0], order.get(entry[1], len(order))))[:_MOST_TOPICS]
    for name, topic in chosen:
        tables, medians = {}, 0
        for side in sides:
            model = side.models.get(name)
            if model is None or topic not in model.rows:
                continue
            table, layers = _of_run(side, name, topic, model.rows[topic])
            tables[side.label] = table.assign(layer=side.label)
            medians = max(medians, layers)
        if not tables:
            continue
        title = _TITLES.get(topic, title_of(topic))
        chart = metric(
            pd.concat(tables.values(), ignore_index=True),
            title=f"{topic}, median over layers" if medians > 1 else topic,
            layers=list(tables),
            limits=limits,
            max_points=max(2_000, _POINTS // len(chosen)),
        )
        chart = with_marks(chart, _alerts(sides, name), limits)
        chart = with_action_marks(chart, _actions(sides, name), limits)
        of = (
            f" Of {medians} layers each line is the median; filter by a layer to see its own."
            if medians > 1
            else ""
        )
        yield Section(topic.replace("_", "-"), name, title, f"A line a run.{of}", chart)


def _of_run(side: _Side, name: str, topic: str, rows: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """A run's rows of a topic with one layer, or with the median over its layers; and their number."""
    full = f"{name}/{topic}" if name else topic
    layers = side.models[name].layers[topic]
    if len(layers) <= 1:
        return rows, 1
    if side.run.rolls(full):
        means = side.thinned.means(full)
        # A layer that holds NaN has no value to take part with.
        rows = means.assign(value=means["mean"])
    keys = ["step", "epoch", *(["component"] if "component" in rows.columns else [])]
    finite = rows["value"].where(np.isfinite(rows["value"].to_numpy(dtype=np.float64)))
    median = finite.groupby([rows[key] for key in keys], observed=True, sort=True).median()
    return median.rename("value").reset_index(), len(layers)


def _alerts(sides: Sequence[_Side], name: str) -> list[Alert]:
    return [
        replace(alert, rule=f"{side.label}: {alert.rule}")
        for side in sides
        if name in side.models
        for alert in side.models[name].alerts
    ]


def _actions(sides: Sequence[_Side], name: str) -> pd.DataFrame:
    found = [
        done.assign(steered=f"{side.label}: " + done["steered"].astype(str))
        for side in sides
        if name in side.models and len(done := actions(side.models[name].actions))
    ]
    return pd.concat(found, ignore_index=True) if found else actions({})


def _same_colours(part: Any, labels: Sequence[str]) -> None:
    """Let each run have one colour in all charts, also in those that lack another run."""
    if isinstance(part, list):
        for entry in part:
            _same_colours(entry, labels)
    elif isinstance(part, dict):
        color = part.get("color")
        if isinstance(color, dict) and isinstance(color.get("scale"), dict):
            domain = color["scale"].get("domain")
            if isinstance(domain, list) and domain and set(map(str, domain)) <= set(labels):
                color["scale"]["domain"] = list(labels)
        for key, entry in part.items():
            if key != "datasets":
                _same_colours(entry, labels)


_TITLES: Final = {view.needs[0]: view.title for view in VIEWS.values() if len(view.needs) == 1}

"""What a page about a run shows: its sections, each a chart with a sentence on how to read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import altair as alt

from streamlens.views.actions import SUFFIX, actions, with_action_marks
from streamlens.views.alerts import PREFIX, Alert, alerts, with_marks
from streamlens.views.marks import Limits
from streamlens.views.others import other_sections, shows
from streamlens.views.shipped import VIEWS, View

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TOPICS", "ModelRows", "ReadableRun", "Section", "label_width", "read_models", "sections"]

_MARK: Final = "epoch_finished"

TOPICS: Final = frozenset(topic for view in VIEWS.values() for topic in view.topics) | {_MARK}
"""The topics that views of their own draw; any other that holds numbers is drawn plainly."""

_MOST_POINTS: Final = 10_000
"""Points of the charts of these topics in a page: a browser redraws that many at once without a pause."""

_MOST_OTHERS: Final = 8_000
"""Points of all other charts."""

_PERCENT: Final = {
    "loss": 15,
    "learning_rate": 5,
    "accuracy": 5,
    "update_to_weight_ratio": 45,
    "ratio_against_loss": 1,
    "hessian_eigenvalues": 5,
}
"""Shares of the points that views get at most; those of many lines share whatever these leave."""

_MOST_READ: Final = 20_000
"""Rows read of one layer; a longer run is read thinned, its extremes and NaN kept."""


class ReadableRun(Protocol):
    """What a page needs of a run; `streamlens.runs.Run` is one."""

    @property
    def topics(self) -> list[str]:
        """The names of what was recorded."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What is known about the run beside its frames."""

    def layers(self, topic: str) -> list[str]:
        """The layers of a topic, in model order."""

    def holds_numbers(self, topic: str) -> bool:
        """Whether the topic's values are numbers, one a layer and component."""

    def dataframe(self, topic: str, *, max_points: int | None = None) -> pd.DataFrame:
        """A topic as rows: step, micro_step, epoch, layer, value, wall_time."""


@dataclass(frozen=True, slots=True)
class ModelRows:
    """What was recorded of one model.

    Attributes:
        name: The name given to `observe(model, name=...)`, or `""`.
        rows: The rows of each topic, without the name in front.
        layers: The layers of each topic, in model order, without the name in front.
        alerts: The alerts, in the order of their starts.
        actions: The rows of each topic of controllers' actions.
    """

    name: str
    rows: dict[str, pd.DataFrame] = field(default_factory=dict)
    layers: dict[str, list[str]] = field(default_factory=dict)
    alerts: list[Alert] = field(default_factory=list)
    actions: dict[str, pd.DataFrame] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Section:
    """A chart in a page, with the words around it.

    Attributes:
        key: What it is about, as a short word.
        model: The model it is about, or `""`.
        title: Its heading.
        reading: How to read the chart.
        chart: The chart.
    """

    key: str
    model: str
    title: str
    reading: str
    chart: alt.LayerChart

    @property
    def file_name(self) -> str:
        """What a browser proposes for a saved picture; it makes the rest safe by itself."""
        return f"{self.model}-{self.key}" if self.model else self.key


def label_width(models: Sequence[ModelRows]) -> int:
    """Pixels for the labels of every value axis, so that all step axes start at one place.

    Args:
        models: What `read_models` returned.
    """
    per_layer = ("uw_ratio", "weight_gradients.norm2", "weights.norm2")
    names = [layer for model in models for topic in per_layer for layer in model.layers.get(topic, ())]
    return min(140, max(48, 10 + round(6.4 * max(map(len, names), default=0))))


def read_models(run: ReadableRun) -> list[ModelRows]:
    """Read what the page knows how to show, one entry a model.

    Args:
        run: The run.

    Returns:
        The models in the order in which they were recorded; what has no model's name first.
    """
    known = {topic.rpartition("/") for topic in run.topics}
    names = {name for name, _, base in known if base in TOPICS or base.startswith(PREFIX)}
    models: dict[str, ModelRows] = {"": ModelRows("")}
    told: dict[str, dict[str, pd.DataFrame]] = {}
    for topic in run.topics:
        # A name of the user's own may hold a slash too: only one that stands before a known topic is a
        # model's.
        name, _, base = topic.rpartition("/")
        if base.startswith(PREFIX):
            told.setdefault(name, {})[base] = _short(run.dataframe(topic), name)
            continue
        if base.endswith(SUFFIX):
            steered = models.setdefault(name, ModelRows(name)).actions
            steered[base] = run.dataframe(topic, max_points=_MOST_READ)
            continue
        if name not in names:
            name, base = "", topic
        if base not in TOPICS and not (shows(base) and run.holds_numbers(topic)):
            continue
        model = models.setdefault(name, ModelRows(name))
        rows = run.dataframe(topic, max_points=_MOST_READ)
        model.rows[base] = _short(rows, name)
        model.layers[base] = [_shorter(layer, name) for layer in run.layers(topic)]
    for name, tables in told.items():
        models.setdefault(name, ModelRows(name)).alerts.extend(alerts(tables))
    return [m for m in models.values() if m.alerts or any(len(rows) for rows in m.rows.values())]


def _short(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """Rows with layers that do not begin with the model's name."""
    if not name or "layer" not in rows:
        return rows
    return rows.assign(layer=[_shorter(layer, name) for layer in rows["layer"].tolist()])


def _shorter(layer: str, name: str) -> str:
    """A layer without the model's name in front; the model itself is `""`."""
    return "" if name and layer == name else layer.removeprefix(f"{name}." if name else "")


def sections(models: Sequence[ModelRows], limits: Limits | None = None) -> list[Section]:
    """The sections of a page, at most about 18,000 points in all of them together.

    Args:
        models: What `read_models` returned.
        limits: The first and last step of every chart's axis.
    """
    share = _MOST_POINTS // max(1, len(models))
    others = _MOST_OTHERS // max(1, len(models))
    return [section for model in models for section in _of_model(model, limits, share, others)]


def _of_model(model: ModelRows, limits: Limits | None, budget: int, others: int) -> Iterator[Section]:
    rows = {topic: table for topic, table in model.rows.items() if len(table)}
    done = actions(model.actions)

    def marked(chart: alt.LayerChart) -> alt.LayerChart:
        return with_action_marks(with_marks(chart, model.alerts, limits), done, limits)

    views = [view for view in VIEWS.values() if view.can_show(rows)]
    for view, most in zip(views, _shares(views, rows, budget), strict=True):
        chart = view.draw(rows, layers=model.layers, limits=limits, max_points=most)
        key = view.name.replace("_", "-")
        chart = marked(chart) if view.over_steps else chart
        yield Section(key, model.name, view.title, view.reading, chart)
    drawn = {topic for view in views for topic in view.topics} | {_MARK}
    plain = {topic: table for topic, table in rows.items() if topic not in drawn}
    for key, title, reading, chart in other_sections(plain, model.layers, limits=limits, max_points=others):
        yield Section(key, model.name, title, reading, marked(chart))


def _shares(views: Sequence[View], rows: Mapping[str, pd.DataFrame], budget: int) -> list[int]:
    """The most points of each view."""
    most = {
        view.name: min(
            budget * _PERCENT[view.name] // 100,
            sum(len(rows[topic]) for topic in view.topics if topic in rows),
        )
        for view in views
        if view.name in _PERCENT
    }
    rest = budget - sum(most.values())
    sharing = max(1, len(views) - len(most))
    return [max(5, most.get(view.name, rest // sharing)) for view in views]

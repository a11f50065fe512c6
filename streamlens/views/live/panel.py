"""One chart among those that are live: what it draws, when it is drawn anew, and what follows by rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import altair as alt

from streamlens.views.actions import with_action_marks
from streamlens.views.alerts import with_marks
from streamlens.views.live.bindings import Binding, bindings, of_own_chart
from streamlens.views.live.topics import Topics
from streamlens.views.shipped import View, by_name
from streamlens.views.sources import AnyChart, filled, records, source_name, taken_apart, topics_of

__all__ = ["OwnChart", "Panel", "ShippedPanel", "panel_of", "shipped"]

_GROWTH: Final = 4
"""A chart is drawn anew when this many times the steps have come, since its axes may be chosen otherwise."""

_MOST_CHANGES: Final = 21
"""Changes of the learning rate from which on a loss's chart says nothing of them."""

_AVERAGED: Final = ".ema"


@dataclass(frozen=True)
class _State:
    """What a drawing was made of; another one is due where this has changed."""

    topics: tuple[str, ...] = ()
    series: int = 0
    bad: tuple[str, ...] = ()
    below: bool = False
    said: int = 0
    changes: int = 0


@dataclass
class Panel(ABC):
    """A chart while a run goes on.

    Attributes:
        key: What names it among the others.
        title: Its heading.
        reading: How to read it.
        specification: The chart without data; None before it was drawn.
        datasets: Its data that do not follow by rows.
        bindings: How the others follow; None where it has to be drawn anew for every row.
    """

    key: str
    title: str
    reading: str
    specification: dict[str, Any] | None = None
    datasets: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    bindings: list[Binding] | None = field(default_factory=list)
    may_change: ClassVar[bool] = True
    """Whether its axes may be chosen otherwise as the run goes on."""

    _state: _State = field(default_factory=_State)
    _taken: int = 0

    @abstractmethod
    def claims(self, topic: str) -> bool:
        """Whether it draws a topic, so that the topic needs no chart of its own."""

    @abstractmethod
    def present(self, topics: Topics) -> dict[str, str]:
        """The topics that it can draw now, by what the chart calls them."""

    @abstractmethod
    def chart(self, topics: Topics) -> AnyChart:
        """The chart of what there is."""

    def rows(self, topics: Topics) -> dict[str, list[dict[str, Any]]]:
        """The rows of topics that its chart has only the names of."""
        return {}

    def due(self, topics: Topics) -> bool:
        """Whether the chart has to be drawn anew to show what there is."""
        present = self.present(topics)
        if not present:
            return False
        taken = _steps(present, topics)
        if self.specification is None or self._state != self._seen(present, topics):
            return True
        if self.bindings is None:
            return taken > self._taken
        return bool(self.bindings) and taken >= _GROWTH * self._taken and self.may_change

    def draw(self, topics: Topics) -> None:
        """Draw the chart of what there is."""
        present = self.present(topics)
        self._state, self._taken = self._seen(present, topics), _steps(present, topics)
        self._draw(topics, present)

    @abstractmethod
    def _draw(self, topics: Topics, present: Mapping[str, str]) -> None:
        """Set the specification, the data and the bindings."""

    def _seen(self, present: Mapping[str, str], topics: Topics) -> _State:
        """What decides how the chart is drawn."""
        numbers = [topics.numbers[name] for name in present.values() if name in topics.numbers]
        return _State(
            tuple(present.values()),
            sum(len(kept.series) for kept in numbers),
            *self._judged(present, topics) if self.may_change else (),
        )

    @staticmethod
    def _judged(present: Mapping[str, str], topics: Topics) -> tuple[tuple[str, ...], bool, int, int]:
        """What views look at beside the names."""
        numbers = {name: topics.numbers[name] for name in present.values() if name in topics.numbers}
        bad = tuple(name for name, kept in numbers.items() if kept.bad)
        changes = min(topics.changes, _MOST_CHANGES) if "learning_rate" in present else 0
        return bad, any(kept.lowest <= 0 for kept in numbers.values()), topics.said, changes


def _steps(present: Mapping[str, str], topics: Topics) -> int:
    return sum(
        topics.numbers[name].taken if name in topics.numbers else topics.samples[name].taken
        for name in present.values()
    )


@dataclass
class ShippedPanel(Panel):
    """One of the shipped views, of one model.

    Attributes:
        view: The view.
        model: The name given to `observe(model, name=...)`, with a slash behind it, or `""`.
        suffix: `".ema"` where it shows moving averages in place of what it is made for.
        most_points: The most points that it draws.
    """

    view: View = field(kw_only=True)
    model: str = ""
    suffix: str = ""
    most_points: int = 4000
    _cells: bool = False

    def claims(self, topic: str) -> bool:
        """Whether it draws a topic."""
        return topic.startswith(self.model) and topic[len(self.model) :] in {
            f"{name}{self.suffix}" for name in self.view.topics
        }

    def present(self, topics: Topics) -> dict[str, str]:
        """The topics of its view that there are."""
        named = {name: f"{self.model}{name}{self.suffix}" for name in self.view.topics}
        there = {name: topic for name, topic in named.items() if topic in topics}
        return there if self.view.can_show(there) else {}

    def chart(self, topics: Topics) -> alt.LayerChart:
        """The view's chart with marks for alerts and actions."""
        chart = self._plain(topics)
        if self.view.over_steps:
            chart = with_marks(chart, topics.alerts, None)
            chart = with_action_marks(chart, topics.actions, None)
        return chart

    def _plain(self, topics: Topics) -> alt.LayerChart:
        present = self.present(topics)
        tables = {name: topics.table(topic, cells=self._cells) for name, topic in present.items()}
        layers = {
            name: list(dict.fromkeys(layer for layer, _ in topics.numbers[topic].series))
            for name, topic in present.items()
            if topic in topics.numbers
        }
        return self.view.draw(tables, layers=layers, max_points=self.most_points)

    def _draw(self, topics: Topics, present: Mapping[str, str]) -> None:
        specification, datasets = taken_apart(self.chart(topics))
        numbers = {name: topics.numbers[topic] for name, topic in present.items() if topic in topics.numbers}
        found = bindings(specification, datasets, numbers) if len(numbers) == len(present) else None
        self.bindings = found and [
            Binding(b.dataset, present[b.topic], b.form, b.names, b.constants, b.log, b.floor) for b in found
        ]
        cells = any(binding.form == "cell" for binding in found or ())
        if cells and not self._cells:
            # Cells are made of means, which the points of lines are not.
            self._cells = True
            self._draw(topics, present)
            return
        bound = {binding.dataset for binding in self.bindings or ()}
        self.specification = specification
        self.datasets = {name: rows for name, rows in datasets.items() if name not in bound}


@dataclass
class OwnChart(Panel):
    """A chart of people's own over `data(topic)`.

    Attributes:
        given: The chart.
    """

    given: AnyChart = field(kw_only=True)
    may_change: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.topics = topics_of(self.given)

    def claims(self, topic: str) -> bool:
        """Whether the chart draws a topic."""
        return topic in self.topics

    def present(self, topics: Topics) -> dict[str, str]:
        """The topics of the chart that there are."""
        return {topic: topic for topic in self.topics if topic in topics}

    def chart(self, topics: Topics) -> AnyChart:
        """The chart as it was given."""
        return self.given

    def rows(self, topics: Topics) -> dict[str, list[dict[str, Any]]]:
        """The rows of the topics that it draws."""
        return {topic: records(topics.table(topic)) for topic in self.present(topics)}

    def _draw(self, topics: Topics, present: Mapping[str, str]) -> None:
        specification, datasets = taken_apart(filled(self.given, {}))
        numbers = {topic: topics.numbers[topic] for topic in present if topic in topics.numbers}
        self.specification = specification
        if len(numbers) == len(present):
            self.bindings = of_own_chart(numbers)
        else:
            self.bindings = None
            datasets |= {source_name(topic): rows for topic, rows in self.rows(topics).items()}
        bound = {binding.dataset for binding in self.bindings or ()}
        self.datasets = {name: rows for name, rows in datasets.items() if name not in bound}


def panel_of(topic: str) -> ShippedPanel:
    """The panel of a topic that no panel draws yet.

    Args:
        topic: The topic, with the model's name in front where it has one.
    """
    model, slash, base = topic.rpartition("/")
    prefix = f"{model}{slash}"
    view, suffix = by_name(base, [base]), ""
    if base.endswith(_AVERAGED) and base not in view.needs[1:]:
        plain = base.removesuffix(_AVERAGED)
        smoothed = by_name(plain, [plain])
        # A view made for a topic shows its moving averages too.
        if smoothed.name != plain and smoothed.needs == (plain,):
            view, suffix = smoothed, _AVERAGED
    return shipped(view, prefix, suffix)


def shipped(view: View, model: str = "", suffix: str = "") -> ShippedPanel:
    """The panel of a shipped view.

    Args:
        view: The view.
        model: As the panel's.
        suffix: As the panel's.
    """
    title = f"{view.title}, moving average" if suffix else view.title
    return ShippedPanel(
        key=f"{model}{view.name}{suffix}",
        title=f"{model[:-1]}: {title}" if model else title,
        reading=view.reading,
        view=view,
        model=model,
        suffix=suffix,
    )

"""`live()`: charts of a run in a notebook while it goes on, and what they need subscribed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import altair as alt
from reactivex import Observable

from streamlens import operators
from streamlens.errors import StreamlensError
from streamlens.frame import Frame, Kind
from streamlens.lens import Lens
from streamlens.stream import Operator, Stream
from streamlens.topics import topic_spec
from streamlens.views.actions import SUFFIX
from streamlens.views.live.chart import Host, LiveChart
from streamlens.views.live.panel import OwnChart, Panel, panel_of, shipped
from streamlens.views.live.picture import bundle
from streamlens.views.shipped import VIEWS, View, by_name
from streamlens.views.sources import AnyChart, topics_of

__all__ = ["Live", "live"]

Viewable: TypeAlias = str | AnyChart | Stream | Operator
"""What can be asked for as a view."""

_ALERTS: Final = "alerts"
_LOOKED_EVERY: Final = 10
"""Steps after which it is seen whether alerts or controllers have been added."""

_RECIPES: Final[Mapping[str, Any]] = {
    "norm2": operators.norm,
    "histogram": operators.histogram,
    "percentile_bands": operators.percentile_bands,
    "dead_fraction": operators.dead_fraction,
}
"""What makes `<topic>.<ending>` of a topic."""


class Live:
    """Charts of a run that move while it goes on; what `live` returns.

    Attributes:
        chart: The sink that shows them; any other chain may end in it too.
    """

    def __init__(self, lens: Lens, chart: LiveChart) -> None:
        self.chart = chart
        self._lens = lens
        self._heard: set[str] = set()

    def close(self) -> None:
        """End the charts and what was subscribed for them; a picture stays. The lens goes on."""
        self.chart.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Live({self._lens.plan_text}, {self.chart!r})"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """The charts as they are, for a cell that ends in the handle."""
        picture = self.chart.board.picture()
        return {"text/plain": repr(self)} if picture is None else bundle(picture)

    def _begin(self, chains: Sequence[Observable[Frame]]) -> None:
        for chain in chains:
            chain.subscribe(self.chart)
        self._hear()
        watched = _whole(self._lens).pipe(operators.every(_LOOKED_EVERY), operators.topic("update_finished"))
        self.chart.subscribed(watched.subscribe(lambda _: self._hear()).dispose)

    def _hear(self) -> None:
        """Subscribe alerts and controllers' actions that have been added."""
        source = self._lens.source
        topics = [t for t in source.derived_topics if t == _ALERTS or t.startswith(f"{_ALERTS}.")]
        topics += [t for t in source.user_topics if t.endswith(SUFFIX)]
        for topic in topics:
            if topic not in self._heard:
                self._heard.add(topic)
                _whole(self._lens).pipe(operators.topic(topic)).subscribe(self.chart)


def live(
    lens: Lens,
    views: Sequence[Viewable] | Viewable = ("loss", "uw_ratio"),
    *,
    hz: float = 5.0,
    host: Host = "auto",
) -> Live:
    """Show charts in this notebook cell that move while the run goes on.

    In a cell of its own, before the one that trains:

        live = sl.live(lens, views=["loss", "uw_ratio"], hz=5)

    What the views need is subscribed through the lens, each topic once; alerts (a derived topic `alerts`) and
    controllers' actions stand in every chart as marks, also if they are added later. The charts end with
    `live.close()`, with the lens, or when the cell runs again.

    Args:
        lens: What `observe` returned, or a narrower lens: `lens.layers("features.*")`.
        views: What to show, from the top down; a histogram or percentiles show one layer, the first that the
            lens selects. A name is that of a shipped view (`sl.views.VIEWS`) or of a
            topic; a chart is one of your own over `sl.views.data(topic)`; a chain, `lens.pipe(...)`, or an
            operator is shown as its topic is. What a view draws beside what it is made for, as the loss's
            does changes of the learning rate, it draws where that is shown too: `["loss", "learning_rate"]`.
        hz: How often rows are appended, a second.
        host: As in `LiveChart`.

    Returns:
        A handle that ends the charts.

    Raises:
        ValueError: There is no such view or topic, a chart draws no topic, or `hz` or `host` is wrong.
        TypeError: `lens` or a view is something else.
        UnknownTopicError: The run does not provide a topic that a view needs.
        StreamlensError: This is no notebook, or a view's topic takes arguments that only you know.
    """
    if not isinstance(lens, Lens):
        raise TypeError(f"live() needs the lens that observe() returned, got {type(lens).__name__}")
    single = isinstance(views, str | Stream) or _is_chart(views) or callable(views)
    wanted: list[Any] = [views] if single else list(views)  # type: ignore[arg-type]
    if not wanted:
        raise ValueError("live(views=[]) has nothing to show: give names such as 'loss' and 'uw_ratio'")
    plan = _Plan(lens)
    for view in wanted:
        plan.add(view)
    chart = LiveChart(hz=hz, host=host, panels=plan.panels)
    shown = Live(lens, chart)
    try:
        shown._begin(list(plan.chains.values()))
    except BaseException:
        shown.close()
        raise
    return shown


class _Plan:
    """What is to be drawn, and which chains that takes.

    Attributes:
        panels: The charts.
        chains: What they draw, each topic once.
    """

    def __init__(self, lens: Lens) -> None:
        self.lens = lens
        self.panels: list[Panel] = []
        self.chains: dict[str, Observable[Frame]] = {}
        name = getattr(lens.source, "name", "")
        self.model = f"{name}/" if name else ""

    def add(self, view: Any) -> None:
        """Plan for one thing that was asked for."""
        if isinstance(view, str):
            self._named(view)
        elif isinstance(view, Stream):
            self.chains[f"chain {len(self.chains)}"] = view
        elif _is_chart(view):
            self._own(view)
        elif callable(view):
            self.chains[f"chain {len(self.chains)}"] = self.lens.pipe(view)
        else:
            raise TypeError(
                "live(views=...) takes names, charts over sl.views.data(topic), chains and operators; got "
                f"{view!r}"
            )

    def _named(self, name: str) -> None:
        if _is_raw(name):
            raise StreamlensError(_raw("live(views=...)", name))
        there = [t for t in self.lens.source.known_topics if not _is_raw(t)]
        made = [name] if name not in there and self._recipe(name) is not None else []
        view = by_name(name, [*there, *made, "uw_ratio"])
        self._needed(view)
        panel = shipped(view, self.model) if name in VIEWS else panel_of(f"{self.model}{name}")
        if all(panel.key != other.key for other in self.panels):
            self.panels.append(panel)

    def _needed(self, view: View) -> None:
        if view.any_of:
            found = [topic for topic in view.needs if self._subscribable(topic)]
            if not found:
                named = ", ".join(map(repr, view.needs))
                raise StreamlensError(
                    f"the view {view.name!r} draws {' or '.join(view.needs)}, which nothing has emitted yet: "
                    f"name what lens.emit() will give, observe(model, emits=[{named}])"
                )
        else:
            found = list(view.needs)
        for topic in found:
            self._topic(topic, f"the view {view.name!r}")

    def _own(self, chart: AnyChart) -> None:
        topics = topics_of(chart)
        if not topics:
            raise ValueError(
                "live(views=[chart]): the chart draws no topic, so there is nothing to append to it; make it "
                "over one, alt.Chart(sl.views.data('loss'))"
            )
        for topic in topics:
            self._topic(topic.removeprefix(self.model), "your chart")
        # A chart of one's own has its own title, if it has one.
        self.panels.append(OwnChart(key=f"chart {len(self.panels) + 1}", title="", reading="", given=chart))

    def _subscribable(self, topic: str) -> bool:
        return topic in self.lens.source.known_topics or self._recipe(topic) is not None

    def _topic(self, topic: str, who: str) -> None:
        if topic in self.chains:
            return
        if topic in self.lens.source.known_topics:
            if _is_raw(topic):
                raise StreamlensError(_raw(who, topic))
            chain = self.lens.pipe(operators.topic(topic))
            spec = topic_spec(topic)
            micro = spec is not None and spec.kind is Kind.MICRO_STEP
            self.chains[topic] = chain.pipe(operators.per_step()) if micro else chain
            return
        steps = self._recipe(topic)
        if steps is None:
            raise StreamlensError(
                f"{who} draws {topic!r}, and how that is made of this run only you can say: give the chain "
                f"itself, views=[lens.pipe(...)], or make it a topic: lens.derive({topic!r}, lens.pipe(...))"
            )
        self.chains[topic] = self.lens.pipe(*steps)

    def _recipe(self, topic: str) -> tuple[Operator, ...] | None:
        """The operators that make a topic which only its name is known of."""
        base, _, ending = topic.rpartition(".")
        if topic == "uw_ratio":
            return (operators.uw_ratio(),)
        if ending in _RECIPES and base in self.lens.source.known_topics and _is_raw(base):
            return (_RECIPES[ending](base),)
        if ending == "ema" and base:
            known = base in self.lens.source.known_topics and not _is_raw(base)
            inner = (operators.topic(base),) if known else self._recipe(base)
            return inner and (*inner, operators.ema(0.9))
        return None


def _is_raw(topic: str) -> bool:
    spec = topic_spec(topic)
    return spec is not None and spec.raw


def _raw(who: str, topic: str) -> str:
    return f"{who} draws {topic!r}, which is tensors and no numbers: reduce it, as in {topic}.norm2"


def _is_chart(view: object) -> bool:
    return isinstance(view, alt.TopLevelMixin)


def _whole(lens: Lens) -> Lens:
    """The lens with nothing selected: marks are of no layer."""
    return Lens(lens.source, lens.session)

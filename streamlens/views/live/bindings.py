"""A view's live form: from which topics the data sets of its specification are appended to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from streamlens.views.live.envelope import Envelope
from streamlens.views.loss import AVERAGE, EACH
from streamlens.views.sources import source_name

__all__ = ["Binding", "Form", "Rows", "bindings", "of_own_chart"]

Form: TypeAlias = Literal["line", "flag", "cell", "bad", "topic"]
"""What a data set holds: points of lines, marks of what no line can show, cells of a heatmap, its bad cells,
or the rows that `data` promises."""

Rows: TypeAlias = Mapping[str, Sequence[Mapping[str, Any]]]
"""Data sets by name."""

_LINE: Final = frozenset({"series", "step", "epoch", "value"})
_FLAG: Final = frozenset({"series", "step", "epoch", "flag"})
_CELL: Final = frozenset({"layer", "step", "last", "end", "value"})
_BAD: Final = frozenset({"layer", "step", "last", "end", "holds"})
_MARKS: Final = (
    frozenset({"step", "alert", "severity", "layers", "text"}),
    frozenset({"step", "steered", "text"}),
    frozenset({"step", "change"}),
)
"""Columns by which the data sets of the shipped views are known: `draw_table`, `heatmap` and the marks."""


@dataclass(frozen=True, slots=True)
class Binding:
    """Where the rows of a data set come from while a run goes on.

    Attributes:
        dataset: Its name in the specification.
        topic: The topic.
        form: What it holds.
        names: What each series of the topic is called in it; None where it is not drawn.
        constants: Columns that say the same in all of these rows.
        log: Whether its axis is logarithmic, where zero and below have no place.
        floor: What stands for the logarithm of zero.
    """

    dataset: str
    topic: str
    form: Form
    names: tuple[str | tuple[str, str] | None, ...]
    constants: Mapping[str, str] = field(default_factory=dict)
    log: bool = False
    floor: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As the browser gets it."""
        return {
            "dataset": self.dataset,
            "topic": self.topic,
            "form": self.form,
            "names": list(self.names),
            "constants": dict(self.constants),
            "log": self.log,
            "floor": self.floor,
        }


def of_own_chart(topics: Mapping[str, Envelope]) -> list[Binding]:
    """The bindings of a chart of people's own over `data(topic)`.

    Args:
        topics: What is kept of each topic that it draws.
    """
    return [Binding(source_name(topic), topic, "topic", tuple(kept.series)) for topic, kept in topics.items()]


def bindings(
    specification: Mapping[str, Any], datasets: Rows, topics: Mapping[str, Envelope]
) -> list[Binding] | None:
    """How the data sets of a shipped view's chart follow the run.

    Args:
        specification: The chart's, taken apart from its data.
        datasets: Its data when it was drawn.
        topics: What is kept of the topics that it drew.

    Returns:
        None where some data set is of another kind, or it is not certain which topic's it is: such a chart
        has to be drawn anew.
    """
    log = _is_log(specification)
    floor = _floor(specification)
    found: list[Binding] = []
    for name, rows in datasets.items():
        if not rows:
            return None
        columns = frozenset(rows[0])
        if columns in _MARKS:
            continue
        if columns == _LINE | {"kind"}:
            made = _of_loss(name, rows, topics, log)
        elif columns == _LINE:
            made = _of(name, "line", rows, "series", topics, log=log)
        elif columns == _FLAG:
            made = _of(name, "flag", rows, "series", topics, log=log)
        elif columns == _CELL:
            made = _of(name, "cell", rows, "layer", topics, floor=floor)
        elif columns == _BAD:
            made = _of(name, "bad", rows, "layer", topics, floor=floor)
        else:
            return None
        if made is None:
            return None
        found += made
    # Bad cells lie over the cells of the same topic, of which every series may get one.
    cells = next((binding for binding in found if binding.form == "cell"), None)
    return [_widened(binding, cells) for binding in found]


def _widened(binding: Binding, cells: Binding | None) -> Binding:
    if binding.form != "bad" or cells is None:
        return binding
    return Binding(binding.dataset, cells.topic, "bad", cells.names, floor=cells.floor)


def _of(
    dataset: str,
    form: Form,
    rows: Sequence[Mapping[str, Any]],
    column: str,
    topics: Mapping[str, Envelope],
    *,
    log: bool = False,
    floor: float = 0.0,
) -> list[Binding] | None:
    """The one topic whose series these are."""
    drawn = {str(row[column]) for row in rows}
    found = {topic: names for topic, kept in topics.items() if (names := _names(kept, drawn, form))}
    if form == "flag" and "loss" in found:
        found = {"loss": found["loss"]}
    if len(found) != 1:
        return None
    [(topic, names)] = found.items()
    return [Binding(dataset, topic, form, names, log=log, floor=floor)]


def _of_loss(
    dataset: str, rows: Sequence[Mapping[str, Any]], topics: Mapping[str, Envelope], log: bool
) -> list[Binding] | None:
    found = []
    for kind, topic in ((EACH, "loss"), (AVERAGE, "loss.ema")):
        if topic not in topics:
            return None
        names = _names(topics[topic], {str(row["series"]) for row in rows if row["kind"] == kind}, "line")
        if not names:
            return None
        found.append(Binding(dataset, topic, "line", names, {"kind": kind}, log=log))
    return found


def _names(kept: Envelope, drawn: set[str], form: Form) -> tuple[str | None, ...]:
    """What the series are called if all that are drawn are among them; else nothing."""
    for names in _namings(kept.series):
        if drawn <= set(names) and len(set(names)) == len(names):
            # A mark may come to any series, a line only to those that were chosen.
            return tuple(name if form == "flag" or name in drawn else None for name in names)
    return ()


def _namings(series: Sequence[tuple[str, str]]) -> Iterator[list[str]]:
    """The ways in which views name series."""
    yield [layer or "(model)" for layer, _ in series]
    yield [component or "(model)" for _, component in series]
    yield [f"{layer} {component}".strip() for layer, component in series]


def _units(specification: Any) -> Iterator[Mapping[str, Any]]:
    """Every view within a specification that has an encoding."""
    if isinstance(specification, Mapping):
        if isinstance(specification.get("encoding"), Mapping):
            yield specification["encoding"]
        for key in ("layer", "vconcat", "hconcat", "concat", "spec"):
            yield from _units(specification.get(key))
    elif isinstance(specification, Sequence) and not isinstance(specification, str):
        for part in specification:
            yield from _units(part)


def _scale(encoding: Mapping[str, Any], channel: str) -> Mapping[str, Any]:
    scale = (encoding.get(channel) or {}).get("scale")
    return scale if isinstance(scale, Mapping) else {}


def _is_log(specification: Mapping[str, Any]) -> bool:
    return any(_scale(encoding, "y").get("type") == "log" for encoding in _units(specification))


def _floor(specification: Mapping[str, Any]) -> float:
    """Below the lowest colour of a heatmap."""
    for encoding in _units(specification):
        domain = _scale(encoding, "color").get("domain")
        if domain and isinstance(domain[0], int | float):
            return float(domain[0]) - 1.0
    return 0.0

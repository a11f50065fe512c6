"""What a page about a run shows: its sections, each a chart with a sentence on how to read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import altair as alt

from streamlens.views.accuracy import accuracies
from streamlens.views.actions import SUFFIX, actions, with_action_marks
from streamlens.views.alerts import PREFIX, Alert, alerts, with_marks
from streamlens.views.curvature import hessian_eigenvalues
from streamlens.views.heatmap import update_to_weight_ratio
from streamlens.views.loss import loss
from streamlens.views.marks import Limits
from streamlens.views.norms import gradient_norms, weight_norms
from streamlens.views.others import other_sections, shows
from streamlens.views.rates import learning_rate

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TOPICS", "ModelRows", "ReadableRun", "Section", "label_width", "read_models", "sections"]

TOPICS: Final = (
    "loss",
    "loss.ema",
    "train_accuracy",
    "test_accuracy",
    "learning_rate",
    "uw_ratio",
    "weight_gradients.norm2",
    "weights.norm2",
    "hessian_eigenvalues",
    "epoch_finished",
)
"""The topics that have a chart of their own; any other that holds numbers is drawn plainly."""

_MOST_POINTS: Final = 10_000
"""Points of the charts of these topics in a page: a browser redraws that many at once without a pause."""

_MOST_OTHERS: Final = 8_000
"""Points of all other charts."""

_MOST_CELLS: Final = 4_500
_PERCENT: Final = {
    "loss": 10,
    "loss.ema": 5,
    "train_accuracy": 3,
    "test_accuracy": 2,
    "learning_rate": 5,
    "hessian_eigenvalues": 5,
}
"""Shares of the points that other topics than those of many layers get at most."""

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
    return [
        section
        for model in models
        for section in [*_of_model(model, limits, share), *_others(model, limits, others)]
    ]


def _others(model: ModelRows, limits: Limits | None, budget: int) -> list[Section]:
    rows = {topic: table for topic, table in model.rows.items() if topic not in TOPICS and len(table)}
    made = other_sections(rows, model.layers, limits=limits, max_points=budget)
    return [
        Section(key, model.name, title, reading, with_marks(chart, model.alerts, limits))
        for key, title, reading, chart in made
    ]


def _of_model(model: ModelRows, limits: Limits | None, budget: int) -> list[Section]:
    rows = {topic: table for topic, table in model.rows.items() if len(table)}
    found: list[Section] = []
    done = actions(model.actions)

    def add(key: str, title: str, reading: str, chart: alt.LayerChart) -> None:
        marked = with_marks(chart, model.alerts, limits)
        marked = with_action_marks(marked, done, limits)
        found.append(Section(key, model.name, title, reading, marked))

    cells = min(_MOST_CELLS * budget // _MOST_POINTS, len(rows.get("uw_ratio", ())))
    # The norms of many layers take whatever the others leave.
    others = {topic: budget * percent // 100 for topic, percent in _PERCENT.items()}
    used = cells + sum(min(most, len(rows.get(topic, ()))) for topic, most in others.items())
    per_layer = (budget - used) // 2
    if "loss" in rows:
        chart = loss(
            rows["loss"], rows.get("loss.ema"), limits=limits, max_points=others["loss"] + others["loss.ema"]
        )
        add("loss", "Loss", _READING["loss"], chart)
    curves = {
        name: rows[f"{topic}_accuracy"]
        for name, topic in (("training", "train"), ("test", "test"))
        if f"{topic}_accuracy" in rows
    }
    if curves:
        chart = accuracies(
            curves, limits=limits, max_points=others["train_accuracy"] + others["test_accuracy"]
        )
        add("accuracy", "Accuracy", _READING["accuracy"], chart)
    if "learning_rate" in rows:
        chart = learning_rate(rows["learning_rate"], limits=limits, max_points=others["learning_rate"])
        add("learning-rate", "Learning rate", _READING["learning-rate"], chart)
    if "uw_ratio" in rows:
        chart = update_to_weight_ratio(
            rows["uw_ratio"], layers=model.layers["uw_ratio"], limits=limits, max_cells=max(1, cells)
        )
        add("update-to-weight-ratio", "Update-to-weight ratio", _READING["update-to-weight-ratio"], chart)
    for topic, key, title, view in (
        ("weight_gradients.norm2", "gradient-norms", "Gradient norms", gradient_norms),
        ("weights.norm2", "weight-norms", "Weight norms", weight_norms),
    ):
        if topic in rows:
            chart = view(rows[topic], layers=model.layers[topic], limits=limits, max_points=per_layer)
            add(key, title, _READING[key], chart)
    if "hessian_eigenvalues" in rows:
        chart = hessian_eigenvalues(
            rows["hessian_eigenvalues"],
            rows.get("learning_rate"),
            limits=limits,
            max_points=others["hessian_eigenvalues"],
        )
        add("curvature", "Curvature", _READING["curvature"], chart)
    return found


_READING: Final = {
    "loss": (
        "The faint line is the loss of each step's batch, the strong one its moving average; "
        "look for a steady fall and for jumps that do not recover."
    ),
    "accuracy": (
        "The share of examples classified correctly; training far above test is the mark of overfitting."
    ),
    "learning-rate": (
        "The rate the optimizer used at each step; a bend in another chart below a step in this one "
        "is the schedule's doing."
    ),
    "update-to-weight-ratio": (
        "How far each update moves a layer, relative to the size of its weights, from the input's layer "
        "at the top to the output's: neutral is around 10⁻³, the usual aim, orange is faster, blue slower, "
        "magenta holds NaN or infinity."
    ),
    "gradient-norms": (
        "The 2-norm of each layer's weight gradient; lines that fall apart by powers of ten from layer to "
        "layer are gradients that vanish, lines that shoot up are gradients that explode."
    ),
    "weight-norms": (
        "The 2-norm of each layer's weights; slow growth is common without weight decay, jumps are not."
    ),
    "curvature": (
        "The largest eigenvalues of the loss's Hessian; the dashed line is 2 over the learning rate, up to "
        "which plain gradient descent is stable: training tends to rise towards it and to stay there, and "
        "the loss jumps where the largest eigenvalue stands above it."
    ),
}

"""The views there are, by name: what each is called, which topics it draws, and how to read it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

import altair as alt

from streamlens.errors import did_you_mean
from streamlens.views.accuracy import accuracies
from streamlens.views.bands import percentile_bands
from streamlens.views.curvature import hessian_eigenvalues
from streamlens.views.heatmap import update_to_weight_ratio
from streamlens.views.histogram import histogram
from streamlens.views.loss import loss
from streamlens.views.marks import Limits, nothing
from streamlens.views.metric import metric
from streamlens.views.norms import gradient_norms, weight_norms
from streamlens.views.others import BANDS, HISTOGRAM, bare, reading_of, title_of
from streamlens.views.progress import ratio_against_loss
from streamlens.views.rates import learning_rate

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["VIEWS", "Shown", "View", "by_name"]


@dataclass(frozen=True, slots=True)
class Shown:
    """What a view is given to draw.

    Attributes:
        rows: The rows of each topic that there is, as a run's `dataframe(topic)` has them.
        layers: The layers of each topic in model order; by default in order of appearance.
        limits: The first and last step of the axis; by default those of the data.
        max_points: The most points, or cells, drawn.
    """

    rows: Mapping[str, pd.DataFrame]
    layers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    limits: Limits | None = None
    max_points: int = 1500


_Draw: TypeAlias = Callable[[Shown], alt.LayerChart]
_DrawLayer: TypeAlias = Callable[["pd.DataFrame", Shown, str], alt.LayerChart]


@dataclass(frozen=True, slots=True)
class View:
    """A view, and all that a host must know to show it.

    Attributes:
        name: By which it is asked for.
        title: Its heading.
        reading: How to read it, in a sentence.
        needs: The topics without which it has nothing to draw.
        uses: Topics that it draws too where they are there.
        any_of: Whether one of the topics that it needs is enough.
        over_steps: Whether its x axis is the step: then alerts and actions stand in it as marks, and it
            zooms with the others.
    """

    name: str
    title: str
    reading: str
    needs: tuple[str, ...]
    draw_shown: _Draw
    uses: tuple[str, ...] = ()
    any_of: bool = False
    over_steps: bool = True

    @property
    def topics(self) -> tuple[str, ...]:
        """All topics that it draws."""
        return (*self.needs, *self.uses)

    def can_show(self, topics: Collection[str]) -> bool:
        """Whether it has something to draw where these topics are there."""
        return (any if self.any_of else all)(topic in topics for topic in self.needs)

    def draw(
        self,
        rows: Mapping[str, pd.DataFrame],
        *,
        layers: Mapping[str, Sequence[str]] | None = None,
        limits: Limits | None = None,
        max_points: int = 1500,
    ) -> alt.LayerChart:
        """The chart of a run's topics; in words why there is none, where it lacks what it needs.

        Args:
            rows: The rows of each topic, as a run's `dataframe(topic)` has them; others are left alone.
            layers: The layers of each topic in model order; by default in order of appearance.
            limits: The first and last step of the axis; by default those of the data.
            max_points: The most points, or cells, drawn.

        Raises:
            ValueError: A column is missing.
        """
        there = {topic: rows[topic] for topic in self.topics if topic in rows and len(rows[topic])}
        if not self.can_show(there):
            lacking = [topic for topic in self.needs if topic not in there]
            return nothing(f"nothing was recorded of {(' or ' if self.any_of else ' and ').join(lacking)}")
        return self.draw_shown(Shown(there, layers or {}, limits, max_points))


def by_name(name: str, topics: Collection[str] = ()) -> View:
    """The view of that name, or of a topic: its own where it has one, a plain one of any other metric.

    Args:
        name: The name of a view (`"loss"`, `"gradient_norms"`), a topic that one draws (`"uw_ratio"`), a
            topic of histograms or percentiles, or one of `topics`.
        topics: Topics that are there to be drawn, for instance a run's.

    Raises:
        ValueError: There is no such view and no such topic; the message names the nearest.
    """
    if name in VIEWS:
        return VIEWS[name]
    for view in VIEWS.values():
        if name in view.needs and (view.any_of or len(view.needs) == 1):
            return view
    if name.endswith(".histogram"):
        return _distribution(name, _histogram, HISTOGRAM)
    if name.endswith(".percentile_bands"):
        return _distribution(name, _bands, BANDS)
    if name in topics:
        return _plain(name)
    known = dict.fromkeys([*VIEWS, *topics])
    hint = did_you_mean(name, known)
    raise ValueError(
        f"unknown view {name!r}: {hint}{' ' if hint else ''}Views: {', '.join(known)}; a chart of your own "
        "is drawn over sl.views.data(topic)"
    )


def _distribution(topic: str, draw: _DrawLayer, reading: str) -> View:
    """A chart of one layer: the first of those named to it."""

    def first(shown: Shown) -> alt.LayerChart:
        table = shown.rows[topic]
        layer = next(iter(shown.layers.get(topic) or [table["layer"].iloc[0]]))
        return draw(table[table["layer"] == layer], shown, bare(topic))

    return View(topic, title_of(topic), reading, (topic,), first)


def _histogram(rows: pd.DataFrame, shown: Shown, values: str) -> alt.LayerChart:
    return histogram(rows, limits=shown.limits, max_cells=shown.max_points, values=values)


def _bands(rows: pd.DataFrame, shown: Shown, values: str) -> alt.LayerChart:
    return percentile_bands(rows, limits=shown.limits, max_points=shown.max_points, values=values)


def _plain(topic: str) -> View:
    def draw(shown: Shown) -> alt.LayerChart:
        return metric(
            shown.rows[topic],
            title=topic,
            layers=shown.layers.get(topic),
            limits=shown.limits,
            max_points=shown.max_points,
        )

    return View(topic, title_of(topic), reading_of(topic), (topic,), draw)


def _loss(shown: Shown) -> alt.LayerChart:
    return loss(
        shown.rows["loss"],
        shown.rows.get("loss.ema"),
        shown.rows.get("learning_rate"),
        limits=shown.limits,
        max_points=shown.max_points,
    )


def _accuracy(shown: Shown) -> alt.LayerChart:
    curves = {topic.removesuffix("_accuracy"): rows for topic, rows in shown.rows.items()}
    named = {"training" if name == "train" else name: rows for name, rows in curves.items()}
    return accuracies(named, limits=shown.limits, max_points=shown.max_points)


def _learning_rate(shown: Shown) -> alt.LayerChart:
    return learning_rate(shown.rows["learning_rate"], limits=shown.limits, max_points=shown.max_points)


def _ratio(shown: Shown) -> alt.LayerChart:
    return update_to_weight_ratio(
        shown.rows["uw_ratio"],
        layers=shown.layers.get("uw_ratio"),
        limits=shown.limits,
        max_cells=max(1, shown.max_points),
    )


def _ratio_against_loss(shown: Shown) -> alt.LayerChart:
    return ratio_against_loss(
        shown.rows["uw_ratio"], shown.rows["loss"], max_points=min(120, shown.max_points)
    )


def _gradient_norms(shown: Shown) -> alt.LayerChart:
    topic, dead = "weight_gradients.norm2", "activations.dead_fraction"
    return gradient_norms(
        shown.rows[topic],
        shown.rows.get(dead),
        layers=shown.layers.get(topic),
        dead_layers=shown.layers.get(dead),
        limits=shown.limits,
        max_points=shown.max_points,
    )


def _weight_norms(shown: Shown) -> alt.LayerChart:
    topic = "weights.norm2"
    return weight_norms(
        shown.rows[topic],
        layers=shown.layers.get(topic),
        limits=shown.limits,
        max_points=shown.max_points,
    )


def _curvature(shown: Shown) -> alt.LayerChart:
    return hessian_eigenvalues(
        shown.rows["hessian_eigenvalues"],
        shown.rows.get("learning_rate"),
        limits=shown.limits,
        max_points=shown.max_points,
    )


_ALL: Final = (
    View(
        "loss",
        "Loss",
        "The faint line is the loss of each step's batch, the strong one its moving average, "
        "dotted lines are changes of the learning rate; look for a steady fall and for jumps that do not "
        "recover.",
        ("loss",),
        _loss,
        uses=("loss.ema", "learning_rate"),
    ),
    View(
        "learning_rate",
        "Learning rate",
        "The rate the optimizer used at each step; a bend in another chart below a step in this one "
        "is the schedule's doing.",
        ("learning_rate",),
        _learning_rate,
    ),
    View(
        "accuracy",
        "Accuracy",
        "The share of examples classified correctly; training far above test is the mark of overfitting.",
        ("train_accuracy", "test_accuracy"),
        _accuracy,
        any_of=True,
    ),
    View(
        "update_to_weight_ratio",
        "Update-to-weight ratio",
        "How far each update moves a layer, relative to the size of its weights, from the input's layer "
        "at the top to the output's: neutral is around 10⁻³, the usual aim, orange is faster, blue slower, "
        "magenta holds NaN or infinity.",
        ("uw_ratio",),
        _ratio,
    ),
    View(
        "ratio_against_loss",
        "Ratio against loss decrease",
        "A point a stretch of the run, early ones dark, late ones light: to the right the loss falls fast, "
        "further up the weights move far. Points high up that do not lie to the right of zero are steps too "
        "large, points low down at zero are training that has come to rest.",
        ("uw_ratio", "loss"),
        _ratio_against_loss,
        over_steps=False,
    ),
    View(
        "gradient_norms",
        "Gradient norms",
        "The 2-norm of each layer's weight gradient; lines that fall apart by powers of ten from layer to "
        "layer are gradients that vanish, lines that shoot up are gradients that explode. "
        "Below, where they were counted, the units of a layer that give zero for a whole batch.",
        ("weight_gradients.norm2",),
        _gradient_norms,
        uses=("activations.dead_fraction",),
    ),
    View(
        "weight_norms",
        "Weight norms",
        "The 2-norm of each layer's weights; slow growth is common without weight decay, jumps are not.",
        ("weights.norm2",),
        _weight_norms,
    ),
    View(
        "hessian_eigenvalues",
        "Curvature",
        "The largest eigenvalues of the loss's Hessian; the dashed line is 2 over the learning rate, up to "
        "which plain gradient descent is stable: training tends to rise towards it and to stay there, and "
        "the loss jumps where the largest eigenvalue stands above it.",
        ("hessian_eigenvalues",),
        _curvature,
        uses=("learning_rate",),
    ),
)

VIEWS: Final[Mapping[str, View]] = {view.name: view for view in _ALL}
"""The views that have a place of their own in a page, in its order."""

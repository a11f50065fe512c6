"""The sections of what a page has no chart of its own for: distributions, and any other metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import altair as alt
import numpy as np

from streamlens.views.bands import are_percentiles, percentile_bands
from streamlens.views.histogram import histogram, is_histogram
from streamlens.views.marks import Limits
from streamlens.views.metric import metric

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["BANDS", "HISTOGRAM", "Other", "bare", "other_sections", "reading_of", "shows", "title_of"]

_MARKS: Final = frozenset(
    {
        "batch_started",
        "batch_finished",
        "epoch_started",
        "epoch_finished",
        "update_finished",
        "input_data",
        "input_labels",
        "network_output",
    }
)
"""Topics that are no metrics."""

_MOST_DISTRIBUTIONS: Final = 6
"""Layers of one topic whose distributions are drawn, each in a chart of its own."""

_MOST_METRICS: Final = 30
_MOST_TITLE: Final = 80


_Draw = Callable[["pd.DataFrame", "Limits | None", int, str], alt.LayerChart]


class Other(NamedTuple):
    """A section to be: its key, title, how to read it, and its chart."""

    key: str
    title: str
    reading: str
    chart: alt.LayerChart


def shows(topic: str) -> bool:
    """Whether a topic is one that this module makes sections of.

    Args:
        topic: Its name, without the model's.
    """
    return topic not in _MARKS


def other_sections(
    rows: Mapping[str, pd.DataFrame],
    layers: Mapping[str, Sequence[str]],
    *,
    limits: Limits | None,
    max_points: int,
) -> Iterator[Other]:
    """Sections of topics: first the metrics, then the distributions.

    Args:
        rows: The topics.
        layers: The layers of each topic, in model order.
        limits: The first and last step of every axis.
        max_points: The most points in all of them together.
    """
    others = {topic: table for topic, table in rows.items() if len(table)}
    spread = {topic: view for topic, table in others.items() if (view := _distribution(table)) is not None}
    metrics = [topic for topic in others if topic not in spread][:_MOST_METRICS]
    chosen = {topic: _chosen(layers[topic]) for topic in spread}
    charts = len(metrics) + sum(map(len, chosen.values()))
    share = max_points // max(1, charts)
    for topic in metrics:
        chart = metric(others[topic], title=topic, layers=layers[topic], limits=limits, max_points=share)
        yield Other(_key(topic), title_of(topic), reading_of(topic), chart)
    for topic, names in chosen.items():
        table = others[topic]
        draw, reading = spread[topic]
        values = bare(topic)
        for name in names:
            chart = draw(table[table["layer"] == name], limits, share, values)
            title = f"{title_of(topic)}: {name}" if name else title_of(topic)
            left_out = len(layers[topic]) - len(names)
            note = f" {left_out} more layers were recorded." if left_out and name == names[-1] else ""
            yield Other(_key(f"{topic}-{name}"), title, reading + note, chart)


def _distribution(table: pd.DataFrame) -> tuple[_Draw, str] | None:
    """How a topic is drawn whose components together are one distribution, and how to read that."""
    if is_histogram(table):
        return _histogram, HISTOGRAM
    return (_bands, BANDS) if are_percentiles(table) else None


def _histogram(rows: pd.DataFrame, limits: Limits | None, most: int, values: str) -> alt.LayerChart:
    return histogram(rows, limits=limits, max_cells=most, values=values)


def _bands(rows: pd.DataFrame, limits: Limits | None, most: int, values: str) -> alt.LayerChart:
    return percentile_bands(rows, limits=limits, max_points=most, values=values)


def _chosen(names: Sequence[str]) -> list[str]:
    """Some of the layers, from the first to the last."""
    places = np.linspace(0, len(names) - 1, min(len(names), _MOST_DISTRIBUTIONS)).round().astype(int)
    return [names[i] for i in places.tolist()]


def bare(topic: str) -> str:
    """What a topic of distributions holds the distributions of.

    Args:
        topic: The topic.
    """
    return topic.removesuffix(".histogram").removesuffix(".percentile_bands")


def reading_of(topic: str) -> str:
    """How to read a plain chart of a topic.

    Args:
        topic: Its name, without the model's.
    """
    return _READING.get(topic, _METRIC)


def title_of(topic: str) -> str:
    """A topic as a heading.

    Args:
        topic: Its name, without the model's.
    """
    words = topic.replace("_", " ")
    if topic in _TITLES:
        return _TITLES[topic]
    base, dot, what = words.partition(".")
    of = ": ".join([base, what.replace(".", ", ")]) if "." in what else f"{what} of {base}"
    title = f" {of if dot else words} ".replace(" ema ", " moving average ").replace(
        " lr ", " learning rate "
    )
    title = title.strip()
    title = title[:1].upper() + title[1:]
    return title if len(title) <= _MOST_TITLE else f"{title[: _MOST_TITLE - 1]}…"


def _key(topic: str) -> str:
    return topic.replace("_", "-").replace(".", "-")


_TITLES: Final = {
    "weights.spectral_norm": "Spectral norms of weights",
    "weights.spectral_norm.residual": "Residuals of the spectral norms",
    "weights.histogram": "Weights",
    "weight_gradients.histogram": "Weight gradients",
    "svcca": "Similarity with an earlier checkpoint (SVCCA)",
    "linear_cka": "Similarity with an earlier checkpoint (linear CKA)",
    "linear_cka.layers": "Similarity of layers (linear CKA)",
    "activations.saturation": "Saturation",
}
_READING: Final = {
    "weights.spectral_norm": (
        "The largest singular value of each layer's weights: how far it can stretch its input; steady growth "
        "makes the loss sharper, and a few directions that take over show here before they do in the 2-norm."
    ),
    "activations.saturation": (
        "The share of a layer's directions that 99% of its outputs' variance needs: near 1 more units may "
        "help, near 0 fewer would do."
    ),
    "svcca": (
        "How much of what each layer represents it represented at the checkpoint too, 1 being all of it; a "
        "line that stays flat near the end is a layer that has settled."
    ),
    "linear_cka": (
        "How alike each layer's representation of the same inputs is to that of the checkpoint, 1 being the "
        "same up to rotation and scale; a line that stays flat near the end is a layer that has settled."
    ),
    "adversarial_susceptibility": (
        "The accuracy lost where each input moves a small step against the model: 0 is none, and a rise says "
        "that predictions hang on less and less."
    ),
    "weights.spectral_norm.residual": (
        "How far the spectral norms are from exact, relative and squared; 0 where they were decomposed."
    ),
}
BANDS: Final = (
    "Between which values the elements lie at each step, the line being the median; bands that close on "
    "the line are a layer that dies, an outer band that runs away from the inner ones is a few elements that "
    "blow up, magenta holds NaN or infinity."
)
_METRIC: Final = "A line a layer, or a line a layer and component; magenta marks hold NaN or infinity."
HISTOGRAM: Final = (
    "How the elements are distributed at each step, small values at the bottom; a band that narrows towards "
    "zero is a layer that dies, one that spreads is a layer that blows up, magenta holds NaN or infinity."
)

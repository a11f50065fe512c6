"""The sections of what a page has no chart of its own for: histograms, and any other metric."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import altair as alt
import numpy as np

from streamlens.views.histogram import histogram, is_histogram
from streamlens.views.marks import Limits
from streamlens.views.metric import metric

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Other", "other_sections", "shows"]

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

_MOST_HISTOGRAMS: Final = 6
"""Layers of one topic whose histograms are drawn."""

_MOST_METRICS: Final = 30
_MOST_TITLE: Final = 80


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
    """Sections of topics: first the metrics, then the histograms.

    Args:
        rows: The topics.
        layers: The layers of each topic, in model order.
        limits: The first and last step of every axis.
        max_points: The most points in all of them together.
    """
    others = {topic: table for topic, table in rows.items() if len(table)}
    counted = {topic: table for topic, table in others.items() if is_histogram(table)}
    metrics = [topic for topic in others if topic not in counted][:_MOST_METRICS]
    chosen = {topic: _chosen(layers[topic]) for topic in counted}
    charts = len(metrics) + sum(map(len, chosen.values()))
    share = max_points // max(1, charts)
    for topic in metrics:
        chart = metric(others[topic], title=topic, layers=layers[topic], limits=limits, max_points=share)
        yield Other(_key(topic), _title(topic), _READING.get(topic, _METRIC), chart)
    for topic, names in chosen.items():
        table = counted[topic]
        for name in names:
            of_layer = table[table["layer"] == name]
            chart = histogram(
                of_layer, limits=limits, max_cells=share, values=topic.removesuffix(".histogram")
            )
            title = f"{_title(topic)}: {name}" if name else _title(topic)
            left_out = len(layers[topic]) - len(names)
            note = f" {left_out} more layers were recorded." if left_out and name == names[-1] else ""
            yield Other(_key(f"{topic}-{name}"), title, _HISTOGRAM + note, chart)


def _chosen(names: Sequence[str]) -> list[str]:
    """Some of the layers, from the first to the last."""
    places = np.linspace(0, len(names) - 1, min(len(names), _MOST_HISTOGRAMS)).round().astype(int)
    return [names[i] for i in places.tolist()]


def _title(topic: str) -> str:
    words = topic.replace("_", " ")
    if topic in _TITLES:
        return _TITLES[topic]
    base, dot, what = words.partition(".")
    title = f"{what.replace('.', ', ')} of {base}" if dot else words
    title = title[:1].upper() + title[1:]
    return title if len(title) <= _MOST_TITLE else f"{title[: _MOST_TITLE - 1]}…"


def _key(topic: str) -> str:
    return topic.replace("_", "-").replace(".", "-")


_TITLES: Final = {
    "weights.spectral_norm": "Spectral norms of weights",
    "weights.spectral_norm.residual": "Residuals of the spectral norms",
    "weights.histogram": "Weights",
    "weight_gradients.histogram": "Weight gradients",
}
_READING: Final = {
    "weights.spectral_norm": (
        "The largest singular value of each layer's weights: how far it can stretch its input; steady growth "
        "makes the loss sharper, and a few directions that take over show here before they do in the 2-norm."
    ),
    "weights.spectral_norm.residual": (
        "How far the spectral norms are from exact, relative and squared; 0 where they were decomposed."
    ),
}
_METRIC: Final = "A line a layer, or a line a layer and component; magenta marks hold NaN or infinity."
_HISTOGRAM: Final = (
    "How the elements are distributed at each step, small values at the bottom; a band that narrows towards "
    "zero is a layer that dies, one that spreads is a layer that blows up, magenta holds NaN or infinity."
)

"""A run as a page draws it: of any length about as many rows as there are pixels, read from its roll-ups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final

import numpy as np
import pandas as pd

from streamlens.runs import Run
from streamlens.views.actions import SUFFIX
from streamlens.views.bands import are_percentiles
from streamlens.views.histogram import is_histogram

__all__ = ["Thinned", "Window", "matching", "points_of"]

Window = tuple[int, int]
"""The first and the last of the steps that are looked at closely."""

_ROWS: Final = 30_000
"""Rows of one topic that are read at most, where each of its series still gets some."""

_MOST: Final = 500
"""Stretches of a series: the extremes of each are as many points as a wide screen has pixels."""

_FEWEST: Final = 40
_MOST_LINES: Final = 40
"""Series above which a topic is drawn as a heatmap, by means; fewer are lines, by extremes."""

_MOST_SAID: Final = 5_000
"""Steps with alerts that are read."""

_MOST_ACTIONS: Final = 100


class Thinned:
    """A run with its topics thinned, of the layers that a filter chooses.

    Lines keep their extremes and NaN; heatmaps and distributions are drawn of means. Topics that have no
    layer left are left out; what belongs to the whole model stays.

    Args:
        run: The run.
        pattern: Which layers: globs or parts of names, with blanks or commas in between. By default all.
        layer: The only layer, by its full name; goes before `pattern`.
        window: Steps to read more closely than the others.

    Attributes:
        thinned: Whether something read so far was thinned, so that a closer look would show more.
    """

    def __init__(
        self, run: Run, *, pattern: str = "", layer: str | None = None, window: Window | None = None
    ) -> None:
        self._run = run
        self._window = window
        self.thinned = False
        with run.reading() as reading:
            series = {
                topic: max((layout.series for layout in layouts.values()), default=0)
                for topic, (_, layouts) in reading.topics().items()
            }
        self._series = series
        self._layers = {topic: run.layers(topic) for topic in series}
        self._chosen = {
            topic: _own(topic, names) or matching(names, pattern, layer)
            for topic, names in self._layers.items()
        }

    @property
    def topics(self) -> list[str]:
        """The topics of which something is chosen."""
        return [topic for topic, chosen in self._chosen.items() if chosen or not self._layers[topic]]

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The run's."""
        return self._run.metadata

    @property
    def every_layer(self) -> list[str]:
        """All layers of the run's metrics, chosen or not, in order of appearance."""
        names = (
            name
            for topic, layers in self._layers.items()
            if not _own(topic, layers) and "alerts." not in topic
            for name in layers
        )
        return list(dict.fromkeys(map(_valid, names)))

    def layers(self, topic: str) -> list[str]:
        """The chosen layers of a topic, in model order."""
        return [_valid(name) for name in self._chosen[topic]]

    def holds_numbers(self, topic: str) -> bool:
        """Whether the topic's values are numbers, one a layer and component."""
        return self._run.holds_numbers(topic)

    def dataframe(self, topic: str, *, max_points: int | None = None) -> pd.DataFrame:
        """A topic as rows: step, epoch, layer, component where there are, value, wall_time.

        Args:
            topic: One of `topics`.
            max_points: Rows a layer of a topic that has no roll-ups.
        """
        base = topic.rpartition("/")[2]
        if base.startswith("alerts."):
            return self._run.dataframe(topic, steps=self._run.some_steps(topic, _MOST_SAID))
        if base.endswith(SUFFIX):
            return self._run.dataframe(topic, steps=self._run.some_steps(topic, _MOST_ACTIONS))
        if not self._run.rolls(topic):
            return self._run.dataframe(topic, self._chosen[topic], max_points=max_points or _ROWS)
        table = self.means(topic)
        spread = "component" in table.columns and (is_histogram(table) or are_percentiles(table))
        extremes = not spread and self._of_chosen(topic) <= _MOST_LINES
        return points_of(table, extremes=extremes, last=self._run.steps_of(topic)[1])

    def _of_chosen(self, topic: str) -> int:
        return self._series[topic] * len(self._chosen[topic]) // max(1, len(self._layers[topic]))

    def means(self, topic: str) -> pd.DataFrame:
        """The envelope of a topic that rolls, closer within the window.

        Args:
            topic: One of `topics`.
        """
        most = int(np.clip(_ROWS // max(1, self._of_chosen(topic)), _FEWEST, _MOST))
        if self._window is None:
            whole = self._envelope(topic, max_points=most)
            self.thinned = self.thinned or bool((whole["count"] + whole["missing"] > 1).any())
            return whole
        first, last = self._window
        coarse = self._envelope(topic, max_points=most // 2)
        fine = self._envelope(topic, steps=(first, last), max_points=most)
        self.thinned = True
        around = (coarse["step"] < first, coarse["step"] > last)
        return pd.concat([coarse[around[0]], fine, coarse[around[1]]], ignore_index=True)

    def _envelope(self, topic: str, **asked: Any) -> pd.DataFrame:
        table = self._run.envelope(topic, self._chosen[topic], **asked)
        for column in {"layer", "component"} & set(table.columns):
            names = table[column].cat.categories.tolist()
            if any(_valid(name) != name for name in names):
                table[column] = table[column].cat.rename_categories([_valid(name) for name in names])
        return table


def _valid(name: str) -> str:
    """A name that pandas can hold: half a character, as in a broken file's name, is spelt out."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def matching(names: Sequence[str], pattern: str, layer: str | None = None) -> list[str]:
    """The names that a filter chooses, in their order.

    Args:
        names: All names.
        pattern: Globs, or parts of names, with blanks or commas in between; all where it is blank.
        layer: The only one, by its full name; goes before `pattern`.
    """
    if layer is not None:
        return [name for name in names if _valid(name) == layer]
    wanted = pattern.replace(",", " ").split()
    if not wanted:
        return list(names)
    globs = [part if any(sign in part for sign in "*?[") else f"*{part}*" for part in wanted]
    # A name is also taken as it is: one with brackets, as a glob, would not match itself.
    return [
        name
        for name in names
        if any(fnmatchcase(name, glob) for glob in globs) or any(part == name for part in wanted)
    ]


def points_of(table: pd.DataFrame, *, extremes: bool, last: int | None = None) -> pd.DataFrame:
    """An envelope as the rows that charts take: `step`, `epoch`, `layer`, `component`, `value`, `wall_time`.

    A stretch of one value is that value. One of several becomes its mean, or its minimum and its maximum,
    half of it apart, in the order in which the series rises or falls; and a NaN beside them where it holds
    any.

    Args:
        table: What `Run.envelope` returned.
        extremes: Whether to keep the extremes rather than the mean.
        last: The last step that there is, beyond which nothing is put.
    """
    columns = [name for name in ("step", "epoch", "layer", "component", "wall_time") if name in table.columns]
    base = table[columns]
    low, mean, high = (table[name].to_numpy(dtype=np.float64) for name in ("min", "mean", "max"))
    missing, count = table["missing"].to_numpy(), table["count"].to_numpy()
    one = count + missing <= 1
    if one.all():
        return base.assign(value=low)
    steps = table["step"].to_numpy()
    distinct = np.unique(steps)
    ends = np.append(distinct[1:], distinct[-1] + (distinct[-1] - distinct[-2] if len(distinct) > 1 else 1))
    half = np.maximum((ends - distinct) // 2, 1)
    if last is not None:
        # The last stretch is seldom full, and ends where the run does.
        half[-1] = max(last - distinct[-1], 0)
    half = half[np.searchsorted(distinct, steps)]
    whole = np.flatnonzero(~one & (count > 0))
    parts = [base[one].assign(value=low[one])]
    if extremes:
        rising = _rising(base, mean)[whole]
        first, second = np.where(rising, low[whole], high[whole]), np.where(rising, high[whole], low[whole])
        parts.append(base.iloc[whole].assign(value=first))
        parts.append(base.iloc[whole].assign(value=second, step=steps[whole] + half[whole]))
    else:
        parts.append(base.iloc[whole].assign(value=mean[whole]))
    bad = np.flatnonzero(~one & (missing > 0))
    # Between the two where there is room, else in the place of the second.
    parts.append(base.iloc[bad].assign(value=np.nan, step=steps[bad] + (half[bad] + 1) // 2))
    rows: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return rows.sort_values("step", kind="stable", ignore_index=True)


def _rising(base: pd.DataFrame, mean: np.ndarray[Any, np.dtype[np.float64]]) -> Any:
    """Of each stretch, whether its series is larger after it than before it."""
    keys = [name for name in ("layer", "component") if name in base.columns]
    means = base[keys].assign(mean=mean).groupby(keys, observed=True, sort=False)["mean"]
    after, before = means.shift(-1).fillna(base["step"] * 0 + mean), means.shift(1)
    return (after >= before.fillna(pd.Series(mean, index=base.index))).to_numpy()


def _own(topic: str, names: Sequence[str]) -> list[str]:
    """The layers of a topic that is about the whole model; none of any other."""
    model = topic.rpartition("/")[0]
    return list(names) if set(names) <= {"", model} else []

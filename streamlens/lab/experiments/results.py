"""`Results`: the runs of an experiment as tables; means over seeds, with intervals."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from scipy import special, stats

from streamlens.errors import UnknownTopicError, did_you_mean
from streamlens.lab.experiments.trial import Settings
from streamlens.runs import read_run

__all__ = ["CORRELATION", "SHARE", "Results", "file_name", "interval", "paired"]

SHARE: Final = (0.0, 1.0)
"""The bounds of a share, such as an accuracy."""

CORRELATION: Final = (-1.0, 1.0)
"""The bounds of a correlation."""


def file_name(name: str) -> str:
    """The name of a topic, table or figure with hyphens for what files should not be called by."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name)


class Results:
    """What all runs of an experiment have recorded.

    Args:
        runs: The settings of each run, and its run store.
    """

    def __init__(self, runs: Sequence[tuple[Settings, Path]]) -> None:
        self.runs = list(runs)
        self._tables: dict[str, pd.DataFrame] = {}

    @property
    def settings(self) -> pd.DataFrame:
        """A row a run, a column a setting; settings that a condition has not are missing."""
        return pd.DataFrame([dict(settings) for settings, _ in self.runs])

    @property
    def topics(self) -> list[str]:
        """The topics of numbers that any run has, in the order in which they first came."""
        found: dict[str, None] = {}
        for _, store in self.runs:
            with read_run(store) as run:
                found |= dict.fromkeys(topic for topic in run.topics if run.holds_numbers(topic))
        return list(found)

    def rows(self, topic: str) -> pd.DataFrame:
        """A topic of all runs that have it: a row a value, with a column for each setting.

        Columns: the settings; then `step`, `epoch`, `layer`, `component` where there are any, `value`.

        Raises:
            UnknownTopicError: No run has it.
        """
        if topic not in self._tables:
            self._tables[topic] = self._read(topic)
        return self._tables[topic].copy()

    def last(self, topic: str) -> pd.DataFrame:
        """The last value of a topic in each run, layer by layer.

        Raises:
            UnknownTopicError: No run has it.
        """
        rows = self.rows(topic)
        keys = [*self.settings.columns, "layer", *(["component"] if "component" in rows else [])]
        keys = [key for key in keys if key in rows]
        return (
            rows.sort_values("step", kind="stable")
            .groupby(keys, sort=False, dropna=False)
            .tail(1)
            .sort_index()
        )

    def write_csv(self, folder: Path) -> list[Path]:
        """Write each topic of numbers to a file of its own.

        Args:
            folder: Where.

        Returns:
            The files.
        """
        paths = []
        folder.mkdir(parents=True, exist_ok=True)
        for topic in self.topics:
            paths.append(folder / f"{file_name(topic)}.csv")
            self.rows(topic).to_csv(paths[-1], index=False)
        return paths

    def _read(self, topic: str) -> pd.DataFrame:
        tables = list(self._each(topic))
        if not tables:
            known = self.topics
            raise UnknownTopicError(
                f"no run has the topic {topic!r}: {did_you_mean(topic, known)} Topics: {', '.join(known)}"
            )
        return pd.concat(tables, ignore_index=True)

    def _each(self, topic: str) -> Iterator[pd.DataFrame]:
        for settings, store in self.runs:
            with read_run(store) as run, contextlib.suppress(UnknownTopicError):
                rows = run.dataframe(topic)
                columns = ["step", "epoch", "layer", "component", "value"]
                rows = rows[[column for column in columns if column in rows]].astype({"layer": "object"})
                for place, (name, value) in enumerate(settings.items()):
                    rows.insert(place, name, value)
                yield rows


def interval(
    rows: pd.DataFrame,
    by: Sequence[str],
    *,
    value: str = "value",
    level: float = 0.95,
    log: bool = False,
    bounds: tuple[float, float] | None = None,
) -> pd.DataFrame:
    """The mean over runs, and the interval that holds the true one with 95% confidence.

    mean +- t s / sqrt(n), s being the deviation (over n - 1) of the n runs, t the quantile of Student's
    distribution with n - 1 degrees of freedom. With `log` this is done with logarithms: the result is the
    geometric mean, and its interval. With `bounds` it is the interval of the mean's log-odds between them,
    whose deviation is s times the slope there (the delta method), carried back: it never passes them, and
    comes to the plain one as s grows small. For `CORRELATION` that transform is Fisher's z, for
    `SHARE` the interval is what surveys report of proportions (Korn and Graubard 1998).

    Args:
        rows: One row a run in each group.
        by: The columns that make a group.
        value: The column of the values; missing ones are left out.
        level: The confidence.
        log: For values above 0 that differ by factors.
        bounds: For values that lie between two numbers, such as `SHARE` and `CORRELATION`.

    Returns:
        A row a group: the columns `by`, `mean`, `low`, `high`, `deviation` (over runs; with `log` that of the
        logarithms) and `runs`. Without a second run the interval is NaN.

    Raises:
        ValueError: `log` with values that are not above 0, values beyond `bounds`, both asked for, or groups
            in which a run comes twice.
    """
    rows = rows.dropna(subset=[value])
    _check_values(rows[value], log, bounds)
    if "seed" in rows and rows.duplicated([*by, "seed"]).any():
        raise ValueError(f"groups by {', '.join(by)} hold several values of one run: average those first")
    used = rows.assign(**{value: np.log(rows[value]) if log else rows[value].astype(float)})
    found = used.groupby(list(by), sort=False, observed=True, dropna=False)[value]
    table = found.agg(mean="mean", deviation="std", runs="count").reset_index()
    half = (
        stats.t.ppf((1 + level) / 2, (table.runs - 1).clip(lower=1)) * table.deviation / np.sqrt(table.runs)
    )
    table["low"], table["high"] = table["mean"] - half, table["mean"] + half
    if bounds is not None:
        table["low"], table["high"] = (_within(table["mean"], sign * half, bounds) for sign in (-1, 1))
    if log:
        table[["mean", "low", "high"]] = np.exp(table[["mean", "low", "high"]])
    return table[[*by, "mean", "low", "high", "deviation", "runs"]]


def _check_values(values: pd.Series, log: bool, bounds: tuple[float, float] | None) -> None:
    if log and bounds is not None:
        raise ValueError("an interval is one of factors (log) or one between bounds, not both")
    if log and (values <= 0).any():
        raise ValueError(f"the logarithm of {values.name!r} needs values above 0")
    if bounds is not None and not values.between(*bounds).all():
        low, high = bounds
        raise ValueError(
            f"{values.name!r} goes from {values.min():g} to {values.max():g}: beyond {low:g} or {high:g}"
        )


def _within(mean: pd.Series, shift: pd.Series, bounds: tuple[float, float]) -> pd.Series:
    """The mean moved by `shift` on the scale of its log-odds between the bounds; never past them."""
    low, high = bounds
    share = (mean - low) / (high - low)
    slope = share * (1 - share) * (high - low)
    # A mean at a bound is that of runs that are all there, and has nowhere to go.
    inside = slope > 0
    odds = special.logit(share.where(inside, 0.5)) + shift / slope.where(inside, 1.0)
    return pd.Series(np.where(inside, low + (high - low) * special.expit(odds), mean + shift), mean.index)


def paired(
    rows: pd.DataFrame,
    of: str,
    against: object,
    by: Sequence[str] = (),
    *,
    value: str = "value",
    log: bool = False,
    bounds: tuple[float, float] | None = None,
) -> pd.DataFrame:
    """How conditions differ from one of them, seed by seed.

    Where only training differs, runs of one seed begin with the same weights and the same batches.

    Args:
        rows: One row a run.
        of: The column that tells the conditions.
        against: The condition that others are compared with.
        by: The columns in which both are alike.
        value: The column of the values.
        log: Quotients instead of differences: their geometric mean.
        bounds: Of the values, as for `interval`; differences are at most as large as these are apart.

    Returns:
        As `interval`, a row for each other condition in each group.

    Raises:
        ValueError: There is no such condition, values are beyond `bounds`, or `bounds` come with `log`.
    """
    keys = [*by, "seed"]
    base = rows.loc[rows[of] == against, [*keys, value]].rename(columns={value: "_base"})
    if base.empty:
        raise ValueError(f"no run has {of} = {against!r}: there are {sorted(map(str, rows[of].unique()))}")
    both = rows[rows[of] != against].merge(base, on=keys)
    both["change"] = both[value] / both["_base"] if log else both[value] - both["_base"]
    if bounds is not None:
        _check_values(rows[value], log, bounds)
        bounds = (bounds[0] - bounds[1], bounds[1] - bounds[0])
    return interval(both, [of, *by], value="change", log=log, bounds=bounds)

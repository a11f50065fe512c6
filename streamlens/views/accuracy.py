"""Training and test accuracy, of one run or of several."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import altair as alt
import numpy as np
import pandas as pd

from streamlens.views.marks import WIDTH, Limits, chart_of_lines, nothing, series_color, step_axis, value_axis
from streamlens.views.series import Series, draw_table, split, thin_indices

__all__ = ["accuracies"]

_HEIGHT: Final = 180
_FEW: Final = 60
"""Up to so many measurements, as one an epoch gives, are points first and a line second."""


def accuracies(
    curves: Mapping[str, pd.DataFrame], *, limits: Limits | None = None, max_points: int = 600
) -> alt.LayerChart:
    """Accuracies over steps: a line for each data set, or each way to train, they were measured on.

    Of several runs, such as one a seed, the line is their mean and the band around it the 95% confidence
    interval of that mean (Student's t over the runs). Where runs were measured at other steps than one
    another, each counts by its straight line between two measurements, from its first to its last; at steps
    of one run alone there is no band. NaN and infinities are left out of both, and are magenta marks.

    Args:
        curves: Name of the line (`"training"`, `"test"`, `"test, ratio schedule"`) to the rows of its topic;
            values are shares in [0, 1]. A column `run` tells the runs apart where there are several.
        limits: The first and last step of the axis; by default those of the data.
        max_points: The most points drawn.

    Raises:
        ValueError: A column is missing.
    """
    lines: list[Series] = []
    flagged: list[Series] = []
    bands: list[pd.DataFrame] = []
    most_runs = 1
    for name, rows in curves.items():
        runs = [line for line in split(rows, "run" if "run" in rows.columns else "layer") if len(line)]
        runs = runs if "run" in rows.columns else runs[:1]
        if len(runs) > 1:
            line, band = _mean(name, runs, max(5, max_points // len(curves)))
            lines.append(line)
            bands.append(band)
            flagged += [Series(f"{name}, {run.name}", run.steps, run.epochs, run.values) for run in runs]
            most_runs = max(most_runs, len(runs))
        else:
            lines += [Series(name, s.steps, s.epochs, s.values) for s in runs]
    if not lines:
        return nothing("no accuracy was recorded")
    points, flags = draw_table(lines, max_points, log=False)
    if flagged:
        flags = pd.concat([flags, draw_table(flagged, 10**9, log=False)[1]], ignore_index=True)
        # Where no run had a finite value the mean has none either; the runs' own marks say so.
        flags = flags[~flags["series"].isin([line.name for line in lines]) | (flags["flag"] != "NaN")]
    of_runs = f"; mean and 95% band of {most_runs} runs" if most_runs > 1 else ""
    names = [line.name for line in lines]
    y = value_axis(f"accuracy (share of examples{of_runs})", log=False, number_format="~%")
    chart = chart_of_lines(
        points,
        flags,
        names=names,
        y=y,
        limits=limits,
        series_title="measured on",
        value_title="accuracy" if most_runs == 1 else "mean accuracy",
        value_format=".2%",
        with_points=max(map(len, lines)) <= _FEW,
        height=_HEIGHT,
    )
    if bands:
        chart.layer.insert(0, _drawn(pd.concat(bands, ignore_index=True), names, y, limits))
    return chart


def _mean(name: str, runs: list[Series], most: int) -> tuple[Series, pd.DataFrame]:
    """The mean over runs, and the edges of its confidence interval where two or more are known."""
    steps = np.unique(np.concatenate([run.steps for run in runs]))
    table = np.stack([_at(steps, run) for run in runs])
    epochs = np.zeros_like(steps)
    for run in runs:
        epochs[np.searchsorted(steps, run.steps)] = run.epochs
    known = np.isfinite(table)
    count = known.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, table, 0).sum(0) / count
        spread = np.sqrt(np.where(known, (table - mean) ** 2, 0).sum(0) / (count - 1))
        half = np.array([_student(n - 1) for n in count.tolist()]) * spread / np.sqrt(count)
    line = Series(name, steps, epochs, mean)
    kept = thin_indices(mean, most)
    kept = kept[count[kept] > 1]
    low, high = np.clip(mean - half, 0, 1)[kept], np.clip(mean + half, 0, 1)[kept]
    edges = {"value": low.round(5), "upper": high.round(5)}
    return line, pd.DataFrame({"series": name, "step": steps[kept], **edges, "runs": count[kept]})


def _at(
    steps: np.ndarray[tuple[int, ...], np.dtype[np.int64]], run: Series
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """A run at other steps than its own; NaN before its first, after its last, beside what is not finite."""
    finite = np.where(np.isfinite(run.values), run.values, np.nan)
    return np.interp(steps, run.steps, finite, left=math.nan, right=math.nan)


_STUDENT: Final = (12.7062, 4.3027, 3.1824, 2.7764)
_NORMAL: Final = 1.959964


def _student(freedom: int) -> float:
    """The 97.5% quantile of Student's t; NaN without a degree of freedom."""
    if freedom < 1:
        return math.nan
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    # Its expansion in 1 / freedom (Abramowitz and Stegun, 26.7.5), here good to three digits.
    z = _NORMAL
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _drawn(bands: pd.DataFrame, names: list[str], y: alt.Y, limits: Limits | None) -> alt.Chart:
    areas: alt.Chart = alt.Chart(bands, width=WIDTH).mark_area(opacity=0.2, clip=True)
    return areas.encode(x=step_axis(limits), y=y, y2="upper:Q", color=series_color(names))

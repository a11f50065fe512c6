"""Down-sampling for the eye: fewer points, the same picture."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["MIN_POINTS", "extremes"]

MIN_POINTS = 5
"""The first, the last, a minimum, a maximum and a NaN."""


def extremes(values: np.ndarray[Any, Any], max_points: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Positions of at most `max_points` values that draw the same curve as all of them.

    The series is cut into equal stretches; of each, the positions of the minimum, of the maximum
    and of the first NaN, if there is one, are kept, and the first and the last of the whole. So
    no spike and no gap disappears, whatever the width of the chart.

    Args:
        values: One series. Complex values count by magnitude; of values that are arrays
            themselves, evenly spaced ones are kept.
        max_points: At least 5.

    Returns:
        Ascending positions; all of them where the series is short enough.

    Raises:
        ValueError: `max_points` is below 5.
    """
    if max_points < MIN_POINTS:
        raise ValueError(
            f"max_points must be at least {MIN_POINTS}, to show extremes and gaps; got {max_points}"
        )
    count = len(values)
    if count <= max_points:
        return np.arange(count)
    if values.dtype == object:
        return np.linspace(0, count - 1, max_points).astype(np.int64)
    if values.dtype.kind == "c":
        values = np.abs(values)
    missing = np.isnan(values)
    kept_each = 3 if missing.any() else 2
    width = -(-count // ((max_points - 2) // kept_each))
    rows = -(-count // width)
    padding = (0, rows * width - count)
    cut = np.pad(values, padding, mode="edge").reshape(rows, width)
    starts = np.arange(rows) * width
    keep = [np.array([0, count - 1])]
    if kept_each == 3:
        gaps = np.pad(missing, padding, mode="edge").reshape(rows, width)
        keep.append((starts + gaps.argmax(axis=1))[gaps.any(axis=1)])
        # With NaN moved out of the way, a stretch that is NaN throughout yields a NaN: no harm.
        keep.append(starts + np.where(gaps, np.inf, cut).argmin(axis=1))
        keep.append(starts + np.where(gaps, -np.inf, cut).argmax(axis=1))
    else:
        keep += [starts + cut.argmin(axis=1), starts + cut.argmax(axis=1)]
    return np.unique(np.concatenate(keep))

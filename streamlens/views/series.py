"""From the rows of a run to what a chart can draw: series, thinned, with their bad values marked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Series", "draw_table", "exponential_average", "flag_of", "split", "thin_indices"]


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart.

    Attributes:
        name: What the legend calls it.
        steps: Optimizer steps, ascending, each once.
        epochs: The epoch of each step.
        values: The value at each step; NaN and infinities are data.
    """

    name: str
    steps: NDArray[np.int64]
    epochs: NDArray[np.int64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)

    def take(self, indices: NDArray[np.intp]) -> Series:
        """The series at these positions only."""
        return Series(self.name, self.steps[indices], self.epochs[indices], self.values[indices])


def split(rows: pd.DataFrame, by: str = "layer", order: Sequence[str] | None = None) -> list[Series]:
    """Split rows into one series for each value of the column `by`.

    Several rows of one step (micro-steps) become their mean; one NaN among them makes it NaN, as a
    chart that averaged it away would hide it.

    Args:
        rows: Columns `step`, `value` and `by`; `epoch` where known.
        by: The column whose values name the series.
        order: The order of the series; by default that of first appearance.

    Raises:
        ValueError: `rows` lacks a column.
    """
    missing = [name for name in ("step", "value", by) if name not in rows.columns]
    if missing:
        raise ValueError(
            f"rows without the column {', '.join(map(repr, missing))}: a view takes what "
            f"run.dataframe(topic) returns; it was given {', '.join(map(str, rows.columns)) or 'no columns'}"
        )
    present = list(dict.fromkeys(rows[by].tolist()))
    names = present if order is None else [name for name in order if name in set(present)]
    codes = pd.Categorical(rows[by], categories=names).codes
    steps = rows["step"].to_numpy(dtype=np.int64)
    values = rows["value"].to_numpy(dtype=np.float64)
    epochs = rows["epoch"].to_numpy(dtype=np.int64) if "epoch" in rows.columns else np.zeros_like(steps)
    return [
        # The model itself has no name of its own.
        _one_value_a_step(str(name) or "(model)", steps[mine], epochs[mine], values[mine])
        for code, name in enumerate(names)
        for mine in [codes == code]
    ]


def _one_value_a_step(
    name: str, steps: NDArray[np.int64], epochs: NDArray[np.int64], values: NDArray[np.float64]
) -> Series:
    order = np.argsort(steps, kind="stable")
    steps, epochs, values = steps[order], epochs[order], values[order]
    unique, first, count = np.unique(steps, return_index=True, return_counts=True)
    if len(unique) < len(steps):
        # inf - inf within a step is NaN, which is what the chart is to show there.
        with np.errstate(invalid="ignore"):
            values = np.add.reduceat(values, first) / count
        epochs = epochs[first]
    return Series(name, unique, epochs, values)


def thin_indices(values: NDArray[np.float64], max_points: int) -> NDArray[np.intp]:
    """Positions of at most `max_points` values that draw the same picture as all of them.

    The values are cut into equal stretches; of each its smallest, its largest and its first NaN or
    infinity stay, and the first and the last value of all do. Spikes and gaps survive, which an
    average or every n-th value would lose. Cost: two passes over the values.

    Args:
        values: The values in order of time.
        max_points: The most positions to return, at least 5.

    Raises:
        ValueError: `max_points` is below 5.
    """
    if max_points < 5:
        raise ValueError(f"max_points is {max_points}: a thinned series needs at least 5 points")
    n = len(values)
    if n <= max_points:
        return np.arange(n)
    # What each stretch keeps: its extremes, and where there are any, a value that is not finite.
    each = 2 if np.isfinite(values).all() else 3
    width = -(-n // ((max_points - 2) // each))
    stretches = -(-n // width)
    padded = np.full(stretches * width, np.nan)
    padded[:n] = values
    blocks = padded.reshape(stretches, width)
    finite = np.isfinite(blocks)
    inside = np.arange(stretches * width).reshape(blocks.shape) < n
    start = np.arange(stretches) * width
    low = start + np.where(finite, blocks, np.inf).argmin(axis=1)
    high = start + np.where(finite, blocks, -np.inf).argmax(axis=1)
    bad = inside & ~finite
    first_bad = (start + bad.argmax(axis=1))[bad.any(axis=1)]
    return np.unique(np.concatenate([[0, n - 1], low, high, first_bad])).astype(np.intp)


def exponential_average(values: NDArray[np.float64], half_life: float) -> NDArray[np.float64]:
    """The exponential moving average `s <- d * s + (1 - d) * x` with `d = 0.5 ** (1 / half_life)`.

    It starts at the first finite value. At a NaN or an infinity it keeps its state, and is NaN.

    Args:
        values: The values in order of time.
        half_life: After how many values the weight of one has halved.
    """
    decay = 0.5 ** (1.0 / half_life)
    out = np.full(len(values), np.nan)
    state: float | None = None
    for i, value in enumerate(values.tolist()):
        if not np.isfinite(value):
            continue
        state = value if state is None else decay * state + (1.0 - decay) * value
        out[i] = state
    return out


def draw_table(series: Iterable[Series], max_points: int, *, log: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the marks of a chart take: the points of its lines, and the values no line can show.

    Args:
        series: The lines.
        max_points: The most points in all; each line gets an equal share, but at least 5.
        log: Whether the value axis is logarithmic, where zero and below have no place.

    Returns:
        Rows (`series`, `step`, `epoch`, `value`), with a gap in the line where the value cannot be
        drawn, and rows (`series`, `step`, `epoch`, `flag`) that say what stood there.
    """
    lines = [line for line in series if len(line)]
    share = max(5, max_points // max(1, len(lines)))
    points: dict[str, list[Any]] = {"series": [], "step": [], "epoch": [], "value": []}
    flags: dict[str, list[Any]] = {"series": [], "step": [], "epoch": [], "flag": []}
    for line in lines:
        values = np.where(line.values > 0, line.values, np.nan) if log else line.values
        kept = line.take(thin_indices(values, share))
        drawable = np.isfinite(kept.values) & ((kept.values > 0) | (not log))
        points["series"] += [line.name] * len(kept)
        points["step"] += kept.steps.tolist()
        points["epoch"] += kept.epochs.tolist()
        points["value"] += [
            _round(v) if ok else None for v, ok in zip(kept.values.tolist(), drawable, strict=True)
        ]
        bad = kept.take(np.flatnonzero(~drawable))
        flags["series"] += [line.name] * len(bad)
        flags["step"] += bad.steps.tolist()
        flags["epoch"] += bad.epochs.tolist()
        flags["flag"] += [flag_of(value) for value in bad.values.tolist()]
    table = pd.DataFrame(points).astype({"value": "float64"})
    return table, pd.DataFrame(flags)


def _round(value: float) -> float:
    # Five digits are more than any screen shows, and halve the page.
    return float(f"{value:.5g}")


def flag_of(value: float) -> str:
    """What a mark says of a value that no line can show: NaN, an infinity, or zero on a logarithmic axis.

    Args:
        value: The value.
    """
    if np.isnan(value):
        return "NaN"
    if np.isinf(value):
        return "+inf" if value > 0 else "-inf"
    return "0" if value == 0 else f"{value:.3g}"

"""One topic's numbers, kept for the eye: bounded, with every extreme and everything that is not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["Envelope"]

_FEWEST: Final = 8
"""Stretches that are kept at least, however many series share the points."""


class Envelope:
    """The numbers of a topic by series and stretch of steps.

    Stretches are one step wide at first. When there would be more of them than there are points for, two
    neighbours become one, so that a run of any length stays within the bound and each stretch keeps, for
    every series, its smallest, its largest and its last number, the first that is not finite, and the mean
    of the logarithms. A series is a layer, or a layer's component.

    Taking a frame in is a dozen operations on arrays as long as there are series.

    Args:
        most_points: The most points that `lines` gives where all numbers are finite; half as many cells.

    Attributes:
        series: Layer and component of each series, in the order of their first numbers.
        width: How many steps a stretch is wide.
        left_out: Series for which there was no room.
        bad: Whether some number was not finite.
        lowest: The smallest finite number so far.
        taken: How many steps were taken in.
    """

    def __init__(self, most_points: int) -> None:
        self.series: list[tuple[str, str]] = []
        self.width = 1
        self.left_out = 0
        self.bad = False
        self.lowest = np.inf
        self.taken = 0
        self._most = most_points
        self._most_series = max(1, most_points // (2 * _FEWEST))
        self._place: dict[tuple[str, str], int] = {}
        self._places: dict[tuple[tuple[str, ...], tuple[str, ...]], NDArray[np.intp]] = {}
        self._count = 0
        self._changed = 0
        self._cut = False
        self._room(0)

    def __len__(self) -> int:
        return self._count

    def _room(self, series: int) -> None:
        """Make the arrays as large as so many series need, and keep what is in them."""
        capacity = max(_FEWEST, self._most // (2 * max(1, series))) // 2 * 2
        while self._count > capacity:
            self._widen()
        old = self.__dict__.get("_arrays", {})
        self._capacity = capacity
        self._starts = _grown(self.__dict__.get("_starts"), (capacity,), 0.0, self._count)
        self._firsts = _grown(self.__dict__.get("_firsts"), (capacity,), 0.0, self._count)
        self._lasts = _grown(self.__dict__.get("_lasts"), (capacity,), 0.0, self._count)
        self._epochs = _grown(self.__dict__.get("_epochs"), (capacity,), 0.0, self._count)
        self._arrays = {
            name: _grown(old.get(name), (capacity, series), empty, self._count)
            for name, empty in _EMPTY.items()
        }

    def _indices(self, layers: tuple[str, ...], components: tuple[str, ...]) -> NDArray[np.intp]:
        """Where a frame's numbers belong; -1 for those without room."""
        known = self._places.get((layers, components))
        if known is not None:
            return known
        names = [(layer, component) for layer in layers for component in components or ("",)]
        for name in names:
            if name not in self._place:
                if len(self.series) < self._most_series:
                    self._place[name] = len(self.series)
                    self.series.append(name)
                else:
                    self._place[name] = -1
                    self.left_out += 1
        if len(self.series) != self._arrays["low"].shape[1]:
            self._room(len(self.series))
            self._changed = 0
        found = np.array([self._place[name] for name in names], dtype=np.intp)
        self._places[layers, components] = found
        return found

    def add(
        self,
        step: int,
        epoch: int,
        layers: tuple[str, ...],
        components: tuple[str, ...],
        values: NDArray[np.float64],
    ) -> None:
        """Take a frame's numbers in.

        Args:
            step: Its step.
            epoch: Its epoch.
            layers: Its layers.
            components: Its components, if any.
            values: A number a layer, or a number a layer and component.
        """
        at = self._indices(layers, components)
        numbers = values.reshape(-1)
        if self.left_out:
            numbers, at = numbers[at >= 0], at[at >= 0]
        row = self._stretch(step, epoch)
        self._merge_numbers(row, at, numbers, float(step))
        self.taken += 1

    def _stretch(self, step: int, epoch: int) -> int:
        """The stretch that a step belongs to, made if need be."""
        start = float(step // self.width * self.width)
        last = self._count - 1
        if last < 0 or start > self._starts[last]:
            if self._count == self._capacity:
                self._widen()
                return self._stretch(step, epoch)
            row = self._count
            self._count += 1
            self._starts[row] = start
            self._firsts[row] = self._lasts[row] = step
            for name, empty in _EMPTY.items():
                self._arrays[name][row] = empty
            # The cell before ends where this one begins.
            self._changed = min(self._changed, max(0, row - 1))
        else:
            # A number that comes late belongs to an earlier stretch, or to the one in front of its gap.
            row = max(0, int(np.searchsorted(self._starts[: self._count], start, side="right")) - 1)
            self._firsts[row] = min(self._firsts[row], step)
            self._lasts[row] = max(self._lasts[row], step)
            self._changed = min(self._changed, max(0, row - 1))
        self._epochs[row] = epoch
        return row

    def _merge_numbers(
        self, row: int, at: NDArray[np.intp], numbers: NDArray[np.float64], step: float
    ) -> None:
        kept = {name: array[row] for name, array in self._arrays.items()}
        finite = np.isfinite(numbers)
        if not finite.all():
            self.bad = True
            fresh = ~finite & np.isnan(kept["bad_step"][at])
            kept["bad"][at[fresh]], kept["bad_step"][at[fresh]] = numbers[fresh], step
        lower = finite & (numbers < kept["low"][at])
        kept["low"][at[lower]], kept["low_step"][at[lower]] = numbers[lower], step
        higher = finite & (numbers > kept["high"][at])
        kept["high"][at[higher]], kept["high_step"][at[higher]] = numbers[higher], step
        kept["last"][at], kept["last_step"][at] = numbers, step
        if finite.any():
            self.lowest = min(self.lowest, float(numbers[finite].min()))
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log10(numbers)
        drawn = np.isfinite(logs)
        kept["logs"][at[drawn]] += logs[drawn]
        kept["logged"][at[drawn]] += 1.0
        kept["unlogged"][at[np.isnan(logs) | (logs == np.inf)]] += 1.0

    def _widen(self) -> None:
        """Make stretches twice as wide."""
        self.width *= 2
        n = self._count
        groups = self._starts[:n] // self.width
        # Two stretches at most fall into one: where a stretch begins and its successor belongs to it.
        head = np.flatnonzero(np.diff(groups, prepend=-1.0))
        tail = np.append(head[1:], n) - 1
        a = {name: array[head] for name, array in self._arrays.items()}
        b = {name: array[tail] for name, array in self._arrays.items()}
        two = (tail > head)[:, np.newaxis]
        lower, higher = two & (b["low"] < a["low"]), two & (b["high"] > a["high"])
        later = two & ~np.isnan(b["last_step"])
        worse = two & np.isnan(a["bad_step"])
        merged = {
            **{name: np.where(lower, b[name], a[name]) for name in ("low", "low_step")},
            **{name: np.where(higher, b[name], a[name]) for name in ("high", "high_step")},
            **{name: np.where(later, b[name], a[name]) for name in ("last", "last_step")},
            **{name: np.where(worse, b[name], a[name]) for name in ("bad", "bad_step")},
            **{name: a[name] + np.where(two, b[name], 0.0) for name in ("logs", "logged", "unlogged")},
        }
        self._count = len(head)
        for name, array in merged.items():
            self._arrays[name][: len(head)] = array
        self._starts[: len(head)] = groups[head] * self.width
        self._firsts[: len(head)] = self._firsts[head]
        self._lasts[: len(head)] = self._lasts[tail]
        self._epochs[: len(head)] = self._epochs[tail]
        self._changed = 0

    def limit(self, most_points: int) -> None:
        """Do with fewer points.

        Args:
            most_points: The most, as in the constructor; more than before changes nothing.
        """
        if most_points < self._most:
            self._most = most_points
            self._room(len(self.series))

    def cut(self, step: int) -> None:
        """Forget the stretches that reach beyond a step."""
        self._count = int((self._lasts[: self._count] <= step).sum())
        self._changed, self._cut = 0, True

    # -- what is drawn -----------------------------------------------------------------------

    @property
    def changed(self) -> int | None:
        """The first stretch that is not as `settle` saw it; None if all are."""
        return self._changed if self._changed < self._count or self._cut else None

    def settle(self) -> None:
        """Note that all is drawn as it is."""
        self._changed, self._cut = self._count, False

    def begin(self, stretch: int) -> float:
        """The first step of a stretch; of none, one that no step comes before."""
        return float(self._starts[stretch]) if 0 < stretch < self._count else -1.0

    def lines(self, stretch: int = 0) -> NDArray[np.float64]:
        """The points of lines, from a stretch on.

        Args:
            stretch: The first one.

        Returns:
            Four rows, a column a point: series, step, epoch, number; sorted by step.
        """
        n, a = self._count, self._arrays
        part = slice(stretch, n)
        low, high, last = a["low_step"][part], a["high_step"][part], a["last_step"][part].copy()
        last[:-1] = np.nan
        last[(last == low) | (last == high) | (last == a["bad_step"][part])] = np.nan
        # One number that is both.
        high = np.where((high == low) & (a["high"][part] == a["low"][part]), np.nan, high)
        steps = np.stack([low, high, a["bad_step"][part], last])
        values = np.stack([a["low"][part], a["high"][part], a["bad"][part], a["last"][part]])
        epochs = np.broadcast_to(self._epochs[part, np.newaxis], low.shape)
        series = np.broadcast_to(np.arange(low.shape[1], dtype=np.float64), low.shape)
        there = ~np.isnan(steps)
        found = np.stack(
            [
                np.broadcast_to(series, steps.shape)[there],
                steps[there],
                np.broadcast_to(epochs, steps.shape)[there],
                values[there],
            ]
        )
        return found[:, np.argsort(found[1], kind="stable")]

    def cells(self, stretch: int = 0) -> NDArray[np.float64]:
        """The cells of a heatmap of logarithms, from a stretch on.

        Args:
            stretch: The first one.

        Returns:
            Six rows, a column a cell: series, first step, last step, where the next cell begins, mean
            of the logarithms (minus infinity where there is none), and 1 where some number has none
            because it is NaN, infinite or negative.
        """
        n, a = self._count, self._arrays
        firsts, lasts = self._firsts[:n], self._lasts[:n]
        gap = firsts[-1] - firsts[-2] if n > 1 else 1.0
        ends = np.append(firsts[1:], lasts[-1:] + (1.0 if self.width > 1 else gap))[stretch:]
        part = slice(stretch, n)
        rows, columns = np.nonzero(~np.isnan(a["last_step"][part]))
        logged = a["logged"][part][rows, columns]
        mean = np.where(logged > 0, a["logs"][part][rows, columns] / np.maximum(logged, 1.0), -np.inf)
        return np.stack(
            [
                columns.astype(np.float64),
                firsts[part][rows],
                lasts[part][rows],
                ends[rows],
                mean,
                (a["unlogged"][part][rows, columns] > 0).astype(np.float64),
            ]
        )

    def line_table(self) -> pd.DataFrame:
        """The points of lines as rows that a view takes."""
        series, steps, epochs, values = self.lines()
        return self._table(series, steps, epochs, values)

    def cell_table(self) -> pd.DataFrame:
        """The cells as rows that a heatmap takes: one number each."""
        series, firsts, _, _, mean, bad = self.cells()
        values = np.where(bad > 0, np.nan, np.power(10.0, mean))
        return self._table(series, firsts, np.zeros_like(firsts), values)

    def _table(
        self,
        series: NDArray[np.float64],
        steps: NDArray[np.float64],
        epochs: NDArray[np.float64],
        values: NDArray[np.float64],
    ) -> pd.DataFrame:
        names = [self.series[i] for i in series.astype(np.intp).tolist()]
        table = pd.DataFrame(
            {
                "step": steps.astype(np.int64),
                "epoch": epochs.astype(np.int64),
                "layer": np.array([layer for layer, _ in names], dtype=object),
                "value": values,
            }
        )
        if any(component for _, component in self.series):
            table["component"] = np.array([component for _, component in names], dtype=object)
        return table


_EMPTY: Final = {
    "low": np.inf,
    "low_step": np.nan,
    "high": -np.inf,
    "high_step": np.nan,
    "last": np.nan,
    "last_step": np.nan,
    "bad": np.nan,
    "bad_step": np.nan,
    "logs": 0.0,
    "logged": 0.0,
    "unlogged": 0.0,
}
"""What a stretch keeps of each series, and what stands there before there is a number."""


def _grown(
    old: NDArray[np.float64] | None, shape: Sequence[int], empty: float, used: int
) -> NDArray[np.float64]:
    new = np.full(tuple(shape), empty)
    if old is not None:
        new[tuple(slice(0, min(used if i == 0 else n, n)) for i, n in enumerate(old.shape))] = old[:used]
    return new

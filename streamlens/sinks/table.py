"""`Table`: every frame in memory, as a pandas DataFrame."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from streamlens.errors import did_you_mean
from streamlens.frame import Frame
from streamlens.sink import RunInfo, Sink
from streamlens.sinks._values import host_values

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Table"]

_COLUMNS: Final = ("topic", "layer", "step", "epoch", "micro_step")
_READ_TIMEOUT: Final = 10.0
"""Seconds that reading waits for frames that are still queued."""


class Table(Sink):
    """Keeps frames in memory and gives them as tidy rows.

    Reading first waits for what is queued, so that the table is complete right after a step.
    Writing keeps the frames as they are; rows are made when somebody reads, once each.

    Args:
        limit: The most frames to keep; the oldest are dropped beyond that, and counted in
            `dropped`. Without limit by default.

    Raises:
        ValueError: The limit is not a positive number.

    Example:
        >>> table = Table()
        >>> lens.pipe(uw_ratio()).subscribe(table)  # doctest: +SKIP
        >>> table["uw_ratio"].plot(logy=True)  # doctest: +SKIP
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"Table(limit=) is the most frames to keep, at least 1; got {limit!r}")
        self.limit = limit
        self.dropped = 0
        self._lock = threading.Lock()
        self._run = 0
        self._runs: list[str] = []
        self._frames: deque[tuple[int, Frame]] = deque()
        self._built: pd.DataFrame | None = None
        self._built_frames = 0

    def open(self, run: RunInfo) -> None:
        """Note which run the next frames belong to."""
        with self._lock:
            if run.id not in self._runs:
                self._runs.append(run.id)
            self._run = self._runs.index(run.id)

    def write(self, frames: Sequence[Frame]) -> None:
        """Keep frames."""
        with self._lock:
            self._frames.extend((self._run, frame) for frame in frames)
            if self.limit is not None and len(self._frames) > self.limit:
                excess = len(self._frames) - self.limit
                for _ in range(excess):
                    self._frames.popleft()
                self.dropped += excess
                self._forget_rows()

    @property
    def dataframe(self) -> pd.DataFrame:
        """One row a layer and frame, in the order of emission; a copy of the caller's own.

        Columns: `topic`, `layer`, `step`, `epoch`, `micro_step`, `value`. Where they occur also
        `component`, each entry of a frame's `meta`, and `run` (counted from 0) once frames of
        several runs are held. `value` is a float, or an array in rows of unnamed vectors.
        """
        return self._rows().copy()

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics seen, in order of their first frame."""
        return tuple(dict.fromkeys(frame.topic for frame in self))

    def __getitem__(self, topic: str) -> pd.DataFrame:
        """One topic as a matrix: index the step, columns the layers (with components: both).

        Several frames of a step (its micro-steps) are averaged. With several runs, the last.

        Raises:
            KeyError: The table has no frame of that topic.
        """
        rows = self._rows()
        mine = rows[rows["topic"] == topic]
        if mine.empty:
            known = list(dict.fromkeys(rows["topic"]))
            hint = did_you_mean(topic, known)
            raise KeyError(
                f"no topic {topic!r} in the table" + (f": {hint}" if hint else f"; it has {known}")
            )
        if "run" in mine:
            mine = mine[mine["run"] == mine["run"].max()]
        named = "component" in mine and bool(mine["component"].notna().any())
        keys = ["layer", "component"] if named else ["layer"]
        groups = mine.groupby(["step", *keys], sort=False, dropna=False)["value"]
        values = groups.mean() if mine["value"].dtype != object else groups.last()
        matrix = values.unstack(keys).sort_index()
        order = mine[keys].drop_duplicates()
        columns = pd.MultiIndex.from_frame(order) if named else pd.Index(order["layer"], name="layer")
        return matrix.reindex(columns=columns)

    def __iter__(self) -> Iterator[Frame]:
        """The frames, oldest first."""
        self.drain(_READ_TIMEOUT)
        with self._lock:
            return iter([frame for _, frame in self._frames])

    def __len__(self) -> int:
        """How many frames are kept."""
        self.drain(_READ_TIMEOUT)
        return len(self._frames)

    def __bool__(self) -> bool:
        return True

    def clear(self) -> None:
        """Forget every frame received so far."""
        self.drain(_READ_TIMEOUT)
        with self._lock:
            self._frames.clear()
            self._forget_rows()

    def __repr__(self) -> str:
        with self._lock:
            frames = [frame for _, frame in self._frames]
        if not frames:
            return "Table(empty)"
        topics = list(dict.fromkeys(frame.topic for frame in frames))
        names = ", ".join(topics[:6]) + (", ..." if len(topics) > 6 else "")
        steps = [frame.step for frame in frames]
        lost = f", {self.dropped} dropped" if self.dropped else ""
        return f"Table({len(frames)} frames of {names}; steps {min(steps)} to {max(steps)}{lost})"

    def _forget_rows(self) -> None:
        self._built = None
        self._built_frames = 0

    def _rows(self) -> pd.DataFrame:
        self.drain(_READ_TIMEOUT)
        with self._lock:
            new = list(self._frames)[self._built_frames :]
            if self._built is None:
                self._built = _to_rows(new)
            elif new:
                self._built = pd.concat([self._built, _to_rows(new)], ignore_index=True)
            self._built_frames += len(new)
            if len(set(self._runs)) > 1:
                return self._built
            return self._built.drop(columns="run")


def _to_rows(frames: Sequence[tuple[int, Frame]]) -> pd.DataFrame:
    """Tidy rows of many frames, column by column."""
    sizes: list[int] = []
    layers: list[str] = []
    components: list[str | None] = []
    values: list[Any] = []
    for _, frame in frames:
        before = len(layers)
        for layer, value in host_values(frame):
            names = frame.components
            if names and value.ndim >= 1 and len(value) == len(names):
                layers += [layer] * len(names)
                components += names
                values += value.tolist() if value.ndim == 1 else list(value)
            else:
                layers.append(layer)
                components.append(None)
                values.append(value.item() if value.ndim == 0 else value)
        sizes.append(len(layers) - before)
    columns: dict[str, Any] = {
        "topic": np.repeat(np.array([f.topic for _, f in frames], dtype=object), sizes),
        "layer": np.array(layers, dtype=object),
        "step": np.repeat(np.array([f.step for _, f in frames], dtype=np.int64), sizes),
        "epoch": np.repeat(np.array([f.epoch for _, f in frames], dtype=np.int64), sizes),
        "micro_step": np.repeat(np.array([f.micro_step for _, f in frames], dtype=np.int64), sizes),
    }
    if any(name is not None for name in components):
        columns["component"] = np.array(components, dtype=object)
    columns["value"] = _column(values)
    for key in dict.fromkeys(key for _, frame in frames for key in frame.meta):
        entries = [
            entry for (_, f), size in zip(frames, sizes, strict=True) for entry in [f.meta.get(key)] * size
        ]
        columns[key] = _column(entries, numbers=False)
    columns["run"] = np.repeat(np.array([run for run, _ in frames], dtype=np.int64), sizes)
    return pd.DataFrame(columns)


def _column(values: list[Any], *, numbers: bool = True) -> NDArray[Any]:
    if numbers and not any(isinstance(value, np.ndarray) for value in values):
        return np.array(values, dtype=np.float64)
    # Assigned one by one: NumPy would join arrays of equal shapes to one more dimension.
    column = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):
        column[i] = value
    return column

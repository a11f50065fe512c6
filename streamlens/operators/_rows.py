"""Frames of one topic, kept for a while and stacked over time."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from streamlens.frame import Frame
from streamlens.operators._base import (
    frame_from_state,
    frame_state,
    holds_kept_values,
    layers_of,
    own,
    widened,
)

__all__ = ["Rows", "reduce_rows"]


class Rows:
    """Kept frames of one topic in order of time, one a (step, micro-step).

    A frame that brings further layers of a step (several optimizers do) joins that step's row; a
    layer never replaces one that is there. Values of another shape start afresh.
    """

    def __init__(self) -> None:
        self._times: list[tuple[int, int]] = []
        self.frames: list[Frame] = []

    def __len__(self) -> int:
        return len(self.frames)

    def insert(self, frame: Frame) -> tuple[str, ...]:
        """Keep a frame; gives the layers that were there already, which are left out."""
        if self.frames and not holds_kept_values(frame, self.frames[-1]):
            self._times.clear()
            self.frames.clear()
        time = (frame.step, frame.micro_step)
        place = bisect_right(self._times, time)
        if not place or self._times[place - 1] != time:
            self._times.insert(place, time)
            self.frames.insert(place, own(frame))
            return ()
        there = self.frames[place - 1]
        known = frozenset(there.layers)
        new = tuple(name for name in frame.layers if name not in known)
        if new:
            self.frames[place - 1] = _joined(there, own(frame.select(new)))
        return tuple(name for name in frame.layers if name in known)

    def drop_before(self, step: int) -> None:
        """Let go of the frames of earlier steps."""
        place = bisect_right(self._times, (step, -1))
        if place:
            del self._times[:place]
            del self.frames[:place]

    def up_to(self, step: int) -> list[Frame]:
        """The frames of steps up to and including one."""
        return self.frames[: bisect_right(self._times, (step + 1, -1))]

    def state_dict(self) -> list[dict[str, Any]]:
        """The frames as plain containers and tensors."""
        return [frame_state(frame) for frame in self.frames]

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Put back what `state_dict` gave."""
        self.frames = []
        for state in states:
            frame = frame_from_state(state)
            if self.frames and self.frames[-1].layers == frame.layers:
                # One tuple for all, as it was: equal layers are told by identity.
                frame = frame.replace(layers=self.frames[-1].layers)
            self.frames.append(frame)
        self._times = [(frame.step, frame.micro_step) for frame in self.frames]


def _joined(a: Frame, b: Frame) -> Frame:
    values_a, values_b = a.values, b.values
    if isinstance(values_a, Tensor) and isinstance(values_b, Tensor):
        values: Tensor | tuple[Tensor, ...] = torch.cat([values_a, values_b.to(values_a.dtype)])
    else:
        values = (*values_a, *values_b)
    return a.replace(layers=(*a.layers, *b.layers), values=values)


def reduce_rows(
    rows: Sequence[Frame],
    reduce: Callable[[Tensor], Tensor],
    *,
    layers: tuple[str, ...] | None = None,
) -> tuple[tuple[str, ...], Tensor | tuple[Tensor, ...]]:
    """Reduce frames over time.

    Args:
        rows: Frames of one topic, oldest first; at least one.
        reduce: Takes values of shape [time, layers, ...], removes the first dimension; where a
            layer is missing its value is NaN.
        layers: The layers wanted; all that appear unless given.

    Returns:
        The layers, and their reduced values: stacked, or one tensor a layer if the frames are ragged.
    """
    newest = rows[-1]
    same = all(row.layers is newest.layers or row.layers == newest.layers for row in rows)
    wanted = layers
    if wanted is None:
        wanted = newest.layers if same else layers_of(rows)
    if newest.stacked:
        values = [widened(_tensor(row)) for row in rows]
        if same and wanted == newest.layers:
            return wanted, reduce(torch.stack(values))
        return wanted, reduce(_spread(rows, values, wanted))
    outputs: list[Tensor] = []
    for name in wanted:
        column = [widened(row[name]) if name in row.layers else None for row in rows]
        like = next(v for v in reversed(column) if v is not None)
        missing = torch.full_like(like, math.nan)
        outputs.append(reduce(torch.stack([missing if v is None else v for v in column]).unsqueeze(1))[0])
    return wanted, tuple(outputs)


def _spread(rows: Sequence[Frame], values: Sequence[Tensor], wanted: tuple[str, ...]) -> Tensor:
    place = {name: i for i, name in enumerate(wanted)}
    like = values[-1]
    out = like.new_full((len(rows), len(wanted), *like.shape[1:]), math.nan)
    index: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
    for time, (row, value) in enumerate(zip(rows, values, strict=True)):
        if row.layers not in index:
            pairs = [(place[name], i) for i, name in enumerate(row.layers) if name in place]
            both = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).to(like.device, non_blocking=True)
            index[row.layers] = (both[:, 0], both[:, 1])
        to, of = index[row.layers]
        out[time].index_copy_(0, to, value.to(like).index_select(0, of))
    return out


def _tensor(frame: Frame) -> Tensor:
    values = frame.values
    assert isinstance(values, Tensor)  # asked only of stacked frames
    return values

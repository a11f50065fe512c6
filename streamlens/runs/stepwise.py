"""A run read step by step: what a replay needs, in chunks of bounded size."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from streamlens.frame import Frame
from streamlens.runs.codec import Layout, decode_frame, frame_of
from streamlens.runs.reader import Run
from streamlens.runs.rows import Reading
from streamlens.runs.tidy import checked_row

__all__ = ["Stored", "first_step", "layouts_of", "stepwise"]

Stored: TypeAlias = tuple[Frame, float]
"""A frame, and when it was emitted, in seconds since 1970."""

_Row: TypeAlias = Sequence[Any]
_Read: TypeAlias = tuple[_Row, Tensor | None, str, Mapping[int, Layout]]
"""A row, its values where they are stacked, its topic and the topic's layouts."""

_MOST_ROWS: Final = 1024
_MOST_BYTES: Final = 16 << 20


def layouts_of(run: Run) -> dict[str, tuple[Layout, ...]]:
    """For each topic of a run, what its frames have in common."""
    with run.reading() as db:
        return {topic: tuple(layouts.values()) for topic, (_, layouts) in db.topics().items()}


def first_step(run: Run, topics: Collection[str]) -> tuple[int, int] | None:
    """The first step of some topics of a run, and its epoch; None while nothing is stored of them."""
    with run.reading() as db:
        numbers = [number for topic, (number, _) in db.topics().items() if topic in topics]
        first, last = db.steps(numbers)
        rows = [row for number in numbers for row in db.rows(number, first, first + 1)]
    return (first, min(row[3] for row in rows)) if first <= last else None


def stepwise(run: Run, topics: Iterable[str]) -> Iterator[Stored]:
    """Yield frames by step, and within a step in the order in which they were stored.

    Args:
        run: The run.
        topics: Which of its topics.

    Raises:
        RunStoreError: The file is damaged.
    """
    wanted = set(topics)
    with run.reading() as db:
        known = _known(db, wanted)
        first, last = db.steps(list(known))
    low, width = first, 1
    while known and low <= last:
        read: list[_Read] = []
        size = 0
        # A short read each: one long one would keep the log of a run that is being written from
        # being merged into the file.
        with run.reading() as db:
            for number in known:
                rows = db.rows(number, low, low + width)
                if not known[number][1].keys() >= {row[5] for row in rows}:
                    known = _known(db, wanted)
                topic, layouts = known[number]
                read += zip(rows, _values(rows, topic, layouts), repeat(topic), repeat(layouts))
                size += sum(layouts[row[5]].nbytes for row in rows)
        if len(known) > 1:
            read.sort(key=_order)
        yield from _frames(read)
        low += width
        if len(read) * 2 <= _MOST_ROWS and size * 2 <= _MOST_BYTES:
            width *= 2
        elif len(read) > _MOST_ROWS or size > _MOST_BYTES:
            width = max(width // 2, 1)


def _known(db: Reading, wanted: Collection[str]) -> dict[int, tuple[str, Mapping[int, Layout]]]:
    """The topics wanted, with their layouts, by their numbers."""
    return {n: (topic, layouts) for topic, (n, layouts) in db.topics().items() if topic in wanted}


def _order(read: _Read) -> tuple[int, int]:
    return read[0][0], read[0][2]


def _values(rows: Sequence[_Row], topic: str, layouts: Mapping[int, Layout]) -> Sequence[Tensor | None]:
    """The values of rows where they are stacked, those of one layout decoded together; else None.

    Raises:
        ValueError: A row is not what was written.
    """
    by_layout: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        checked_row(row, topic, layouts)
        by_layout.setdefault(row[5], []).append(place)
    values: list[Tensor | None] = [None] * len(rows)
    for which, places in by_layout.items():
        layout = layouts[which]
        if layout.stacked and layout.nbytes:
            together = _together(layout, [rows[place][7] for place in places])
            for place, value in zip(places, together, strict=True):
                values[place] = value
    return values


def _frames(read: Iterable[_Read]) -> Iterator[Stored]:
    """The frames of rows that were checked, each made when it is taken."""
    # A list of them would outlive the garbage collector's young generations, and be searched again and again.
    for row, value, topic, layouts in read:
        step, micro_step, _, epoch, wall_time, which, meta, data, _ = row
        if value is None:
            frame = decode_frame(layouts[which], topic, step, micro_step, epoch, meta, data)
        else:
            frame = frame_of(layouts[which], topic, step, micro_step, epoch, meta, value)
        yield frame, wall_time


def _together(layout: Layout, data: Sequence[bytes]) -> tuple[Tensor, ...]:
    """The stacked values of frames of one layout, each on its part of one memory."""
    ((name, shape),) = layout.tensors
    dtype: torch.dtype = getattr(torch, name)
    return torch.frombuffer(bytearray(b"".join(data)), dtype=dtype).reshape(len(data), *shape).unbind(0)

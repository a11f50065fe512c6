"""A run read step by step: what a replay needs, in chunks of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from streamlens.frame import Frame
from streamlens.runs.codec import Layout, decode_frame, frame_of
from streamlens.runs.reader import Run
from streamlens.runs.tidy import checked_row

__all__ = ["Stored", "first_step", "layouts_of", "stepwise"]

Stored: TypeAlias = tuple[Frame, float]
"""A frame, and when it was emitted, in seconds since 1970."""

_MOST_ROWS: Final = 2048
_MOST_BYTES: Final = 16 << 20


def layouts_of(run: Run) -> dict[str, tuple[Layout, ...]]:
    """For each topic of a run, what its frames have in common."""
    with run.reading() as db:
        return {topic: tuple(layouts.values()) for topic, (_, layouts) in db.topics().items()}


def first_step(run: Run) -> tuple[int, int] | None:
    """The first step of a run, and its epoch; None while nothing is stored."""
    with run.reading() as db:
        numbers = [number for number, _ in db.topics().values()]
        first, last = db.steps(numbers)
        rows = db.rows(numbers, first, first + 1) if first <= last else []
    return (first, min(row[4] for row in rows)) if rows else None


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
        known = {number: (topic, layouts) for topic, (number, layouts) in db.topics().items()}
        numbers = [number for number, (topic, _) in known.items() if topic in wanted]
        first, last = db.steps(numbers)
    low, width = first, 1
    while numbers and low <= last:
        # A short read each: one long one would keep the log of a run that is being written from
        # being merged into the file.
        with run.reading() as db:
            rows = db.rows(numbers, low, low + width)
            for number in {row[0] for row in rows}:
                topic, layouts = known[number]
                if any(row[6] not in layouts for row in rows if row[0] == number):
                    known[number] = (topic, db.topics()[topic][1])
            rows.sort(key=_order)
            frames = _decoded(rows, known)
        yield from frames
        low += width
        size = sum(len(row[8]) for row in rows)
        if len(rows) * 2 <= _MOST_ROWS and size * 2 <= _MOST_BYTES:
            width *= 2
        elif len(rows) > _MOST_ROWS or size > _MOST_BYTES:
            width = max(width // 2, 1)


def _order(row: Sequence[Any]) -> tuple[int, int]:
    return row[1], row[3]


def _decoded(
    rows: Sequence[Sequence[Any]], known: Mapping[int, tuple[str, Mapping[int, Layout]]]
) -> list[Stored]:
    """The frames of some rows; stacked ones of one layout are decoded together."""
    by_layout: dict[tuple[int, int], list[int]] = {}
    for place, row in enumerate(rows):
        topic, layouts = known[row[0]]
        checked_row(row[1:], topic, layouts)
        by_layout.setdefault((row[0], row[6]), []).append(place)
    out: list[Any] = [None] * len(rows)
    for (number, which), places in by_layout.items():
        topic, layouts = known[number]
        layout = layouts[which]
        together = _together(layout, [rows[place][8] for place in places]) if layout.stacked else None
        for i, place in enumerate(places):
            _, step, micro_step, _, epoch, wall_time, _, meta, data, _ = rows[place]
            if together is None:
                frame = decode_frame(layout, topic, step, micro_step, epoch, meta, data)
            else:
                frame = frame_of(layout, topic, step, micro_step, epoch, meta, together[i])
            out[place] = (frame, wall_time)
    return out


def _together(layout: Layout, data: Sequence[bytes]) -> tuple[Tensor, ...] | None:
    """The stacked values of frames of one layout, each on its part of one memory."""
    ((name, shape),) = layout.tensors
    if not layout.nbytes:
        return None
    dtype: torch.dtype = getattr(torch, name)
    return torch.frombuffer(bytearray(b"".join(data)), dtype=dtype).reshape(len(data), *shape).unbind(0)

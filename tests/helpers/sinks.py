"""Sinks as a delivery uses them, without a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from reactivex.subject import Subject

from streamlens.delivery import Delivery, SinkStats
from streamlens.frame import Frame
from streamlens.sink import RunInfo, Sink

RUN = RunInfo(id="f00d")


def written(sink: Sink, *frames: Frame, run: RunInfo = RUN) -> None:
    """Open a sink, write frames at the wall times 100, 101 and so on, and close it."""
    sink.open(run)
    sink.received = [100.0 + i for i in range(len(frames))]
    sink.write(frames)
    sink.flush()
    sink.close()


def norms(step: int, values: Sequence[float], **fields: Any) -> Frame:
    """A frame of a number a layer."""
    return Frame("norm", step, [f"layer{i}" for i in range(len(values))], torch.tensor(values), **fields)


class Connected:
    """A chain that ends in a sink, as a lens would connect it."""

    def __init__(self, sink: Sink, run: RunInfo = RUN) -> None:
        self.reports: list[str] = []
        self.delivery = Delivery(lambda: run, lambda error, where: self.reports.append(f"{where}: {error}"))
        self.sink = sink
        self.proxy = self.delivery.connect(sink, "chain")

    def send(self, *frames: Frame) -> bool:
        """Whether all frames were written and flushed."""
        for frame in frames:
            self.proxy.on_next(frame)
        self.delivery.end_burst()
        return self.sink.drain(10)

    def close(self) -> bool:
        """Whether everything was written, in the end."""
        return self.delivery.close(10)

    @property
    def stats(self) -> SinkStats:
        """The sink's counters."""
        (stats,) = self.delivery.stats().values()
        return stats


def reduced(frame: Frame, *operators: Any) -> Frame:
    """What a chain of operators makes of a frame."""
    source: Subject[Frame] = Subject()
    seen: list[Frame] = []
    source.pipe(*operators).subscribe(seen.append)
    source.on_next(frame)
    (found,) = seen
    return found

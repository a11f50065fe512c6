"""What handing a frame to a sink costs the training thread, frame by frame.

A step computes for about two milliseconds, as training does, and then hands frames of ten topics to
a sink's queue, 600 float32 values each, and ends the burst. Of each hand-over both are taken: the CPU
time of the thread, and the time that passed, in which the sink's own thread may have had Python's
lock. Reported are the median and the 99th percentile of single frames, of which the first of a step finds
the processor's caches full of the computation, and the 99th percentile over steps of a step's cost
divided by its frames, which is what a run pays.

Run it with `python -m benchmarks.delivery`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from streamlens.delivery import Delivery
from streamlens.frame import Frame
from streamlens.sink import RunInfo, Sink
from streamlens.sinks.run_store import RunStore

__all__ = ["hand_over"]

_LAYERS = 600
_TOPICS = tuple(f"topic {i}" for i in range(10))


class _Nothing(Sink):
    """A sink that takes everything and does nothing."""

    def write(self, frames: Sequence[Frame]) -> None:
        """Do nothing."""


def hand_over(steps: int = 1500) -> dict[str, float]:
    """Hand frames over to a sink that does nothing, and to a run store.

    Args:
        steps: How many, each with ten frames.

    Returns:
        Microseconds a frame, in CPU time and as it passed.
    """
    layers = tuple(f"blocks.{i}.weight" for i in range(_LAYERS))
    values = torch.randn(_LAYERS)
    work = torch.randn(384, 384)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, sink in (("nothing", _Nothing()), ("RunStore", RunStore(Path(folder) / "run.db"))):
            delivery = Delivery(lambda: RunInfo("benchmark"), _fail)
            proxy = delivery.connect(sink, "chain")
            times: list[tuple[int, int]] = []
            for step in range(steps):
                work @ work
                for topic in _TOPICS:
                    frame = Frame(topic, step, layers, values)
                    begin, cpu_begin = time.perf_counter_ns(), time.thread_time_ns()
                    proxy.on_next(frame)
                    if topic == _TOPICS[-1]:
                        delivery.end_burst()
                    times.append((time.thread_time_ns() - cpu_begin, time.perf_counter_ns() - begin))
            cpu, passed = np.array(times).T
            frames = len(times)
            if not delivery.close(60) or delivery.stats()[type(sink).__name__].written != frames:
                raise RuntimeError(f"{name} lost frames: {delivery.stats()}")
            for kind, taken in (("CPU", cpu), ("passed", passed)):
                by_step = taken.reshape(steps, len(_TOPICS)).mean(axis=1)
                for row, value in (
                    ("median", np.median(taken)),
                    ("99%", np.percentile(taken, 99)),
                    ("99% of steps", np.percentile(by_step, 99)),
                ):
                    found[f"{name}, {kind}, {row}"] = float(value) / 1e3
    return found


def _fail(error: Exception, where: str) -> None:
    raise error


if __name__ == "__main__":
    for name, microseconds in hand_over().items():
        print(f"{name:32} {microseconds:8.1f} us")

"""Runs in processes of their own, in order to kill them or to weigh them.

`python -m tests.harmless_scripts NAME ARGUMENTS...`
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import streamlens as sl
from streamlens.frame import Frame
from streamlens.sink import Sink
from tests._runs import small_model, steps_of
from tests.helpers.shipped import NAMES, Chain, chains_of


class Stalled(Sink):
    """Hangs in its first write until it is let go."""

    capacity = 200

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.steps: list[int] = []

    def write(self, frames: Sequence[Frame]) -> None:
        self.let_go.wait()
        self.steps += [frame.step for frame in frames]


def resident() -> int:
    """Bytes of memory that the process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def trained_until_killed(path: str) -> None:
    """Train into a run store for ever; says on stdout what happened when.

    `step <k> <time>` after each update, `safe <k>` after a flush that was acknowledged.
    """
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    lens = sl.observe(model)
    lens.pipe(sl.norm("weights")).subscribe(sl.sinks.RunStore(path))
    for step, _ in enumerate(steps_of(model, optimizer, 10**9)):
        os.write(1, f"step {step} {time.time()}\n".encode())
        if step % 97 == 96 and lens.flush(30):
            os.write(1, f"safe {step} 0\n".encode())


def stalled(steps: int) -> dict[str, Any]:
    """A sink that hangs for a whole run, beside one that works."""
    model = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sink = Stalled()
    lens = sl.observe(model)
    lens.pipe(sl.topic("weights")).subscribe(sink)
    queued, balanced, sizes = 0, True, []
    for step, _ in enumerate(steps_of(model, optimizer, steps)):
        if step % max(1, steps // 100) == 0:
            counts = lens.engine.sink_stats()["Stalled"]
            queued = max(queued, counts.queued)
            balanced &= counts.emitted == step + 1 == counts.written + counts.dropped + counts.queued
            sizes.append(resident())
    sink.let_go.set()
    flushed = lens.close(30)
    counts = lens.engine.sink_stats()["Stalled"]
    return {
        "queued": queued,
        "capacity": Stalled.capacity,
        "balanced": balanced,
        "flushed": flushed,
        "emitted": counts.emitted,
        "written": counts.written,
        "dropped": counts.dropped,
        "left": counts.queued,
        "received": sink.steps,
        "resident": sizes,
    }


class Discards(Sink):
    """Takes what comes and keeps nothing."""

    capacity = 10**6

    def write(self, frames: Sequence[Frame]) -> None:
        pass


def cadence(lens: sl.Lens, chain: Chain, steps: int) -> int:
    """How often a chain is due: in a long run, one that takes every raw topic only each fiftieth step."""
    front = lens.pipe(chain[0])
    return 50 if steps >= 1000 and isinstance(front, sl.Lens) and len(front.view.topics) > 5 else 1


def everything(steps: int) -> dict[str, Any]:
    """Every shipped operator and a sink, for many steps; what remains, meanwhile and after.

    It says on stderr how far it is, ten times.
    """
    others = set(threading.enumerate())
    model = small_model()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    lens = sl.observe(model, loss=criterion)
    failures: list[str] = []
    lens.errors.subscribe(lambda report: failures.append(str(report)) if len(failures) < 10 else None)
    sink = Discards()
    for name in NAMES:
        for chain in chains_of(name, lens, inputs=4, every=max(10, steps // 100)):
            stream = lens.pipe(sl.every(cadence(lens, chain, steps)), *chain)
            stream.subscribe(lambda frame: None)
    for topic in ("weights", "activations", "loss"):
        lens.pipe(sl.topic(topic)).subscribe(sink)
    data = torch.Generator().manual_seed(0)
    sizes: list[int] = []
    objects: list[int] = []
    began = time.monotonic()
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(6, 4, generator=data)
        # In two parts: some operators compare the gradients of micro-steps.
        for part in x.split(3):
            criterion(model(part), torch.randint(0, 3, (3,), generator=data)).backward()
        optimizer.step()
        if step % 50 == 49:
            lens.epoch_finished()
        if (step + 1) % (steps // 10) == 0:
            gc.collect()
            lens.flush(30)
            sizes.append(resident())
            objects.append(len(gc.get_objects()))
            seconds = time.monotonic() - began
            print(
                f"step {step + 1}, {seconds:.0f} s: {sizes[-1] / 2**20:.1f} MiB, {objects[-1]} objects",
                file=sys.stderr,
                flush=True,
            )
    lens.close(30)
    found = [weakref.ref(o) for o in (model, optimizer, criterion, *model.parameters(), sink)]
    del model, optimizer, criterion, sink, stream, chain
    gc.collect()
    return {
        "resident": sizes,
        "objects": objects,
        "failures": failures,
        "alive": [str(type(o)) for reference in found if (o := reference()) is not None],
        "threads": [t.name for t in threading.enumerate() if t not in others],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, argument = sys.argv[1:]
    if name == "trained_until_killed":
        trained_until_killed(argument)
    else:
        print(json.dumps({"stalled": stalled, "everything": everything}[name](int(argument))))

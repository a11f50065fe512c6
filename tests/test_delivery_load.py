"""Delivery under load: many frames through good and bad sinks at once, and what is in their way in mid-run.

Nothing is lost at a healthy sink, what is lost at others is counted and said once, and training goes on.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import streamlens as sl
from streamlens.delivery import Delivery, SinkStats
from streamlens.frame import Frame
from streamlens.runs import read_run
from streamlens.sink import RunInfo, Sink
from streamlens.sinks import CSV, JSONLines, Parquet, RunStore, TensorBoard
from tests._runs import small_model

NOBODY = 65534


class Counting(Sink):
    """Knows how many frames it was given, and whether they came in order and once."""

    max_latency = 0.02

    def __init__(self) -> None:
        self.count = 0
        self.in_order = True

    def write(self, frames: Sequence[Frame]) -> None:
        for frame in frames:
            self.in_order = self.in_order and frame.step == self.count
            self.count += 1


class Slow(Counting):
    """Takes 20 ms a write."""

    def write(self, frames: Sequence[Frame]) -> None:
        time.sleep(0.02)
        self.count += len(frames)


class Failing(Counting):
    """Takes every third write only."""

    retries = 1

    def write(self, frames: Sequence[Frame]) -> None:
        self.count += 1
        if self.count % 6:
            raise OSError("no")


class Hanging(Counting):
    """Never comes back from a write, until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()

    def write(self, frames: Sequence[Frame]) -> None:
        self.let_go.wait(600)
        self.count += len(frames)


def resident() -> int:
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def balanced(stats: SinkStats) -> bool:
    return stats.emitted == stats.written + stats.dropped + stats.queued


@pytest.mark.parametrize(
    ("count", "capacity"),
    [
        pytest.param(4_000, 500, id="some"),
        pytest.param(1_000_000, 10_000, id="a million", marks=pytest.mark.soak),
    ],
)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_healthy_sink_loses_nothing_beside_slow_failing_and_hanging_ones(count: int, capacity: int) -> None:
    sinks: dict[str, Counting] = {s.__name__: s() for s in (Counting, Slow, Failing, Hanging)}
    errors: list[str] = []
    delivery = Delivery(lambda: RunInfo("load"), lambda error, where: errors.append(where))
    proxies = []
    for sink in sinks.values():
        sink.capacity = capacity
        proxies.append(delivery.connect(sink, "chain"))
    layers = ("a", "b", "c")
    values = torch.zeros(3)
    most, before, grown = 0, 0, 0
    for step in range(count):
        frame = Frame("norm", step, layers, values)
        for proxy in proxies:
            proxy.on_next(frame)
        delivery.end_burst()
        if step % (capacity // 5) == 0:
            # Training takes longer than a frame: what a healthy sink gets is done meanwhile.
            assert proxies[0]._channel.await_flush(proxies[0]._channel.ask_flush(), 60)
            found = delivery.stats().values()
            assert all(map(balanced, found))
            most = max(most, *(stats.queued for stats in found))
            if step > count // 4:
                before = before or resident()
                grown = max(grown, resident() - before)
    begin = time.monotonic()
    assert not delivery.close(1)
    assert time.monotonic() - begin < 10
    hanging = sinks["Hanging"]
    assert isinstance(hanging, Hanging)
    hanging.let_go.set()
    assert until(lambda: not any(stats.queued for stats in delivery.stats().values()))
    stats = delivery.stats()
    assert all(map(balanced, stats.values()))
    assert {found.emitted for found in stats.values()} == {count}
    healthy = stats["Counting"]
    assert (healthy.written, healthy.dropped) == (count, 0)
    assert (sinks["Counting"].count, sinks["Counting"].in_order) == (count, True)
    assert stats["Slow"].written == sinks["Slow"].count
    assert stats["Hanging"].written == hanging.count <= capacity
    assert stats["Failing"].failed > 0
    assert {"sink Failing", "sink Hanging"} <= set(errors) <= {"sink Failing", "sink Hanging", "sink Slow"}
    # A queue holds what may wait, and frames of three numbers are small.
    assert most <= capacity
    assert grown < 64 << 20


def until(condition: Callable[[], bool], timeout: float = 30.0) -> bool:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


class LateStore(RunStore):
    """A run store that is subscribed in the middle of it all."""

    retries = 0
    max_latency = 0.01


# -- what gets in the way while a run is recorded ----------------------------------------------------


class Training:
    """A run that is recorded by every kind of file sink, and by one that cannot fail."""

    def __init__(self, folder: Path) -> None:
        self.sinks: dict[str, Sink] = {
            "RunStore": RunStore(folder / "run.db"),
            "CSV": CSV(folder / "run.csv"),
            "JSONLines": JSONLines(folder / "run.jsonl"),
            "Parquet": Parquet(folder / "run.parquet"),
            "TensorBoard": TensorBoard(folder / "events"),
            "Counting": Counting(),
        }
        torch.manual_seed(0)
        self.model = small_model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.lens = sl.observe(self.model)
        self.steps = 0
        for sink in self.sinks.values():
            sink.retries = 0
            sink.max_latency = 0.01
            self.lens.pipe(sl.norm("weights")).subscribe(sink)

    def train(self, steps: int) -> None:
        """Train; sinks write every five steps."""
        for _ in range(steps):
            step(self.model, self.optimizer)
            self.steps += 1
            if self.steps % 5 == 0:
                self.lens.flush(20)

    def stats(self) -> dict[str, SinkStats]:
        found: dict[str, SinkStats] = self.lens.engine.sink_stats()
        return found


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(4, 4)).square().sum().backward()
    optimizer.step()


def trained_alone(steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        step(model, optimizer)
    return model.state_dict()


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """No file grows any more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Every file is at its end already: the log of SQLite by its own size, others by theirs.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def without_permission(folder: Path) -> Iterator[None]:
    """Nothing in the folder can be opened any more; what is open stays so."""
    everybody = folder.stat().st_mode
    root = os.geteuid() == 0
    folder.chmod(0)
    if root:  # whom no permission holds up
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(everybody)


def numbers_of(folder: Path) -> dict[str, set[int]]:
    """The steps that each file holds."""
    with read_run(folder / "run.db") as run:
        stored = {frame.step for frame in run.frames()}
    parquet = pd.read_parquet(folder / "run.parquet")
    return {
        "RunStore": stored,
        "CSV": set(pd.read_csv(folder / "run.csv")["step"]),
        "JSONLines": {json.loads(line)["step"] for line in (folder / "run.jsonl").read_text().splitlines()},
        "Parquet": set(parquet["step"]),
    }


@pytest.mark.parametrize("trouble", [full_disk, without_permission])
def test_training_goes_on_through_trouble_and_what_was_lost_is_counted_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, trouble: Callable[[Path], Any]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    run = Training(folder)
    run.train(20)
    late = LateStore(folder / "late.db")
    run.lens.pipe(sl.norm("weights")).subscribe(late)
    with trouble(folder):
        run.train(20)
    run.train(20)
    before = run.stats()
    run.lens.close(20)
    assert all(torch.equal(value, run.model.state_dict()[name]) for name, value in trained_alone(60).items())
    assert before["Counting"].written == 60
    held = numbers_of(folder)
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    lossy = set()
    for name, stats in run.stats().items():
        assert stats.emitted == (40 if name == "LateStore" else 60)
        assert balanced(stats)
        assert stats.queued == 0
        assert stats.dropped == stats.failed
        if name in held:
            # What is counted as written is there, what came before and after the trouble in any case.
            assert len(held[name]) == stats.written
            assert held[name] >= {*range(20), *range(45, 60)}
        lost = [line for line in said if line.startswith(f"sink {name} lost ")]
        assert len(lost) == (stats.dropped > 0), said
        if stats.dropped:
            lossy.add(name)
            assert f"lost {stats.dropped} frames: {stats.failed} in writes that failed" in lost[0]
            # And the cause, once while it goes on.
            assert len([line for line in said if line.startswith(f"sink {name} failed")]) <= 2
    # An open file needs no permission, and Parquet holds what it cannot write until it can.
    full = {"RunStore", "CSV", "JSONLines", "TensorBoard", "LateStore"}
    assert lossy == (full if trouble is full_disk else {"LateStore"})
    with read_run(late.path) as stored:
        assert [frame.step for frame in stored.frames()] == list(range(40, 60))


@pytest.mark.parametrize("what", ["the folder", "its files"])
def test_files_that_are_removed_are_begun_anew_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    run = Training(folder)
    run.train(20)
    if what == "the folder":
        shutil.rmtree(folder)
    else:
        for path in folder.rglob("*"):
            if path.is_file():
                path.unlink()
    run.train(20)
    assert run.lens.close(20)
    assert all(torch.equal(value, run.model.state_dict()[name]) for name, value in trained_alone(40).items())
    # Parquet still has the file that it had not finished.
    newer = set(range(20, 40))
    assert numbers_of(folder) == dict.fromkeys(("RunStore", "CSV", "JSONLines"), newer) | {
        "Parquet": set(range(40))
    }
    events = EventAccumulator(str(folder / "events")).Reload()
    assert {event.step for event in events.Scalars("weights.norm2/0")} == newer
    assert all(stats.written == stats.emitted == 40 for stats in run.stats().values())
    said = [record.getMessage() for record in caplog.records]
    # With its folder Parquet's is gone, and without a file in it that is no loss.
    assert len(said) == (5 if what == "the folder" else 4)
    assert all("was removed while a run wrote it: a new file has what comes" in line for line in said)


def test_a_folder_that_is_moved_takes_the_open_files_along(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    run = Training(folder)
    run.train(10)
    folder.rename(tmp_path / "elsewhere")
    run.train(10)
    run.lens.close(20)
    with read_run(tmp_path / "elsewhere" / "run.db") as stored:
        assert [frame.step for frame in stored.frames()] == list(range(20))
    assert set(pd.read_csv(tmp_path / "elsewhere" / "run.csv")["step"]) == set(range(20))

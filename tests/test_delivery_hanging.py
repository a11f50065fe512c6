"""A sink that hangs, in whichever of its methods: nobody waits for it, and its queue stays bounded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

import streamlens as sl
from streamlens.chain import ErrorReport
from streamlens.delivery import Delivery
from streamlens.frame import Frame
from streamlens.sink import RunInfo, Sink
from tests._runs import small_model, steps_of

METHODS = ["open", "write", "flush", "close"]


class Hanging(Sink):
    """Hangs in one of its methods until it is let go."""

    max_latency = 0.01
    retries = 0

    def __init__(self, method: str) -> None:
        self.method = method
        self.entered = threading.Event()
        self.let_go = threading.Event()
        self.steps: list[int] = []

    def _at(self, method: str) -> None:
        if method == self.method:
            self.entered.set()
            self.let_go.wait(20)

    def open(self, run: RunInfo) -> None:
        self._at("open")

    def write(self, frames: Sequence[Frame]) -> None:
        self._at("write")
        self.steps += [frame.step for frame in frames]

    def flush(self) -> None:
        self._at("flush")

    def close(self) -> None:
        self._at("close")


class Healthy(Hanging):
    """Hangs nowhere."""

    def __init__(self) -> None:
        super().__init__("nowhere")


Make = Callable[[str], Hanging]


@pytest.fixture
def hanging() -> Iterator[Make]:
    made: list[Hanging] = []

    def make(method: str) -> Hanging:
        made.append(Hanging(method))
        return made[-1]

    yield make
    for sink in made:
        sink.let_go.set()
    for thread in threading.enumerate():
        if thread.name == "streamlens-sink-Hanging":
            thread.join(5)


@pytest.mark.parametrize("method", METHODS)
def test_close_returns_in_time_wherever_a_sink_hangs_and_the_others_have_everything(
    hanging: Make, method: str
) -> None:
    model = small_model()
    sink, healthy = hanging(method), Healthy()
    reports: list[ErrorReport] = []
    lens = sl.observe(model)
    lens.errors.subscribe(reports.append)
    for end in (sink, healthy):
        lens.pipe(sl.norm("weights")).subscribe(end)
    list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 5))
    began = time.monotonic()
    assert not lens.close(timeout=0.3)
    assert time.monotonic() - began < 3
    assert sink.entered.is_set()
    assert healthy.steps == list(range(5))
    (report,) = reports
    assert "Hanging did not finish in time" in str(report)
    assert "close(timeout=...)" in str(report)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", METHODS[:3])
def test_training_and_a_flush_with_a_timeout_go_on_wherever_a_sink_hangs(hanging: Make, method: str) -> None:
    model = small_model()
    sink = hanging(method)
    sink.capacity = 4
    with sl.observe(model) as lens:
        lens.pipe(sl.norm("weights")).subscribe(sink)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        list(steps_of(model, optimizer, 2))
        assert not lens.flush(timeout=0.1)
        assert sink.entered.is_set()
        list(steps_of(model, optimizer, 20))
        counts = lens.engine.sink_stats()["Hanging"]
        assert counts.queued <= 4
        assert counts.emitted == 22 == counts.written + counts.dropped + counts.queued
        sink.let_go.set()
        assert lens.flush(timeout=5)
    assert sink.steps[-1] == 21
    assert sink.steps == sorted(set(sink.steps))


def test_the_leaving_of_a_with_block_does_not_wait_for_ever(
    hanging: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It closes with a timeout: seen by the one that it passes on."""
    model = small_model()
    timeouts: list[float | None] = []
    close = sl.Lens.close

    def noting(self: sl.Lens, timeout: float | None = None) -> bool:
        timeouts.append(timeout)
        return close(self, 0.1)

    monkeypatch.setattr(sl.Lens, "close", noting)
    with sl.observe(model) as lens:
        lens.pipe(sl.norm("weights")).subscribe(hanging("write"))
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 1))
    assert timeouts == [30.0]


@pytest.mark.parametrize("capacity", [1, 2, 3, 10, 11])
def test_what_a_hanging_write_holds_counts_towards_the_queue(hanging: Make, capacity: int) -> None:
    """Many frames wait when the write begins, which takes half of what may wait at most."""
    sink = hanging("write")
    sink.capacity, sink.max_latency = capacity, 60.0
    delivery = Delivery(lambda: RunInfo("id"), lambda error, where: None)
    proxy = delivery.connect(sink, "chain")
    most = 0
    for step in range(60):
        proxy.on_next(Frame("norm", step, ("a",), torch.ones(1)))
        if step == 2 * capacity:
            assert sink.entered.wait(5)
        most = max(most, delivery.stats()["Hanging"].queued)
    # One frame may always wait beside the one that is being written.
    assert most == max(capacity, 2)
    sink.let_go.set()
    assert delivery.close(5)
    assert sink.steps[-1] == 59


def test_what_a_hanging_write_holds_counts_towards_the_bytes(hanging: Make) -> None:
    sink = hanging("write")
    sink.max_bytes, sink.max_latency = 100_000, 60.0
    delivery = Delivery(lambda: RunInfo("id"), lambda error, where: None)
    proxy = delivery.connect(sink, "chain")
    for step in range(100):
        proxy.on_next(Frame("weights", step, ("a",), torch.ones(1, 1000)))
        if step == 60:
            assert sink.entered.wait(5)
    assert delivery.stats()["Hanging"].queued == 25, "of 4,000 bytes each"
    proxy.on_next(Frame("weights", 100, ("a",), torch.ones(1, 100_000)))
    sink.let_go.set()
    assert delivery.close(5)
    assert sink.steps[-1] == 100, "a frame larger than all of it comes through alone"


def test_a_slow_sink_loses_nothing_that_fits(hanging: Make) -> None:
    """Frames that come while a write is under way find the other half free."""
    sink = hanging("write")
    sink.capacity, sink.max_latency = 10, 60.0
    delivery = Delivery(lambda: RunInfo("id"), lambda error, where: None)
    proxy = delivery.connect(sink, "chain")
    for step in range(6):
        proxy.on_next(Frame("norm", step, ("a",), torch.ones(1)))
    assert sink.entered.wait(5)
    for step in range(6, 10):
        proxy.on_next(Frame("norm", step, ("a",), torch.ones(1)))
    sink.let_go.set()
    assert delivery.close(5)
    assert sink.steps == list(range(10))
    assert delivery.stats()["Hanging"].dropped == 0


def test_a_second_lens_of_the_model_works_while_a_sink_of_the_first_still_hangs(hanging: Make) -> None:
    model = small_model()
    sink = hanging("close")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = sl.observe(model)
    first.pipe(sl.norm("weights")).subscribe(sink)
    list(steps_of(model, optimizer, 2))
    assert not first.close(timeout=0.1)
    healthy = Healthy()
    with sl.observe(model) as second:
        second.pipe(sl.norm("weights")).subscribe(healthy)
        list(steps_of(model, optimizer, 2))
    assert healthy.steps == [2, 3]

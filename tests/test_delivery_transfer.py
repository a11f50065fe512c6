"""One transfer a burst, without waiting on the thread that trains.

There is no accelerator here: tensors in host memory stand in for its own, and the calls to CUDA
are recorded.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from streamlens.delivery import core, transfer
from streamlens.delivery.core import Delivery
from streamlens.frame import Frame
from streamlens.sink import RunInfo
from tests.test_delivery import Recorder


class Device:
    """Records what would be asked of CUDA."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.copies: list[int] = []


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()

    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking

        def record(self, stream: Any) -> None:
            device.calls.append("record")

        def synchronize(self) -> None:
            device.calls.append("synchronize")

    empty = torch.empty

    def page_locked(shape: torch.Size, *, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        assert pin_memory
        device.copies.append(shape.numel())
        return empty(shape, dtype=dtype)

    @contextlib.contextmanager
    def stream(_: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(transfer, "_gathers", lambda value: value.layout == torch.strided)
    monkeypatch.setattr(core, "on_host", lambda frame: False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch, "empty", page_locked)
    original = transfer.Burst.__init__

    def with_stream(self: transfer.Burst) -> None:
        original(self)
        self._streams[torch.device("cpu")] = "stream"

    monkeypatch.setattr(transfer.Burst, "__init__", with_stream)
    return device


@pytest.fixture
def delivery() -> Iterator[Delivery]:
    errors: list[Exception] = []
    delivery = Delivery(lambda: RunInfo("id"), lambda error, where: errors.append(error))
    yield delivery
    assert delivery.close(5)
    assert errors == []


def frames(step: int) -> list[Frame]:
    """Stacked, ragged, of several types, with empty and scalar values."""
    generator = torch.Generator().manual_seed(step)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    return [
        Frame("norm", step, ("a", "b"), rand(2)),
        Frame("quantiles", step, ("a", "b", "c"), rand(3, 5)),
        Frame("raw", step, ("a", "b", "c"), (rand(2, 3), rand(), rand(0))),
        Frame("half", step, ("a",), rand(1, 4).to(torch.bfloat16)),
        Frame("count", step, ("a",), torch.tensor([step])),
        Frame("sliced", step, ("a",), rand(1, 4, 4).transpose(1, 2)),
    ]


def equal(a: Frame, b: Frame) -> bool:
    if (a.topic, a.step, a.layers) != (b.topic, b.step, b.layers):
        return False
    pairs = zip(a.values, b.values, strict=True)
    return all(x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


def test_a_burst_is_one_copy_a_type_for_all_sinks_and_every_value_arrives(
    device: Device, delivery: Delivery
) -> None:
    sinks = [Recorder(), Recorder()]
    proxies = [delivery.connect(sink, "chain") for sink in sinks]
    expected = []
    for step in range(2):
        for each in frames(step):
            expected.append(each)
            for proxy in proxies:
                proxy.on_next(each)
        delivery.end_burst()
    assert device.copies == [2 + 15 + 7 + 16, 4, 1] * 2
    assert delivery.flush(5)
    for sink in sinks:
        assert all(equal(got, want) for got, want in zip(sink.frames, expected, strict=True))


def test_the_training_thread_never_waits_and_workers_wait_for_the_copy(
    device: Device, delivery: Delivery
) -> None:
    sink = Recorder()
    sink.max_latency = 60.0
    delivery.connect(sink, "chain").on_next(frames(0)[0])
    delivery.end_burst()
    assert device.calls == ["record"]
    assert delivery.flush(5)
    assert device.calls == ["record", "synchronize"]


def test_frames_wait_for_the_end_of_their_burst(device: Device, delivery: Delivery) -> None:
    sink = Recorder()
    sink.max_latency = 0.1
    proxy = delivery.connect(sink, "chain")
    proxy.on_next(frames(0)[0])
    proxy.on_next(frames(0)[1])
    assert device.copies == []
    delivery.end_burst()
    assert device.copies == [17]


def test_without_the_end_of_a_burst_frames_arrive_all_the_same(device: Device, delivery: Delivery) -> None:
    sink = Recorder()
    proxy = delivery.connect(sink, "chain")
    for step in range(3):
        proxy.on_next(frames(step)[0])
        deadline = time.monotonic() + 5
        while len(sink.frames) <= step and time.monotonic() < deadline:
            time.sleep(0.002)
    assert sink.steps == [0, 1, 2]


def test_a_burst_larger_than_the_queue_is_written(device: Device, delivery: Delivery) -> None:
    sink = Recorder()
    sink.capacity, sink.max_latency = 2, 60.0
    proxy = delivery.connect(sink, "chain")
    for step in range(20):
        proxy.on_next(frames(step)[0])
    assert delivery.flush(5)
    assert sink.steps == list(range(20))


def test_kept_values_do_not_hold_on_to_the_rest_of_their_burst(device: Device, delivery: Delivery) -> None:
    sink = Recorder()
    proxy = delivery.connect(sink, "chain")
    for each in frames(0):
        proxy.on_next(each)
    assert delivery.flush(5)
    for got in sink.frames:
        for value in got.values if isinstance(got.values, tuple) else (got.values,):
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_sparse_values_are_fetched_by_the_worker(device: Device, delivery: Delivery) -> None:
    sink = Recorder()
    sparse = torch.eye(3).to_sparse()
    delivery.connect(sink, "chain").on_next(Frame("weights", 0, ("a",), (sparse,)))
    assert delivery.flush(5)
    assert torch.equal(sink.frames[0]["a"].to_dense(), torch.eye(3))

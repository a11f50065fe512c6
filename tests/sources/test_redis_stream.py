"""Frames through a real Redis server: what processes write comes back, bit for bit, once."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reactivex import operators as rx

import streamlens as sl
from streamlens.frame import Frame, Kind
from streamlens.runs.messages import Packer, layout_of, unpack
from streamlens.sink import RunInfo
from streamlens.sinks.redis_stream import RedisStream
from streamlens.sources import RedisFrames, redis
from tests.helpers.redis_server import RedisServer, needs_redis
from tests.helpers.sinks import Connected, norms, written

FRAMES = [
    norms(0, [1.0, float("nan"), float("inf")], epoch=2),
    Frame(
        "loss",
        1,
        ("",),
        torch.tensor([[0.5, 1.5]]),
        micro_step=3,
        components=("a", "b"),
        kind=Kind.MICRO_STEP,
    ),
    Frame("weights", 1, ("a", "b"), (torch.rand(2, 3, dtype=torch.float64), torch.ones(0)), source="G"),
    Frame(
        "half", 1, ("a",), torch.tensor([1.5], dtype=torch.bfloat16), kind=Kind.EVENT, meta={"text": "oh ☹"}
    ),
    Frame("empty", 2, (), torch.empty(0, 4)),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def stream(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


def read(source: RedisFrames) -> list[Frame]:
    """All frames of a stream that comes to an end."""
    found: list[Frame] = []
    failures: list[Exception] = []
    done = threading.Event()

    def fail(error: Exception) -> None:
        failures.append(error)
        done.set()

    source.subscribe(found.append, fail, done.set)
    assert done.wait(30)
    if failures:
        raise failures[0]
    return found


def same(one: Frame, other: Frame) -> bool:
    def bits(frame: Frame) -> list[tuple[Any, ...]]:
        return [
            (v.dtype, tuple(v.shape), v.contiguous().view(-1).view(torch.uint8).tolist())
            for v in frame.values
        ]

    fields = ("topic", "step", "epoch", "micro_step", "layers", "components", "kind", "source", "stacked")
    return (
        all(getattr(one, field) == getattr(other, field) for field in fields)
        and dict(one.meta) == dict(other.meta)
        and bits(one) == bits(other)
    )


def test_a_message_gives_its_frame_back_bit_for_bit() -> None:
    packer = Packer()
    for frame in FRAMES:
        message = packer.pack(frame)
        layout = layout_of(packer.layouts[message.layout])
        assert same(unpack(layout, message.head, message.data), frame)


def test_frames_of_a_metric_share_a_layout_that_every_process_names_alike() -> None:
    one, other = Packer(), Packer()
    names = {one.pack(norms(step, [1.0, 2.0])).layout for step in range(3)}
    assert names == set(one.layouts) == {other.pack(norms(9, [3.0, 4.0])).layout}


@pytest.mark.parametrize("damage", ["[]", "nonsense", '["zzz", "", "[]", "[]", 1, "[\\"float32\\", []]"]'])
def test_what_is_no_layout_is_an_error(damage: str) -> None:
    with pytest.raises(sl.StreamlensError, match="is no layout of frames"):
        layout_of(damage)


def test_a_message_of_another_length_is_an_error() -> None:
    packer = Packer()
    message = packer.pack(norms(0, [1.0]))
    with pytest.raises(sl.StreamlensError, match="a message is damaged: 3 bytes where 4 belong"):
        unpack(layout_of(packer.layouts[message.layout]), message.head, message.data[:3])


@needs_redis
def test_a_run_comes_back_as_its_sink_was_given_it(server: RedisServer, stream: str) -> None:
    written(RedisStream(server.url, stream), *FRAMES)
    found = read(redis(server.url, stream, run="f00d", ends=1))
    assert len(found) == len(FRAMES)
    assert all(map(same, found, FRAMES))


@needs_redis
def test_runs_together_are_labelled_and_kept_apart(server: RedisServer, stream: str) -> None:
    for name, run_id, factor in (("left", "0" * 32, 1.0), ("", "123456789abc", 10.0)):
        frames = [norms(step, [factor * step]) for step in range(5)]
        written(RedisStream(server.url, stream), *frames, run=RunInfo(id=run_id, name=name))
    smoothed = read(redis(server.url, stream, ends=2).pipe(sl.ema(0.5)))  # type: ignore[arg-type]
    last = {frame.source: frame["layer0"].item() for frame in smoothed}
    assert set(last) == {"left", "12345678"}
    assert last["12345678"] == pytest.approx(10 * last["left"])


WRITER = """
import sys, torch, streamlens as sl
url, stream, name = sys.argv[1:]
torch.manual_seed(len(name))
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
with sl.observe(model, name=name) as lens:
    lens.pipe(sl.norm("weights")).subscribe(sl.sinks.RedisStream(url, stream))
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
"""


@needs_redis
def test_two_processes_write_and_one_reads_along(server: RedisServer, stream: str) -> None:
    found: list[Frame] = []
    done = threading.Event()
    redis(server.url, stream, ends=2).subscribe(found.append, on_completed=done.set)
    command = [sys.executable, "-c", WRITER, server.url, stream]
    writers = [subprocess.Popen([*command, name]) for name in ("one", "three")]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    assert done.wait(30)
    for name in ("one", "three"):
        steps = [frame.step for frame in found if frame.topic == f"{name}/weights.norm2"]
        assert steps == list(range(20))


@needs_redis
def test_a_reader_goes_on_where_another_stopped(server: RedisServer, stream: str) -> None:
    written(RedisStream(server.url, stream), *[norms(step, [0.0]) for step in range(10)])
    first = redis(server.url, stream)
    seen: list[int] = []
    enough = threading.Event()
    first.pipe(rx.take(4)).subscribe(lambda frame: seen.append(frame.step), on_completed=enough.set)
    assert enough.wait(30)
    assert seen == [0, 1, 2, 3]
    rest = read(redis(server.url, stream, start=first.position, ends=1))
    assert seen + [frame.step for frame in rest] in (list(range(10)), [0, 1, 2, 3, *range(3, 10)])


@needs_redis
def test_only_what_is_new_where_that_is_asked_for(server: RedisServer, stream: str) -> None:
    sink = RedisStream(server.url, stream)
    sink.open(RunInfo(id="f00d"))
    sink.write([norms(0, [0.0])])
    found: list[int] = []
    done = threading.Event()
    source = redis(server.url, stream, start="$", ends=1)
    source.subscribe(lambda frame: found.append(frame.step), on_completed=done.set)
    deadline = time.monotonic() + 20
    while source.position == "$" and time.monotonic() < deadline:
        time.sleep(0.01)
    sink.write([norms(1, [0.0])])
    sink.close()
    assert done.wait(30)
    assert found == [1]
    assert source.lost == 0


@needs_redis
def test_a_write_whose_answer_was_lost_is_read_once(server: RedisServer, stream: str) -> None:
    sink = RedisStream(server.url, stream)
    sink.open(RunInfo(id="f00d"))
    batch = [norms(0, [0.0]), norms(1, [0.0])]
    real = sink._client.pipeline

    class Cut:
        """Does what it shall, then loses the answer."""

        def __init__(self) -> None:
            self.pipe = real(transaction=True)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.pipe, name)

        def execute(self) -> None:
            self.pipe.execute()
            raise ConnectionError("cut")

    sink._client.pipeline = lambda transaction: Cut()
    with pytest.raises(ConnectionError):
        sink.write(batch)
    sink._client.pipeline = real
    sink.write(batch)
    sink.write([norms(2, [0.0])])
    sink.close()
    source = redis(server.url, stream, ends=1)
    assert [frame.step for frame in read(source)] == [0, 1, 2]
    assert source.lost == 0


@needs_redis
def test_what_was_dropped_before_it_was_read_is_counted(
    server: RedisServer, stream: str, caplog: pytest.LogCaptureFixture
) -> None:
    written(RedisStream(server.url, stream), *[norms(step, [0.0]) for step in range(10)])
    with server.client() as client:
        client.xtrim(stream, maxlen=4, approximate=False)
    source = redis(server.url, stream, ends=1)
    with caplog.at_level(logging.WARNING, "streamlens"):
        assert [frame.step for frame in read(source)] == [7, 8, 9]
    assert source.lost == 7
    assert "7 frames of run f00d" in caplog.text


@needs_redis
def test_a_server_that_is_gone_and_back_costs_only_what_was_in_between(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        found: list[int] = []
        done = threading.Event()
        reader = redis(server.url, "s", ends=1, timeout=1)
        reader.subscribe(lambda frame: found.append(frame.step), on_completed=done.set)
        sink = RedisStream(server.url, "s", timeout=1)
        sink.retries, sink.back_off = 1, 0.01
        connected = Connected(sink)
        assert connected.send(norms(0, [0.0]))
        server.stop()
        connected.send(norms(1, [0.0]))
        assert connected.stats.dropped == 1
        server.start()
        connected.send(norms(2, [0.0]))
        connected.close()
        assert done.wait(30)
        assert found == [0, 2]
        assert any("Connection" in report or "refused" in report for report in connected.reports)


@needs_redis
def test_disposing_ends_the_readers_thread(server: RedisServer, stream: str) -> None:
    subscription = redis(server.url, stream).subscribe(print)
    (thread,) = (t for t in threading.enumerate() if t.name == "streamlens-redis")
    subscription.dispose()
    thread.join(10)
    assert not thread.is_alive()


@needs_redis
def test_a_stream_of_somebody_else_is_an_error(server: RedisServer, stream: str) -> None:
    with server.client() as client:
        client.xadd(stream, {"temperature": "20"})
    with pytest.raises(sl.StreamlensError, match="entries that no RedisStream sink has written"):
        read(redis(server.url, stream))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RedisStream(maxlen=0), "maxlen=.* from 1 on"),
        (lambda: RedisStream(timeout=0), "timeout=.* above 0"),
        (lambda: RedisStream("http://x"), "scheme"),
        (lambda: redis("http://x"), "scheme"),
        (lambda: redis(ends=0), "ends=0"),
    ],
)
def test_bad_arguments_are_errors_at_the_call(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

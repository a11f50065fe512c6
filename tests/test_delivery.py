"""Delivery: every frame is written once, or counted; nobody waits for anybody else's sink."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex import Subject

from streamlens.delivery import Delivery, SinkStats
from streamlens.errors import SinkError, StreamlensError
from streamlens.frame import Frame, Lease
from streamlens.sink import RunInfo, Sink


class Recorder(Sink):
    """Remembers everything that was done to it."""

    max_latency = 0.01

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.calls: list[str] = []
        self.runs: list[RunInfo] = []
        self.threads: set[int] = set()

    def open(self, run: RunInfo) -> None:
        self.runs.append(run)
        self._note("open")

    def write(self, frames: Sequence[Frame]) -> None:
        self.frames.extend(frames)
        self._note("write")

    def flush(self) -> None:
        self._note("flush")

    def close(self) -> None:
        self._note("close")

    def _note(self, call: str) -> None:
        self.threads.add(threading.get_ident())
        if not self.calls or self.calls[-1] != call:
            self.calls.append(call)

    @property
    def steps(self) -> list[int]:
        return [frame.step for frame in self.frames]


class Hanging(Recorder):
    """Hangs in `write` until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.let_go = threading.Event()

    def write(self, frames: Sequence[Frame]) -> None:
        self.entered.set()
        self.let_go.wait(20)
        super().write(frames)


class Failing(Recorder):
    """Raises in its first `times` writes."""

    def __init__(self, times: int, error: BaseException | None = None) -> None:
        super().__init__()
        self.times = times
        self.attempts = 0
        self.error = error or OSError("disk full")

    def write(self, frames: Sequence[Frame]) -> None:
        self.attempts += 1
        if self.attempts <= self.times:
            raise self.error
        super().write(frames)


class Bench:
    """A delivery, and what it reported."""

    def __init__(self) -> None:
        self.reports: list[tuple[Exception, str]] = []
        self.run = RunInfo(id="f00d", name="run", resumed_at=None)
        self.delivery = Delivery(lambda: self.run, lambda error, where: self.reports.append((error, where)))

    def stats(self, name: str) -> SinkStats:
        return self.delivery.stats()[name]


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.delivery.close(2)


def frame(step: int = 0, topic: str = "norm", layers: Sequence[str] = ("a", "b"), **fields: Any) -> Frame:
    return Frame(topic, step, layers, torch.arange(float(len(layers))) + step, **fields)


_others: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
"""Threads that were there before the test: other tests of this process may leave sinks open."""


@pytest.fixture(autouse=True)
def _threads_of_other_tests() -> None:
    _others.update(threading.enumerate())


def workers() -> list[str]:
    threads = [thread for thread in threading.enumerate() if thread not in _others]
    return [thread.name for thread in threads if thread.name.startswith("streamlens-sink-")]


def until(condition: Callable[[], bool], timeout: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def balanced(stats: SinkStats) -> bool:
    return stats.emitted == stats.written + stats.dropped + stats.queued


# -- the life of a sink --------------------------------------------------------------------------


def test_frames_arrive_in_order_and_once(bench: Bench) -> None:
    sink = Recorder()
    proxy = bench.delivery.connect(sink, "chain")
    for step in range(100):
        proxy.on_next(frame(step))
        bench.delivery.end_burst()
    assert bench.delivery.flush(5)
    assert sink.steps == list(range(100))


def test_frames_arrive_without_flush_and_without_bursts(bench: Bench) -> None:
    sink = Recorder()
    bench.delivery.connect(sink, "chain").on_next(frame(3))
    assert until(lambda: sink.steps == [3])
    assert until(lambda: sink.calls == ["open", "write", "flush"])


def test_all_methods_run_on_one_worker_thread_named_after_the_sink(bench: Bench) -> None:
    sink = Recorder()
    proxy = bench.delivery.connect(sink, "chain")
    assert workers() == [], "the thread starts with the first frame"
    proxy.on_next(frame())
    assert workers() == ["streamlens-sink-Recorder"]
    bench.delivery.close(5)
    assert sink.calls == ["open", "write", "flush", "close"]
    assert len(sink.threads) == 1
    assert threading.get_ident() not in sink.threads


def test_no_thread_remains_after_close(bench: Bench) -> None:
    for _ in range(3):
        bench.delivery.connect(Recorder(), "chain").on_next(frame())
    assert len(workers()) == 3
    assert bench.delivery.close(5)
    assert workers() == []


def test_a_sink_closes_with_its_last_chain_and_opens_again(bench: Bench) -> None:
    sink = Recorder()
    first, second = bench.delivery.connect(sink, "one"), bench.delivery.connect(sink, "two")
    first.on_next(frame(0, "x"))
    first.on_completed()
    second.on_next(frame(0, "y"))
    assert bench.delivery.flush(5)
    assert "close" not in sink.calls
    second.dispose()
    assert until(lambda: sink.calls[-1] == "close")
    again = bench.delivery.connect(sink, "one")
    again.on_next(frame(1, "x"))
    assert bench.delivery.flush(5)
    assert sink.calls == ["open", "write", "flush", "close", "open", "write", "flush"]


def test_what_was_queued_before_a_resubscription_is_written_before_the_sink_opens_again(bench: Bench) -> None:
    sink = Hanging()
    proxy = bench.delivery.connect(sink, "one")
    proxy.on_next(frame(0))
    assert sink.entered.wait(5)
    proxy.on_next(frame(1))
    proxy.dispose()
    bench.run = RunInfo(id="beef")
    bench.delivery.connect(sink, "one").on_next(frame(2))
    sink.let_go.set()
    assert bench.delivery.close(5)
    assert sink.steps == [0, 1, 2]
    assert [run.id for run in sink.runs] == ["f00d", "beef"]
    assert [call for call in sink.calls if call in {"open", "close"}] == ["open", "close"] * 2


def test_a_detached_chain_delivers_nothing(bench: Bench) -> None:
    sink = Recorder()
    proxy = bench.delivery.connect(sink, "chain")
    proxy.on_error(ValueError("upstream"))
    proxy.on_next(frame())
    assert bench.delivery.close(5)
    assert sink.calls == []
    assert bench.reports == [], "whoever runs the chain reports its error"


def test_two_deliveries_share_one_sink_without_calling_it_at_the_same_time(bench: Bench) -> None:
    other, sink = Bench(), Recorder()
    bench.delivery.connect(sink, "one").on_next(frame(0, "x"))
    other.delivery.connect(sink, "two").on_next(frame(0, "y"))
    assert other.delivery.close(5)
    assert sink.calls[-1] != "close", "the first delivery still uses it"
    assert {f.topic for f in sink.frames} == {"x", "y"}
    assert bench.delivery.close(5)
    assert sink.calls[-1] == "close"
    assert len(sink.threads) == 1


# -- what frames look like to a sink -------------------------------------------------------------


def test_frames_of_a_named_lens_are_labelled(bench: Bench) -> None:
    sink = Recorder()
    proxy = bench.delivery.connect(sink, "chain")
    proxy.on_next(frame(0, "norm", ("", "features.0"), source="G"))
    assert bench.delivery.flush(5)
    (got,) = sink.frames
    assert (got.topic, got.layers, got.source) == ("G/norm", ("G", "G.features.0"), "")


def test_borrowed_frames_are_copied_once_a_burst_and_outlive_their_lease(bench: Bench) -> None:
    sinks = [Recorder(), Recorder()]
    lease, weights = Lease(), torch.ones(3)
    raw = Frame("weights", 0, ("a",), (weights,), lease=lease)
    for sink in sinks:
        bench.delivery.connect(sink, "chain").on_next(raw)
    weights.zero_()
    lease.end()
    bench.delivery.end_burst()
    assert bench.delivery.flush(5)
    first, second = (sink.frames[0] for sink in sinks)
    assert first["a"].tolist() == [1, 1, 1]
    assert first["a"] is second["a"]


def test_stacked_values_on_the_host_are_not_copied(bench: Bench) -> None:
    sink, given_frame = Recorder(), frame()
    bench.delivery.connect(sink, "chain").on_next(given_frame)
    assert bench.delivery.flush(5)
    assert sink.frames[0] is given_frame


def test_wall_times_are_those_of_emission(bench: Bench) -> None:
    class Timed(Recorder):
        def write(self, frames: Sequence[Frame]) -> None:
            times.extend(self.wall_times(frames))

    times: list[float] = []
    proxy = bench.delivery.connect(Timed(), "chain")
    before = time.time()
    proxy.on_next(frame(0))
    between = time.time()
    time.sleep(0.02)
    proxy.on_next(frame(1))
    assert bench.delivery.flush(5)
    assert before <= times[0] <= between < times[1]


def test_frames_that_a_sink_cannot_show_are_left_out_counted_and_reported_once(bench: Bench) -> None:
    class Scalars(Recorder):
        kinds = frozenset({"scalar"})

    sink = Scalars()
    proxy = bench.delivery.connect(sink, "chain")
    for step in range(3):
        proxy.on_next(Frame("weights", step, ("a",), (torch.ones(2, 2),)))
        proxy.on_next(frame(step))
    assert bench.delivery.flush(5)
    assert [f.topic for f in sink.frames] == ["norm"] * 3
    assert bench.stats("Scalars").dropped == 3
    ((error, where),) = bench.reports
    assert where == "sink Scalars"
    assert "'weights' holds vector values" in str(error)
    assert "norm()" in str(error)


# -- the training thread comes first -------------------------------------------------------------


def test_a_hanging_sink_delays_nobody(bench: Bench) -> None:
    hanging, healthy = Hanging(), Recorder()
    proxies = [bench.delivery.connect(sink, "chain") for sink in (hanging, healthy)]
    for proxy in proxies:
        proxy.on_next(frame(0))
    assert hanging.entered.wait(5)
    start = time.perf_counter()
    for step in range(1, 200):
        for proxy in proxies:
            proxy.on_next(frame(step))
    assert time.perf_counter() - start < 1
    assert until(lambda: healthy.steps == list(range(200)))
    hanging.let_go.set()


def test_a_full_queue_blocks_50_ms_in_all_then_drops_the_oldest(bench: Bench) -> None:
    sink = Hanging()
    sink.capacity = 10
    proxy = bench.delivery.connect(sink, "chain")
    proxy.on_next(frame(0))
    assert sink.entered.wait(5)
    start = time.perf_counter()
    for step in range(1, 500):
        proxy.on_next(frame(step))
    elapsed = time.perf_counter() - start
    assert 0.045 <= elapsed < 0.5
    stats = bench.stats("Hanging")
    assert (stats.dropped, stats.queued) == (490, 10)
    assert balanced(stats)
    sink.let_go.set()
    assert bench.delivery.flush(5)
    assert sink.steps == [0, *range(491, 500)]
    assert balanced(bench.stats("Hanging"))


def test_patience_comes_back_once_the_queue_has_drained(bench: Bench) -> None:
    sink = Hanging()
    sink.capacity = 2

    def overfill(start: int) -> float:
        proxy.on_next(frame(start))
        assert sink.entered.wait(5)
        begin = time.perf_counter()
        for step in range(start + 1, start + 20):
            proxy.on_next(frame(step))
        elapsed = time.perf_counter() - begin
        sink.let_go.set()
        assert bench.delivery.flush(5)
        sink.let_go.clear()
        sink.entered.clear()
        return elapsed

    proxy = bench.delivery.connect(sink, "chain")
    assert overfill(0) >= 0.045
    assert overfill(100) >= 0.045
    sink.let_go.set()


def test_a_queue_is_full_also_by_the_size_of_its_values(bench: Bench) -> None:
    sink = Hanging()
    sink.max_bytes = 10_000
    proxy = bench.delivery.connect(sink, "chain")
    for step in range(40):
        proxy.on_next(Frame("weights", step, ("a",), (torch.ones(1000),)))
    assert bench.stats("Hanging").dropped >= 36
    sink.let_go.set()


def test_the_worker_is_not_woken_for_every_frame(bench: Bench) -> None:
    class Counting(Recorder):
        writes = 0
        max_latency = 0.2

        def write(self, frames: Sequence[Frame]) -> None:
            self.writes += 1

    sink = Counting()
    proxy = bench.delivery.connect(sink, "chain")
    for step in range(500):
        proxy.on_next(frame(step))
    assert bench.delivery.flush(5)
    assert sink.writes <= 3


def test_a_long_queue_wakes_the_worker_before_its_latency_is_over(bench: Bench) -> None:
    sink = Recorder()
    sink.capacity, sink.max_latency = 10, 60.0
    proxy = bench.delivery.connect(sink, "chain")
    for step in range(6):
        proxy.on_next(frame(step))
    assert until(lambda: len(sink.frames) >= 6)


@given(
    loads=st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=12),
    capacity=st.integers(1, 8),
    fails=st.integers(0, 6),
    retries=st.integers(0, 1),
)
@settings(max_examples=15, deadline=None)
def test_emitted_equals_written_plus_dropped_plus_queued(
    loads: list[tuple[int, bool]], capacity: int, fails: int, retries: int
) -> None:
    bench, sink = Bench(), Failing(fails)
    sink.capacity, sink.retries, sink.max_latency = capacity, retries, 0.001
    proxy = bench.delivery.connect(sink, "chain")
    step = 0
    for count, flush in loads:
        for _ in range(count):
            proxy.on_next(frame(step))
            step += 1
            assert balanced(bench.stats("Failing"))
        if flush:
            bench.delivery.flush(5)
    bench.delivery.close(5)
    stats = bench.stats("Failing")
    assert balanced(stats)
    assert (stats.emitted, stats.queued) == (step, 0)
    assert stats.written == len(sink.frames) == len(set(sink.steps))
    assert sink.steps == sorted(sink.steps)


# -- failures ------------------------------------------------------------------------------------


def test_a_failed_write_is_tried_again_with_the_same_frames(bench: Bench) -> None:
    sink = Failing(2)
    proxy = bench.delivery.connect(sink, "chain")
    for step in range(5):
        proxy.on_next(frame(step))
    assert bench.delivery.flush(5)
    assert sink.steps == [0, 1, 2, 3, 4]
    assert bench.reports == []


def test_frames_that_cannot_be_written_are_counted_and_reported_and_others_follow(bench: Bench) -> None:
    sink, healthy = Failing(4), Recorder()
    for each in (sink, healthy):
        bench.delivery.connect(each, "chain").on_next(frame(0))
    assert not bench.delivery.flush(5)
    stats = bench.stats("Failing")
    assert (stats.failed, stats.dropped, stats.written) == (1, 1, 0)
    assert isinstance(stats.last_error, OSError)
    assert [(str(error), where) for error, where in bench.reports] == [("disk full", "sink Failing")]
    assert healthy.steps == [0]
    again = bench.delivery.connect(sink, "chain 2")
    again.on_next(frame(1))
    assert bench.delivery.flush(5)
    assert sink.steps == [1]


def test_a_sink_that_cannot_be_opened_is_tried_again_with_each_write(bench: Bench) -> None:
    class Unopenable(Recorder):
        retries = 0
        broken = True

        def open(self, run: RunInfo) -> None:
            if self.broken:
                raise OSError("read-only")
            super().open(run)

    sink = Unopenable()
    proxy = bench.delivery.connect(sink, "chain")
    proxy.on_next(frame(0))
    assert not bench.delivery.flush(5)
    sink.broken = False
    proxy.on_next(frame(1))
    assert bench.delivery.flush(5)
    assert sink.steps == [1]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_whatever_a_sink_raises_its_worker_survives(bench: Bench, error: BaseException) -> None:
    sink = Failing(1, error)
    sink.retries = 0
    proxy = bench.delivery.connect(sink, "chain")
    proxy.on_next(frame(0))
    assert not bench.delivery.flush(5)
    proxy.on_next(frame(1))
    assert bench.delivery.flush(5)
    assert sink.steps == [1]
    assert type(error).__name__ in str(bench.reports[0][0])


def test_a_flush_or_close_that_raises_is_reported(bench: Bench) -> None:
    class Clumsy(Recorder):
        def flush(self) -> None:
            raise OSError("flush")

        def close(self) -> None:
            raise OSError("close")

    bench.delivery.connect(Clumsy(), "chain").on_next(frame())
    assert not bench.delivery.flush(5)
    assert not bench.delivery.close(5)
    assert [str(error) for error, _ in bench.reports][-1] == "close"
    assert workers() == []


def test_close_returns_in_time_though_a_sink_hangs_and_says_what_was_lost(bench: Bench) -> None:
    sink = Hanging()
    proxy = bench.delivery.connect(sink, "chain")
    proxy.on_next(frame(0))
    assert sink.entered.wait(5)
    for step in range(1, 8):
        proxy.on_next(frame(step))
    start = time.perf_counter()
    assert not bench.delivery.close(0.1)
    assert time.perf_counter() - start < 1
    ((error, _),) = bench.reports
    assert "7 frames were lost and 1 are in a write" in str(error)
    assert balanced(bench.stats("Hanging"))
    sink.let_go.set()
    assert until(lambda: not workers()), "the worker ends once its write comes back"
    stats = bench.stats("Hanging")
    assert (stats.written, stats.dropped, stats.queued) == (1, 7, 0)


def test_flush_gives_up_in_time(bench: Bench) -> None:
    sink = Hanging()
    bench.delivery.connect(sink, "chain").on_next(frame())
    assert not bench.delivery.flush(0.05)
    sink.let_go.set()
    assert bench.delivery.flush(5)


def test_a_report_that_raises_comes_out_on_the_thread_that_trains() -> None:
    def report(error: Exception, where: str) -> None:
        raise error

    delivery = Delivery(lambda: RunInfo("id"), report)
    sink = Failing(1)
    sink.retries = 0
    delivery.connect(sink, "chain").on_next(frame())
    with pytest.raises(OSError, match="disk full"):
        delivery.flush(5)
    assert not delivery.close(5)


def test_close_says_whether_anything_was_lost_since_the_sink_was_opened(bench: Bench) -> None:
    sink = Failing(1)
    sink.retries = 0
    proxy = bench.delivery.connect(sink, "chain")
    proxy.on_next(frame(0))
    assert not bench.delivery.flush(5)
    proxy.on_next(frame(1))
    assert bench.delivery.flush(5)
    assert not bench.delivery.close(5)
    again = Delivery(lambda: bench.run, lambda error, where: None)
    again.connect(sink, "chain").on_next(frame(2))
    assert again.close(5)
    assert sink.steps == [1, 2]


def test_only_sinks_can_be_connected(bench: Bench) -> None:
    with pytest.raises(TypeError, match="connects sinks, got 3"):
        bench.delivery.connect(3, "chain")  # type: ignore[arg-type]


# -- one writer ----------------------------------------------------------------------------------


def test_two_chains_that_write_the_same_are_an_error_naming_both_and_rename(bench: Bench) -> None:
    sink = Recorder()
    first, second = bench.delivery.connect(sink, "norm()"), bench.delivery.connect(sink, "norm() | ema()")
    for step in range(3):
        first.on_next(frame(step, layers=("a", "b")))
        second.on_next(frame(step, layers=("b", "c")))
    assert bench.delivery.flush(5)
    assert [f.layers for f in sink.frames] == [("a", "b")] * 3
    ((error, _),) = bench.reports
    assert isinstance(error, StreamlensError)
    for word in ("'norm'", "'norm()'", "'norm() | ema()'", "rename()"):
        assert word in str(error)
    assert balanced(bench.stats("Recorder"))


def test_a_late_frame_of_a_second_chain_is_noticed_too(bench: Bench) -> None:
    sink = Recorder()
    first, second = (bench.delivery.connect(sink, name) for name in "ab")
    for step in range(50):
        first.on_next(frame(step))
    second.on_next(frame(10))
    assert len(bench.reports) == 1


@pytest.mark.parametrize(
    ("mine", "other"),
    [
        ({"layers": ("a",)}, {"layers": ("b",)}),
        ({"step": 0}, {"step": 1}),
        ({"topic": "x"}, {"topic": "y"}),
        ({"source": "G"}, {"source": "D"}),
    ],
    ids=["other layers", "other steps", "other topics", "other models"],
)
def test_chains_that_write_something_else_go_together(
    bench: Bench, mine: dict[str, Any], other: dict[str, Any]
) -> None:
    sink = Recorder()
    for name, fields in (("one", mine), ("two", other)):
        bench.delivery.connect(sink, name).on_next(frame(**fields))
    assert bench.delivery.flush(5)
    assert len(sink.frames) == 2
    assert bench.reports == []


def test_one_chain_may_write_many_frames_of_a_topic_and_step(bench: Bench) -> None:
    sink = Recorder()
    proxy, other = bench.delivery.connect(sink, "one"), bench.delivery.connect(sink, "two")
    for layer in ("a", "b", "a"):
        proxy.on_next(frame(0, layers=(layer,)))
    other.on_next(frame(0, layers=("b",)))
    assert bench.delivery.flush(5)
    assert [f.layers for f in sink.frames] == [("a",), ("b",), ("a",)]
    assert len(bench.reports) == 1


def test_a_chain_subscribed_again_may_write_what_its_predecessor_wrote(bench: Bench) -> None:
    sink = Recorder()
    proxy = bench.delivery.connect(sink, "one")
    proxy.on_next(frame(0))
    proxy.dispose()
    bench.delivery.connect(sink, "one").on_next(frame(0))
    assert bench.delivery.flush(5)
    assert sink.steps == [0, 0]
    assert bench.reports == []


# -- plain Observables ---------------------------------------------------------------------------


def test_a_sink_ends_a_plain_observable() -> None:
    sink, subject = Recorder(), Subject[Frame]()
    subject.subscribe(sink)
    subject.on_next(frame(0))
    assert sink.drain(5)
    assert sink.steps == [0]
    subject.on_completed()
    assert until(lambda: sink.calls[-1] == "close")
    again = Subject[Frame]()
    again.subscribe(sink)
    again.on_next(frame(1))
    again.on_completed()
    assert until(lambda: sink.calls.count("close") == 2 and not workers())
    assert sink.steps == [0, 1]


def test_an_error_of_a_plain_observable_is_logged_and_closes_the_sink(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink, subject = Recorder(), Subject[Frame]()
    subject.subscribe(sink)
    subject.on_next(frame(0))
    subject.on_error(ValueError("broken source"))
    assert until(lambda: sink.calls[-1:] == ["close"])
    assert "broken source" in caplog.text


def test_a_sink_that_nobody_is_subscribed_to_any_more_is_let_go_and_its_counts_are_kept() -> None:
    delivery = Delivery(lambda: RunInfo("run"), lambda error, where: None)
    sink = Recorder()
    proxy = delivery.connect(sink, "chain")
    proxy.on_next(frame())
    proxy.dispose()
    until(lambda: not workers())
    delivery.connect(Recorder(), "another chain").dispose()
    assert delivery.stats()["Recorder #2"].written == 1
    gone = weakref.ref(sink)
    del sink, proxy
    gc.collect()
    assert gone() is None
    assert delivery.stats()["Recorder #2"].written == 1


# -- a run that goes back to a snapshot ------------------------------------------------------------


def test_a_sink_that_has_begun_a_run_opens_again_when_the_run_goes_back_to_a_snapshot(bench: Bench) -> None:
    sink = Recorder()
    proxy = bench.delivery.connect(sink, "chain")
    for step in range(3):
        proxy.on_next(frame(step))
    bench.run = RunInfo(id="f00d", resumed_at=0, resumption="first")
    bench.delivery.renew()
    for step in (1, 2):
        proxy.on_next(frame(step))
    assert bench.delivery.close(5)
    assert sink.steps == [0, 1, 2, 1, 2]
    assert [(run.resumed_at, run.resumption) for run in sink.runs] == [(None, ""), (0, "first")]
    assert [call for call in sink.calls if call != "flush"] == ["open", "write", "close"] * 2


def test_a_sink_that_has_written_nothing_yet_is_told_the_run_as_it_goes_on(bench: Bench) -> None:
    sink = Recorder()
    proxy = bench.delivery.connect(sink, "chain")
    bench.run = RunInfo(id="f00d", resumed_at=4, resumption="only")
    bench.delivery.renew()
    proxy.on_next(frame(5))
    assert bench.delivery.close(5)
    assert sink.runs == [bench.run]


def test_another_runs_return_to_a_snapshot_leaves_a_shared_sink_open(bench: Bench) -> None:
    sink, other = Recorder(), Delivery(lambda: RunInfo("other"), lambda error, where: None)
    first, second = bench.delivery.connect(sink, "chain"), other.connect(sink, "chain")
    first.on_next(frame(0))
    second.on_next(frame(1))
    other.renew()
    second.on_next(frame(2))
    assert bench.delivery.close(5)
    assert other.close(5)
    assert sink.steps == [0, 1, 2]
    assert len(sink.runs) == 1


def test_what_was_lost_before_the_run_went_back_is_not_forgotten(bench: Bench) -> None:
    sink = Failing(1)
    sink.retries = 0
    proxy = bench.delivery.connect(sink, "chain")
    proxy.on_next(frame(0))
    assert not bench.delivery.flush(5)
    bench.delivery.renew()
    proxy.on_next(frame(1))
    assert not bench.delivery.close(5)
    assert sink.steps == [1]


# -- what one wait must not take from another ------------------------------------------------------


def test_each_flush_tells_of_its_own_round_also_when_a_later_one_went_well(bench: Bench) -> None:
    sink = Failing(1)
    sink.retries = 0
    channel = bench.delivery.connect(sink, "chain")._channel
    proxy = bench.delivery.connect(sink, "other")
    proxy.on_next(frame(0))
    first = channel.ask_flush()
    assert until(lambda: first.done)
    proxy.on_next(frame(1))
    second = channel.ask_flush()
    assert until(lambda: second.done)
    assert not channel.await_flush(first, 5)
    assert channel.await_flush(second, 5)


def test_a_close_that_ran_out_of_time_costs_the_next_subscription_no_retries(bench: Bench) -> None:
    class Slow(Failing):
        def write(self, frames: Sequence[Frame]) -> None:
            if not self.attempts:
                entered.set()
                let_go.wait(20)
            super().write(frames)

    entered, let_go = threading.Event(), threading.Event()
    sink = Slow(3)
    bench.delivery.connect(sink, "chain").on_next(frame(0))
    assert entered.wait(5)
    assert not bench.delivery.close(0.01)
    # While the write given up on still hangs, somebody else subscribes the sink.
    again = Delivery(lambda: bench.run, lambda error, where: None)
    proxy = again.connect(sink, "chain")
    proxy.on_next(frame(1))
    let_go.set()
    assert again.close(5)
    # Frame 0 was tried once, frame 1 three times.
    assert (sink.attempts, sink.steps) == (4, [1])


def test_a_sink_that_could_not_be_closed_has_not_written_everything(bench: Bench) -> None:
    class Unclosable(Recorder):
        def close(self) -> None:
            raise OSError("close")

    bench.delivery.connect(Unclosable(), "chain").on_next(frame())
    assert bench.delivery.flush(5)
    assert not bench.delivery.close(5)


# -- failures, retries and losses -----------------------------------------------------------------


class Refusing(Recorder):
    """Raises what it is given in every write, and notes when."""

    retries = 2
    back_off = 0.01

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.attempts: list[float] = []

    def write(self, frames: Sequence[Frame]) -> None:
        self.attempts.append(time.monotonic())
        raise self.error


def test_a_sink_error_says_whether_and_when_a_write_is_tried_again(bench: Bench) -> None:
    hopeless, later = Refusing(SinkError("gone", retry=False)), Refusing(SinkError("busy", after=0.05))
    for sink in (hopeless, later):
        bench.delivery.connect(sink, "chain").on_next(frame())
        assert not sink.drain(5)
    assert len(hopeless.attempts) == 1
    assert len(later.attempts) == 3
    assert min(b - a for a, b in itertools.pairwise(later.attempts)) >= 0.05


def test_waiting_for_a_retry_ends_when_the_run_gives_up(bench: Bench) -> None:
    sink = Refusing(SinkError("busy", after=60))
    bench.delivery.connect(sink, "chain").on_next(frame())
    start = time.monotonic()
    assert not bench.delivery.close(0.05)
    assert time.monotonic() - start < 30


def test_what_a_sink_lost_is_said_once_when_it_closes(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    failing, slow, sound = Failing(1), Hanging(), Recorder()
    failing.retries = 0
    slow.capacity = 2
    proxies = [bench.delivery.connect(sink, "chain") for sink in (failing, slow, sound)]
    proxies[1].on_next(frame(0))
    assert slow.entered.wait(5)
    for step in range(1, 6):
        proxies[1].on_next(frame(step))
    slow.let_go.set()
    for step in range(3):
        for proxy in (proxies[0], proxies[2]):
            proxy.on_next(frame(step))
        failing.drain(5)
    assert not bench.delivery.close(5)
    assert sorted(caplog.messages) == [
        "sink Failing lost 1 frames: 1 in writes that failed (the last: disk full)",
        "sink Hanging lost 4 frames: 4 because it was slower than the run",
    ]
    assert bench.stats("Hanging").dropped == 4

"""Operators, callables and sinks that fail at any event there is: training stays as it is, to the bit.

Beside them stand a chain that ends in a callable and one that ends in a sink, which get the same as ever.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from reactivex import Observable
from reactivex import operators as ops
from torch import Tensor, nn

import streamlens as sl
from streamlens.chain import ErrorReport, Mark
from streamlens.frame import Frame
from streamlens.nodes import Emitted, Node, stateful
from streamlens.sink import RunInfo, Sink
from streamlens.stream import Stream
from tests._runs import same, small_model
from tests.helpers.shipped import EVERY_TOPIC

OWN = "validation_loss"
ABSENT = {sl.optimizer_state("momentum_buffer")}
"""What Adam does not keep."""
TOPICS = [topic for topic in (*EVERY_TOPIC, OWN) if topic not in ABSENT]
OF_THE_CLOCK = {"step_time", "examples_per_second"}


class MetricError(Exception):
    """What the failing parts raise."""


def fail(*_: object) -> Any:
    raise MetricError("on purpose")


def ignore(*_: object) -> None:
    pass


class Healthy(Sink):
    """Keeps what it is given."""

    max_latency = 0.01

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def write(self, frames: Sequence[Frame]) -> None:
        self.told += [telling(frame) for frame in frames]


class Failing(Sink):
    """Raises in one of its methods, whenever that is called."""

    max_latency = 0.01
    retries = 0

    def __init__(self, method: str = "write") -> None:
        self.method = method

    def _at(self, method: str) -> None:
        if method == self.method:
            fail()

    def open(self, run: RunInfo) -> None:
        self._at("open")

    def write(self, frames: Sequence[Frame]) -> None:
        self._at("write")

    def flush(self) -> None:
        self._at("flush")

    def close(self) -> None:
        self._at("close")


class FailingNode(Node):
    """An operator with state that fails in one of its methods; otherwise it passes frames on."""

    def __init__(self, method: str) -> None:
        self.method = method

    def _at(self, method: str) -> None:
        if method == self.method:
            fail()

    def on_frame(self, frame: Frame) -> Emitted:
        self._at("a frame")
        return frame

    def on_mark(self, mark: Mark) -> Emitted:
        self._at(f"the mark {mark.kind.value}")
        return None

    def on_completed(self) -> Emitted:
        self._at("the end")
        return None


def failing_node(method: str) -> sl.Operator:
    def apply(source: Observable[Frame]) -> Stream:
        return stateful(source, lambda: FailingNode(method), f"failing({method})", marks=True)

    return apply


def telling(frame: Frame) -> tuple[Any, ...]:
    values = {} if frame.topic in OF_THE_CLOCK else {k: v.tolist() for k, v in frame.items()}
    return (frame.topic, frame.step, frame.epoch, frame.micro_step, frame.layers, repr(values))


@dataclass
class Outcome:
    """What a run leaves behind, and what was seen of it."""

    trained: list[Any]
    told: list[tuple[Any, ...]] = field(default_factory=list)
    written: list[tuple[Any, ...]] = field(default_factory=list)
    reports: list[ErrorReport] = field(default_factory=list)


def outcome(topic: str, subscribe: Callable[[sl.Lens], object]) -> Outcome:
    """Two epochs of two steps with gradient accumulation, with healthy chains around those in question."""
    model, criterion = small_model(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    data = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(4, 4, generator=data), torch.randint(0, 3, (4,), generator=data)) for _ in range(4)
    ]
    result = Outcome([])
    sink = Healthy()
    losses: list[Tensor] = []
    with sl.observe(model, loss=criterion, emits=[OWN]) as lens:
        lens.errors.subscribe(result.reports.append)
        lens.pipe(sl.topic(topic)).subscribe(lambda frame: result.told.append(telling(frame)))
        subscribe(lens)
        lens.pipe(sl.topic(topic)).subscribe(sink)
        for _ in lens.epochs(2):
            for i, (x, y) in enumerate(lens.batches(batches)):
                loss = criterion(model(x), y)
                loss.backward()
                losses.append(loss.detach().clone())
                if i % 2:
                    optimizer.step()
                    optimizer.zero_grad()
            lens.emit(OWN, 0.5)
    result.written = sink.told
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    result.trained = [weights, optimizer.state_dict(), losses, torch.get_rng_state()]
    return result


def lines(caplog: pytest.LogCaptureFixture) -> Counter[str]:
    """How often each message was logged, without the step in it."""
    records = [r for r in caplog.records if r.name == "streamlens" and r.levelno >= logging.ERROR]
    assert all("training goes on" in r.getMessage() for r in records)
    return Counter(r.getMessage().split(" failed at step")[0] for r in records)


@pytest.mark.parametrize("topic", TOPICS)
def test_whatever_fails_at_any_event_there_is_changes_nothing_else(
    topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    def subscribe(lens: sl.Lens) -> None:
        lens.pipe(sl.topic(topic)).subscribe(fail)
        lens.pipe(sl.topic(topic), sl.where(fail)).subscribe(ignore)
        lens.pipe(sl.topic(topic), failing_node("a frame")).subscribe(ignore)
        lens.pipe(sl.topic(topic), ops.map(fail)).subscribe(ignore)
        lens.pipe(sl.topic(topic)).subscribe(Failing())

    undisturbed = outcome(topic, ignore)
    assert undisturbed.told, "the event happens"
    caplog.clear()
    disturbed = outcome(topic, subscribe)
    assert same(disturbed.trained, undisturbed.trained)
    assert disturbed.told == undisturbed.told
    assert disturbed.written == undisturbed.written == undisturbed.told
    assert {type(report.error) for report in disturbed.reports} == {MetricError}
    # One entry a failure: an operator of reactivex fails once, and a sink's writes hold several frames.
    failures = Counter(report.where for report in disturbed.reports)
    ours = [count for where, count in failures.items() if "it has ended" not in where and "sink" not in where]
    assert ours == [len(undisturbed.told)] * 3
    assert set(lines(caplog).values()) == {1}, "one line a cause, however often it fails"
    assert len(lines(caplog)) == 5


MOMENTS = ["the mark update", "the mark closed", "the mark epoch", "the end"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_operator_that_fails_at_a_mark_or_at_the_end_changes_nothing_else(
    moment: str, caplog: pytest.LogCaptureFixture
) -> None:
    passed: list[tuple[Any, ...]] = []

    def subscribe(lens: sl.Lens) -> None:
        lens.pipe(sl.topic("loss"), failing_node(moment)).subscribe(lambda f: passed.append(telling(f)))

    undisturbed = outcome("loss", ignore)
    disturbed = outcome("loss", subscribe)
    assert same(disturbed.trained, undisturbed.trained)
    assert disturbed.told == disturbed.written == undisturbed.told
    assert passed == undisturbed.told, "the chain itself goes on too"
    assert {type(report.error) for report in disturbed.reports} == {MetricError}
    assert len(disturbed.reports) == {"the mark epoch": 2, "the end": 1}.get(moment, 4)
    assert list(lines(caplog).values()) == [1]


def test_what_fails_on_frames_that_come_at_a_mark_is_one_line_too(caplog: pytest.LogCaptureFixture) -> None:
    """The means of micro-steps come at the update's mark, and the rows of an epoch at its end."""

    def subscribe(lens: sl.Lens) -> None:
        lens.pipe(sl.norm("activations"), sl.per_step()).subscribe(fail)
        lens.pipe(sl.topic("loss"), sl.per_epoch(), sl.where(fail)).subscribe(ignore)
        lens.pipe(sl.norm("activations"), sl.per_step(), ops.do_action(fail)).subscribe(ignore)

    undisturbed = outcome("loss", ignore)
    disturbed = outcome("loss", subscribe)
    assert same(disturbed.trained, undisturbed.trained)
    assert disturbed.written == disturbed.told == undisturbed.told
    assert list(lines(caplog).values()) == [1, 1, 1]


def test_a_mark_that_reaches_nobody_is_one_line_a_kind(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever hears marks without a node around it is contained at the mark itself."""
    undisturbed = outcome("loss", ignore)
    disturbed = outcome("loss", lambda lens: lens.engine.on_mark(fail))
    assert same(disturbed.trained, undisturbed.trained)
    assert disturbed.told == undisturbed.told
    assert lines(caplog) == {"the mark 'update'": 1, "the mark 'closed'": 1, "the mark 'epoch'": 1}


@pytest.mark.parametrize("method", ["open", "write", "flush", "close"])
def test_a_sink_that_fails_anywhere_leaves_training_and_the_other_sinks_alone(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed = outcome("weights", ignore)
    disturbed = outcome("weights", lambda lens: lens.pipe(sl.norm("weights")).subscribe(Failing(method)))
    assert same(disturbed.trained, undisturbed.trained)
    assert disturbed.told == disturbed.written == undisturbed.told
    assert disturbed.reports
    assert {report.where for report in disturbed.reports} == {"sink Failing"}
    assert lines(caplog) == {"sink Failing": 1}


def test_a_failing_sink_leaves_the_run_store_beside_it_as_it_would_be(tmp_path: Any) -> None:
    def stored(name: str, *others: Sink) -> list[tuple[Any, ...]]:
        model = small_model()
        with sl.observe(model) as lens:
            for sink in (*others, sl.sinks.RunStore(tmp_path / name)):
                lens.pipe(sl.norm("weights"), sl.ema(0.5)).subscribe(sink)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(5):
                optimizer.zero_grad()
                model(torch.ones(2, 4)).square().sum().backward()
                optimizer.step()
        with sl.read_run(tmp_path / name) as run:
            return [telling(frame) for frame in run.frames()]

    alone = stored("alone")
    assert len(alone) == 5
    assert stored("beside", *(Failing(method) for method in ("open", "write", "flush", "close"))) == alone


def test_the_same_cause_is_logged_again_after_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("streamlens.runtime.time.monotonic", lambda: now)
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.observe(model) as lens:
        lens.pipe(sl.norm("weights")).subscribe(fail)
        counts: list[int] = []
        for _ in range(7):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            counts.append(sum(lines(caplog).values()))
            now += 25.0
        assert lens.stats()["errors"] == 7
    assert counts == [1, 1, 1, 2, 2, 2, 3]


def test_the_report_names_the_step_and_is_no_part_of_what_is_rate_limited() -> None:
    reports = outcome("loss", lambda lens: lens.engine.on_mark(fail)).reports
    assert [r.step for r in reports if "update" in r.where] == [0, 1, 2, 3]

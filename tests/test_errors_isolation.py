"""What fails in an observer stays there: training, other chains and other layers do not notice."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from reactivex import operators as ops
from reactivex.abc import DisposableBase
from torch import Tensor, nn

import streamlens as sl
from streamlens.chain import ErrorReport
from streamlens.frame import Frame
from streamlens.reductions import Reduction, Statistic, Statistics
from streamlens.sink import Sink
from streamlens.topics import TOPICS
from tests._runs import Outcome, Recipe, same, small_model, steps_of, train

EVENTS = [
    "batch_started",
    "input_data",
    "activations",
    "network_output",
    "loss",
    "layer_gradients",
    "raw_gradients",
    "weight_gradients",
    "learning_rate",
    "weights",
    "weight_updates",
    "batch_finished",
]


class MetricError(Exception):
    """What the failing parts raise."""


def fail(*_: object) -> Any:
    raise MetricError("on purpose")


def succeed(*values: Any) -> Any:
    return values[-1]


Part = Callable[..., Any]


class PartSink(Sink):
    """A sink that does in `write` whatever is being tested."""

    retries = 0
    max_latency = 0.01

    def __init__(self, part: Part) -> None:
        self.part = part

    def write(self, frames: Sequence[Frame]) -> None:
        self.part(*frames)


@dataclass(frozen=True)
class Total(Reduction):
    """A sum that may fail, on each tensor or when it is finished from statistics."""

    part: Part
    from_statistics: bool

    @property
    def name(self) -> str:
        return "total"

    def needs(self) -> tuple[Statistic, ...]:
        return (Statistic("sum"),) if self.from_statistics else ()

    def reduce(self, tensors: Sequence[Tensor]) -> Tensor:
        return cast("Tensor", self.part(torch.stack([t.sum() for t in tensors])))

    def finish(self, statistics: Statistics, count: Tensor) -> Tensor:
        return cast("Tensor", self.part(statistics[Statistic("sum")]))


def ignore(frame: object) -> None:
    pass


Subscribe = Callable[[sl.Lens, str, Part], DisposableBase]


def stateful(lens: sl.Lens, topic: str, part: Part) -> DisposableBase:
    reduced = [sl.norm()] if TOPICS[topic].raw else []
    stream: sl.Stream = lens.pipe(sl.topic(topic), *reduced, sl.scan(part))
    return stream.subscribe(ignore)


AT_AN_EVENT: dict[str, Subscribe] = {
    "a callable": lambda lens, topic, part: lens.pipe(sl.topic(topic)).subscribe(part),
    "an operator": lambda lens, topic, part: lens.pipe(sl.topic(topic), sl.where(part)).subscribe(ignore),
    "an operator with state": stateful,
    "an operator of reactivex": lambda lens, topic, part: lens.pipe(sl.topic(topic), ops.map(part)).subscribe(
        ignore
    ),
    "a sink": lambda lens, topic, part: lens.pipe(sl.topic(topic)).subscribe(PartSink(part)),
}
WHERE_IT_IS_TAKEN: dict[str, Subscribe] = {
    "reducing": lambda lens, topic, part: lens.narrow(
        topics=(topic,), reduction=Total(part, from_statistics=False)
    ).subscribe(ignore),
    "finishing": lambda lens, topic, part: lens.narrow(
        topics=(topic,), reduction=Total(part, from_statistics=True)
    ).subscribe(ignore),
    "a function": lambda lens, topic, part: lens.pipe(
        sl.reduce(lambda value: part(value.sum()), topic, name="total")
    ).subscribe(ignore),
}


@dataclass
class Watched:
    """What well-behaved chains of a run received, and what was reported."""

    frames: list[tuple[str, int, dict[str, Any]]]
    reports: list[ErrorReport]


@contextlib.contextmanager
def healthy_chains(lens: sl.Lens) -> Iterator[Watched]:
    watched = Watched([], [])

    def note(frame: Frame) -> None:
        watched.frames.append((frame.topic, frame.step, frame.to_dict()))

    lens.errors.subscribe(watched.reports.append)
    for topic in ("activations", "layer_gradients", "weight_gradients", "weights", "weight_updates"):
        lens.pipe(sl.norm(topic)).subscribe(note)
    lens.pipe(sl.uw_ratio(), sl.ema(0.5)).subscribe(note)
    lens.pipe(sl.topic("loss", "batch_started", "learning_rate")).subscribe(note)
    yield watched


def observed(subscribe: Subscribe, topic: str, part: Part) -> tuple[Outcome, Watched]:
    """A run with well-behaved chains on both sides of the one in question."""
    kept: list[Watched] = []

    @contextlib.contextmanager
    def observing(model: nn.Module, criterion: nn.Module) -> Iterator[None]:
        with sl.observe(model, loss=criterion) as lens, healthy_chains(lens) as watched:
            subscribe(lens, topic, part)
            with healthy_chains(lens) as later:
                yield
        watched.frames += later.frames
        kept.append(watched)

    outcome = train(Recipe("linear", "momentum", steps=2), observing)
    return outcome, kept[0]


def equal(some: Watched, others: Watched) -> bool:
    """Whether two runs' chains received the same, to rounding: other demands may sum in another order."""
    return len(some.frames) == len(others.frames) and all(
        a[:2] == b[:2] and a[2] == pytest.approx(b[2], rel=1e-5)
        for a, b in zip(some.frames, others.frames, strict=True)
    )


@pytest.mark.parametrize("topic", EVENTS)
@pytest.mark.parametrize("what", list(AT_AN_EVENT))
def test_a_failure_at_any_event_reaches_neither_training_nor_other_chains(
    what: str, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    outcome, undisturbed = observed(AT_AN_EVENT[what], topic, succeed)
    assert undisturbed.reports == []
    assert caplog.records == []
    disturbed_outcome, disturbed = observed(AT_AN_EVENT[what], topic, fail)
    assert same(disturbed_outcome, outcome)
    assert equal(disturbed, undisturbed)
    assert {type(report.error) for report in disturbed.reports} == {MetricError}
    lines = [r for r in caplog.records if r.name == "streamlens" and r.levelno >= logging.ERROR]
    assert len(lines) == 1, "one line a cause, however often it fails"
    assert "on purpose" in lines[0].getMessage()
    assert "training goes on" in lines[0].getMessage()


@pytest.mark.parametrize(
    "topic", ["activations", "layer_gradients", "raw_gradients", "weight_gradients", "weights", "input_data"]
)
@pytest.mark.parametrize("what", list(WHERE_IT_IS_TAKEN))
def test_a_reduction_that_fails_costs_nobody_else_a_value(what: str, topic: str) -> None:
    outcome, undisturbed = observed(WHERE_IT_IS_TAKEN[what], topic, succeed)
    disturbed_outcome, disturbed = observed(WHERE_IT_IS_TAKEN[what], topic, fail)
    assert same(disturbed_outcome, outcome)
    assert equal(disturbed, undisturbed)
    assert undisturbed.reports == []
    assert disturbed.reports
    assert {type(report.error) for report in disturbed.reports} == {MetricError}


@pytest.mark.parametrize(
    "topic", ["activations", "layer_gradients", "weight_gradients", "weights", "weight_updates"]
)
def test_a_layer_that_fails_leaves_the_other_layers_values_equal(topic: str) -> None:
    def sensitive(value: Tensor) -> Tensor:
        if 5 in value.shape[:1] or value.shape[-1:] == (5,):
            fail()
        return value.abs().sum()

    def run(fn: Callable[[Tensor], Tensor]) -> tuple[list[dict[str, Any]], list[ErrorReport]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3))
        frames: list[dict[str, Any]] = []
        reports: list[ErrorReport] = []
        with sl.observe(model) as lens:
            lens.errors.subscribe(reports.append)
            lens.pipe(sl.reduce(fn, topic, name="size")).subscribe(lambda f: frames.append(f.to_dict()))
            list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 2))
        return frames, reports

    whole, none = run(lambda value: value.abs().sum())
    partial, reports = run(sensitive)
    assert none == []
    assert len(partial) == len(whole) == 2
    failed = {"1", "2"} if topic.startswith("weight") else {"1"}
    for frame, all_layers in zip(partial, whole, strict=True):
        assert frame == {layer: value for layer, value in all_layers.items() if layer not in failed}
    named = {layer for layer in failed if any(repr(layer)[1:-1] in report.where for report in reports)}
    assert named == failed, "the report names the layer"


def test_frame_map_leaves_out_the_layer_that_fails_and_reports_it() -> None:
    frame = Frame("t", 0, ("a", "b", "c"), torch.tensor([1.0, 2.0, 3.0]))
    failed: list[str] = []

    def picky(value: Tensor) -> Tensor:
        return fail() if value == 2 else value * 2

    assert frame.map(picky, on_error=lambda layer, error: failed.append(layer)).to_dict() == {
        "a": 2.0,
        "c": 6.0,
    }
    assert failed == ["b"]
    with pytest.raises(MetricError):
        frame.map(picky)


def test_one_failure_is_one_entry_and_one_count() -> None:
    model = small_model()
    reports: list[ErrorReport] = []
    with sl.observe(model) as lens:
        lens.errors.subscribe(reports.append)
        lens.pipe(sl.norm("weights"), sl.every(2), sl.where(fail)).subscribe(ignore)
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 4))
        assert [report.step for report in reports] == [0, 2]
        assert lens.stats()["errors"] == 2
        assert "2 errors" in lens.explain()
    assert "where" in reports[0].where
    assert "MetricError: on purpose" in str(reports[0])


def test_two_causes_are_two_lines(caplog: pytest.LogCaptureFixture) -> None:
    model = small_model()
    with sl.observe(model) as lens:
        lens.pipe(sl.norm("weights")).subscribe(fail)
        lens.pipe(sl.norm("weights"), sl.where(fail)).subscribe(ignore)
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 5))
    assert len([r for r in caplog.records if r.levelno >= logging.ERROR]) == 2


def test_a_chain_of_ours_goes_on_after_a_failure_and_one_of_reactivex_ends() -> None:
    def once(frame: Frame) -> bool:
        return fail() if frame.step == 1 else True

    def mapped(frame: Frame) -> Frame:
        once(frame)
        return frame

    model = small_model()
    ours: list[int] = []
    foreign: list[int] = []
    ended: list[Exception] = []
    with sl.observe(model) as lens:
        lens.pipe(sl.norm("weights"), sl.where(once)).subscribe(lambda frame: ours.append(frame.step))
        lens.pipe(sl.norm("weights"), ops.map(mapped)).subscribe(
            lambda frame: foreign.append(frame.step), on_error=ended.append
        )
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 4))
        assert "ops.map" not in lens.explain()
    assert ours == [0, 2, 3]
    assert foreign == [0]
    assert [type(error) for error in ended] == [MetricError]


def test_a_chain_that_ended_is_captured_for_no_longer() -> None:
    model = small_model()
    with sl.observe(model) as lens:
        lens.pipe(sl.topic("weight_updates"), ops.map(fail)).subscribe(ignore)
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 2))
        assert "nothing is captured" in lens.explain()
        assert "bytes held: 0" in lens.explain()


def test_a_failing_subscriber_of_the_errors_is_contained_too() -> None:
    model = small_model()
    with sl.observe(model) as lens:
        lens.errors.subscribe(fail)
        lens.pipe(sl.norm("weights")).subscribe(fail)
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 2))
        assert lens.current_step == 1

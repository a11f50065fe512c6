"""`when`: captured from the step after an alert starts until it ends, and not before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reactivex.subject import Subject
from torch import nn

import streamlens as sl
from streamlens.chain import current_chain
from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.runtime import default_runtime
from tests._runs import Recipe, same, steps_of, train
from tests.operators.support import chain_of, frame, saved_and_loaded


def alert(step: int, state: str, rule: str = "r", layers: tuple[str, ...] = ("a",), **meta: Any) -> Frame:
    values = torch.ones(len(layers))
    return Frame(f"alerts.{rule}", step, layers, values, meta={"state": state, **meta})


class Training:
    """A small model that is trained step by step, with alerts given by hand."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        self.lens = sl.observe(self.model, on_error="raise")
        self.alerts: Subject[Frame] = Subject()

    def steps(self, count: int) -> None:
        for _ in steps_of(self.model, self.optimizer, count):
            pass

    def alert(self, state: str, **fields: Any) -> None:
        self.alerts.on_next(alert(self.lens.current_step, state, **fields))


@pytest.fixture
def training() -> Iterator[Training]:
    run = Training()
    yield run
    run.lens.close()


def test_is_on_from_the_step_after_the_start_until_the_end(training: Training) -> None:
    seen: list[int] = []
    training.lens.pipe(sl.when(training.alerts), sl.norm("weights")).subscribe(lambda f: seen.append(f.step))
    training.steps(3)
    training.alert("start")
    training.steps(2)
    training.alert("end")
    training.steps(2)
    training.alert("start")
    training.steps(1)
    assert seen == [3, 4, 7]


def test_costs_nothing_before_an_alert(training: Training) -> None:
    training.lens.pipe(sl.when(training.alerts), sl.norm("activations")).subscribe(lambda _: None)
    training.lens.pipe(sl.when(training.alerts), sl.uw_ratio()).subscribe(lambda _: None)
    engine = training.lens.engine
    before = engine.hook_counts()
    training.steps(3)
    assert engine.demands == []
    assert engine.idle
    assert engine.updates.bytes_held == 0
    assert training.lens.stats()["emitted"] == 0
    assert "nothing" in training.lens.explain().split("captured\n")[1].splitlines()[0]
    training.alert("start")
    training.steps(1)
    assert engine.hook_counts() != before
    assert engine.updates.bytes_held > 0
    training.alert("end")
    training.steps(1)
    assert engine.demands == []
    assert engine.updates.bytes_held == 0
    assert engine.hook_counts() == before


def test_what_is_captured_then_is_right_from_its_first_step_on(training: Training) -> None:
    always: dict[int, dict[str, float]] = {}
    then: dict[int, dict[str, float]] = {}
    training.lens.pipe(sl.uw_ratio()).subscribe(lambda f: always.update({f.step: f.to_dict()}))
    training.lens.pipe(sl.when(training.alerts), sl.uw_ratio()).subscribe(
        lambda f: then.update({f.step: f.to_dict()})
    )
    training.steps(2)
    training.alert("start")
    training.steps(3)
    assert then == {step: always[step] for step in (2, 3, 4)}


def test_stays_on_while_any_alert_is_open(training: Training) -> None:
    seen: list[int] = []
    training.lens.pipe(sl.when(training.alerts), sl.norm("weights")).subscribe(lambda f: seen.append(f.step))
    training.steps(1)
    training.alert("start", layers=("a", "b"))
    training.steps(1)
    training.alert("end", layers=("a",))
    training.steps(1)
    training.alert("start", rule="other", of="x")
    training.alert("end", layers=("b",))
    training.steps(1)
    training.alert("end", rule="other", of="y")
    training.steps(1)
    training.alert("end", rule="other", of="x")
    training.steps(1)
    assert seen == [1, 2, 3, 4]


def test_its_frames_belong_to_the_chain_that_asked_for_them(training: Training) -> None:
    training.lens.pipe(sl.when(training.alerts), sl.norm("weights")).subscribe(lambda _: None)
    training.steps(1)
    training.alert("start")
    (chain,) = [c for c in training.lens.engine.chains if "norm2" in c.plan]
    assert [demand.chain for demand in training.lens.engine.demands] == [chain]
    assert current_chain.get() is None


def test_explain_says_whether_it_is_on(training: Training) -> None:
    training.lens.pipe(sl.when(training.alerts), sl.norm("weights")).subscribe(lambda _: None)
    training.steps(1)
    assert "off: it waits for an alert" in training.lens.explain()
    training.alert("start")
    assert "on since step 0" in training.lens.explain()


def test_switches_itself_on_by_an_alert_of_the_same_run() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with sl.observe(model, emits=["trouble"], on_error="raise") as lens:
        noticed = lens.pipe(
            sl.topic("trouble"), sl.scan(lambda _, f: f.replace(meta={"state": "start"}), frame(0, {"": 0.0}))
        )
        alerts = lens.derive("alerts", noticed)
        seen: list[int] = []
        lens.pipe(sl.when(alerts), sl.norm("weight_gradients")).subscribe(lambda f: seen.append(f.step))
        for step, _ in enumerate(steps_of(model, optimizer, 6)):
            if step == 2:
                lens.emit("trouble", 1.0)
    assert seen == [3, 4, 5]


def test_ends_with_its_subscription(training: Training) -> None:
    chain = training.lens.pipe(sl.when(training.alerts), sl.norm("weights")).subscribe(lambda _: None)
    training.alert("start")
    assert training.lens.engine.demands
    chain.dispose()
    assert training.lens.engine.demands == []
    assert training.alerts.observers == []


def test_a_resumed_run_is_on_where_it_was(training: Training) -> None:
    training.lens.pipe(sl.when(training.alerts), sl.norm("weights")).subscribe(lambda _: None)
    training.steps(2)
    training.alert("start")
    training.steps(1)
    state = saved_and_loaded(training.lens.state_dict())
    again = Training()
    seen: list[int] = []
    again.lens.pipe(sl.when(again.alerts), sl.norm("weights")).subscribe(lambda f: seen.append(f.step))
    again.lens.load_state_dict(state)
    again.steps(2)
    again.alert("end")
    again.steps(1)
    again.lens.close()
    assert seen == [3, 4]


def test_changes_nothing_of_the_run() -> None:
    def observing(model: nn.Module, criterion: nn.Module) -> Any:
        lens = sl.observe(model, loss=criterion, on_error="raise")
        alerts: Subject[Frame] = Subject()
        lens.pipe(sl.when(alerts), sl.uw_ratio()).subscribe(lambda _: None)
        lens.pipe(sl.when(alerts), sl.norm("activations")).subscribe(lambda _: None)
        lens.pipe(sl.norm("weights")).subscribe(
            lambda f: alerts.on_next(alert(f.step, "start" if f.step % 2 == 0 else "end"))
        )
        return lens

    recipe = Recipe(optimizer="adam", steps=6)
    assert same(train(recipe), train(recipe, observing))


def test_on_a_plain_stream_it_passes_the_steps_between() -> None:
    source: Subject[Frame] = Subject()
    alerts: Subject[Frame] = Subject()
    seen: list[int] = []
    source.pipe(sl.when(alerts)).subscribe(lambda f: seen.append(f.step))
    for step in range(8):
        if step == 2:
            alerts.on_next(alert(2, "start"))
        if step == 5:
            alerts.on_next(alert(5, "end"))
        source.on_next(frame(step, {"a": 1.0}))
    assert seen == [3, 4, 5]


def test_on_a_plain_stream_open_alerts_are_part_of_the_state() -> None:
    source: Subject[Frame] = Subject()
    alerts: Subject[Frame] = Subject()
    before = chain_of_when(source, alerts, [])
    alerts.on_next(alert(2, "start"))
    state = saved_and_loaded(before.state_dict())
    seen: list[int] = []
    other: Subject[Frame] = Subject()
    after = chain_of_when(other, alerts, seen)
    after.cells[0].load_state_dict(state[0]["state"])
    for step in range(5):
        other.on_next(frame(step, {"a": 1.0}))
    assert seen == [3, 4]


def chain_of_when(source: Subject[Frame], alerts: Subject[Frame], seen: list[int]) -> Any:
    known = set(map(id, default_runtime().chains))
    source.pipe(sl.when(alerts)).subscribe(lambda f: seen.append(f.step))
    return next(c for c in default_runtime().chains if id(c) not in known and c.cells)


def test_a_frame_that_is_no_alert_is_reported_and_ignored() -> None:
    source: Subject[Frame] = Subject()
    alerts: Subject[Frame] = Subject()
    chain_of(source.pipe(sl.when(alerts)), lambda _: None)
    with pytest.raises(StreamlensError, match="'x' at step 3 is no alert: its meta has no state"):
        alerts.on_next(frame(3, {"a": 1.0}))


def test_wrong_arguments_are_errors_at_once(training: Training) -> None:
    with pytest.raises(TypeError, match=r"when\(alerts=...\) takes a stream of alerts"):
        sl.when("alerts")  # type: ignore[arg-type]
    with pytest.raises(StreamlensError, match="no topic selected"):
        sl.when(training.lens)

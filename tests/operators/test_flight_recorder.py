"""`flight_recorder`: the last frames come through when something has happened, each once and in order."""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reactivex.subject import Subject
from torch import Tensor, nn

import streamlens as sl
from streamlens.errors import StreamlensError
from streamlens.failure import failed
from streamlens.frame import Frame, Kind, Lease
from streamlens.runtime import default_runtime
from tests._runs import steps_of
from tests.operators.support import chain_of, frame, ragged, saved_and_loaded

ALERT = Frame("alerts.r", 0, ("",), torch.ones(1), meta={"state": "start"})
END = Frame("alerts.r", 0, ("",), torch.ones(1), meta={"state": "end"})


def play(events: str, last: int, after: int) -> list[int]:
    """Frames (".") of steps 0, 1, ... with alerts ("!") and dumps ("d") between them."""
    source: Subject[Frame] = Subject()
    alerts: Subject[Frame] = Subject()
    recorder = sl.flight_recorder(last, on=alerts, after=after)
    seen: list[int] = []
    source.pipe(recorder).subscribe(lambda f: seen.append(f.step))
    step = 0
    for event in events:
        if event == ".":
            source.on_next(frame(step, {"a": float(step)}))
            step += 1
        elif event == "!":
            alerts.on_next(ALERT)
        else:
            recorder.dump()
    source.on_completed()
    return seen


def by_hand(events: str, last: int, after: int) -> list[int]:
    ring: deque[int] = deque(maxlen=last)
    seen: list[int] = []
    step = following = 0
    for event in events:
        if event == ".":
            if following:
                seen.append(step)
                following -= 1
            else:
                ring.append(step)
            step += 1
        else:
            seen += ring
            ring.clear()
            following = after
    return seen


@given(st.text(".!d", max_size=40), st.integers(1, 5), st.integers(0, 3))
def test_lets_the_last_frames_through_once_and_in_order(events: str, last: int, after: int) -> None:
    seen = play(events, last, after)
    assert seen == by_hand(events, last, after)
    assert seen == sorted(set(seen))


def test_frames_are_events_of_their_own_steps_and_say_what_let_them_go() -> None:
    source: Subject[Frame] = Subject()
    alerts: Subject[Frame] = Subject()
    seen: list[Frame] = []
    source.pipe(sl.flight_recorder(2, on=alerts, after=1)).subscribe(seen.append)
    for step in range(3):
        source.on_next(frame(step, {"a": float(step)}, "w.norm2", meta={"mine": 1}, kind=Kind.MICRO_STEP))
    alerts.on_next(ALERT)
    source.on_next(frame(3, {"a": 3.0}, "w.norm2"))
    assert [(f.topic, f.step, f.to_dict()) for f in seen] == [
        ("w.norm2.recorded", step, {"a": float(step)}) for step in (1, 2, 3)
    ]
    assert {f.kind for f in seen} == {Kind.EVENT}
    assert dict(seen[0].meta) == {"mine": 1, "cause": "alerts.r"}


def test_the_end_of_an_alert_lets_nothing_go() -> None:
    source: Subject[Frame] = Subject()
    alerts: Subject[Frame] = Subject()
    seen: list[Frame] = []
    source.pipe(sl.flight_recorder(2, on=alerts)).subscribe(seen.append)
    source.on_next(frame(0, {"a": 0.0}))
    alerts.on_next(END)
    assert seen == []


def test_holds_copies_of_raw_tensors() -> None:
    source: Subject[Frame] = Subject()
    recorder = sl.flight_recorder(1)
    seen: list[Frame] = []
    source.pipe(recorder).subscribe(seen.append)
    weight, lease = torch.ones(2), Lease()
    source.on_next(ragged(0, {"a": weight}, lease=lease))
    lease.end()
    weight.zero_()
    recorder.dump()
    assert seen[0]["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("at", [1, 3, 4])
def test_what_is_held_survives_a_resume(at: int) -> None:
    frames = [frame(step, {"a": float(step)}) for step in range(5)]
    source: Subject[Frame] = Subject()
    before = chain_of(source.pipe(sl.flight_recorder(4)), lambda _: None)
    for item in frames[:at]:
        source.on_next(item)
    again: Subject[Frame] = Subject()
    recorder, seen = sl.flight_recorder(4), list[Frame]()
    after = chain_of(again.pipe(recorder), seen.append)
    after.cells[0].load_state_dict(saved_and_loaded(before.state_dict())[0]["state"])
    for item in frames[at:]:
        again.on_next(item)
    recorder.dump()
    assert [f.step for f in seen] == [1, 2, 3, 4]


def test_a_disposed_recorder_lets_nothing_go_and_leaves_nothing_behind() -> None:
    source: Subject[Frame] = Subject()
    alerts: Subject[Frame] = Subject()
    recorder = sl.flight_recorder(2, on=alerts)
    seen: list[Frame] = []
    hook = sys.excepthook
    chain = source.pipe(recorder).subscribe(seen.append)
    source.on_next(frame(0, {"a": 0.0}))
    chain.dispose()
    recorder.dump()
    alerts.on_next(ALERT)
    assert (seen, source.observers, alerts.observers) == ([], [], [])
    assert sys.excepthook is hook


class Stumbling(nn.Module):
    """Raises in its forward at one call."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.calls = 0
        self.at = at

    def forward(self, x: Tensor) -> Tensor:
        if self.calls == self.at:
            raise RuntimeError("the model stumbled")
        self.calls += 1
        out: Tensor = self.layer(x)
        return out


def test_training_that_raises_lets_them_go_and_its_exception_passes() -> None:
    model = Stumbling(at=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    table = sl.sinks.Table()

    def training() -> None:
        with sl.observe(model) as lens:
            lens.pipe(sl.norm("weight_gradients"), sl.flight_recorder(3)).subscribe(table)
            list(steps_of(model, optimizer, 10))

    with pytest.raises(RuntimeError, match="the model stumbled"):
        training()
    rows = table.dataframe
    assert rows["step"].tolist() == [1, 2, 3]
    assert set(rows["topic"]) == {"weight_gradients.norm2.recorded"}
    assert set(rows["cause"]) == {"RuntimeError: the model stumbled"}


def test_a_lens_that_closes_in_peace_lets_nothing_go() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen: list[Frame] = []
    with sl.observe(model) as lens:
        lens.pipe(sl.norm("weights"), sl.flight_recorder(3)).subscribe(seen.append)
        for _ in steps_of(model, optimizer, 3):
            pass
    assert seen == []


SCRIPT = """
import sys
import torch
import streamlens as sl

sys.excepthook = lambda kind, error, trace: print("mine:", error)
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
lens = sl.observe(model)
lens.pipe(sl.norm("weights"), sl.flight_recorder(2)).subscribe(sl.sinks.RunStore(sys.argv[1]))
for step in range(10):
    optimizer.zero_grad()
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    if step == 5:
        raise ValueError("out of the program")
"""


def test_an_exception_that_ends_the_program_lets_them_go_and_the_users_hook_sees_it(tmp_path: Path) -> None:
    store = tmp_path / "run.db"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(store)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "mine: out of the program\n", "")
    with sl.read_run(store) as run:
        rows = run.dataframe("weights.norm2.recorded")
    assert rows["step"].tolist() == [4, 5]
    assert set(rows["cause"]) == {"ValueError: out of the program"}


def test_the_batchs_index_is_recorded_so_that_it_can_be_found_again() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen: list[Frame] = []
    recorder = sl.flight_recorder(20)
    with sl.observe(model, on_error="raise") as lens:
        lens.pipe(sl.norm("weight_gradients"), recorder).subscribe(seen.append)
        lens.pipe(sl.norm("activations"), recorder).subscribe(seen.append)
        for _ in lens.epochs(2):
            batches = [torch.randn(3, 4) for _ in range(4)]
            for i, x in enumerate(batches):
                # Two micro-steps a step.
                model(x).sum().backward()
                if i % 2:
                    optimizer.step()
                    optimizer.zero_grad()
        recorder.dump()
    gradients = [f for f in seen if f.topic.startswith("weight_gradients")]
    outputs = [f for f in seen if f.topic.startswith("activations")]
    assert [(f.step, f.epoch, f.meta["batch"]) for f in gradients] == [
        (0, 0, 1),
        (1, 0, 3),
        (2, 1, 1),
        (3, 1, 3),
    ]
    assert [(f.epoch, f.micro_step, f.meta["batch"]) for f in outputs] == [
        (epoch, batch % 2, batch) for epoch in range(2) for batch in range(4)
    ]


def test_sinks_take_steps_that_are_long_past(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    recorder = sl.flight_recorder(3)
    store, table = sl.sinks.RunStore(tmp_path / "run.db"), sl.sinks.Table()
    with sl.observe(model, on_error="raise") as lens:
        for sink in (store, table):
            lens.pipe(sl.norm("weights")).subscribe(sink)
            lens.pipe(sl.norm("weights"), recorder).subscribe(sink)
        for i, _ in enumerate(steps_of(model, optimizer, 8)):
            if i in (4, 6):
                recorder.dump()
        stats = lens.stats()
    assert stats["dropped"] == 0
    with sl.read_run(tmp_path / "run.db") as run:
        assert run.dataframe("weights.norm2.recorded")["step"].tolist() == [2, 3, 4, 5, 6]
        assert run.dataframe("weights.norm2")["step"].tolist() == list(range(8))
    rows = table.dataframe
    recorded = rows[rows["topic"] == "weights.norm2.recorded"]
    assert sorted(set(recorded["step"])) == [2, 3, 4, 5, 6]


def test_what_a_listener_raises_is_no_business_of_the_failing_program(caplog: Any) -> None:
    source: Subject[Frame] = Subject()

    def broken(_: Frame) -> None:
        raise OSError("a sink that breaks, too")

    source.pipe(sl.flight_recorder(1)).subscribe(broken)
    source.on_next(frame(0, {"a": 0.0}))
    failed(default_runtime(), ValueError("training"))
    assert "on ValueError failed" in caplog.text


@pytest.mark.parametrize("arguments", [{"last": 0}, {"last": 2.5}, {"last": True}, {"after": -1}])
def test_wrong_numbers_are_errors_at_once(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"flight_recorder\((last|after)=.*: a whole number from [01] on"):
        sl.flight_recorder(**arguments)


def test_wrong_streams_are_errors_at_once() -> None:
    with pytest.raises(TypeError, match=r"flight_recorder\(on=...\) takes a stream of alerts"):
        sl.flight_recorder(on="alerts")  # type: ignore[arg-type]
    model = nn.Linear(1, 1)
    with sl.observe(model) as lens, pytest.raises(StreamlensError, match="no topic selected"):
        lens.pipe(sl.flight_recorder())

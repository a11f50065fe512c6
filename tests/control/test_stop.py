"""`Stop`, and what the loops of a lens do once it has acted."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex.subject import Subject
from torch import Tensor, nn

import streamlens as sl
from streamlens import control
from streamlens.frame import Frame, Kind
from streamlens.views.report import write_report
from tests._runs import same, small_model, steps_of

Batch = tuple[Tensor, Tensor]


def batches(count: int, *, spoilt: int | None = None) -> list[Batch]:
    """Batches of inputs and labels; one of them with a NaN."""
    data = torch.Generator().manual_seed(0)
    made = [
        (torch.randn(6, 4, generator=data), torch.randint(0, 3, (6,), generator=data)) for _ in range(count)
    ]
    if spoilt is not None:
        made[spoilt][0][0] = math.nan
    return made


class Run:
    """A model under training, with what it has seen."""

    def __init__(self) -> None:
        self.model = small_model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.lens = sl.observe(self.model, on_error="raise", emits=["validation_loss"])
        self.criterion = self.lens.watch_loss(nn.functional.cross_entropy)
        self.trained = 0

    def update(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        self.criterion(self.model(batch[0]), batch[1]).backward()
        self.optimizer.step()
        self.trained += 1


@pytest.fixture
def run() -> Iterator[Run]:
    made = Run()
    yield made
    made.lens.close()


def test_a_nan_stops_after_the_update_of_its_step_and_says_why(run: Run) -> None:
    stop = control.Stop()
    actions: list[Frame] = []
    run.lens.pipe(sl.loss()).subscribe(stop)
    run.lens.pipe(sl.topic("stop.action")).subscribe(actions.append)
    seen = []
    for batch in batches(5, spoilt=2):
        run.update(batch)
        seen.append(run.lens.should_stop)
    assert seen == [False, False, True, True, True]
    assert stop.stopped
    (action,) = actions
    assert action.step == 2
    assert float(action[""]) == 1.0
    assert action.meta["text"] == "Stop stopped training: loss is nan at step 2"


def test_without_on_nan_such_a_frame_is_no_input(run: Run) -> None:
    stop = control.Stop(on_nan=False)
    run.lens.pipe(sl.loss()).subscribe(stop)
    for batch in batches(3, spoilt=1):
        run.update(batch)
    assert not run.lens.should_stop
    assert stop.held == 2  # the spoilt batch, and what it made of the model


def test_the_layer_of_a_nan_is_named() -> None:
    frame = Frame("weights.norm2", 7, ("a", "b"), torch.tensor([1.0, math.inf]))
    assert control.Stop().cause_of(frame) == "weights.norm2 of b is inf at step 7"


def test_an_alert_that_starts_stops_and_one_that_ends_does_not(run: Run) -> None:
    stop = control.Stop()
    run.lens.pipe(sl.nonfinite_values(phases=("loss",))).subscribe(stop)
    causes: list[str] = []
    stop.actions.subscribe(lambda action: causes.append(action.meta["cause"]))
    for batch in batches(2, spoilt=1):
        run.update(batch)
    assert causes == [
        "alert nonfinite_values: Values that are NaN or infinite appeared, first in the loss (phase: loss)"
    ]
    ended = Frame(
        "alerts.x",
        0,
        ("",),
        torch.ones(1),
        meta={"rule": "x", "state": "end", "text": "Back."},
        kind=Kind.EVENT,
    )
    assert control.Stop().cause_of(ended) is None


def first_plateau(numbers: list[float], patience: int) -> int | None:
    """The place at which more than `patience` numbers in a row were no better than all before them."""
    best, bad = math.inf, 0
    for place, number in enumerate(numbers):
        if math.isfinite(number):
            bad = 0 if number < best else bad + 1
            best = min(best, number)
            if bad > patience:
                return place
    return None


@settings(max_examples=60, deadline=None)
@given(
    numbers=st.lists(
        st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([1.0, 2.0]), max_size=20
    ),
    patience=st.integers(0, 3),
)
def test_a_plateau_stops_as_a_loop_written_by_hand_would(numbers: list[float], patience: int) -> None:
    feed = sl.Feed(on_error="raise", emits=["x"])
    stop = control.Stop(patience, threshold=0.0, on_nan=False)
    feed.pipe(sl.topic("x")).subscribe(stop)
    stopped = None
    for step, number in enumerate(numbers):
        feed.push(step, x=torch.tensor(number, dtype=torch.float64))
        if stopped is None and feed.should_stop:
            stopped = step
    assert stopped == first_plateau(numbers, patience)
    assert stop.stopped is (stopped is not None)
    feed.close()


def test_batches_end_and_their_epoch_with_them(run: Run) -> None:
    run.lens.pipe(sl.loss()).subscribe(control.Stop())
    ended: list[tuple[int, int]] = []
    run.lens.pipe(sl.topic("epoch_finished")).subscribe(lambda f: ended.append((int(f[""]), f.step)))
    for _ in range(2):
        for batch in run.lens.batches(batches(5, spoilt=2)):
            run.update(batch)
    assert run.trained == 3
    assert ended == [(0, 2)]
    assert run.lens.epoch == 1


def test_epochs_end_after_the_one_that_was_left_and_per_epoch_metrics_have_it(run: Run) -> None:
    run.lens.pipe(sl.loss()).subscribe(control.Stop())
    means: list[int] = []
    run.lens.pipe(sl.norm("weights"), sl.per_epoch("mean")).subscribe(lambda f: means.append(f.epoch))
    epochs = []
    for epoch in run.lens.epochs(4):
        epochs.append(epoch)
        for batch in run.lens.batches(batches(3, spoilt=1 if epoch == 1 else None)):
            run.update(batch)
    assert epochs == [0, 1]
    assert run.trained == 5
    assert means == [0, 1]


def test_a_run_that_goes_on_all_the_same_is_not_stopped_again_by_the_same_controller(run: Run) -> None:
    run.lens.pipe(sl.loss()).subscribe(control.Stop())
    for batch in run.lens.batches(batches(2, spoilt=0)):
        run.update(batch)
    assert run.trained == 1
    run.lens.should_stop = False
    for batch in run.lens.batches(batches(2, spoilt=0)):
        run.update(batch)
    assert run.trained == 3


def test_a_plateau_of_validations_ends_training_with_the_epoch_and_begins_no_other(run: Run) -> None:
    run.lens.pipe(sl.topic("validation_loss")).subscribe(control.Stop(patience=2))
    trained = []
    for epoch in run.lens.epochs(10):
        for batch in run.lens.batches(batches(3)):
            run.update(batch)
        run.lens.emit("validation_loss", 1.0)
        trained.append((epoch, run.trained))
    # The first is the best; three in a row are then no better, one more than `patience`.
    assert trained == [(0, 3), (1, 6), (2, 9), (3, 12)]
    assert run.trained == 12


def test_an_average_over_an_epoch_ends_training_with_that_epoch(run: Run) -> None:
    run.lens.pipe(sl.norm("weights"), sl.layers("0"), sl.per_epoch()).subscribe(
        control.Stop(patience=1, mode="min", threshold=1e9, threshold_mode="abs")
    )
    for _ in run.lens.epochs(10):
        for batch in run.lens.batches(batches(2)):
            run.update(batch)
    assert run.trained == 6


def test_a_snapshot_keeps_the_request_and_a_plateau_goes_on_where_it_was() -> None:
    def validated(numbers: list[float], saved: dict[str, Any] | None) -> tuple[bool, dict[str, Any]]:
        run = Run()
        stop = control.Stop(patience=2)
        run.lens.pipe(sl.topic("validation_loss")).subscribe(stop)
        if saved is not None:
            run.lens.load_state_dict(saved)
        for number in numbers:
            run.update(batches(1)[0])
            run.lens.emit("validation_loss", number)
        state = copy.deepcopy(run.lens.state_dict())
        stopped = run.lens.should_stop
        run.lens.close()
        return stopped, state

    stopped, saved = validated([1.0, 2.0, 2.0], None)
    assert not stopped
    stopped, saved = validated([2.0], saved)
    assert stopped
    assert validated([], saved)[0]
    assert not validated([2.0], None)[0]


def test_a_dry_run_stops_nothing_leaves_training_bit_identical_and_says_it_once(run: Run) -> None:
    alone = Run()
    stop = control.Stop(dry_run=True)
    said: list[str] = []
    stop.actions.subscribe(lambda action: said.append(action.meta["text"]))
    run.lens.pipe(sl.loss()).subscribe(stop)
    for batch in batches(4, spoilt=2)[:3]:
        run.update(batch)
        alone.update(batch)
    run.update(batches(1)[0])
    alone.update(batches(1)[0])
    assert not run.lens.should_stop
    assert said == ["Stop would have stopped training: loss is nan at step 2"]
    pairs = zip(run.model.parameters(), alone.model.parameters(), strict=True)
    assert all(same(a.detach(), b.detach()) for a, b in pairs)
    alone.lens.close()


def test_on_a_plain_stream_it_acts_at_once_and_says_that_it_has() -> None:
    source: Subject[Frame] = Subject()
    stop = control.Stop()
    actions: list[Frame] = []
    stop.actions.subscribe(actions.append)
    source.subscribe(stop)
    for step, number in enumerate([1.0, math.nan, math.nan]):
        source.on_next(Frame("x", step, ("a",), torch.tensor([number])))
    assert [action.step for action in actions] == [1]
    assert stop.stopped
    source.on_completed()


def test_the_report_marks_it_and_tensorboard_has_its_sentence(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run.lens.pipe(sl.loss()).subscribe(control.Stop())
    for sink in (sl.sinks.RunStore(tmp_path / "run.db"), sl.sinks.TensorBoard(tmp_path)):
        run.lens.pipe(sl.loss()).subscribe(sink)
        run.lens.pipe(sl.topic("stop.action")).subscribe(sink)
    for batch in run.lens.batches(batches(3, spoilt=1)):
        run.update(batch)
    run.lens.close()
    sentence = "Stop stopped training: loss is nan at step 1"
    assert write_report(tmp_path / "run.db", tmp_path / "report.html").read_text().count(sentence) == 1
    events = next(tmp_path.glob("events*")).read_bytes()
    assert events.count(sentence.encode()) == 1
    assert b"stop.action/" in events


@pytest.mark.parametrize(
    ("options", "message"),
    [({"patience": -1}, r"Stop\(patience=-1\)"), ({"mode": "nim", "patience": 1}, r"Stop\(mode='nim'\)")],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        control.Stop(**options)


def test_a_plateau_of_more_than_one_number_is_reported_with_the_remedy() -> None:
    model = small_model()
    with sl.observe(model) as lens:
        reports: list[str] = []
        lens.errors.subscribe(lambda report: reports.append(str(report)))
        lens.pipe(sl.uw_ratio()).subscribe(control.Stop(patience=1))
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 1))
    assert "Stop takes one number a frame, and 'uw_ratio' has more" in reports[0]

"""`Rollback` against a training loop that does the same by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex import operators as rx
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, StepLR

import streamlens as sl
from streamlens import control
from streamlens.control import _attachment
from streamlens.frame import Frame
from streamlens.views.report import write_report
from tests._runs import same

Batch = tuple[Tensor, Tensor]


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.1)


def batches(count: int, spoilt: set[int]) -> list[Batch]:
    data = torch.Generator().manual_seed(0)
    made = [(torch.randn(6, 4, generator=data), torch.randn(6, 3, generator=data)) for _ in range(count)]
    for place in spoilt & set(range(count)):
        made[place][0][0] = math.nan
    return made


class Run:
    """A model under training, and what became of it."""

    def __init__(self, *, on_error: str = "raise") -> None:
        self.model = make_model()
        self.optimizer = adam(self.model)
        self.lens = sl.observe(self.model, on_error=on_error, emits=["x"])
        self.criterion = self.lens.watch_loss(nn.functional.mse_loss)
        self.actions: list[Frame] = []

    def roll_back(self, controller: control.Rollback, *chain: Any) -> control.Rollback:
        controller.actions.subscribe(self.actions.append)
        self.lens.pipe(*(chain or (sl.loss(),))).subscribe(controller)
        return controller

    def update(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        self.criterion(self.model(batch[0]), batch[1]).backward()
        self.optimizer.step()

    @property
    def rate(self) -> float:
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    @property
    def finite(self) -> bool:
        return all(bool(t.isfinite().all()) for t in self.model.state_dict().values())

    def outcome(self) -> list[Any]:
        return [
            {name: tensor.clone() for name, tensor in self.model.state_dict().items()},
            copy.deepcopy(self.optimizer.state_dict()),
        ]


@pytest.fixture
def run() -> Iterator[Run]:
    made = Run()
    yield made
    made.lens.close()


def by_hand(data: list[Batch], every: int, confirm: int, factor: float) -> tuple[list[Any], list[Any]]:
    """The same by hand: what training leaves, and (step, step put back) of each time."""
    model = make_model()
    optimizer = adam(model)

    def kept(step: int) -> tuple[int, Any, Any]:
        return step, copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])

    good, candidate, done = kept(-1), None, []
    for step, (x, y) in enumerate(data):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        bad = not loss.isfinite()
        if bad:
            model.load_state_dict(good[1])
            groups = optimizer.state_dict()["param_groups"]
            groups[0]["lr"] *= factor
            optimizer.load_state_dict({"state": copy.deepcopy(good[2]), "param_groups": groups})
            candidate = None
            done.append((step, good[0]))
        if candidate is not None and step - candidate[0] >= confirm:
            good, candidate = candidate, None
        if step % every == 0 and not bad:
            candidate = kept(step)
    return [model.state_dict(), optimizer.state_dict()], done


SPOILT = {2, 7, 12}


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("interrupted_at", [None, 7, 10])
def test_training_is_that_of_a_loop_written_by_hand_also_when_interrupted(
    interrupted_at: int | None, on_disk: bool, tmp_path: Path
) -> None:
    data = batches(15, SPOILT)
    done: list[tuple[float, float]] = []
    saved: dict[str, Any] | None = None
    parts = [data] if interrupted_at is None else [data[:interrupted_at], data[interrupted_at:]]
    for part in parts:
        run = Run()
        folder = tmp_path / "kept" if on_disk else None
        run.roll_back(control.Rollback(every=4, confirm=2, factor=0.5, folder=folder))
        if saved is not None:
            run.model.load_state_dict(saved["model"])
            run.optimizer.load_state_dict(saved["optimizer"])
            run.lens.load_state_dict(saved["lens"])
        for batch in part:
            run.update(batch)
        done += [(action.meta["old"], action.meta["new"]) for action in run.actions]
        model, optimizer = run.outcome()
        saved = copy.deepcopy({"model": model, "optimizer": optimizer, "lens": run.lens.state_dict()})
        outcome = run.outcome()
        # The run goes on and fails: its files are others then.
        for batch in batches(6, set()):
            run.update(batch)
        run.lens.close()
    expected, times = by_hand(data, every=4, confirm=2, factor=0.5)
    assert times == [(2, -1), (7, 4), (12, 8)]
    assert done == times
    assert same(outcome, expected)


def test_every_action_says_what_was_done_and_why(run: Run) -> None:
    seen: list[Frame] = []
    run.roll_back(control.Rollback(every=2, confirm=1))
    run.lens.pipe(sl.topic("rollback.action")).subscribe(seen.append)
    for batch in batches(5, {0, 4}):
        run.update(batch)
    assert [action.step for action in seen] == [0, 4]
    assert seen == run.actions
    assert [action.meta["text"] for action in seen] == [
        f"Rollback put back the model as it was {when} and lowered the learning rate from {rates}: {why}"
        for when, rates, why in (
            ("before its first update", "0.1 to 0.05", "loss is nan at step 0"),
            ("after step 2", "0.05 to 0.025", "loss is nan at step 4"),
        )
    ]
    assert seen[1].meta["cause"] == "loss is nan at step 4"


def test_a_dry_run_leaves_training_bit_identical_and_says_what_it_would_do(run: Run) -> None:
    alone = Run()
    dry = run.roll_back(control.Rollback(every=2, confirm=1, limit=1, dry_run=True))
    for batch in batches(5, {4}):
        run.update(batch)
        alone.update(batch)
    assert same(run.outcome(), alone.outcome())
    did = "would have put back the model as it was after step 2 and lowered the learning rate"
    assert run.actions[0].meta["text"] == f"Rollback {did} from 0.1 to 0.05: loss is nan at step 4"
    assert run.actions[0].meta["dry_run"] is True
    assert dry.rollbacks == 1
    alone.lens.close()


def test_it_acts_a_bounded_number_of_times_and_says_when_it_stands_back() -> None:
    run = Run(on_error="report")
    reports: list[str] = []
    run.lens.errors.subscribe(lambda report: reports.append(str(report)))
    controller = run.roll_back(control.Rollback(limit=2))
    for batch in batches(5, {0, 1, 2, 3}):
        run.update(batch)
    assert controller.rollbacks == len(run.actions) == 2
    assert run.rate == 0.025
    assert len(reports) == 1
    assert "it has put the model back 2 times, its limit, and again loss is nan at step 2" in reports[0]
    run.lens.close()


@settings(max_examples=10, deadline=None)
@given(
    spoilt=st.sets(st.integers(0, 11), max_size=8),
    every=st.integers(1, 5),
    factor=st.sampled_from([0.1, 0.5, 1.0]),
    min_lr=st.sampled_from([0.0, 0.03, 0.2]),
)
def test_whatever_comes_the_model_stays_finite_rates_within_bounds_and_actions_within_the_limit(
    spoilt: set[int], every: int, factor: float, min_lr: float
) -> None:
    run = Run()
    controller = run.roll_back(
        control.Rollback(every=every, confirm=min(every, 2), factor=factor, min_lr=min_lr, limit=20)
    )
    for batch in batches(12, spoilt):
        before = run.rate
        run.update(batch)
        assert run.finite
        assert min(0.1, min_lr) <= run.rate <= before
        assert run.rate >= before * factor * (1 - 1e-12)
    assert controller.rollbacks == len(spoilt)
    run.lens.close()


def alerting(frame: Frame) -> Frame:
    """1 starts an alert, -1 ends it."""
    state = "start" if float(frame[""]) > 0 else "end"
    meta = {"rule": "bad", "severity": "critical", "state": state, "text": "It is bad. Do something."}
    return frame.replace(topic="alerts.bad", meta=meta)


def test_an_alert_that_starts_is_a_reason_and_while_it_is_on_nothing_is_kept(run: Run) -> None:
    controller = run.roll_back(
        control.Rollback(every=2, confirm=1, patience=4, limit=9), sl.topic("x"), rx.map(alerting)
    )
    told = {3: 1.0, 11: -1.0}
    kept = []
    for step, batch in enumerate(batches(16, set())):
        run.update(batch)
        kept.append(controller.good_step)
        if step in told:
            run.lens.emit("x", told[step])
    assert [(a.step, a.meta["new"], a.meta["cause"]) for a in run.actions] == [
        (4, 2, "alert bad: It is bad"),
        (8, 2, "alert bad has not ended in 4 steps"),
    ]
    assert kept[3:13] == [2] * 10
    assert kept[-1] == 14


def test_what_arrives_late_of_steps_that_were_put_back_is_no_reason(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_attachment, "lagging", lambda frame: True)
    run.roll_back(control.Rollback(every=2, confirm=2, factor=1.0))
    for batch in batches(8, {4}):
        run.update(batch)
    assert [(a.step, a.meta["new"]) for a in run.actions] == [(5, 2)]
    assert run.finite


def test_a_bad_model_does_not_become_the_good_one_before_it_shows(run: Run) -> None:
    controller = run.roll_back(control.Rollback(every=4, confirm=3), sl.topic("x"), rx.map(alerting))
    for step, batch in enumerate(batches(8, set())):
        run.update(batch)
        if step == 5:  # the copy of step 4 is two steps old
            run.lens.emit("x", 1.0)
    assert [(a.step, a.meta["new"]) for a in run.actions] == [(6, 0)]
    assert controller.good_step == 0


def test_updates_after_it_start_from_what_was_put_back(run: Run) -> None:
    run.roll_back(control.Rollback())
    weights: list[Tensor] = []
    updates: list[Tensor] = []
    run.lens.pipe(sl.topic("weights")).subscribe(lambda f: weights.append(f["0"].clone()))
    run.lens.pipe(sl.topic("weight_updates")).subscribe(lambda f: updates.append(f["0"].clone()))
    initial = next(run.model.parameters()).detach().clone()
    for batch in batches(2, {0}):
        run.update(batch)
    assert torch.equal(updates[1], weights[1] - initial)


def test_optimizers_that_step_together_are_put_back_once_all_have_stepped() -> None:
    model = make_model()
    optimizers = [torch.optim.Adam(model[i].parameters(), lr=0.1) for i in (0, 1, 3)]
    with sl.observe(model, on_error="raise") as lens:
        criterion = lens.watch_loss(nn.functional.mse_loss)
        lens.pipe(sl.loss()).subscribe(control.Rollback(every=1, confirm=1))
        before: list[Any] = []
        for step, (x, y) in enumerate(batches(4, {2})):
            if step == 3:
                model.train()
                out = model(x)
                assert all(map(torch.equal, [p.detach() for p in model.parameters()], before))
                assert bool(out.isfinite().all())
                assert [o.param_groups[0]["lr"] for o in optimizers] == [0.05] * 3
                break
            for optimizer in optimizers:
                optimizer.zero_grad()
            criterion(model(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()
            if step == 0:
                before = [p.detach().clone() for p in model.parameters()]


def scheduled_rates(make: Callable[[Optimizer], Any], spoilt: set[int]) -> tuple[list[float], list[str]]:
    run = Run(on_error="report")
    reports: list[str] = []
    run.lens.errors.subscribe(lambda report: reports.append(str(report)))
    run.roll_back(control.Rollback())
    scheduler = make(run.optimizer)
    rates = []
    for batch in batches(5, spoilt):
        run.update(batch)
        scheduler.step()
        rates.append(run.rate)
    assert run.finite
    run.lens.close()
    return rates, reports


def test_a_scheduler_that_multiplies_keeps_the_lower_rate() -> None:
    rates, reports = scheduled_rates(lambda optimizer: StepLR(optimizer, 1, gamma=0.9), {1})
    assert rates == pytest.approx([0.1 * 0.9 ** (k + 1) * (0.5 if k else 1) for k in range(5)])
    assert not reports


def test_a_scheduler_that_computes_the_rate_anew_is_reported_once_and_has_it_from_then_on() -> None:
    rates, reports = scheduled_rates(lambda optimizer: LambdaLR(optimizer, lambda epoch: 1.0), {1, 3})
    assert rates == [0.1] * 5
    assert len(reports) == 1
    assert "it had lowered the learning rate to 0.05 and found 0.1" in reports[0]


def test_beside_a_controller_of_the_rate_it_is_refused_unless_it_leaves_the_rate_alone(run: Run) -> None:
    ratio = control.RatioLR(mode="current", smoothing=0.5)
    run.lens.pipe(sl.uw_ratio()).subscribe(ratio)
    with pytest.raises(sl.StreamlensError, match=r"leave it to that one with Rollback\(factor=1\)"):
        run.roll_back(control.Rollback())
    controller = run.roll_back(control.Rollback(factor=1))
    for batch in batches(5, {2}):
        run.update(batch)
    assert controller.rollbacks == 1
    assert not ratio.standing_back
    with pytest.raises(sl.StreamlensError, match="would steer the model's weights that Rollback steers"):
        run.lens.pipe(sl.loss()).subscribe(control.Rollback(factor=1))


def test_what_cannot_be_put_back_is_reported_and_no_action(tmp_path: Path) -> None:
    run = Run(on_error="report")
    reports: list[str] = []
    run.lens.errors.subscribe(lambda report: reports.append(str(report)))
    run.roll_back(control.Rollback(folder=tmp_path))
    for step, batch in enumerate(batches(2, {1})):
        if step == 1:
            (tmp_path / "rollback.good.pt").unlink()
        run.update(batch)
    assert not run.actions
    assert run.rate == 0.1
    assert "Rollback.apply" in reports[0]
    assert "rollback.good.pt" in reports[0]
    run.lens.close()


def test_an_overflow_that_a_scaler_skips_is_no_reason_where_weights_are_watched(run: Run) -> None:
    run.roll_back(control.Rollback(), sl.norm("weights"))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = {name: tensor.clone() for name, tensor in run.model.named_parameters()}
    for step, (x, y) in enumerate(batches(3, set())):
        run.optimizer.zero_grad()
        # The first overflows in the loss alone: it spoils no buffer.
        loss = run.criterion(run.model(x), y * (math.inf if step == 0 else 1.0))
        scaler.scale(loss).backward()
        scaler.step(run.optimizer)
        scaler.update()
        if step == 0:
            assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())
    assert run.lens.current_step == 1
    assert not run.actions


def test_the_report_marks_it_and_tensorboard_has_its_sentence(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run.roll_back(control.Rollback())
    for sink in (sl.sinks.RunStore(tmp_path / "run.db"), sl.sinks.TensorBoard(tmp_path)):
        run.lens.pipe(sl.loss()).subscribe(sink)
        run.lens.pipe(sl.topic("rollback.action")).subscribe(sink)
    for batch in batches(3, {1}):
        run.update(batch)
    run.lens.close()
    sentence = "Rollback put back the model as it was before its first update"
    assert write_report(tmp_path / "run.db", tmp_path / "report.html").read_text().count(sentence) == 1
    assert next(tmp_path.glob("events*")).read_bytes().count(sentence.encode()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0.*whole number from 1 on"),
        ({"limit": 1.5}, "limit=1.5"),
        ({"every": 5, "confirm": 6}, "confirmed before the next, 5 steps later"),
        ({"factor": 0.0}, r"factor=0.0.*in \(0, 1\]"),
        ({"min_lr": math.nan}, "bounds: the least"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        control.Rollback(**options)


def test_what_it_cannot_do_without_is_named() -> None:
    with pytest.raises(TypeError, match="folder=3"):
        control.Rollback(folder=3)  # type: ignore[arg-type]
    feed = sl.Feed(emits=["x"])
    with pytest.raises(sl.StreamlensError, match="Rollback puts a model back, and a stream without one"):
        feed.pipe(sl.topic("x")).subscribe(control.Rollback())
    feed.close()

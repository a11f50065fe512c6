"""What all controllers have in common."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reactivex.subject import Subject
from torch import Tensor, nn
from torch.optim import Optimizer

import streamlens as sl
from streamlens import control
from streamlens.control import _attachment
from streamlens.frame import Frame
from tests._runs import small_model, steps_of


def halve(frame: Frame, rate: float) -> float:
    return rate / 2


def observed(**options: Any) -> tuple[nn.Module, Optimizer, sl.Lens]:
    model = small_model()
    return model, torch.optim.SGD(model.parameters(), lr=1.0), sl.observe(model, **options)


def train(model: nn.Module, optimizer: Optimizer, count: int, seed: int = 0) -> list[float]:
    """Train, and give the rates after each step."""
    return [optimizer.param_groups[0]["lr"] for _ in steps_of(model, optimizer, count, seed=seed)]


def test_it_acts_after_each_update_so_that_the_next_one_has_the_new_rate() -> None:
    model, optimizer, lens = observed(on_error="raise")
    used: list[float] = []
    lens.pipe(sl.topic("learning_rate")).subscribe(lambda frame: used.append(float(frame["0"])))
    lens.pipe(sl.uw_ratio()).subscribe(control.act(halve))
    assert train(model, optimizer, 3) == [0.5, 0.25, 0.125]
    assert used == [1.0, 0.5, 0.25]
    lens.close()


def test_every_action_is_a_frame_on_the_controller_and_a_topic_of_the_lens() -> None:
    model, optimizer, lens = observed(on_error="raise")
    controller = control.act(halve)
    own: list[Frame] = []
    seen: list[Frame] = []
    controller.actions.subscribe(own.append)
    lens.pipe(sl.uw_ratio()).subscribe(controller)
    lens.pipe(sl.topic("learning_rate.action")).subscribe(seen.append)
    train(model, optimizer, 2)
    assert [(f.topic, f.step, float(f[""])) for f in seen] == [
        ("learning_rate.action", 0, 0.5),
        ("learning_rate.action", 1, 0.25),
    ]
    assert own == seen
    assert seen[1].meta["old"] == 0.5
    assert seen[1].meta["new"] == 0.25
    assert "asked for 0.25 of uw_ratio" in seen[1].meta["cause"]
    assert seen[1].meta["text"].startswith("act(halve) set learning_rate from 0.5 to 0.25: ")
    lens.close()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_value_in_any_layer_holds(bad: float) -> None:
    model, optimizer, lens = observed(on_error="raise")
    controller = control.act(halve)

    def spoil(ratios: Tensor, weights: Tensor) -> Tensor:
        spoilt = ratios.clone()
        if lens.current_step == 1:
            spoilt[-1] = bad
        return spoilt

    chain = sl.combine(sl.norm("weight_updates"), sl.norm("weights"), fn=spoil, name="spoilt")
    lens.pipe(chain).subscribe(controller)
    assert train(model, optimizer, 3) == [0.5, 0.5, 0.25]
    assert controller.held == 1
    assert "1 frames were no input" in lens.explain()
    lens.close()


def test_a_frame_that_lacks_a_layer_holds_and_one_of_other_layers_does_not() -> None:
    controller = control.act(halve, read=lambda: 8.0, write=lambda _: None, name="other")
    actions: list[int] = []
    controller.actions.subscribe(lambda frame: actions.append(frame.step))
    source: Subject[Frame] = Subject()
    source.subscribe(controller)
    for step, layers in enumerate([("a", "b"), ("a",), ("c",), (), ("a", "b")]):
        source.on_next(Frame("x", step, layers, torch.ones(len(layers))))
    assert controller.held == 2
    assert len(actions) == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda: control.act(halve, dry_run=True),
        lambda: control.RatioLR(mode="current", dry_run=True),
        lambda: control.RatioLR(per_layer=True, dry_run=True),
        lambda: control.SetRate(dry_run=True),
    ],
)
def test_a_dry_run_leaves_training_bit_identical_and_says_what_it_would_do(
    make: Callable[[], control.Controller],
) -> None:
    alone = small_model()
    train(alone, torch.optim.SGD(alone.parameters(), lr=1.0), 5)
    model, optimizer, lens = observed(on_error="raise")
    controller = make()
    said: list[Frame] = []
    controller.actions.subscribe(said.append)
    chain: tuple[Any, ...] = (sl.uw_ratio(),)
    if isinstance(controller, control.SetRate):
        chain = (control.scheduled(control.ExponentialDecay(0.5, 0.5)),)
    lens.pipe(*chain).subscribe(controller)
    assert set(train(model, optimizer, 5)) == {1.0}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    assert len(said) == 5
    assert said[0].meta["dry_run"] is True
    assert " would set " in said[0].meta["text"]
    lens.close()


def test_two_controllers_of_one_rate_are_an_error_at_subscribe() -> None:
    model, optimizer, lens = observed()
    first = lens.pipe(sl.uw_ratio()).subscribe(control.act(halve))
    with pytest.raises(sl.StreamlensError, match=r"RatioLR would steer the learning rate that act\(halve\)"):
        lens.pipe(sl.uw_ratio()).subscribe(control.RatioLR())
    with pytest.raises(sl.StreamlensError, match="steers already"):
        lens.pipe(sl.uw_ratio()).subscribe(control.RatioLR(optimizer))
    lens.pipe(sl.uw_ratio()).subscribe(control.RatioLR(dry_run=True))
    lens.pipe(sl.uw_ratio()).subscribe(control.RatioLR(per_layer=True))
    first.dispose()
    lens.pipe(sl.uw_ratio()).subscribe(control.RatioLR())
    lens.close()
    del model  # it was observed until here


def test_controllers_of_two_optimizers_do_not_meet() -> None:
    model, _, lens = observed()
    body = torch.optim.SGD(model[0].parameters(), lr=0.1)  # type: ignore[index]
    head = torch.optim.SGD(model[2].parameters(), lr=0.1)  # type: ignore[index]
    lens.pipe(sl.uw_ratio()).subscribe(control.RatioLR(body))
    lens.pipe(sl.uw_ratio()).subscribe(control.RatioLR(head))
    with pytest.raises(sl.StreamlensError, match="steers already"):
        lens.pipe(sl.uw_ratio()).subscribe(control.SetRate(head))
    lens.close()


def test_two_controllers_of_one_rate_meet_also_where_their_streams_are_of_two_runs() -> None:
    model, optimizer, lens = observed()
    of_a_part = sl.observe(model[0])  # type: ignore[index]
    source: Subject[Frame] = Subject()
    first = lens.pipe(sl.uw_ratio()).subscribe(control.RatioLR())
    with pytest.raises(sl.StreamlensError, match="SetRate would steer the learning rate that RatioLR steers"):
        control.SetRate(optimizer).attach(sl.runtime.Runtime(), sl.chain.Chain("x", "x"))
    with pytest.raises(sl.StreamlensError, match="RatioLR would steer the learning rate that RatioLR steers"):
        of_a_part.pipe(sl.uw_ratio()).subscribe(control.RatioLR())
    other = torch.optim.SGD(small_model().parameters(), lr=0.1)
    lens.pipe(sl.uw_ratio()).subscribe(control.RatioLR(dry_run=True))
    source.subscribe(control.SetRate(other))
    source.on_next(Frame("x", 0, ("a",), torch.tensor([0.5])))
    assert other.param_groups[0]["lr"] == 0.5
    source.on_completed()
    first.dispose()
    of_a_part.pipe(sl.uw_ratio()).subscribe(control.RatioLR())
    of_a_part.close()
    lens.close()


def test_one_controller_ends_one_chain_and_is_free_again_after_it() -> None:
    model, _, lens = observed()
    controller = control.RatioLR()
    subscription = lens.pipe(sl.uw_ratio()).subscribe(controller)
    with pytest.raises(sl.StreamlensError, match="ends a chain already"):
        lens.pipe(sl.uw_ratio()).subscribe(controller)
    subscription.dispose()
    lens.pipe(sl.uw_ratio()).subscribe(controller)
    lens.close()
    del model


def test_it_acts_no_more_once_its_subscription_is_disposed() -> None:
    model, optimizer, lens = observed(on_error="raise")
    subscription = lens.pipe(sl.uw_ratio()).subscribe(control.act(halve))
    train(model, optimizer, 1)
    subscription.dispose()
    assert train(model, optimizer, 2) == [0.5, 0.5]
    lens.close()


def test_a_scheduler_that_overwrites_the_rate_is_reported_once_and_has_its_way() -> None:
    model, optimizer, lens = observed()
    reports: list[str] = []
    lens.errors.subscribe(lambda report: reports.append(str(report)))
    controller = control.act(halve)
    lens.pipe(sl.uw_ratio()).subscribe(controller)
    rates = []
    for _ in steps_of(model, optimizer, 4):
        optimizer.param_groups[0]["lr"] = 0.7  # what a scheduler does after each update
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.7] * 4
    assert optimizer.param_groups[0]["lr"] == 0.7
    assert len(reports) == 1
    assert "it had set the learning rate to 0.5 and found 0.7" in reports[0]
    assert controller.standing_back
    lens.close()


def test_a_plan_calls_a_function_by_its_name() -> None:
    def halve(frame: Frame, rate: float) -> float:
        return rate / 2

    model = small_model()
    with sl.observe(model) as lens:
        lens.pipe(sl.norm("weights")).subscribe(control.act(halve))
        assert "ends in act(halve)" in lens.explain()


def test_a_function_that_raises_or_gives_no_number_changes_nothing_and_is_reported() -> None:
    model, optimizer, lens = observed()
    reports: list[str] = []
    lens.errors.subscribe(lambda report: reports.append(str(report)))
    answers: list[Any] = ["fast", None, math.nan, 0.25]
    lens.pipe(sl.uw_ratio()).subscribe(control.act(lambda frame, rate: answers.pop(0)))
    assert train(model, optimizer, 5) == [1.0, 1.0, 1.0, 0.25, 0.25]
    assert "gave 'fast', which is no number" in reports[0]
    assert "IndexError" in reports[1]
    lens.close()


def test_on_a_lagging_device_values_are_those_of_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attachment, "lagging", lambda frame: True)
    model, optimizer, lens = observed(on_error="raise")
    steps: list[int] = []

    def rule(frame: Frame, rate: float) -> float:
        steps.append(frame.step)
        return rate / 2

    lens.pipe(sl.uw_ratio()).subscribe(control.act(rule))
    assert train(model, optimizer, 3) == [1.0, 0.5, 0.25]
    assert steps == [0, 1]
    lens.close()


def test_gradient_controllers_act_before_the_gradients_are_taken() -> None:
    class Half(control.GradientController):
        def scales(self, gradients: Any, optimizer: Optimizer) -> dict[str, Tensor]:
            return {name: torch.tensor(0.5) for name in gradients}

        def propose(self, frame: Frame, noted: Any) -> None:
            return None

        def apply(self, decision: control.Decision) -> None: ...

    def gradients(controller: control.Controller | None, *, closure: bool) -> tuple[list[float], Tensor]:
        model, optimizer, lens = observed(on_error="raise")
        norms: list[float] = []
        lens.pipe(sl.norm("weight_gradients")).subscribe(lambda frame: norms.append(float(frame["0"])))
        if controller is not None:
            lens.pipe(sl.norm("weight_gradients")).subscribe(controller)

        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(torch.ones(2, 4)).square().sum()
            loss.backward()
            return loss

        if closure:
            optimizer.step(evaluate)  # type: ignore[arg-type] # a loss is a tensor in practice
        else:
            evaluate()
            optimizer.step()
        lens.close()
        return norms, model[0].weight.detach() - small_model()[0].weight.detach()  # type: ignore[index,operator]

    for closure in (False, True):
        (full,), change = gradients(None, closure=closure)
        (half,), smaller = gradients(Half(), closure=closure)
        (same,), unchanged = gradients(Half(dry_run=True), closure=closure)
        assert half == pytest.approx(full / 2)
        assert torch.allclose(smaller, change / 2, atol=1e-6)
        assert same == full
        assert torch.equal(unchanged, change)
    with pytest.raises(sl.StreamlensError, match="acts on gradients, and a stream without a model"):
        sl.stream.Stream(None, plan=("x",), runtime=sl.runtime.Runtime()).subscribe(Half())


def test_what_comes_before_an_update_is_acted_on_after_it() -> None:
    model, optimizer, lens = observed(on_error="raise")
    criterion = lens.watch_loss(nn.functional.mse_loss)
    used: list[float] = []
    lens.pipe(sl.topic("learning_rate")).subscribe(lambda frame: used.append(float(frame["0"])))
    lens.pipe(sl.topic("loss")).subscribe(control.act(halve))
    rates = []
    for _ in range(2):
        optimizer.zero_grad()
        for _ in range(2):
            criterion(model(torch.ones(2, 4)), torch.ones(2, 3)).backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [1.0, 0.25, 0.25, 0.0625]
    assert used == [1.0, 0.25]
    lens.close()


def test_what_waits_for_an_update_is_part_of_a_snapshot() -> None:
    def half_a_step(model: nn.Module, lens: sl.Lens) -> None:
        lens.watch_loss(nn.functional.mse_loss)(model(torch.ones(2, 4)), torch.ones(2, 3)).backward()

    model, optimizer, lens = observed(on_error="raise")
    controller = control.act(halve)
    lens.pipe(sl.topic("loss")).subscribe(controller)
    half_a_step(model, lens)
    saved = copy.deepcopy(lens.state_dict())
    lens.close()
    model, optimizer, lens = observed(on_error="raise")
    lens.pipe(sl.topic("loss")).subscribe(control.act(halve))
    lens.load_state_dict(saved)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    lens.close()

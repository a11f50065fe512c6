"""Controllers beside each other, and beside a scheduler: one that steers, and the other says so."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, StepLR

import streamlens as sl
from streamlens import control
from tests._runs import small_model, steps_of
from tests.control._cases import CASES, CONTROLLERS, Case

STEERED: dict[str, set[str]] = {
    "ClipAt": {"gradients"},
    "FixedRatio": {"gradients", "steps", "rate"},
    "Freeze": {"freezing"},
    "NoiseScaleBatch": {"batch size"},
    "RatioLR": {"rate"},
    "RatioLR per layer": {"steps"},
    "ReduceOnPlateau": {"rate"},
    "Rollback": {"weights", "rate"},
    "SetRate": {"rate"},
    "Stop": set(),
    "act": {"rate"},
}
"""What each of them changes of a run, by hand."""


def case_of(name: str) -> Case:
    """A case of it, with the optimizer that all of them take."""
    if name == "NoiseScaleBatch":
        return Case(lambda **o: control.NoiseScaleBatch(16, lambda size: None, high=512, **o))
    known, _, variant = name.partition(" ")
    return CASES[known][{"": 0, "current": 1, "per layer": 2}[variant]]


def test_of_every_controller_it_is_said_here_what_it_steers() -> None:
    assert set(CONTROLLERS) <= set(STEERED)


@pytest.mark.parametrize("named", [False, True], ids=["all optimizers", "named"])
@pytest.mark.parametrize(
    ("first", "second"), itertools.product(STEERED, repeat=2), ids=lambda name: name.replace(" ", "_")
)
def test_two_that_steer_one_thing_are_an_error_and_no_others(first: str, second: str, named: bool) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {}
    if named and second in ("ClipAt", "FixedRatio", "RatioLR", "ReduceOnPlateau", "SetRate", "act"):
        options["optimizer"] = optimizer
    with sl.observe(model, on_error="raise", emits=["number"]) as lens:
        lens.pipe(*case_of(first).chain).subscribe(case_of(first).make())
        lens.pipe(*case_of(second).chain).subscribe(case_of(second).make(dry_run=True))
        try:
            lens.pipe(*case_of(second).chain).subscribe(case_of(second).make(**options))
        except sl.StreamlensError as error:
            refused = str(error)
        else:
            refused = ""
        assert bool(refused) == bool(STEERED[first] & STEERED[second]), refused
        if refused:
            assert " steers already: " in refused
            assert "dispose that one's subscription" in refused
        # It says so before it has changed anything: training goes on.
        list(steps_of(model, optimizer, 1))


OF_RATES = ["RatioLR", "RatioLR current", "ReduceOnPlateau", "SetRate", "act"]


def rates_under(name: str | None, scheduler: Any, steps: int = 8) -> tuple[list[float], list[str], list[int]]:
    """The rate that each update had, what was reported, and the steps at which the controller acted."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = scheduler(optimizer)
    rates, reports, actions = list[float](), list[str](), list[int]()
    with sl.observe(model, emits=["number"]) as lens:
        lens.errors.subscribe(lambda report: reports.append(str(report)))
        case = None if name is None else case_of(name)
        if case is not None:
            controller = case.make()
            controller.actions.subscribe(lambda frame: actions.append(frame.step))
            lens.pipe(*case.chain).subscribe(controller)
        for step in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            list(steps_of(model, optimizer, 1, seed=step))
            if case is not None and case.emitted is not None:
                lens.emit("number", case.emitted(step))
            schedule.step()
    return rates, reports, actions


@pytest.mark.parametrize("name", OF_RATES)
@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: LambdaLR(optimizer, lambda step: 0.9**step),
        lambda optimizer: CosineAnnealingLR(optimizer, T_max=8),
        lambda optimizer: StepLR(optimizer, step_size=1, gamma=0.9),
    ],
    ids=["LambdaLR", "CosineAnnealingLR", "StepLR"],
)
def test_a_scheduler_that_sets_the_rate_too_is_reported_once_and_has_its_way(
    name: str, scheduler: Any
) -> None:
    alone, _, _ = rates_under(None, scheduler)
    rates, reports, actions = rates_under(name, scheduler)
    (report,) = reports
    assert "stands back: it had set the learning rate to " in report
    assert "a scheduler, or the training loop, sets it too; use one of them" in report
    # It acted before the scheduler had changed what it had set, and never again.
    assert len(actions) == 1
    changes = [after / before for before, after in itertools.pairwise(rates)]
    left = actions[0] + 1
    assert changes[left:] == pytest.approx([b / a for a, b in itertools.pairwise(alone)][left:])


def test_scaling_steps_leaves_the_rate_to_a_scheduler() -> None:
    def scheduler(optimizer: Any) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: 0.9**step)

    rates, reports, actions = rates_under("RatioLR per layer", scheduler)
    assert rates == rates_under(None, scheduler)[0]
    assert reports == []
    assert actions[0] == 0
    assert actions[-1] == 7

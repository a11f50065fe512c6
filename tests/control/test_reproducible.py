"""The same seed gives the same actions and parameters, under every controller, interrupted or not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import streamlens as sl
from streamlens.control import _attachment
from tests._runs import same, small_model, steps_of
from tests.control._cases import CASES, CONTROLLERS, Case

STEPS = 9

ALL = [pytest.param(case, id=f"{name}-{i}") for name in CASES for i, case in enumerate(CASES[name])]


def test_every_controller_that_is_exported_has_a_case() -> None:
    missing = sorted(set(CONTROLLERS) - set(CASES))
    assert not missing, f"{missing}: give each a run in which it acts, in CASES of tests/control/_cases.py"
    assert set(CASES) <= set(CONTROLLERS)


def told(action: sl.Frame) -> tuple[Any, ...]:
    meta = action.meta
    return action.topic, action.step, action.layers, meta["old"], meta["new"], meta["text"]


def run(case: Case | None, *parts: range, **options: Any) -> tuple[list[Any], dict[str, Any]]:
    """Train, each part in a process of its own as it were; the actions, and what is left in the end."""
    actions: list[Any] = []
    saved: dict[str, Any] = {}
    for part in parts:
        model = small_model()
        optimizer = (case.optimizer if case else options["optimizer"])(list(model.parameters()))
        lens = sl.observe(model, on_error="raise", emits=["number"])
        if case is not None:
            controller = case.make(**options)
            controller.actions.subscribe(lambda f: actions.append(told(f)))
            lens.pipe(*case.chain).subscribe(controller)
        if saved:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            lens.load_state_dict(saved["lens"])
        stopped = False
        for step in part:
            list(steps_of(model, optimizer, 1, seed=step))
            if case is not None and case.emitted is not None:
                lens.emit("number", case.emitted(step))
            stopped = lens.should_stop
        saved = copy.deepcopy(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "lens": lens.state_dict()}
        )
        saved["stopped"] = stopped
        saved["trained"] = [p.requires_grad for p in model.parameters()]
        lens.close()
    # Every run has a name of its own.
    del saved["lens"]["run_id"]
    return actions, saved


@pytest.mark.parametrize("lag", [False, True], ids=["at once", "lagging"])
@pytest.mark.parametrize("case", ALL)
def test_actions_and_parameters_are_the_same_to_the_bit_again_and_interrupted_anywhere(
    case: Case, lag: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_attachment, "lagging", lambda frame: lag)
    actions, left = run(case, range(STEPS))
    assert actions
    again = run(case, range(STEPS))
    assert again[0] == actions
    assert same(again[1], left)
    # In front of the first action, between two, and after the last.
    for cut in (1, 5, 8):
        resumed = run(case, range(cut), range(cut, STEPS))
        assert resumed[0] == actions
        assert same(resumed[1], left)


@pytest.mark.parametrize("case", ALL)
def test_it_changes_the_run_and_a_dry_run_of_it_does_not_and_says_what_it_would_do(case: Case) -> None:
    _, alone = run(None, range(STEPS), optimizer=case.optimizer)
    _, steered = run(case, range(STEPS))
    said, dry = run(case, range(STEPS), dry_run=True)
    watched = ("model", "optimizer", "stopped", "trained")
    assert all(same(steered[key], alone[key]) for key in watched) == case.recommends
    assert all(same(dry[key], alone[key]) for key in watched)
    assert said


def test_lagging_values_come_one_update_later_under_every_controller_of_rates() -> None:
    """Nothing else differs: what a controller does with values does not depend on when they come."""
    case = CASES["RatioLR"][0]
    at_once, _ = run(case, range(STEPS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_attachment, "lagging", lambda frame: True)
        late, _ = run(case, range(STEPS))
    assert [action[1] for action in late] == [action[1] for action in at_once][1:]
    assert late[0][4] == at_once[0][4]


@pytest.mark.parametrize("case", ALL)
def test_its_state_is_plain_and_a_snapshot_that_later_steps_leave_alone(case: Case, tmp_path: Any) -> None:
    model = small_model()
    optimizer = case.optimizer(list(model.parameters()))
    with sl.observe(model, on_error="raise", emits=["number"]) as lens:
        lens.pipe(*case.chain).subscribe(case.make())
        for step in range(6):
            list(steps_of(model, optimizer, 1, seed=step))
            if case.emitted is not None:
                lens.emit("number", case.emitted(step))
            if step == 3:
                snapshot = lens.state_dict()
                kept = copy.deepcopy(snapshot)
    assert same(snapshot, kept)
    torch.save(snapshot, tmp_path / "lens.pt")
    assert same(torch.load(tmp_path / "lens.pt", weights_only=True), snapshot)

"""Interrupted and resumed is the same as uninterrupted: the clock and the state of every chain."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex import operators as ops
from torch import Tensor

import streamlens as sl
from streamlens.frame import Frame
from tests.helpers.interrupting import Chains, Run

Chain = tuple[Any, ...]


def totalled(total: Tensor, frame: Frame) -> Tensor:
    assert isinstance(frame.values, Tensor)
    return total + frame.values


STATEFUL: dict[str, Callable[[sl.Lens], Chain]] = {
    "ema": lambda lens: (sl.norm("weights"), sl.ema(0.8)),
    "ema by half-life, corrected": lambda lens: (
        sl.uw_ratio(),
        sl.ema(half_life=2, bias_correction=True),
    ),
    "ema of raw weights": lambda lens: (sl.topic("weights"), sl.ema(0.5)),
    "tumbling window": lambda lens: (sl.norm("weight_gradients"), sl.window(3)),
    "sliding window of a function": lambda lens: (
        sl.norm("weight_gradients"),
        sl.window(4, 2, reduce=lambda values: values.amax(0)),
    ),
    "window of windows": lambda lens: (sl.norm("weights"), sl.window(2), sl.every(2), sl.ema(0.5)),
    "per epoch": lambda lens: (sl.norm("weights"), sl.per_epoch()),
    "diff": lambda lens: (sl.norm("weights"), sl.diff(2)),
    "scan": lambda lens: (sl.norm("weights"), sl.scan(totalled)),
    "smooth": lambda lens: (sl.norm("weights"), sl.smooth(1.0)),
    "micro-steps averaged": lambda lens: (sl.norm("activations"), sl.per_step(), sl.ema(0.5)),
    "loss smoothed": lambda lens: (sl.topic("loss"), sl.ema(0.5)),
    "joined": lambda lens: (sl.ratio("weight_updates", "weights"), sl.ema(0.9), sl.window(2)),
    "through an operator of reactivex": lambda lens: (
        sl.norm("weights"),
        ops.filter(lambda frame: frame.step % 3 != 1),
        sl.ema(0.5),
    ),
}


def whole(chains: Chains, parts: list[int], micro_steps: int, epoch: int) -> Run:
    run = Run(chains, micro_steps)
    run.go_on(sum(parts), epoch)
    return run


@pytest.mark.filterwarnings("error")
@settings(max_examples=7, deadline=None, derandomize=True)
@given(
    parts=st.lists(st.integers(0, 5), min_size=2, max_size=4),
    micro_steps=st.integers(1, 3),
    epoch=st.integers(1, 4),
    late=st.booleans(),
)
def test_interrupted_and_resumed_is_uninterrupted(
    parts: list[int], micro_steps: int, epoch: int, late: bool
) -> None:
    expected = whole(STATEFUL, parts, micro_steps, epoch)
    run = Run(STATEFUL, micro_steps, subscribe_after_loading=late)
    for i, part in enumerate(parts):
        if i:
            run.interrupt()
        run.go_on(part, epoch)
    assert run.reports == []
    assert run.frames == expected.frames
    assert (run.lens.current_step, run.lens.epoch) == (expected.lens.current_step, expected.lens.epoch)
    run.lens.close()
    expected.lens.close()


@pytest.mark.parametrize("label", list(STATEFUL))
def test_every_chain_with_state_needs_its_state_to_go_on(label: str) -> None:
    """Without loading it the frames differ: the property above is no accident."""
    chains = {label: STATEFUL[label]}
    expected = whole(chains, [5, 6], 1, 4)
    run = Run(chains)
    run.go_on(5, 4)
    state = copy.deepcopy(run.lens.state_dict())
    run.interrupt()
    forgetful = run.lens.state_dict()
    assert forgetful["chains"].keys() == state["chains"].keys()
    run.lens.load_state_dict({**state, "chains": {}})
    run.lens.close()
    run.start(None)
    run.lens.load_state_dict({**state, "chains": {}})
    run.go_on(6, 4)
    assert run.frames != expected.frames


def test_the_state_is_plain_containers_and_tensors() -> None:
    run = Run(STATEFUL)
    run.go_on(5, 3)
    state = run.lens.state_dict()

    def check(value: Any) -> None:
        assert type(value) in {dict, list, tuple, str, int, float, bool, type(None), Tensor}, type(value)
        if isinstance(value, dict):
            assert all(type(key) in {str, int} for key in value)
            for entry in value.values():
                check(entry)
        elif isinstance(value, list | tuple):
            for entry in value:
                check(entry)

    check(state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    torch.load(file, weights_only=True)
    run.lens.close()


def test_taking_a_snapshot_changes_nothing_and_the_run_does_not_change_it() -> None:
    expected = whole(STATEFUL, [4, 4], 1, 3)
    run = Run(STATEFUL)
    run.go_on(4, 3)
    snapshot = run.lens.state_dict()
    frozen = io.BytesIO()
    torch.save(snapshot, frozen)
    run.go_on(4, 3)
    later = io.BytesIO()
    torch.save(snapshot, later)
    assert run.frames == expected.frames
    assert frozen.getvalue() == later.getvalue(), "the snapshot is of its moment, however long it is kept"
    run.lens.close()
    expected.lens.close()

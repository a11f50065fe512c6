from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamlens.errors import StreamlensError
from streamlens.frame import Frame, Kind
from streamlens.operators import per_step
from tests.operators.support import NUMBERS, Run, as_dicts, assert_same, flat, frame, ragged, resumed, run

STEPS = st.lists(st.lists(NUMBERS, min_size=1, max_size=4), max_size=5)


def micro_steps(steps: list[list[float]]) -> list[Frame]:
    return [
        frame(step, {"a": x} if micro % 2 else {"a": x, "b": -x}, micro_step=micro, kind=Kind.MICRO_STEP)
        for step, numbers in enumerate(steps)
        for micro, x in enumerate(numbers)
    ]


@given(STEPS)
def test_on_a_plain_stream_equals_the_mean_of_each_step(steps: list[list[float]]) -> None:
    out = run(per_step(), micro_steps(steps))
    wanted = {(s, "a"): statistics.fmean(xs) for s, xs in enumerate(steps)}
    wanted |= {(s, "b"): statistics.fmean(-x for x in xs[::2]) for s, xs in enumerate(steps)}
    assert_same(flat(out), wanted)
    assert all(f.kind is Kind.STEP and f.micro_step == len(steps[f.step]) - 1 for f in out)


@given(STEPS, st.integers(0, 20))
def test_interrupted_and_resumed_equals_uninterrupted(steps: list[list[float]], at: int) -> None:
    frames = micro_steps(steps)
    got = resumed(per_step, frames, min(at, len(frames)))
    assert_same(flat(got), flat(run(per_step(), frames)), rel=0, abs_=0)


def test_on_a_run_the_update_completes_a_step() -> None:
    training = Run()
    out: list[Frame] = []
    training.stream(Kind.MICRO_STEP).pipe(per_step()).subscribe(out.append)
    training.push(*micro_steps([[1.0, 3.0]]))
    assert not out
    training.update(0)
    assert as_dicts(out) == [(0, {"a": 2.0, "b": -1.0})]


def test_ragged_frames_are_averaged_layer_by_layer() -> None:
    frames = [
        ragged(0, {"a": torch.full((2,), x), "b": torch.full((3,), -x)}, micro_step=int(x))
        for x in (1.0, 3.0)
    ]
    (out,) = run(per_step(), frames)
    assert [v.tolist() for v in out.values] == [[2.0, 2.0], [-2.0, -2.0, -2.0]]


def test_events_pass() -> None:
    event = frame(3, {"": 1.0}, kind=Kind.EVENT)
    assert run(per_step(), [event], complete=False) == [event]


def test_raw_micro_steps_of_a_run_are_refused_when_applied() -> None:
    with pytest.raises(StreamlensError, match="reduce them first"):
        Run().stream(Kind.MICRO_STEP, raw=True).pipe(per_step())

"""Bounds and slew hold under any sequence of inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex.subject import Subject
from torch import nn

from streamlens import control
from streamlens.frame import Frame

anything = st.floats(allow_nan=True, allow_infinity=True)


@given(wanted=st.lists(anything, max_size=30), start=st.floats(1e-3, 1e3), slew=st.floats(1.01, 100))
def test_a_value_stays_within_its_bounds_and_moves_no_faster_than_it_may(
    wanted: list[float], start: float, slew: float
) -> None:
    bounds = control.Bounds(1e-3, 1e3, slew)
    value = start
    for number in wanted:
        before, value = value, bounds.limit(value, number)
        assert 1e-3 <= value <= 1e3
        assert before / slew * (1 - 1e-12) <= value <= before * slew * (1 + 1e-12)
        if not math.isfinite(number):
            assert value == before


def test_bounds_come_before_slew_where_the_value_starts_outside() -> None:
    assert control.Bounds(0.1, 1.0, 2.0).limit(100.0, 50.0) == 1.0
    assert control.Bounds(0.1, 1.0).limit(0.5, 0.7) == 0.7


@settings(max_examples=30, deadline=None)
@given(
    ratios=st.lists(st.lists(anything, min_size=2, max_size=2), max_size=20),
    mode=st.sampled_from(["base", "current"]),
)
def test_rates_of_ratio_lr_stay_within_bounds_and_slew_under_any_ratios(
    ratios: list[list[float]], mode: str
) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    controller = control.RatioLR(
        optimizer,
        mode=mode,  # type: ignore[arg-type]
        min_lr=1e-3,
        max_lr=0.5,
        slew_limit=1.5,
    )
    source: Subject[Frame] = Subject()
    source.subscribe(controller)
    for step, values in enumerate(ratios):
        before = optimizer.param_groups[0]["lr"]
        source.on_next(Frame("uw_ratio", step, ("a", "b"), torch.tensor(values, dtype=torch.float64)))
        now = optimizer.param_groups[0]["lr"]
        assert 1e-3 <= now <= 0.5
        assert before / 1.5 * (1 - 1e-12) <= now <= before * 1.5 * (1 + 1e-12)
        if not all(map(math.isfinite, values)):
            assert now == before
    source.on_completed()


@given(wanted=st.lists(anything, max_size=20))
@settings(max_examples=30, deadline=None)
def test_set_rate_and_act_obey_their_bounds_under_any_input(wanted: list[float]) -> None:
    first = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    second = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    source: Subject[Frame] = Subject()
    source.subscribe(control.SetRate(first, min_lr=0.01, max_lr=1.0, slew_limit=2.0))
    source.subscribe(
        control.act(lambda f, _: float(f["a"]), optimizer=second, low=0.01, high=1.0, slew_limit=2.0)
    )
    rates = [0.1]
    for step, number in enumerate(wanted):
        source.on_next(Frame("x", step, ("a",), torch.tensor([number], dtype=torch.float64)))
        rates.append(first.param_groups[0]["lr"])
        assert rates[-1] == second.param_groups[0]["lr"]
        assert 0.01 <= rates[-1] <= 1.0
        assert rates[-2] / 2 <= rates[-1] <= rates[-2] * 2
    source.on_completed()


@pytest.mark.parametrize(("low", "high", "slew"), [(1.0, 1.0, None), (0.0, 1.0, 1.0), (0.0, 1.0, math.inf)])
def test_bounds_that_make_no_sense_are_refused(low: float, high: float, slew: float | None) -> None:
    with pytest.raises(ValueError, match="bounds: the "):
        control.Bounds(low, high, slew)

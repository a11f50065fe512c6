"""Bounds and slew hold under any sequence of inputs."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex.subject import Subject
from torch import Tensor, nn
from torch.optim import Optimizer

import streamlens as sl
from streamlens import control
from streamlens.frame import Frame
from tests.control._cases import CONTROLLERS

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


def rates_under(make: Callable[[Optimizer], control.Controller]) -> Callable[[list[float]], list[float]]:
    """The rates that a controller sets, given one number a frame."""

    def drive(numbers: list[float]) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        source: Subject[Frame] = Subject()
        source.subscribe(make(optimizer))
        rates = [0.1]
        for step, number in enumerate(numbers):
            source.on_next(Frame("x", step, ("a",), torch.tensor([number], dtype=torch.float64)))
            rates.append(optimizer.param_groups[0]["lr"])
        source.on_completed()
        return rates

    return drive


def under_gradients(
    make: Callable[[], control.Controller], read: Callable[[Any], Tensor], start: list[float]
) -> Callable[[list[float]], list[float]]:
    """What a controller of gradients steers, given the gradient of each step."""

    def drive(numbers: list[float]) -> list[float]:
        model = nn.Linear(1, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        values = list(start)
        with sl.observe(model, on_error="raise") as lens:
            controller = make()
            lens.pipe(sl.norm("weight_gradients")).subscribe(controller)
            for number in numbers:
                nn.init.ones_(model.weight)
                optimizer.zero_grad()
                model(torch.tensor([[number]])).sum().backward()
                optimizer.step()
                value = float(read(controller))
                # A limit is infinite before the first norm.
                values += [value] if math.isfinite(value) else []
        return values

    return drive


def batch_sizes(numbers: list[float]) -> list[float]:
    """Batch sizes, of which a hundred is 1, under noise scales."""
    controller = control.NoiseScaleBatch(10, low=1, high=100, slew_limit=SLEW)
    source: Subject[Frame] = Subject()
    source.subscribe(controller)
    sizes = [10]
    for step, number in enumerate(numbers):
        source.on_next(Frame("x", step, ("",), torch.tensor([100 * number], dtype=torch.float64)))
        sizes.append(controller.batch_size)
    source.on_completed()
    return [size / 100 for size in sizes]


LOW, HIGH, SLEW = 0.01, 1.0, 2.0
_RATES: dict[str, Any] = {"min_lr": LOW, "max_lr": HIGH, "slew_limit": SLEW}

STEERED: dict[str, list[Callable[[list[float]], list[float]]]] = {
    "ClipAt": [
        under_gradients(
            lambda: control.ClipAt(50, window=3, min_norm=LOW, max_norm=HIGH, slew_limit=SLEW),
            lambda controller: controller.histories["weight"]["limit"],
            [],
        )
    ],
    "FixedRatio": [
        under_gradients(
            lambda: control.FixedRatio(1e-2, min_scale=LOW, max_scale=HIGH, slew_limit=SLEW),
            lambda controller: controller.scales_now[""],
            [1.0],
        )
    ],
    "NoiseScaleBatch": [batch_sizes],
    "RatioLR": [
        rates_under(lambda optimizer: control.RatioLR(optimizer, mode="base", **_RATES)),
        rates_under(lambda optimizer: control.RatioLR(optimizer, mode="current", **_RATES)),
    ],
    "ReduceOnPlateau": [
        rates_under(lambda optimizer: control.ReduceOnPlateau(optimizer, patience=0, factor=0.1, **_RATES))
    ],
    "SetRate": [rates_under(lambda optimizer: control.SetRate(optimizer, **_RATES))],
    "act": [
        rates_under(
            lambda optimizer: control.act(
                lambda frame, _: float(frame["a"]), optimizer=optimizer, low=LOW, high=HIGH, slew_limit=SLEW
            )
        )
    ],
}
"""What each controller with a slew limit steers, over steps."""


def test_every_controller_with_a_slew_limit_is_held_to_it_here() -> None:
    limited = {
        name for name in CONTROLLERS if "slew_limit" in inspect.signature(getattr(control, name)).parameters
    }
    assert limited == set(STEERED), "give each a place in STEERED"


@pytest.mark.parametrize("drive", [pytest.param(d, id=name) for name in STEERED for d in STEERED[name]])
@settings(max_examples=20, deadline=None)
@given(numbers=st.lists(anything, max_size=12))
def test_what_is_steered_keeps_its_bounds_and_its_slew_whatever_comes(
    drive: Callable[[list[float]], list[float]], numbers: list[float]
) -> None:
    values = drive(numbers)
    assert all(LOW <= value <= HIGH for value in values)
    for before, now in itertools.pairwise(values):
        assert before / SLEW * (1 - 1e-12) <= now <= before * SLEW * (1 + 1e-12)


@pytest.mark.parametrize("drive", [pytest.param(d, id=name) for name in STEERED for d in STEERED[name]])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_steered_stays_where_it_was_at_a_number_that_is_none(
    drive: Callable[[list[float]], list[float]], bad: float
) -> None:
    *_, before = drive([0.5, 0.02])
    *_, now = drive([0.5, 0.02, bad])
    assert now == before


def numbers_of(low: float, high: float) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(low, high) | st.sampled_from([math.nan, math.inf, -math.inf]), min_size=1)


@given(old=numbers_of(1e-3, 1e3), wanted=numbers_of(0, 1e6), slew=st.none() | st.floats(1.01, 100))
def test_tensors_are_limited_as_numbers_are(
    old: list[float], wanted: list[float], slew: float | None
) -> None:
    pairs = list(zip(old, wanted, strict=False))
    bounds = control.Bounds(1e-2, 1e2, slew)
    expected = torch.tensor([bounds.limit(a, b) for a, b in pairs], dtype=torch.float64)
    a, b = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    assert torch.equal(bounds.limit_each(a, b).nan_to_num(-1), expected.nan_to_num(-1))


@pytest.mark.parametrize(("low", "high", "slew"), [(1.0, 1.0, None), (0.0, 1.0, 1.0), (0.0, 1.0, math.inf)])
def test_bounds_that_make_no_sense_are_refused(low: float, high: float, slew: float | None) -> None:
    with pytest.raises(ValueError, match="bounds: the "):
        control.Bounds(low, high, slew)


def test_bounds_that_are_no_numbers_are_refused_with_what_they_are() -> None:
    with pytest.raises(TypeError, match="the slew limit are numbers"):
        control.RatioLR(max_lr="1")  # type: ignore[arg-type]

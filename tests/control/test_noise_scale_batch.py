"""`NoiseScaleBatch` against arithmetic by hand, and at the end of the operator that it is for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex.subject import Subject
from torch import nn

import streamlens as sl
from streamlens import control
from streamlens.frame import Frame
from tests._runs import same, small_model


def feed(controller: control.Controller, scales: list[float]) -> list[Frame]:
    """Noise scales of a model, one a step; the actions."""
    actions: list[Frame] = []
    source: Subject[Frame] = Subject()
    actions_of = controller.actions.subscribe(actions.append)
    source.subscribe(controller)
    for step, scale in enumerate(scales):
        source.on_next(Frame("gradient_noise_scale", step, ("",), torch.tensor([scale], dtype=torch.float64)))
    source.on_completed()
    actions_of.dispose()
    return actions


def test_sizes_are_those_of_arithmetic_by_hand() -> None:
    told: list[int] = []
    controller = control.NoiseScaleBatch(
        32, told.append, low=16, high=256, multiple_of=16, share=0.5, tolerance=1.3
    )
    #         half of it: 20 -> 32 (down, rounded up); 47 -> 32 (up, rounded down); 50 -> 48; 300 -> 96; 192;
    #         256; 300 is the same; 1 -> 128; 64; 32; 16; NaN and inf hold
    actions = feed(
        controller, [40.0, 94.0, 100.0, 600.0, 600.0, 600.0, 600.0, *[2.0] * 5, math.nan, math.inf]
    )
    assert told == [48, 96, 192, 256, 128, 64, 32, 16]
    assert [action.step for action in actions] == [2, 3, 4, 5, 7, 8, 9, 10]
    assert controller.batch_size == 16
    assert controller.held == 2
    assert actions[0].topic == "batch_size.action"
    assert actions[0].meta["text"] == (
        "NoiseScaleBatch set batch_size from 32 to 48: the gradient noise scale is 100 samples at step 2"
    )


def test_a_difference_within_the_tolerance_changes_nothing() -> None:
    controller = control.NoiseScaleBatch(100, high=1000, tolerance=1.25)
    assert not feed(controller, [124.0, 81.0])
    assert [a.meta["new"] for a in feed(controller, [125.0, 100.0])] == [125.0, 100.0]


def test_without_a_function_it_recommends_and_goes_on_from_there() -> None:
    controller = control.NoiseScaleBatch(10, high=1000)
    actions = feed(controller, [35.0, 35.0, 35.0])
    assert [action.meta["text"].partition(":")[0] for action in actions] == [
        "NoiseScaleBatch recommended a batch size of 20 instead of 10",
        "NoiseScaleBatch recommended a batch size of 35 instead of 20",
    ]
    assert controller.batch_size == 35


@settings(max_examples=60, deadline=None)
@given(
    scales=st.lists(st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 1e4), max_size=25),
    multiple_of=st.integers(1, 7),
    slew=st.floats(2, 5),
    tolerance=st.floats(1, 2),
)
def test_sizes_keep_to_bounds_multiples_and_slew_whatever_comes(
    scales: list[float], multiple_of: int, slew: float, tolerance: float
) -> None:
    low, high = 2 * multiple_of, 50 * multiple_of
    controller = control.NoiseScaleBatch(
        8 * multiple_of,
        low=low,
        high=high,
        multiple_of=multiple_of,
        slew_limit=slew,
        tolerance=tolerance,
    )
    for action in feed(controller, scales):
        old, new = action.meta["old"], action.meta["new"]
        assert low <= new <= high
        assert new % multiple_of == 0
        assert max(new / old, old / new) <= slew * (1 + 1e-12)
        assert max(new / old, old / new) >= tolerance
        assert math.isfinite(scales[action.step])


def train(lens: sl.Lens | None, model: nn.Module, steps: int = 6) -> None:
    """Two micro-batches an update."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(2):
            x, y = torch.randn(8, 4, generator=data), torch.randint(0, 3, (8,), generator=data)
            (nn.functional.cross_entropy(model(x), y) / 2).backward()
        optimizer.step()


@pytest.mark.parametrize("dry_run", [False, True])
def test_at_the_end_of_the_noise_scale_it_follows_the_models_and_leaves_training_bit_identical(
    dry_run: bool,
) -> None:
    alone, model = small_model(), small_model()
    train(None, alone)
    told: list[int] = []
    scales: list[float] = []
    with sl.observe(model, on_error="raise") as lens:
        controller = control.NoiseScaleBatch(16, told.append, high=512, tolerance=1.0, dry_run=dry_run)
        stream = lens.pipe(sl.gradient_noise_scale(0.5))
        stream.subscribe(lambda f: scales.append(float(f[""])) if f.layers == ("",) else None)
        stream.subscribe(controller)
        train(lens, model)
    size, expected = 16, []
    for scale in scales:
        if math.isfinite(scale):
            wanted = min(max(scale, size / 2), 2 * size)
            new = min(max(math.floor(wanted) if wanted > size else math.ceil(wanted), 1), 512)
            if new != size:
                expected.append(new)
                size = new
    assert expected
    assert told == ([] if dry_run else expected)
    assert controller.batch_size == (16 if dry_run else size)
    assert same([p.detach() for p in model.parameters()], [p.detach() for p in alone.parameters()])


def test_what_the_function_raises_is_reported_and_the_size_stays() -> None:
    def fail(size: int) -> None:
        raise RuntimeError("no such size")

    model = small_model()
    reports: list[str] = []
    with sl.observe(model, emits=["noise"]) as lens:
        lens.errors.subscribe(lambda report: reports.append(str(report)))
        controller = control.NoiseScaleBatch(16, fail, high=512)
        actions: list[Frame] = []
        controller.actions.subscribe(actions.append)
        lens.pipe(sl.topic("noise")).subscribe(controller)
        lens.emit("noise", 100.0)
    assert controller.batch_size == 16
    assert not actions
    assert "NoiseScaleBatch.apply" in reports[0]
    assert "no such size" in reports[0]


def test_a_snapshot_keeps_the_size() -> None:
    controller = control.NoiseScaleBatch(16, high=512)
    feed(controller, [100.0])
    other = control.NoiseScaleBatch(16, high=512)
    other.load_state_dict(controller.state_dict())
    assert other.batch_size == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0.*whole number from 1 on"),
        ({"batch_size": 6, "multiple_of": 4}, "batch_size=6.*a multiple of 4"),
        ({"high": 30, "multiple_of": 4}, "high=30.*a multiple of 4"),
        ({"multiple_of": 0}, "multiple_of=0"),
        ({"batch_size": 1024}, "from low=1 to high=512"),
        ({"share": 0.0}, "share=0.0.*above 0"),
        ({"share": -1.0}, "share=-1.0.*above 0"),
        ({"tolerance": 0.5}, "tolerance=0.5.*from 1 on"),
        ({"slew_limit": 1.5}, "slew_limit=1.5.*from 2 on"),
        ({"slew_limit": math.inf}, "slew_limit=inf"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        control.NoiseScaleBatch(**{"batch_size": 16, "high": 512, **options})


def test_what_is_no_function_is_named() -> None:
    with pytest.raises(TypeError, match="on_change=3"):
        control.NoiseScaleBatch(16, 3, high=512)  # type: ignore[arg-type]

"""Schedules as streams, and SetRate, against PyTorch's own schedulers."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR

import streamlens as sl
from streamlens import control
from tests._runs import small_model, steps_of


def test_exponential_decay_as_a_stream_is_exponential_lr() -> None:
    plain = small_model()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    scheduler = ExponentialLR(optimizer, gamma=0.9)
    for seed in range(5):
        list(steps_of(plain, optimizer, 1, seed=seed))
        scheduler.step()
    model = small_model()
    steered = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.observe(model, on_error="raise") as lens:
        stream = lens.pipe(control.scheduled(control.ExponentialDecay(0.1, 0.9)))
        stream.subscribe(control.SetRate())
        for seed in range(5):
            list(steps_of(model, steered, 1, seed=seed))
    assert steered.param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_schedule_is_for_the_step_that_comes() -> None:
    model = small_model()
    with sl.observe(model, on_error="raise") as lens:
        seen: list[tuple[str, int, float]] = []
        stream = lens.pipe(control.scheduled(lambda step: 10.0 * step))
        stream.subscribe(lambda f: seen.append((f.topic, f.step, float(f[""]))))
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 2))
    assert seen == [("schedule", 0, 10.0), ("schedule", 1, 20.0)]


def test_exponential_decay_stops_at_its_floor() -> None:
    assert control.ExponentialDecay(1.0, 0.5, floor=0.2)(1) == 0.5
    assert control.ExponentialDecay(1.0, 0.5, floor=0.2)(9) == 0.2


def test_wrong_schedules_are_named() -> None:
    with pytest.raises(ValueError, match="start=0"):
        control.ExponentialDecay(0, 0.5)
    with pytest.raises(ValueError, match="decay=2"):
        control.ExponentialDecay(1.0, 2)
    with pytest.raises(ValueError, match="floor=3"):
        control.ExponentialDecay(1.0, 0.5, 3)
    with pytest.raises(TypeError, match="takes a function of the step"):
        control.scheduled(0.1)  # type: ignore[arg-type]


def test_set_rate_takes_one_number() -> None:
    model = small_model()
    with sl.observe(model) as lens:
        reports: list[str] = []
        lens.errors.subscribe(lambda report: reports.append(str(report)))
        lens.pipe(sl.uw_ratio()).subscribe(control.SetRate())
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=0.1), 1))
    assert "SetRate takes one number a frame, and 'uw_ratio' has more" in reports[0]

"""`sharpness`: 1 is where PyTorch's own SGD begins to diverge."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from reactivex.subject import Subject
from torch import Tensor, nn

import streamlens as sl
from streamlens.frame import Frame
from streamlens.operators import sharpness
from tests.helpers.curvature import classification, eigenvalues, exact_hessian, nets
from tests.helpers.recording import observed, record

LOSS = nn.CrossEntropyLoss()
BATCH = classification((6,))


def taken(model: nn.Module, *frames: Frame, **options: Any) -> list[Frame]:
    source: Subject[Frame] = Subject()
    got: list[Frame] = []
    source.pipe(sharpness(model=model, **{"loss": LOSS, "batch": BATCH, **options})).subscribe(got.append)
    for frame in frames or (Frame("when", 0, ("",), torch.zeros(1)),):
        source.on_next(frame)
    return got


def number(frame: Frame) -> float:
    assert isinstance(frame.values, Tensor)
    assert frame.values.shape == (1,)
    return float(frame.values[0])


def test_on_a_lens_it_is_the_largest_eigenvalue_times_half_the_rate_of_the_update() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    wanted = []
    with observed(model) as lens:
        frames = record(lens, sl.every(2), sharpness(loss=LOSS, batch=BATCH))
        for step in range(5):
            optimizer.zero_grad()
            LOSS(model(BATCH[0]), BATCH[1]).backward()
            optimizer.step()
            if step % 2 == 0:
                largest = float(eigenvalues(exact_hessian(model, LOSS, BATCH))[0])
                wanted.append((largest, 0.4 * 0.5**step))
            schedule.step()
    assert [(f.topic, f.step, f.layers) for f in frames] == [("sharpness", k, ("",)) for k in (0, 2, 4)]
    for frame, (largest, rate) in zip(frames, wanted, strict=True):
        assert number(frame) == pytest.approx(largest * rate / 2, rel=1e-3)
        assert frame.meta["eigenvalue"] == pytest.approx(largest, rel=1e-3)
        assert frame.meta["learning_rate"] == pytest.approx(rate)
        assert frame.meta["bound"] == pytest.approx(2 / rate)
        assert frame.meta["converged"] == 1


def test_where_groups_differ_the_largest_rate_counts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[2].parameters(), "lr": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    with observed(model) as lens:
        frames = record(lens, sharpness(loss=LOSS, batch=BATCH))
        LOSS(model(BATCH[0]), BATCH[1]).backward()
        optimizer.step()
    largest = float(eigenvalues(exact_hessian(model, LOSS, BATCH))[0])
    assert [number(f) for f in frames] == [pytest.approx(largest * 0.15, rel=1e-3)]


@pytest.mark.parametrize(
    ("momentum", "nesterov"), [(0.0, False), (0.5, False), (0.9, False), (0.5, True), (0.9, True)]
)
def test_one_is_where_sgd_begins_to_diverge(momentum: float, nesterov: bool) -> None:
    def error_after(lr: float) -> float:
        w = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr=lr, momentum=momentum, nesterov=nesterov)
        for _ in range(600):
            optimizer.zero_grad()
            (3 * w.square() / 2).sum().backward()
            optimizer.step()
        return abs(w.item())

    model = nn.Linear(1, 1, bias=False)
    batch = (torch.full((1, 1), math.sqrt(3)), torch.zeros(1, 1))
    (frame,) = taken(
        model,
        batch=batch,
        loss=lambda out, y: (out - y).square().mean() / 2,
        lr=1.0,
        momentum=momentum,
        nesterov=nesterov,
    )
    edge = 1 / number(frame)
    assert error_after(0.98 * edge) < 1e-3
    assert error_after(1.02 * edge) > 1e3


def test_a_stream_that_carries_rates_and_a_given_rate_agree() -> None:
    model, batch = nets()["tanh"]
    rates = Frame("learning_rate", 4, ("a", "b"), torch.tensor([0.1, 0.2]))
    (carried,) = taken(model, rates, Frame("learning_rate", 5, ("a",), torch.zeros(1)), batch=batch)[:1]
    (given,) = taken(model, batch=batch, lr=0.2)
    assert number(carried) == pytest.approx(number(given), rel=1e-6)
    assert carried.step == 4


def test_a_rate_of_zero_is_far_from_any_edge() -> None:
    (frame,) = taken(nn.Linear(6, 3), lr=0)
    assert number(frame) == 0
    assert frame.meta["bound"] == math.inf


def test_nan_weights_give_nan() -> None:
    model = nn.Linear(6, 3)
    nn.init.constant_(model.weight, math.nan)
    assert math.isnan(number(taken(model, lr=0.1)[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, r"sharpness\(lr=-0.1\): a learning rate is a number from 0 on"),
        ({"lr": math.inf}, r"sharpness\(lr=inf\)"),
        ({"momentum": 1.0}, r"sharpness\(momentum=1.0\): from 0 to below 1"),
        ({"products": 0}, r"^sharpness\(products=0\)"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sharpness(loss=LOSS, batch=BATCH, **options)


def test_a_lens_of_another_topic_has_no_rate_and_is_told_what_to_pass() -> None:
    model = nn.Linear(6, 3)
    with observed(model) as lens:
        with pytest.raises(sl.StreamlensError, match=r"selected epoch_finished.*pass lr="):
            lens.pipe(sl.topic("epoch_finished"), sharpness(loss=LOSS, batch=BATCH))
        frames = record(lens, sl.topic("epoch_finished"), sharpness(loss=LOSS, batch=BATCH, lr=0.5))
        LOSS(model(BATCH[0]), BATCH[1]).backward()
        torch.optim.SGD(model.parameters(), lr=0.5).step()
        lens.epoch_finished()
    assert len(frames) == 1

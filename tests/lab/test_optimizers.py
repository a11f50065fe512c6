"""Optimizers, schedules and seeds."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from streamlens.lab.optimizers import OPTIMIZERS, SCHEDULES, make_optimizer, make_schedule
from streamlens.lab.seeding import seed_everything


def parameters() -> list[nn.Parameter]:
    return list(nn.Conv2d(2, 3, 3).parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_on_offer_updates_every_parameter_of_a_plain_loop(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3)
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = make_optimizer(name, layer.parameters(), learning_rate=0.01)
    layer(torch.randn(2, 2, 5, 5)).square().sum().backward()
    optimizer.step()
    assert type(optimizer).__name__ == name
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert all(not torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True))


def test_the_usual_optimizers_are_on_offer() -> None:
    assert {"SGD", "Adam", "AdamW", "RMSprop", "Adagrad"} <= set(OPTIMIZERS)


def test_an_optimizer_is_found_in_any_case_and_an_unknown_one_names_the_nearest() -> None:
    assert isinstance(make_optimizer("adamw", parameters(), 0.1), torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"unknown optimizer 'Adm': did you mean 'Adam'"):
        make_optimizer("Adm", parameters(), 0.1)


def test_an_optimizer_that_needs_a_closure_says_why_it_is_not_on_offer() -> None:
    with pytest.raises(ValueError, match=r"LBFGS does not suit this trainer: .* closure"):
        make_optimizer("lbfgs", parameters(), 0.1)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_learning_rate_must_be_finite_and_above_zero(rate: float) -> None:
    with pytest.raises(ValueError, match="SGD: the learning rate must be finite and above 0"):
        make_optimizer("SGD", parameters(), rate)


def rates(schedule: str, epochs: int) -> list[float]:
    optimizer = make_optimizer("SGD", parameters(), 0.5)
    scheduler = make_schedule(schedule, optimizer, decay=0.9)
    seen = []
    for _ in range(epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_an_exponential_schedule_multiplies_the_rate_by_its_decay_each_epoch() -> None:
    assert rates("exponential", 5) == pytest.approx([0.5 * 0.9**epoch for epoch in range(5)])


def test_a_constant_schedule_never_changes_the_rate() -> None:
    assert rates("Constant", 7) == [0.5] * 7


def test_bad_schedules_are_errors_that_say_what_is_known() -> None:
    optimizer = make_optimizer("SGD", parameters(), 0.1)
    with pytest.raises(ValueError, match=r"unknown schedule 'exponental': did you mean 'exponential'\?"):
        make_schedule("exponental", optimizer)
    with pytest.raises(ValueError, match=r"decay must lie in \(0, 1\], got 1.5"):
        make_schedule("exponential", optimizer, decay=1.5)
    assert set(SCHEDULES) == {"constant", "exponential", "ratio"}


def test_a_seed_repeats_what_python_numpy_and_torch_draw() -> None:
    def draw() -> tuple[float, float, float]:
        numpy = float(np.random.rand())  # noqa: NPY002 - the generator that is seeded
        return random.random(), numpy, torch.rand(()).item()

    seed_everything(7)
    first = draw()
    second = draw()
    seed_everything(7)
    assert draw() == first
    assert second != first


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_an_error(seed: int) -> None:
    with pytest.raises(ValueError, match=str(seed)):
        seed_everything(seed)

"""`ReduceOnPlateau` against PyTorch's scheduler and against a loop written by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex.subject import Subject
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

import streamlens as sl
from streamlens import control
from streamlens.frame import Frame
from tests._runs import small_model, steps_of


def an_optimizer(*rates: float) -> Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates])


def rates_of(optimizer: Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def feed(source: Subject[Frame], step: int, number: float) -> None:
    source.on_next(Frame("validation_loss", step, ("",), torch.tensor([number], dtype=torch.float64)))


rules = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["min", "max"]),
        "factor": st.sampled_from([0.1, 0.5, 0.9]),
        "patience": st.integers(0, 3),
        "threshold": st.sampled_from([0.0, 1e-4, 0.1]),
        "threshold_mode": st.sampled_from(["rel", "abs"]),
        "cooldown": st.integers(0, 3),
        "min_lr": st.sampled_from([0.0, 0.02]),
    }
)


@settings(max_examples=60, deadline=None)
@given(rule=rules, numbers=st.lists(st.sampled_from([0.5, 0.9, 0.95, 0.99999, 1.0, 1.05, 2.0]), max_size=30))
def test_rates_are_those_of_pytorchs_scheduler(rule: dict[str, Any], numbers: list[float]) -> None:
    ours, theirs = an_optimizer(0.1, 0.4, 0.01), an_optimizer(0.1, 0.4, 0.01)
    scheduler = ReduceLROnPlateau(theirs, eps=0.0, **rule)
    source: Subject[Frame] = Subject()
    source.subscribe(control.ReduceOnPlateau(ours, **rule))
    for step, number in enumerate(numbers):
        feed(source, step, number)
        scheduler.step(number)
        assert rates_of(ours) == rates_of(theirs)
    source.on_completed()


@settings(max_examples=40, deadline=None)
@given(numbers=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30))
def test_rates_keep_to_bounds_and_slew_and_numbers_that_are_none_change_nothing(numbers: list[float]) -> None:
    noisy, clean = an_optimizer(0.1), an_optimizer(0.1)
    sources: list[Subject[Frame]] = [Subject(), Subject()]
    for source, optimizer in zip(sources, (noisy, clean), strict=True):
        source.subscribe(
            control.ReduceOnPlateau(optimizer, patience=1, factor=0.1, min_lr=1e-3, slew_limit=2.0)
        )
    for step, number in enumerate(numbers):
        before = rates_of(noisy)[0]
        feed(sources[0], step, number)
        if math.isfinite(number):
            feed(sources[1], step, number)
        now = rates_of(noisy)[0]
        assert 1e-3 <= now <= before <= now * 2 * (1 + 1e-12)
        assert now == rates_of(clean)[0]
    for source in sources:
        source.on_completed()


def test_of_a_best_below_zero_the_share_is_one_of_its_size() -> None:
    optimizer = an_optimizer(0.1)
    source: Subject[Frame] = Subject()
    source.subscribe(control.ReduceOnPlateau(optimizer, patience=1, threshold=0.1, factor=0.5))
    for step, number in enumerate([-10.0, -9.5, -10.5]):
        feed(source, step, number)
    assert rates_of(optimizer) == [0.05]
    for step, number in enumerate([-11.1, -10.9, -12.3]):
        feed(source, 3 + step, number)
    assert rates_of(optimizer) == [0.05]
    source.on_completed()


def by_hand(count: int) -> tuple[list[float], list[Tensor]]:
    """Training where the rate halves after more than two steps without a lower loss."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    best, bad, rates = math.inf, 0, []
    for loss in steps_of(model, optimizer, count):
        bad = 0 if loss < best * (1 - 1e-4) else bad + 1
        best = min(best, float(loss)) if bad == 0 else best
        if bad > 2:
            bad = 0
            optimizer.param_groups[0]["lr"] /= 2
        rates.append(optimizer.param_groups[0]["lr"])
    return rates, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("interrupted", [False, True])
def test_training_is_that_of_a_loop_written_by_hand_also_when_interrupted(interrupted: bool) -> None:
    rates: list[float] = []
    actions: list[Frame] = []
    model, saved = small_model(), None
    data = torch.Generator().manual_seed(0)
    for part in (9, 11) if interrupted else (20,):
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
        with sl.observe(model, on_error="raise") as lens:
            criterion = lens.watch_loss(nn.functional.cross_entropy)
            controller = control.ReduceOnPlateau(factor=0.5, patience=2)
            controller.actions.subscribe(actions.append)
            lens.pipe(sl.topic("loss")).subscribe(controller)
            if saved is not None:
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
                lens.load_state_dict(saved["lens"])
            for _ in range(part):
                optimizer.zero_grad()
                x = torch.randn(6, 4, generator=data)
                criterion(model(x), torch.randint(0, 3, (6,), generator=data)).backward()
                optimizer.step()
                rates.append(optimizer.param_groups[0]["lr"])
            saved = copy.deepcopy(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "lens": lens.state_dict()}
            )
    expected, parameters = by_hand(20)
    assert len(set(expected)) >= 3
    assert rates == expected
    assert all(map(torch.equal, model.parameters(), parameters))
    assert len(actions) == len(set(expected)) - 1
    assert actions[0].topic == "learning_rate.action"
    assert "loss has brought nothing better than " in actions[0].meta["cause"]
    assert actions[0].meta["cause"].endswith(" in 3 frames")


def test_a_dry_run_leaves_training_bit_identical_and_says_what_it_would_do() -> None:
    alone, model = small_model(), small_model()
    list(steps_of(alone, torch.optim.SGD(alone.parameters(), lr=1.0), 6))
    with sl.observe(model, on_error="raise") as lens:
        controller = control.ReduceOnPlateau(mode="max", patience=0, threshold=1e6, dry_run=True)
        said: list[str] = []
        controller.actions.subscribe(lambda frame: said.append(frame.meta["text"]))
        lens.pipe(sl.norm("weights"), sl.across_layers("mean")).subscribe(controller)
        list(steps_of(model, torch.optim.SGD(model.parameters(), lr=1.0), 6))
    assert all(map(torch.equal, model.parameters(), alone.parameters()))
    assert len(said) == 5
    assert said[0].startswith("ReduceOnPlateau would set learning_rate from 1 to 0.1: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "mni"}, "mode='mni'.*did you mean 'min'"),
        ({"threshold_mode": "x"}, "threshold_mode='x'.*it is 'rel' or 'abs'"),
        ({"patience": -1}, "patience=-1.*whole number of frames from 0 on"),
        ({"cooldown": 1.5}, "cooldown=1.5"),
        ({"threshold": math.nan}, "threshold=nan"),
        ({"factor": 1.0}, r"factor=1.0.*in \(0, 1\)"),
        ({"factor": True}, "factor=True"),
        ({"min_lr": 1.0, "max_lr": 0.5}, "bounds: the least"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        control.ReduceOnPlateau(**options)


def test_a_frame_with_more_than_one_number_is_refused_with_the_remedy() -> None:
    optimizer = an_optimizer(0.1)
    source: Subject[Frame] = Subject()
    controller = control.ReduceOnPlateau(optimizer)
    source.subscribe(controller)
    with pytest.raises(
        sl.StreamlensError, match=r"ReduceOnPlateau takes one number a frame, and 'x' has more"
    ):
        controller.propose(Frame("x", 0, ("a", "b"), torch.ones(2)), None)
    source.on_completed()

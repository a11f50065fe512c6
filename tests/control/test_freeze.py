"""Freeze against loops that leave parameters out by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import streamlens as sl
from streamlens.control import Freeze
from streamlens.frame import Frame
from tests._runs import OPTIMIZERS, same, small_model, steps_of
from tests.control._steps import ALL, deep, emitting, one_step, trainable

KINDS = ["sgd", "momentum", "nesterov", "adam", "adam, fused", "adamw"]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_frozen_is_to_the_bit_what_leaving_the_gradient_out_by_hand_is(kind: str, keep: bool) -> None:
    # At rest at steps 1 and 2, and moved at steps 4 and 5: no update at 3, 4 and 5.
    numbers = [0.5, 0.9, 0.875, 1.0, 0.75, 0.6, 0.8, 0.8]
    alone, watched = small_model(), small_model()
    expected = OPTIMIZERS[kind](list(alone.parameters()))
    for k in range(8):
        left_out = list(alone[0].parameters()) if k in (3, 4, 5) else []

        def leave_out(parameters: Sequence[nn.Parameter] = left_out) -> None:
            for parameter in parameters:
                parameter.grad = None

        one_step(alone, expected, k, leave_out)
    optimizer = OPTIMIZERS[kind](list(watched.parameters()))
    actions: list[tuple[Any, ...]] = []
    with emitting(watched) as lens:
        controller = Freeze(above=0.875, patience=2, thaw=0.75, keep_gradients=keep)
        controller.actions.subscribe(lambda f: actions.append((f.step, f.layers, f.meta["new"])))
        lens.pipe(sl.topic("similarity")).subscribe(controller)
        for k, number in enumerate(numbers):
            one_step(watched, optimizer, k)
            frozen = k in (3, 4, 5)
            assert all((p.grad is None) == (frozen and not keep) for p in watched[0].parameters())
            assert trainable(watched) == (ALL[2:] if frozen and not keep else ALL)
            lens.emit("similarity", {"0": number, "2": 0.1})
    assert actions == [(2, ("0",), 1.0), (5, ("0",), 0.0)]
    assert all(map(torch.equal, watched.parameters(), alone.parameters()))
    assert same(optimizer.state_dict(), expected.state_dict())


def test_by_tiny_updates_and_thawed_after_some_steps() -> None:
    model = small_model()
    groups: list[dict[str, Any]] = [{"params": list(model[0].parameters()), "lr": 1e-6}]
    optimizer = torch.optim.SGD([*groups, {"params": list(model[2].parameters())}], lr=0.1)
    actions: list[Frame] = []
    with sl.observe(model, on_error="raise") as lens:
        lens.pipe(sl.uw_ratio()).subscribe(Freeze(below=1e-5, patience=2, thaw_after=3))
        lens.pipe(sl.topic("frozen.action")).subscribe(actions.append)
        list(steps_of(model, optimizer, 8))
    assert [(f.step, f.meta["new"]) for f in actions] == [(1, 1.0), (4, 0.0), (6, 1.0)]
    first, second = (f.meta["text"] for f in actions[:2])
    assert first == "Freeze ended updates of 0: uw_ratio has been at most 1e-05 for 2 frames"
    assert second == "Freeze resumed updates of 0: 3 steps have passed"


def test_by_similarity_of_what_layers_make_of_a_probe() -> None:
    model, probe = small_model(), torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    groups: list[dict[str, Any]] = [{"params": list(model[0].parameters()), "lr": 1e-7}]
    optimizer = torch.optim.SGD([*groups, {"params": list(model[2].parameters())}], lr=3.0)
    similarity: list[dict[str, float]] = []
    with sl.observe(model, on_error="raise") as lens:
        controller = Freeze(above=0.9999, patience=2)
        # Of two units of three: of all of them the head would span the same space at every step.
        alike = lens.pipe(sl.every(2), sl.svcca(probe, share=0.9, reference="previous"))
        alike.subscribe(lambda frame: similarity.append(frame.to_dict()))
        alike.subscribe(controller)
        list(steps_of(model, optimizer, 7))
        assert controller.frozen == {"0": 4}
    assert [numbers["0"] > 0.9999 for numbers in similarity] == [True] * 3


def test_groups_schedulers_and_the_state_of_the_optimizer_see_no_difference() -> None:
    model, other = small_model(), small_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = LambdaLR(optimizer, lambda k: 1 / (1 + k))
    with sl.observe(model, on_error="raise") as lens:
        lens.pipe(sl.uw_ratio()).subscribe(Freeze(below=1.0, patience=1))
        for seed in range(3):
            one_step(model, optimizer, seed)
            scheduler.step()
        assert trainable(model) == ALL[2:]
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    plain = torch.optim.Adam(other.parameters(), lr=0.1)
    resumed = LambdaLR(plain, lambda k: 1 / (1 + k))
    other.load_state_dict(saved[0])
    plain.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    one_step(other, plain, 3)
    assert plain.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
    assert [int(plain.state[p]["step"]) for p in other.parameters()] == [2, 2, 4, 4]


def test_the_end_of_the_subscription_puts_back_what_it_froze_and_nothing_else() -> None:
    model = small_model()
    model.get_parameter("0.bias").requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.observe(model, on_error="raise") as lens:
        controller = Freeze(below=10.0, patience=1)
        subscription = lens.pipe(sl.uw_ratio()).subscribe(controller)
        one_step(model, optimizer, 0)
        assert trainable(model) == ALL[2:]
        subscription.dispose()
        assert trainable(model) == ["0.weight", *ALL[2:]]
        lens.pipe(sl.uw_ratio()).subscribe(controller)
        assert trainable(model) == ALL[2:]
    assert trainable(model) == ["0.weight", *ALL[2:]]
    kept = copy.deepcopy(model.state_dict())
    one_step(model, optimizer, 1)
    assert not torch.equal(kept["0.weight"], model.get_parameter("0.weight"))


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_frame_that_is_no_input_counts_neither_way(bad: float | None) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with emitting(model) as lens:
        controller = Freeze(above=0.9, patience=2)
        lens.pipe(sl.topic("similarity")).subscribe(controller)
        frozen = []
        for k in range(3):
            one_step(model, optimizer, k)
            whole = {"0": 1.0, "2": 0.1}
            lens.emit("similarity", whole if k != 1 else {"0": 1.0} if bad is None else {"0": 1.0, "2": bad})
            frozen.append(list(controller.frozen))
    assert frozen == [[], [], ["0"]]
    assert controller.held == 1


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({}, [["0", "1", "2", "3"]] * 3),
        ({"at_once": 1}, [["0"], ["0", "1"], ["0", "1", "2"]]),
        ({"leave": 3}, [["0", "1"]] * 3),
        ({"leave": 9}, [[]] * 3),
        ({"at_once": 2, "leave": 2}, [["0", "1"], ["0", "1", "2"], ["0", "1", "2"]]),
    ],
)
def test_bounds_leave_the_last_layers_and_freeze_the_first_ones_first(
    options: dict[str, Any], frozen: list[list[str]]
) -> None:
    model = deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with emitting(model) as lens:
        controller = Freeze(above=0.9, patience=1, **options)
        lens.pipe(sl.topic("similarity")).subscribe(controller)
        for k in range(3):
            one_step(model, optimizer, k)
            lens.emit("similarity", dict.fromkeys("01234", 1.0))
            assert list(controller.frozen) == frozen[k]


def test_a_module_is_frozen_with_all_in_it_a_parameter_alone_and_an_activation_never() -> None:
    model = deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with emitting(model) as lens:
        controller = Freeze(above=0.9, patience=1, leave=1)
        lens.pipe(sl.topic("similarity")).subscribe(controller)
        one_step(model, optimizer, 0)
        lens.emit("similarity", {"0": 1.0, "1.1": 1.0, "2.0.bias": 1.0, "3.0@1": 1.0, "4": 0.0})
        assert list(controller.frozen) == ["0", "2.0.bias", "3.0@1"]
        assert trainable(model) == ["1.0.weight", "1.0.bias", "2.0.weight", "4.weight", "4.bias"]


Row = tuple[float, float, float]
numbers = st.sampled_from([0.0, 0.5, 0.75, 0.875, 1.0, math.nan, math.inf, -math.inf])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(numbers, numbers, numbers), max_size=15),
    patience=st.integers(1, 3),
    leave=st.integers(1, 3),
    at_once=st.none() | st.integers(1, 2),
    thaw_after=st.none() | st.integers(1, 4),
)
def test_any_numbers_freeze_what_the_rules_say_and_leave_enough(
    rows: list[Row], patience: int, leave: int, at_once: int | None, thaw_after: int | None
) -> None:
    model = nn.ModuleDict({name: nn.Linear(1, 1) for name in "abc"})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    frozen: dict[str, int] = {}
    resting, moving = dict.fromkeys("abc", 0), dict.fromkeys("abc", 0)
    with emitting(model, count="grad") as lens:
        options: dict[str, Any] = {"patience": patience, "leave": leave, "thaw_after": thaw_after}
        controller = Freeze(above=0.875, thaw=0.5, at_once=at_once, **options)
        lens.pipe(sl.topic("similarity")).subscribe(controller)
        for k, row in enumerate(rows):
            optimizer.zero_grad()
            sum(model[name](torch.ones(1, 1)) for name in "abc").sum().backward()
            optimizer.step()
            lens.emit("similarity", dict(zip("abc", row, strict=True)))
            if all(map(math.isfinite, row)):
                before = dict(frozen)
                for name, number in zip("abc", row, strict=True):
                    resting[name] = resting[name] + 1 if number >= 0.875 and name not in before else 0
                    moving[name] = moving[name] + 1 if number <= 0.5 and name in before else 0
                    long = thaw_after is not None and k - before.get(name, k) >= thaw_after
                    if name in before and (moving[name] >= patience or long):
                        del frozen[name]
                        moving[name] = 0
                wanted = [n for n in "abc" if n not in before and resting[n] >= patience]
                most = max(3 - len(before) - leave, 0)
                for name in wanted[: most if at_once is None else min(most, at_once)]:
                    frozen[name] = k
                    resting[name] = 0
            assert controller.frozen == frozen
            assert {n for n in "abc" if not model[n].weight.requires_grad} == set(frozen)
            assert len(frozen) <= 3 - leave or not wanted


def test_thaw_trains_named_layers_again_or_all() -> None:
    model = deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    actions: list[Frame] = []
    with emitting(model) as lens:
        controller = Freeze(above=0.9, patience=1)
        with pytest.raises(sl.StreamlensError, match="Freeze ends no chain"):
            controller.thaw()
        controller.actions.subscribe(actions.append)
        lens.pipe(sl.topic("similarity")).subscribe(controller)
        one_step(model, optimizer, 0)
        lens.emit("similarity", dict.fromkeys("01234", 1.0))
        controller.thaw("1")
        assert list(controller.frozen) == ["0", "2", "3"]
        with pytest.raises(
            sl.StreamlensError, match=r"thaw\('1'\): it is not frozen; these are: '0', '2', '3'"
        ):
            controller.thaw("1")
        controller.thaw()
        controller.thaw()
        assert len(trainable(model)) == 10
    assert [f.meta["cause"] for f in actions[1:]] == ["thaw() was called"] * 2

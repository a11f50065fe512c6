"""Frozen is frozen, training goes on, and what cannot be frozen is said."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import streamlens as sl
from streamlens.control import ClipAt, FixedRatio, Freeze, RatioLR
from tests._runs import same, small_model, steps_of
from tests.control._steps import ALL, deep, emitting, one_step, trainable


def test_an_optimizer_keeps_gradients_where_all_that_it_has_is_frozen() -> None:
    model = small_model()
    body = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    head = torch.optim.SGD(model[2].parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with sl.observe(model, on_error="raise", optimizers=[body, head]) as lens:
        controller = Freeze(below=1e9, patience=1)
        lens.pipe(sl.uw_ratio()).subscribe(controller)
        for _ in range(3):
            weight = model.get_parameter("0.weight").detach().clone()
            frozen = dict(controller.frozen)
            scaler.scale(model(torch.ones(2, 4)).square().sum()).backward()
            for optimizer in (body, head):
                scaler.step(optimizer)
            scaler.update()
            assert torch.equal(weight, model.get_parameter("0.weight")) == bool(frozen)
            body.zero_grad()
            head.zero_grad()
        assert list(controller.frozen) == ["0"]
    assert trainable(model) == ALL


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("way", ["zeros", "paused", "closure", "accumulated"])
def test_no_update_comes_by_another_way(way: str, keep: bool) -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    with sl.observe(model, on_error="raise") as lens:
        lens.pipe(sl.uw_ratio()).subscribe(Freeze(below=1e9, patience=1, keep_gradients=keep))
        one_step(model, optimizer, 0)
        kept, state = copy.deepcopy(model[0].state_dict()), copy.deepcopy(optimizer.state_dict()["state"][0])

        def backward() -> Tensor:
            loss: Tensor = model(torch.ones(2, 4)).square().sum()
            loss.backward()
            return loss

        for _ in range(2):
            if way == "closure":
                optimizer.step(backward)
            elif way == "paused":
                with lens.paused():
                    backward()
                    optimizer.step()
            else:
                optimizer.zero_grad(set_to_none=way != "zeros")
                for _ in range(2):
                    backward()
                optimizer.step()
            assert (model.get_parameter("0.weight").grad is not None) == keep
        assert same(model[0].state_dict(), kept)
        assert same(optimizer.state_dict()["state"][0], state)


def test_somebody_who_sets_requires_grad_has_his_way_and_is_reported() -> None:
    model = deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reports: list[str] = []
    with emitting(model, on_error="report") as lens:
        lens.errors.subscribe(lambda report: reports.append(str(report)))
        controller = Freeze(above=0.9, patience=1)
        lens.pipe(sl.topic("similarity")).subscribe(controller)
        for k in range(3):
            one_step(model, optimizer, k)
            if k == 1:
                model.get_submodule("1").requires_grad_(True)
            lens.emit("similarity", dict.fromkeys("01234", 1.0))
        assert controller.standing_back
        assert list(controller.frozen) == ["0", "2", "3"]
        weight = model.get_parameter("1.0.weight").detach().clone()
        one_step(model, optimizer, 3)
        assert not torch.equal(weight, model.get_parameter("1.0.weight"))
    assert len(reports) == 1
    assert "it had frozen '1.0.bias', and somebody has set its requires_grad" in reports[0]


def test_a_dry_run_says_it_once_and_changes_nothing() -> None:
    alone, watched = small_model(), small_model()
    said: list[str] = []
    list(steps_of(alone, torch.optim.SGD(alone.parameters(), lr=0.1), 4))
    with sl.observe(watched, on_error="raise") as lens:
        controller = Freeze(below=1e9, patience=2, dry_run=True)
        controller.actions.subscribe(lambda f: said.append(f.meta["text"]))
        lens.pipe(sl.uw_ratio()).subscribe(controller)
        list(steps_of(watched, torch.optim.SGD(watched.parameters(), lr=0.1), 4))
    assert said == ["Freeze would have ended updates of 0: uw_ratio has been at most 1e+09 for 2 frames"]
    assert all(map(torch.equal, watched.parameters(), alone.parameters()))
    assert trainable(watched) == ALL


def test_other_controllers_go_on_with_the_layers_that_are_trained() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.observe(model, on_error="raise") as lens:
        ratio, clip = RatioLR(smoothing=1.0), ClipAt()
        fixed = FixedRatio(1e-2, dry_run=True)
        lens.pipe(sl.uw_ratio()).subscribe(ratio)
        lens.pipe(sl.norm("weight_gradients")).subscribe(clip)
        lens.pipe(sl.uw_ratio()).subscribe(fixed)
        lens.pipe(sl.norm("weight_gradients")).subscribe(Freeze(below=1e9, patience=1))
        ratios: list[dict[str, float]] = []
        lens.pipe(sl.uw_ratio()).subscribe(lambda f: ratios.append(f.to_dict()))
        list(steps_of(model, optimizer, 3))
        assert ratios[2]["0"] == 0.0
        assert ratio.mean_ratio == pytest.approx(ratios[2]["2"])
        assert [ratio.held, clip.held, fixed.held] == [0, 0, 0]
        assert clip.histories["0.weight"]["count"] == 3


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "Freeze takes one of above= .* and below="),
        ({"above": 0.9, "below": 0.1}, "Freeze takes one of"),
        ({"above": 0.9, "thaw": 0.9}, r"thaw=0\.9\): a frozen layer has moved at a number below above=0\.9"),
        ({"below": 0.1, "thaw": 0.1}, r"thaw=0\.1\): a frozen layer has moved at a number above below=0\.1"),
        ({"above": 0.9, "thaw": math.nan}, r"thaw=nan\)"),
        ({"above": math.nan}, r"above=nan\): it is a finite number"),
        ({"below": "small"}, r"below='small'\): it is a finite number"),
        ({"above": 0.9, "patience": 0}, r"patience=0\): it is a whole number from 1 on"),
        ({"above": 0.9, "leave": 0}, r"leave=0\): it is a whole number"),
        ({"above": 0.9, "at_once": 1.5}, r"at_once=1.5\): it is a whole number"),
        ({"above": 0.9, "thaw_after": True}, r"thaw_after=True\): it is a whole number"),
    ],
)
def test_arguments_out_of_their_range_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Freeze(**options)


def test_what_cannot_be_frozen_is_an_error_at_subscribe() -> None:
    with pytest.raises(sl.StreamlensError, match="Freeze acts on a model, and this stream comes from none"):
        sl.stream.Stream(None, plan=("x",), runtime=sl.runtime.Runtime()).subscribe(Freeze(above=1))
    model = small_model()
    with sl.observe(model) as lens:
        lens.pipe(sl.uw_ratio()).subscribe(Freeze(below=1e-5))
        with pytest.raises(sl.StreamlensError, match="Freeze would steer the freezing of layers that Freeze"):
            lens.pipe(sl.uw_ratio()).subscribe(Freeze(below=1e-6))
    optimizer = torch.optim.LBFGS(model.parameters())
    with sl.observe(model, optimizers=[optimizer], start=0) as lens:  # noqa: SIM117 - what raises is the inner one
        with pytest.raises(sl.StreamlensError, match="LBFGS moves all its parameters together"):
            lens.pipe(sl.uw_ratio()).subscribe(Freeze(below=1e-5))


def test_updates_by_hand_cannot_be_kept_from_layers_and_it_stands_back() -> None:
    model = small_model()
    reports: list[str] = []
    with sl.observe(model) as lens:
        lens.errors.subscribe(lambda report: reports.append(str(report)))
        lens.pipe(sl.uw_ratio()).subscribe(Freeze(below=1e9, patience=1))
        model(torch.ones(1, 4)).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1)
        lens.step()
    assert "no optimizer is known that it could keep updates from" in reports[0]
    assert trainable(model) == ALL


def test_frames_without_one_number_a_trained_layer_are_reported() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reports: list[str] = []
    with emitting(model, on_error="report") as lens:
        lens.errors.subscribe(lambda report: reports.append(str(report)))
        lens.pipe(sl.topic("similarity")).subscribe(Freeze(above=0.9))
        one_step(model, optimizer, 0)
        lens.emit("similarity", {"1": 1.0})
        lens.emit("similarity", {"0": torch.ones(2), "2": torch.ones(2)})
    assert "no layer of 'similarity' has parameters that are trained" in reports[0]
    assert "takes one number a layer, and 'similarity' has more" in reports[1]

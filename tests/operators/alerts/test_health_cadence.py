"""What the default set looks at, how often, and that it finds at once what cannot wait."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import streamlens as sl
from streamlens.frame import Frame
from tests._runs import steps_of
from tests.helpers.recording import observed
from tests.operators.support import frame, run


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.act(self.first(x)))
        return out


@pytest.fixture
def net() -> Iterator[tuple[Net, sl.Lens]]:
    torch.manual_seed(0)
    model = Net()
    with sl.observe(model, on_error="raise") as lens:
        yield model, lens


@pytest.mark.parametrize("at", [3, 13])
def test_the_first_layer_that_is_not_finite_is_told_at_once_at_any_step(
    net: tuple[Net, sl.Lens], at: int
) -> None:
    model, lens = net
    seen: list[Frame] = []
    lens.pipe(sl.health()).subscribe(seen.append)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step in range(at + 1):
        x = torch.randn(8, 4)
        if step == at:
            model.last.register_forward_pre_hook(lambda _, args: (args[0] / 0.0,))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert [(f.step, f.layers, f.meta["phase"]) for f in seen if f.meta["rule"] == "nonfinite_values"] == [
        (at, ("last",), "forward")
    ]


def test_modules_that_make_nothing_infinite_are_not_looked_at_for_it(net: tuple[Net, sl.Lens]) -> None:
    _, lens = net
    lens.pipe(sl.nonfinite_values(thorough=False, phases=("forward",))).subscribe(lambda _: None)
    (demand,) = lens.engine.demands
    assert demand.layers["activations"] == frozenset({"first", "last"})


def test_what_is_dear_is_looked_at_less_often_later(net: tuple[Net, sl.Lens]) -> None:
    model, lens = net
    rule = dataclasses.replace(sl.exploding_gradients(above=1e-9, end=1, start=(1, 1)), later=(3, 4))
    looks: list[int] = []
    taken = sl.vanishing_gradients(below=1.0, every=1, start=(1, 1), end=1)
    assert rule.pace(rule.inputs()[1]) == ((0, 1), (3, 4))
    assert taken.pace(taken.inputs()[0]) == ((0, 1),)
    lens.pipe(rule).subscribe(lambda _: None)
    for demand in lens.engine.demands:
        if demand.view.topics == ("weight_gradients",):
            looks += [step for step in range(13) if demand.view.due(step)]
    assert sorted(looks) == [0, 1, 2, 4, 8, 12]
    for _ in steps_of(model, torch.optim.SGD(model.parameters(), 0.01), 2):
        pass


@pytest.mark.parametrize("at", [10, 30, 95])
def test_an_explosion_early_in_a_run_is_seen_within_ten_steps(at: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    alerts: list[Frame] = []
    with observed(model) as lens:
        lens.pipe(sl.health()).subscribe(alerts.append)
        for step in range(at + 10):
            optimizer.zero_grad()
            loss = model(torch.randn(16, 8)).mean() * (50.0 if step >= at else 1.0)
            loss.backward()
            optimizer.step()
    (alert,) = [f for f in alerts if f.topic == "alerts.exploding_gradients"]
    assert at <= alert.step < at + 10
    assert alert.meta["of"] == "history"


def test_without_the_norm_of_the_weights_a_gradients_history_must_be_longer() -> None:
    def alerted(looks: int) -> list[int]:
        items = [
            frame(s, {"a": 1.0 if s < looks else 99.0}, "weight_gradients.norm2") for s in range(looks + 1)
        ]
        return [f.step for f in run(sl.exploding_gradients(), items)]

    assert alerted(19) == []
    assert alerted(20) == [20]

"""What controllers of gradients have in common: they never wait, and say where they cannot act."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from reactivex import operators as rx
from torch import Tensor, nn
from torch.optim import Optimizer

import streamlens as sl
from streamlens import control
from streamlens.control._attachment import ControllerAttachment
from tests._runs import small_model, steps_of
from tests.control._steps import one_step


class Head(nn.Linear):
    """A module to be told by its class."""


@pytest.mark.parametrize(
    "make",
    [
        lambda: control.ClipAt(20, slew_limit=2.0),
        lambda: control.FixedRatio(1e-2, slew_limit=2.0),
        lambda: control.FixedRatio(1e-2, of="parameters"),
    ],
)
def test_nothing_is_read_from_the_device_before_the_update(
    make: Callable[[], control.GradientController], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device that has no values, whoever asks for one gets an exception."""
    recorded: list[sl.Frame] = []
    monkeypatch.setattr(ControllerAttachment, "receive", lambda self, frame: recorded.append(frame))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reports: list[str] = []
    with sl.observe(model) as lens:
        lens.errors.subscribe(lambda report: reports.append(str(report)))
        lens.pipe(sl.norm("weight_gradients")).subscribe(make())
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.empty(6, 4, device="meta")).sum().backward()
            optimizer.step()
        assert reports == []
    assert len(recorded) == 3


def test_what_the_optimizer_holds_copies_of_is_left_alone_and_said() -> None:
    model, alone = small_model(), small_model()

    def train(model: nn.Module, observing: bool) -> list[str]:
        masters = [p.detach().clone().requires_grad_(True) for p in model.parameters()]
        optimizer: Optimizer = torch.optim.SGD(masters, lr=0.1)
        reports: list[str] = []
        lens = sl.observe(model, optimizers=[optimizer])
        lens.errors.subscribe(lambda report: reports.append(str(report)))
        if observing:
            lens.pipe(sl.topic("weights")).subscribe(control.ClipAt(10))
        for seed in range(3):
            data = torch.Generator().manual_seed(seed)
            model.zero_grad()
            model(torch.randn(3, 4, generator=data)).square().sum().backward()
            for master, parameter in zip(masters, model.parameters(), strict=True):
                assert parameter.grad is not None
                master.grad = parameter.grad.clone()
            optimizer.step()
            with torch.no_grad():
                for master, parameter in zip(masters, model.parameters(), strict=True):
                    parameter.copy_(master)
        lens.close()
        return reports

    assert train(alone, observing=False) == []
    reports = train(model, observing=True)
    assert len(reports) == 1
    assert (
        "SGD owns copies of the parameters, whose gradients are not known: observe(model, owners="
        in reports[0]
    )
    assert all(map(torch.equal, model.parameters(), alone.parameters()))


def test_a_controller_of_one_optimizer_leaves_the_gradients_of_others_alone() -> None:
    class Zero(control.GradientController):
        def scales(self, gradients: object, optimizer: Optimizer) -> dict[str, Tensor]:
            return {"0.weight": torch.tensor(0.0), "2.weight": torch.tensor(0.0)}

    model = small_model()
    body = torch.optim.SGD([model.get_parameter("0.weight")], lr=0.1)
    head = torch.optim.SGD([model.get_parameter("2.weight")], lr=0.1)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with sl.observe(model, on_error="raise") as lens:
        lens.pipe(sl.norm("weight_gradients")).subscribe(Zero(head))
        model(torch.ones(1, 4)).square().sum().backward()
        body.step()
        head.step()
    assert not torch.equal(start["0.weight"], model.get_parameter("0.weight"))
    assert torch.equal(start["2.weight"], model.get_parameter("2.weight"))
    with pytest.raises(TypeError, match=r"Zero\(optimizer=\) takes an optimizer of torch.optim, got 0.1"):
        Zero(0.1)  # type: ignore[arg-type]


def test_it_acts_at_every_update_whatever_the_cadence_of_its_chain_and_no_more_once_disposed() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.observe(model, on_error="raise") as lens:
        controller = control.ClipAt(10)
        subscription = lens.pipe(sl.every(100), sl.norm("weights")).subscribe(controller)
        list(steps_of(model, optimizer, 3))
        assert int(controller.histories["0.weight"]["count"]) == 3
        subscription.dispose()
        list(steps_of(model, optimizer, 3))
        assert int(controller.histories["0.weight"]["count"]) == 3


@pytest.mark.parametrize(
    "chain",
    [
        (sl.layers("2"), sl.norm("weight_gradients")),
        (sl.norm("weight_gradients"), sl.ema(0.5), sl.layers("2")),
        (sl.layers("2"), sl.uw_ratio()),
        (sl.uw_ratio(), sl.layers("2"), rx.map(lambda frame: frame)),
        (sl.layers(Head), sl.norm("weights"), sl.window(2), sl.every(3)),
        (sl.layers("*.*"), sl.layers("2.*"), sl.norm("parameters")),
    ],
)
def test_layers_that_the_chain_does_not_select_neither_count_nor_change(chain: tuple[Any, ...]) -> None:
    alone, watched = (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Head(5, 3)) for _ in range(2))
    watched.load_state_dict(alone.state_dict())
    norms: list[float] = []
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)

    def clip_by_hand() -> None:
        head = [p.grad for p in alone[2].parameters() if p.grad is not None]
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in head)))
        limit = float(np.percentile(norms, 20))
        for gradient in head:
            gradient.mul_(min(limit / norms[-1], 1.0))

    for seed in range(5):
        one_step(alone, optimizer, seed, clip_by_hand)
    assert norms[-1] != pytest.approx(float(np.percentile(norms, 20)))
    other = torch.optim.SGD(watched.parameters(), lr=0.1)
    with sl.observe(watched, on_error="raise") as lens:
        lens.pipe(*chain).subscribe(control.ClipAt(20))
        for seed in range(5):
            one_step(watched, other, seed)
    for mine, theirs in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-7)


def test_of_layers_that_are_selected_the_ratio_is_fixed_and_of_others_it_is_what_it_was() -> None:
    model = small_model()
    ratios: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.observe(model, on_error="raise") as lens:
        lens.pipe(sl.layers("0"), sl.uw_ratio()).subscribe(control.FixedRatio(0.01))
        lens.pipe(sl.uw_ratio()).subscribe(lambda frame: ratios.update(frame.to_dict()))
        list(steps_of(model, optimizer, 1))
    alone = small_model()
    with sl.observe(alone) as lens:
        lens.pipe(sl.uw_ratio()).subscribe(lambda frame: plain.update(frame.to_dict()))
        list(steps_of(alone, torch.optim.SGD(alone.parameters(), lr=0.1), 1))
    assert ratios == {"0": pytest.approx(0.01, rel=1e-3), "2": plain["2"]}
    assert plain["0"] != pytest.approx(0.01, rel=0.1)


def test_a_chain_of_layers_that_are_no_parameters_is_refused() -> None:
    model = small_model()
    with sl.observe(model) as lens:
        groups = lens.pipe(sl.norm("weights"), sl.across_layers("mean"), sl.layers("nothing"))
        with pytest.raises(sl.StreamlensError, match="no layer matches 'nothing'"):
            groups.subscribe(control.ClipAt())


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1.0, 1e18, 1e30])
@pytest.mark.parametrize("elements", [3, 1 << 19])
def test_norms_are_those_of_double_precision_at_any_magnitude_and_size(size: float, elements: int) -> None:
    tensors = [size * torch.rand(elements, generator=torch.Generator().manual_seed(0)), torch.ones(2, 2)]
    wanted = [float(np.linalg.norm(tensor.numpy().astype(np.float64))) for tensor in tensors]
    found = control.ClipAt().norms(tensors)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(wanted, rel=1e-6)
    tensors[0][1] = math.nan
    assert control.ClipAt().norms(tensors).isnan().tolist() == [True, False]

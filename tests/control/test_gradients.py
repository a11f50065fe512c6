"""What controllers of gradients have in common: they never wait, and say where they cannot act."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import streamlens as sl
from streamlens import control
from streamlens.control._attachment import ControllerAttachment
from tests._runs import small_model, steps_of


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

"""A loop with an Accelerator needs no callback: it is a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import streamlens as sl
from tests._runs import same
from tests.helpers.by_hand import Batch, squared_error, train_by_hand
from tests.helpers.recording import assert_steps_equal, numbers, observed, points, record

accelerate = pytest.importorskip("accelerate", reason="needs accelerate")


def parts() -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, DataLoader(TensorDataset(*data()), batch_size=3)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 5, generator=generator), torch.randn(12, 3, generator=generator)


def batches() -> list[Batch]:
    return list(zip(*(t.split(3) for t in data()), strict=True))


def accelerated(accelerator: Any, prepared: Any, loss_of: Any) -> None:
    """A loop as the accelerate documentation writes it."""
    model, optimizer, loader, scheduler = prepared
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = loss_of(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("before", [True, False])
def test_an_accelerated_loop_gives_the_values_of_a_plain_one(before: bool) -> None:
    twin, twin_optimizer, _ = parts()
    steps = train_by_hand(twin, twin_optimizer, batches(), squared_error, accumulate=2, clip=0.5)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader = parts()
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    prepared: Any = None if before else accelerator.prepare(model, optimizer, loader, scheduler)
    with observed(model if prepared is None else prepared[0]) as lens:
        prepared = prepared or accelerator.prepare(model, optimizer, loader, scheduler)
        loss_of = lens.watch_loss(mse_loss)
        seen = {
            topic: record(lens, sl.topic(topic))
            for topic in ("parameters", "parameter_gradients", "parameter_updates", "loss")
        }
        accelerated(accelerator, prepared, loss_of)
    assert_steps_equal(seen["parameters"], [s.after for s in steps])
    assert_steps_equal(seen["parameter_gradients"], [s.gradients for s in steps])
    assert_steps_equal(seen["parameter_updates"], [s.updates() for s in steps])
    assert points(seen["loss"]) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert numbers(seen["loss"]) == [loss for s in steps for loss in s.losses]
    assert same(model.state_dict(), twin.state_dict())

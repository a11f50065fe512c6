"""GradScaler: scaled gradients, and overflows, which are no steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Adam, Optimizer

import streamlens as sl
from tests.helpers.by_hand import norms, regression, snapshot, squared_error
from tests.helpers.recording import assert_steps_equal, observed, points, record

BATCHES = regression(1, 5, (4, 5))
SCALE = 1024.0
OVERFLOW = 2
"""The batch whose gradient is infinite."""

MAKERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "sgd": partial(SGD, lr=0.1),
    "adam": partial(Adam, lr=0.01),
    "sgd-fused": partial(SGD, lr=0.1, fused=True),
    "adam-fused": partial(Adam, lr=0.01, fused=True),
}


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def train_scaled(
    model: nn.Module, optimizer: Optimizer, *, overflow: bool, unscale: bool
) -> list[dict[str, torch.Tensor]]:
    """Parameters before the first update and after each call that should be one."""
    scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=1000)
    states = [snapshot(model)]
    for k, batch in enumerate(BATCHES):
        optimizer.zero_grad()
        loss = squared_error(model, batch)
        if overflow and k == OVERFLOW:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if not (overflow and k == OVERFLOW):
            states.append(snapshot(model))
    return states


@pytest.mark.parametrize("name", MAKERS)
def test_an_overflow_makes_no_frame_and_its_pass_joins_the_next_step(name: str) -> None:
    model, twin = perceptron(), perceptron()
    states = train_scaled(twin, MAKERS[name](twin.parameters()), overflow=True, unscale=False)
    with observed(model) as lens:
        weights, updates = record(lens, sl.topic("parameters")), record(lens, sl.norm("parameter_updates"))
        gradients, outputs = (
            record(lens, sl.norm("parameter_gradients")),
            record(lens, sl.norm("activations")),
        )
        train_scaled(model, MAKERS[name](model.parameters()), overflow=True, unscale=False)
    assert_steps_equal(weights, states[1:])
    changes = [{k: b[k] - a[k] for k in a} for a, b in itertools.pairwise(states)]
    assert_steps_equal(updates, [norms(c) for c in changes], rtol=1e-5)
    assert all(torch.isfinite(f[layer]).all() for f in gradients for layer in f)
    assert points(gradients) == [(0, 0), (1, 0), (2, 1), (3, 0)]
    assert points(outputs) == [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0)]


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_the_gradient_consumed_is_unscaled_and_the_raw_one_is_scaled(name: str, unscale: bool) -> None:
    model, twin = perceptron(), perceptron()
    squared_error(twin, BATCHES[0]).backward()
    truth = norms({n: p.grad for n, p in twin.named_parameters() if p.grad is not None})
    with observed(model) as lens:
        consumed, raw = record(lens, sl.norm("parameter_gradients")), record(lens, sl.norm("raw_gradients"))
        held = record(lens, sl.topic("parameter_gradients"))
        train_scaled(model, MAKERS[name](model.parameters()), overflow=False, unscale=unscale)
    assert_steps_equal(consumed[:1], [truth], rtol=1e-4)
    assert_steps_equal(raw[:1], [{k: v * SCALE for k, v in truth.items()}], rtol=1e-4)
    assert_steps_equal([f for f in held if f.step == 0], [dict(held[0].items())])
    for layer, value in held[0].items():
        assert float(value.norm()) == pytest.approx(float(truth[layer]), rel=1e-4)

"""Interrupts pass through, and failures where that is asked for; the lens works on after either."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from tests._runs import small_model, steps_of

EVENTS = [
    "batch_started",
    "input_data",
    "activations",
    "network_output",
    "loss",
    "layer_gradients",
    "raw_gradients",
    "weight_gradients",
    "learning_rate",
    "weights",
    "weight_updates",
    "batch_finished",
]


class MetricError(Exception):
    """What the failing parts raise."""


def fail(*_: object) -> Any:
    raise MetricError("on purpose")


@pytest.mark.parametrize("topic", EVENTS)
def test_on_error_raise_lets_the_failure_through(topic: str) -> None:
    model, criterion = small_model(), nn.CrossEntropyLoss()
    with sl.observe(model, loss=criterion, on_error="raise") as lens:
        lens.pipe(sl.topic(topic)).subscribe(fail)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step() -> None:
            criterion(model(torch.ones(2, 4)), torch.tensor([0, 1])).backward()
            optimizer.step()

        with pytest.raises(MetricError):
            step()


@pytest.mark.parametrize("topic", EVENTS)
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_callback_passes_through_and_the_lens_works_on(
    kind: type[BaseException], topic: str
) -> None:
    model, criterion = small_model(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    interrupts = [kind()]

    def interrupt(frame: object) -> None:
        if interrupts:
            raise interrupts.pop()

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(torch.ones(2, 4)), torch.tensor([0, 1])).backward()
        optimizer.step()

    seen: list[tuple[str, int, tuple[str, ...]]] = []
    with sl.observe(model, loss=criterion) as lens:
        lens.pipe(sl.topic(topic)).subscribe(interrupt)
        lens.pipe(sl.topic("activations", "layer_gradients", "weights"), sl.norm()).subscribe(
            lambda frame: seen.append((frame.topic, frame.step, frame.layers))
        )
        with pytest.raises(kind):
            step()
        step()
        step()
        after = lens.current_step
        seen.clear()
        step()
        assert lens.current_step == after + 1
    assert seen == [
        ("activations.norm2", after + 1, ("0", "1", "2")),
        ("layer_gradients.norm2", after + 1, ("0", "1", "2")),
        ("weights.norm2", after + 1, ("0", "2")),
    ]


@pytest.mark.parametrize("training", [True, False], ids=["a training forward", "an evaluation"])
def test_ctrl_c_in_a_forward_does_not_deafen_the_lens(training: bool) -> None:
    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small_model()
            self.interrupts = 0

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x)
            if self.interrupts:
                self.interrupts -= 1
                raise KeyboardInterrupt
            return out

    model = Interrupted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[tuple[int, int, tuple[str, ...]]] = []
    with sl.observe(model) as lens:
        lens.pipe(sl.norm("activations")).subscribe(
            lambda frame: seen.append((frame.step, frame.micro_step, frame.layers))
        )
        list(steps_of(model, optimizer, 1))
        model.interrupts = 1
        model.train(training)
        with pytest.raises(KeyboardInterrupt):
            model(torch.ones(1, 4))
        model.train()
        list(steps_of(model, optimizer, 2))
    layers = ("body.0", "body.1", "body.2")
    assert seen == [(0, 0, layers), (1, 0, layers), (2, 0, layers)]


def test_an_error_in_a_forward_that_the_user_catches_leaves_no_trace() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small_model()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x)
            if x.shape[0] == 1:
                raise RuntimeError("out of memory")
            return out

    model = Failing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[tuple[int, int, tuple[str, ...]]] = []
    with sl.observe(model) as lens:
        lens.pipe(sl.norm("activations")).subscribe(
            lambda frame: seen.append((frame.step, frame.micro_step, frame.layers))
        )
        with pytest.raises(RuntimeError, match="out of memory"):
            model(torch.ones(1, 4))
        list(steps_of(model, optimizer, 2))
    assert [layers for _, _, layers in seen] == [("body.0", "body.1", "body.2")] * 2
    assert [step for step, _, _ in seen] == [0, 1]


def test_an_optimizer_whose_step_raises_does_not_deafen_the_lens() -> None:
    class Flaky(torch.optim.SGD):
        failures = 1

        def step(self, closure: Any = None) -> Any:
            if self.failures:
                self.failures -= 1
                raise RuntimeError("disk full")
            return super().step(closure)

    model = small_model()
    optimizer = Flaky(model.parameters(), lr=0.1)
    steps: list[int] = []
    with sl.observe(model) as lens:
        lens.pipe(sl.norm("weight_updates")).subscribe(lambda frame: steps.append(frame.step))
        with pytest.raises(RuntimeError, match="disk full"):
            list(steps_of(model, optimizer, 1))
        list(steps_of(model, optimizer, 2))
    assert steps == [0, 1]

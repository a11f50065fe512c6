"""Two lenses on one model, one of which is opened and closed while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from tests._runs import small_model
from tests.helpers.recording import observed, record

STEPS = 7
MOMENTS = ("before the forward", "after it", "after the backward", "within the update", "after it all")
OPENED, CLOSED = 2, 4
"""The steps at which the second lens is opened and closed."""


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        yield torch.randn(6, 4, generator=draw), torch.randint(3, (6,), generator=draw)


@contextmanager
def during(optimizer: torch.optim.Optimizer, act: Callable[[], None]) -> Iterator[None]:
    handle = optimizer.register_step_pre_hook(lambda *_: act())
    try:
        yield
    finally:
        handle.remove()


def train(model: nn.Module, criterion: nn.Module, at: Callable[[int, str], None]) -> dict[str, list[float]]:
    """Train, and compute by hand what a lens must say; `at` is called at each moment of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    truth: dict[str, list[float]] = {"weights": [], "weight_updates": [], "activations": [], "loss": []}
    for k, (x, y) in enumerate(batches()):
        before = model.get_parameter("0.weight").detach().double().clone()
        first = nn.functional.linear(x, model.get_parameter("0.weight"), model.get_parameter("0.bias"))
        at(k, MOMENTS[0])
        loss = criterion(model(x), y)
        at(k, MOMENTS[1])
        optimizer.zero_grad()
        loss.backward()
        at(k, MOMENTS[2])
        with during(optimizer, lambda k=k: at(k, MOMENTS[3])):  # type: ignore[misc]
            optimizer.step()
        at(k, MOMENTS[4])
        after = model.get_parameter("0.weight").detach().double().clone()
        truth["weights"].append(after.square().sum().sqrt().item())
        truth["weight_updates"].append((after - before).square().sum().sqrt().item())
        truth["activations"].append(first.detach().double().square().sum().sqrt().item())
        truth["loss"].append(loss.item())
    return truth


def subscribed(lens: sl.Lens) -> dict[str, list[sl.Frame]]:
    only = sl.layers("0")
    frames = {t: record(lens, only, sl.norm(t)) for t in ("weights", "weight_updates", "activations")}
    return {**frames, "loss": record(lens, sl.topic("loss"))}


def values(frames: list[sl.Frame]) -> dict[int, float]:
    steps = [frame.step for frame in frames]
    assert len(set(steps)) == len(steps), "each step once"
    return {frame.step: float(frame.values[0]) for frame in frames}


@pytest.mark.parametrize(("opened", "closed"), zip(MOMENTS, MOMENTS[2:] + MOMENTS[:2], strict=True))
def test_a_lens_opened_and_closed_on_the_way_has_true_numbers_and_leaves_the_other_as_it_is(
    opened: str, closed: str
) -> None:
    criterion = nn.CrossEntropyLoss()
    alone = small_model()
    expected = train(alone, criterion, lambda step, moment: None)
    model = small_model()
    second: dict[str, list[sl.Frame]] = {}
    lenses: list[sl.Lens] = []

    def at(step: int, moment: str) -> None:
        if (step, moment) == (OPENED, opened):
            lenses.append(sl.observe(model, loss=criterion, on_error="raise"))
            second.update(subscribed(lenses[0]))
        elif (step, moment) == (CLOSED, closed):
            lenses[0].close()

    with observed(model, loss=criterion) as first:
        seen = subscribed(first)
        truth = train(model, criterion, at)
        assert lenses[0].closed
        assert not first.closed
    assert truth == expected, "training is what it is without"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    for topic, frames in seen.items():
        assert values(frames) == pytest.approx(dict(enumerate(truth[topic])), rel=1e-5), topic
    for topic, frames in second.items():
        found = values(frames)
        assert found == pytest.approx({step: truth[topic][step] for step in found}, rel=1e-5), topic
        # The steps in between are there, and none beyond.
        assert set(range(OPENED + 1, CLOSED)) <= set(found) <= set(range(OPENED, CLOSED + 1)), topic
    assert not model._forward_hooks
    assert not any(module._forward_hooks for module in model.modules())
    assert not criterion._forward_hooks


def test_what_one_lens_narrows_or_pauses_and_fails_at_is_nothing_to_the_other() -> None:
    model, criterion = small_model(), nn.CrossEntropyLoss()
    with sl.observe(model, loss=criterion) as first, sl.observe(model) as second:
        reports: list[object] = []
        first.errors.subscribe(reports.append)
        whole = record(first, sl.norm("weights"))
        rare = record(second, sl.layers("2"), sl.every(3), sl.norm("weights"))

        def fail(frame: sl.Frame) -> None:
            raise ValueError("mine")

        second.pipe(sl.norm("weights")).subscribe(fail)
        losses = record(second, sl.topic("loss"))
        truth = train(model, criterion, lambda step, moment: None)
    assert [frame.step for frame in whole] == list(range(STEPS))
    assert [float(frame["0"]) for frame in whole] == pytest.approx(truth["weights"], rel=1e-5)
    assert [(frame.step, frame.layers) for frame in rare] == [(0, ("2",)), (3, ("2",)), (6, ("2",))]
    assert [float(frame.values[0]) for frame in losses] == truth["loss"], "the first one's loss"
    assert len(reports) == STEPS

"""Steps, micro-steps and epochs of plain loops, and what must not move them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

import streamlens as sl
from tests.helpers.by_hand import (
    norms,
    of_role,
    regression,
    snapshot,
    squared_error,
    train_by_hand,
)
from tests.helpers.recording import assert_steps_equal, numbers, observed, points, record

BATCHES = regression(1, 6, (4, 5))


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 3))


def test_accumulation_counts_micro_steps_and_gives_one_parameter_frame_an_update() -> None:
    model = perceptron()
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    steps = train_by_hand(twin, Adam(twin.parameters()), BATCHES, squared_error, accumulate=3)
    with observed(model) as lens:
        gradients, updates = (
            record(lens, sl.topic("weight_gradients")),
            record(lens, sl.norm("weight_updates")),
        )
        outputs = record(lens, sl.topic("network_output"))
        torch.manual_seed(1)
        train_by_hand(model, Adam(model.parameters()), BATCHES, squared_error, accumulate=3)
    assert points(outputs) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert points(gradients) == points(updates) == [(0, 2), (1, 2)]
    assert_steps_equal(gradients, [of_role(s.gradients, "weight") for s in steps])
    assert_steps_equal(updates, [norms(of_role(s.updates(), "weight")) for s in steps], rtol=1e-5)


def test_raw_gradients_accumulate_over_the_micro_steps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3))
    parts = []
    for batch in BATCHES[:3]:
        twin = copy.deepcopy(model)
        squared_error(twin, batch).backward()
        parts.append(twin.get_parameter("0.weight").grad)
    with observed(model) as lens:
        frames = record(lens, sl.topic("raw_gradients"))
        for batch in BATCHES[:3]:
            squared_error(model, batch).backward()
    assert points(frames) == [(0, 0), (0, 1), (0, 2)]
    total = torch.zeros(3, 5)
    for frame, part in zip(frames, parts, strict=True):
        assert part is not None
        total = total + part
        torch.testing.assert_close(frame["0.weight"], total)


def test_the_gradient_consumed_is_the_clipped_one_and_the_raw_one_is_not() -> None:
    model = perceptron()
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    steps = train_by_hand(twin, SGD(twin.parameters(), lr=0.1), BATCHES[:2], squared_error, clip=0.01)
    with observed(model) as lens:
        consumed, raw = record(lens, sl.norm("parameter_gradients")), record(lens, sl.norm("raw_gradients"))
        torch.manual_seed(1)
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES[:2], squared_error, clip=0.01)
    assert_steps_equal(consumed, [norms(s.gradients) for s in steps], rtol=1e-5)
    for clipped, unclipped in zip(consumed, raw, strict=True):
        whole = sum(float(unclipped[layer]) ** 2 for layer in unclipped) ** 0.5
        assert whole > 0.1
        for layer in clipped:
            assert float(clipped[layer]) == pytest.approx(float(unclipped[layer]) * 0.01 / whole, rel=1e-3)


def test_leftover_accumulation_stays_open_across_the_epoch_and_spends_no_number() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        outputs, weights = record(lens, sl.topic("network_output")), record(lens, sl.topic("weights"))
        for _ in lens.epochs(2):
            for i, batch in enumerate(BATCHES[:3]):
                squared_error(model, batch).backward()
                if i % 2:
                    optimizer.step()
                    optimizer.zero_grad()
    assert [(f.epoch, f.step, f.micro_step) for f in outputs] == [
        (0, 0, 0),
        (0, 0, 1),
        (0, 1, 0),
        (1, 1, 1),
        (1, 1, 2),
        (1, 2, 0),
    ]
    assert [(f.epoch, f.step) for f in weights] == [(0, 0), (1, 1)]


def with_epochs(lens: sl.Lens, epoch: Callable[[], object]) -> None:
    for _ in lens.epochs(2):
        epoch()


def with_marks(lens: sl.Lens, epoch: Callable[[], object]) -> None:
    for _ in range(2):
        epoch()
        lens.epoch_finished()


@pytest.mark.parametrize("loop", [with_epochs, with_marks])
def test_steps_go_on_counting_over_epochs(loop: Callable[[sl.Lens, Callable[[], object]], None]) -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        frames = record(lens, sl.norm("weights"))
        loop(lens, lambda: train_by_hand(model, optimizer, BATCHES[:2], squared_error))
        assert (lens.current_step, lens.epoch) == (4, 2)
    assert [(f.epoch, f.step) for f in frames] == [(0, 0), (0, 1), (1, 2), (1, 3)]


def test_batches_end_an_epoch_each_time_they_are_exhausted() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        frames = record(lens, sl.norm("weights"))
        assert len(list(lens.batches(BATCHES[:2]))) == 2
        for _ in range(2):
            for batch in lens.batches(BATCHES[:2]):
                train_by_hand(model, optimizer, [batch], squared_error)
    assert [(f.epoch, f.step) for f in frames] == [(1, 0), (1, 1), (2, 2), (2, 3)]


def test_batches_within_epochs_end_each_epoch_once() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        finished = record(lens, sl.topic("epoch_finished"))
        for _ in lens.epochs(2):
            for batch in lens.batches(BATCHES[:2]):
                train_by_hand(model, optimizer, [batch], squared_error)
    assert numbers(finished) == [0, 1]


def test_without_being_told_the_epoch_stays_0() -> None:
    model = perceptron()
    with observed(model) as lens:
        frames = record(lens, sl.norm("weights"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES, squared_error)
    assert [f.epoch for f in frames] == [0] * 6


def test_a_loop_without_an_optimizer_says_when_it_has_updated() -> None:
    model = perceptron()
    truth: list[tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]] = []
    with observed(model) as lens:
        weights, updates = record(lens, sl.topic("parameters")), record(lens, sl.topic("parameter_updates"))
        reduced, outputs = record(lens, sl.norm("parameter_updates")), record(lens, sl.norm("activations"))
        gradients = record(lens, sl.topic("parameter_gradients"))
        for batch in BATCHES[:3]:
            before = snapshot(model)
            squared_error(model, batch).backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(0.1 * parameter.grad)
            truth.append((before, snapshot(model), grads))
            lens.step()
            model.zero_grad()
    assert_steps_equal(weights, [after for _, after, _ in truth])
    assert_steps_equal(gradients, [grads for _, _, grads in truth])
    changes = [{k: after[k] - before[k] for k in after} for before, after, _ in truth]
    assert_steps_equal(updates, changes)
    assert_steps_equal(reduced, [norms(c) for c in changes], rtol=1e-5)
    assert points(outputs) == [(0, 0), (1, 0), (2, 0)]


def test_observing_the_model_again_goes_on_counting_and_start_0_begins_anew() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    seen: list[list[tuple[int, int]]] = []
    for options in ({}, {}, {"start": 0}):
        with observed(model, **options) as lens:
            frames = record(lens, sl.norm("weight_updates"))
            train_by_hand(model, optimizer, BATCHES[:2], squared_error)
            lens.epoch_finished()
        seen.append([(f.step, f.epoch) for f in frames])
    assert seen == [[(0, 0), (1, 0)], [(2, 1), (3, 1)], [(0, 0), (1, 0)]]


@pytest.mark.parametrize("kind", ["direct", "by hand", "nobody subscribed"])
def test_a_clock_goes_on_counting_also_where_no_forward_is_seen(kind: str) -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    steps: list[int] = []

    def train(lens: sl.Lens) -> None:
        for x, y in BATCHES[:2]:
            (model.forward(x) - y).square().mean().backward()
            if kind != "by hand":
                optimizer.step()
                continue
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.1 * cast("Tensor", parameter.grad))
            lens.step()

    for _ in range(3):
        with observed(model) as lens:
            frames = [] if kind == "nobody subscribed" else record(lens, sl.norm("weights"))
            train(lens)
            steps += [lens.current_step] if kind == "nobody subscribed" else [f.step for f in frames]
    assert steps == ([1, 3, 5] if kind == "nobody subscribed" else [0, 1, 2, 3, 4, 5])


def test_a_run_wound_back_in_its_course_counts_from_there() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        frames = record(lens, sl.norm("weights"))
        start = lens.state_dict()
        train_by_hand(model, optimizer, BATCHES[:3], squared_error)
        middle = lens.state_dict()
        for snapshot_of in (start, middle):
            train_by_hand(model, optimizer, BATCHES[:1], squared_error)
            lens.load_state_dict(snapshot_of)
            train_by_hand(model, optimizer, BATCHES[:2], squared_error)
    assert [f.step for f in frames] == [0, 1, 2, 3, 0, 1, 2, 3, 4]


def test_steps_that_nobody_subscribed_to_count() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        train_by_hand(model, optimizer, BATCHES[:3], squared_error)
        frames = record(lens, sl.topic("weight_updates"))
        truth = train_by_hand(model, optimizer, BATCHES[3:5], squared_error)
    assert_steps_equal(frames, [of_role(s.updates(), "weight") for s in truth], steps=[3, 4])


def test_loading_weights_between_steps_makes_no_giant_update() -> None:
    model, other = perceptron(), perceptron()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(100.0)
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        raw, reduced = record(lens, sl.topic("weight_updates")), record(lens, sl.norm("weight_updates"))
        train_by_hand(model, optimizer, BATCHES[:2], squared_error)
        model.load_state_dict(other.state_dict())
        truth = train_by_hand(model, optimizer, BATCHES[2:3], squared_error)
    change = of_role(truth[0].updates(), "weight")
    assert all(torch.equal(raw[2][layer], value) for layer, value in change.items())
    assert all(float(reduced[2][k]) == pytest.approx(float(v.norm()), rel=1e-5) for k, v in change.items())


def test_parameters_that_were_replaced_are_followed_in_every_topic_from_the_next_step() -> None:
    model = perceptron()
    topics = ("parameter_updates", "parameter_gradients", "raw_gradients", "activations")
    with observed(model) as lens:
        frames = {topic: record(lens, sl.norm(topic)) for topic in topics}
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES[:2], squared_error)
        model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}, assign=True)
        truth = train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES[2:4], squared_error)
    for topic, got in frames.items():
        assert points(got) == [(k, 0) for k in range(4)], topic
    for topic in ("parameter_gradients", "raw_gradients"):
        assert_steps_equal(frames[topic][2:], [norms(s.gradients) for s in truth], steps=[2, 3], rtol=1e-5)
    expected = [norms(s.updates()) for s in truth]
    assert_steps_equal(frames["parameter_updates"][2:], expected, steps=[2, 3], rtol=1e-5)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_weights_between_forward_and_update_is_no_part_of_the_update(assign: bool) -> None:
    model, other = perceptron(), perceptron()
    with torch.no_grad():
        other.get_parameter("0.weight").add_(100.0)
    with observed(model) as lens:
        updates = record(lens, sl.norm("weight_updates"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES[:2], squared_error)
        model.load_state_dict(other.state_dict(), assign=assign)
        optimizer = SGD(model.parameters(), lr=0.1)
        train_by_hand(model, optimizer, BATCHES[2:4], squared_error)
    assert [f.step for f in updates] == [0, 1, 2, 3]
    assert all(float(f["0"]) < 10 for f in updates)


def test_a_model_moved_to_another_precision_goes_on() -> None:
    model = perceptron()
    with observed(model) as lens:
        updates = record(lens, sl.norm("weight_updates"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES[:2], squared_error)
        model.double()
        optimizer = SGD(model.parameters(), lr=0.1)
        truth = train_by_hand(
            model, optimizer, [(x.double(), y.double()) for x, y in BATCHES[2:4]], squared_error
        )
    wanted = [norms(of_role(s.updates(), "weight")) for s in truth]
    assert_steps_equal(updates[2:], wanted, steps=[2, 3], rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_moved_to_another_precision_goes_on_with_the_optimizer_it_had(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    optimizer = SGD(model.parameters(), lr=0.1)
    moved = [(x.to(dtype), y.to(dtype)) for x, y in BATCHES[2:4]]
    with observed(model) as lens:
        gradients, weights, updates = (
            record(lens, sl.norm(topic)) for topic in ("weight_gradients", "weights", "weight_updates")
        )
        train_by_hand(model, optimizer, BATCHES[:2], squared_error)
        model.to(dtype)
        truth = train_by_hand(model, optimizer, moved, squared_error)
    for frames, values in (
        (gradients, [s.gradients for s in truth]),
        (weights, [s.after for s in truth]),
        (updates, [s.updates() for s in truth]),
    ):
        wanted = [norms(of_role(v, "weight")) for v in values]
        assert_steps_equal(frames[2:], wanted, steps=[2, 3], rtol=1e-5)


def test_a_backward_that_raises_is_over_with_the_next_forward() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *grads: Tensor) -> Tensor:
            raise MemoryError("out of memory")

    fails = cast("Callable[[Tensor], Tensor]", Fails.apply)
    with observed(model) as lens:
        gradients, outputs = record(lens, sl.norm("layer_gradients")), record(lens, sl.norm("activations"))
        train_by_hand(model, optimizer, BATCHES[:1], squared_error)
        hidden = model(fails(BATCHES[1][0].clone().requires_grad_()))
        with pytest.raises(MemoryError):
            hidden.sum().backward()
        optimizer.zero_grad()
        train_by_hand(model, optimizer, BATCHES[2:4], squared_error)
    assert points(gradients) == [(0, 0), (1, 1), (2, 0)]
    assert {f.layers for f in gradients + outputs} == {("0", "1", "2", "3")}

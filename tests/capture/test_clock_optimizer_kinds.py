"""Optimizers that wrap others, fail, are made late or change on the way."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

import streamlens as sl
from tests.helpers.by_hand import (
    Batch,
    HandStep,
    norms,
    of_role,
    regression,
    snapshot,
    squared_error,
    train_by_hand,
    update_by_hand,
)
from tests.helpers.recording import (
    assert_steps_equal,
    layer_sets,
    observed,
    points,
    record,
    record_errors,
)

BATCHES = regression(1, 6, (4, 5))
LAYERS = ("0", "2", "4")


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def optimizer_of(model: nn.Module, *layers: str) -> SGD:
    return SGD([p for layer in layers for p in model.get_submodule(layer).parameters()], lr=0.1)


class Twice(SGD):
    """Does nothing but call its base class, whose hooks fire a second time."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_a_subclass_that_calls_its_base_steps_once() -> None:
    model, twin = perceptron(), perceptron()
    truth = train_by_hand(twin, Twice(twin.parameters(), lr=0.1), BATCHES[:3], squared_error)
    with observed(model) as lens:
        raw, reduced = record(lens, sl.topic("parameter_updates")), record(lens, sl.norm("parameter_updates"))
        train_by_hand(model, Twice(model.parameters(), lr=0.1), BATCHES[:3], squared_error)
    assert_steps_equal(raw, [s.updates() for s in truth])
    assert_steps_equal(reduced, [norms(s.updates()) for s in truth], rtol=1e-5)


@pytest.mark.parametrize("whose", ["its own", "everybody's"])
@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("kind", [SGD, Twice])
def test_gradients_and_rates_are_those_that_the_hooks_of_others_leave(
    whose: str, made: str, kind: type[SGD]
) -> None:
    """A hook before the step may clip, or set the rate; PyTorch runs those of everybody first."""

    def train(model: nn.Module, *, hand: bool, at: str = "") -> list[HandStep]:
        optimizer = kind(model.parameters(), lr=0.1)

        def prepare(which: Optimizer, *_: Any) -> None:
            if which is optimizer:
                nn.utils.clip_grad_value_(model.parameters(), 0.05)
                optimizer.param_groups[0]["lr"] = 0.1 * 0.5 ** len(steps)

        steps: list[HandStep] = []
        handle = None
        for batch in BATCHES[:3]:
            squared_error(model, batch).backward()
            if hand:
                prepare(optimizer)
            elif handle is None and at == "its own":
                handle = optimizer.register_step_pre_hook(prepare)
            elif handle is None:
                handle = register_optimizer_step_pre_hook(prepare)
            steps.append(update_by_hand(model, optimizer))
            optimizer.zero_grad()
        if handle is not None:
            assert list(optimizer._optimizer_step_pre_hooks) == ([handle.id] if at == "its own" else [])
            handle.remove()
        return steps

    truth = train(perceptron(), hand=True)
    early = register_optimizer_step_pre_hook(lambda *_: None) if made == "before" else None
    model = perceptron()
    with observed(model) as lens:
        gradients, rates = (
            record(lens, sl.topic("parameter_gradients")),
            record(lens, sl.topic("learning_rate")),
        )
        updates = record(lens, sl.norm("parameter_updates"))
        train(model, hand=False, at=whose)
    if early is not None:
        early.remove()
    assert_steps_equal(gradients, [s.gradients for s in truth])
    assert_steps_equal(updates, [norms(s.updates()) for s in truth], rtol=1e-5)
    assert [f["0"].item() for f in rates] == pytest.approx([0.1, 0.05, 0.025])


def test_a_hook_of_others_that_raises_leaves_none_of_ours_behind() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)

    def refuse(*_: Any) -> None:
        raise FloatingPointError("refused")

    with observed(model) as lens:
        gradients = record(lens, sl.topic("parameter_gradients"))
        handle = optimizer.register_step_pre_hook(refuse)
        squared_error(model, BATCHES[0]).backward()
        with pytest.raises(FloatingPointError):
            optimizer.step()
        handle.remove()
        truth = train_by_hand(model, optimizer, BATCHES[:2], squared_error)
        optimizer.register_step_pre_hook(refuse)
        with pytest.raises(FloatingPointError):
            optimizer.step()
    assert len(optimizer._optimizer_step_pre_hooks) == 1, "the user's"
    assert [f.step for f in gradients] == [0, 1]
    assert torch.equal(gradients[1]["0.weight"], truth[1].gradients["0.weight"])


class Fallible(SGD):
    """Raises when told to, before or after it has changed the weights."""

    fails = ""

    def step(self, closure: Any = None) -> Any:
        if self.fails == "before":
            raise FloatingPointError("refused")
        result = super().step(closure)
        if self.fails == "after":
            raise FloatingPointError("too late")
        return result


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_step_that_raises_costs_no_later_step_its_frames(when: str) -> None:
    model = perceptron()
    optimizer = Fallible(model.parameters(), lr=0.1)
    with observed(model) as lens:
        updates, gradients = (
            record(lens, sl.norm("weight_updates")),
            record(lens, sl.topic("weight_gradients")),
        )
        train_by_hand(model, optimizer, BATCHES[:1], squared_error)
        squared_error(model, BATCHES[1]).backward()
        optimizer.fails = when
        with pytest.raises(FloatingPointError):
            optimizer.step()
        optimizer.fails = ""
        optimizer.zero_grad()
        truth = train_by_hand(model, optimizer, BATCHES[2:5], squared_error)
    wanted = [norms(of_role(s.updates(), "weight")) for s in truth]
    got = updates[-3:]
    assert_steps_equal(got, wanted, steps=[got[0].step, got[0].step + 1, got[0].step + 2], rtol=1e-5)
    assert len({f.step for f in updates}) == len(updates)
    assert torch.equal(gradients[-1]["4"], truth[-1].gradients["4.weight"])


class Sam(Optimizer):
    """Sharpness-aware minimisation: climb, take the gradient there, go back, let the base step."""

    def __init__(self, params: Any, base: type[Optimizer], rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups

    def climb(self) -> None:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["old"] = parameter.detach().clone()
                parameter.add_(0.05 * parameter.grad)

    def descend(self) -> None:
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.data = self.state[parameter]["old"]
        self.base.step()

    def step(self, closure: Any = None) -> Any:
        self.climb()
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        self.descend()
        return loss


def train_sam(model: nn.Module, *, by_closure: bool) -> list[HandStep]:
    optimizer = Sam(model.parameters(), SGD, lr=0.1)
    steps: list[HandStep] = []
    for batch in BATCHES[:3]:

        def evaluate(batch: Batch = batch) -> Tensor:
            loss = squared_error(model, batch)
            loss.backward()
            return loss

        step = HandStep(before=snapshot(model))
        evaluate()
        if by_closure:
            optimizer.step(evaluate)
        else:
            optimizer.climb()
            optimizer.zero_grad()
            evaluate()
            optimizer.descend()
        step.gradients = {n: cast("Tensor", p.grad).clone() for n, p in model.named_parameters()}
        step.after = snapshot(model)
        optimizer.zero_grad()
        steps.append(step)
    return steps


@pytest.mark.parametrize("by_closure", [False, True])
def test_sharpness_aware_minimisation_is_one_step_whose_gradient_is_the_one_consumed(
    by_closure: bool,
) -> None:
    model = perceptron()
    truth = train_sam(perceptron(), by_closure=by_closure)
    with observed(model) as lens:
        updates, gradients = (
            record(lens, sl.topic("parameter_updates")),
            record(lens, sl.topic("parameter_gradients")),
        )
        reduced = record(lens, sl.norm("parameter_updates"))
        outputs = record(lens, sl.norm("activations"))
        train_sam(model, by_closure=by_closure)
    assert_steps_equal(gradients, [s.gradients for s in truth])
    changes = [s.updates(owned=False) for s in truth]
    assert_steps_equal(updates, changes)
    assert_steps_equal(reduced, [norms(c) for c in changes], rtol=1e-5)
    assert points(outputs) == [(k, m) for k in range(3) for m in range(2)]


def step_in_backward(parameters: Iterable[nn.Parameter]) -> None:
    """Give each parameter an optimizer that steps as soon as its gradient is there."""
    for parameter in parameters:
        optimizer = SGD([parameter], lr=0.1)

        def step(p: Tensor, optimizer: Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)


def test_optimizers_within_the_backward_give_each_weight_once_a_step_as_updated() -> None:
    model, twin = perceptron(), perceptron()
    frozen, *learning = model.parameters()
    frozen.requires_grad_(False)
    next(twin.parameters()).requires_grad_(False)
    truth = train_by_hand(twin, SGD(twin.parameters(), lr=0.1), BATCHES[:3], squared_error)
    with observed(model) as lens:
        weights = record(lens, sl.norm("parameters"))
        step_in_backward(learning)
        for batch in BATCHES[:3]:
            squared_error(model, batch).backward()
    for k, step in enumerate(truth):
        given = [(layer, float(value)) for f in weights if f.step == k for layer, value in f.items()]
        assert len(given) == len(step.after)
        expected = {layer: float(value) for layer, value in norms(step.after).items()}
        assert dict(given) == pytest.approx(expected, rel=1e-6)


def test_optimizers_within_the_backward_give_one_frame_a_step_once_known() -> None:
    model, twin = perceptron(), perceptron()
    truth = train_by_hand(twin, SGD(twin.parameters(), lr=0.1), BATCHES[:3], squared_error)
    with observed(model) as lens:
        updates, outputs = record(lens, sl.norm("parameter_updates")), record(lens, sl.norm("activations"))
        step_in_backward(model.parameters())
        for batch in BATCHES[:3]:
            squared_error(model, batch).backward()
    assert_steps_equal(
        [f for f in updates if f.step > 0],
        [norms(s.updates()) for s in truth[1:]],
        steps=[1, 2],
        rtol=1e-5,
    )
    assert sorted(layer for f in updates if f.step == 0 for layer in f) == sorted(truth[0].after)
    assert points(outputs) == [(0, 0), (1, 0), (2, 0)]


@pytest.mark.parametrize("before", [True, False])
def test_optimizers_are_found_whether_made_before_or_after_observing(before: bool) -> None:
    model, twin = perceptron(), perceptron()
    truth = train_by_hand(twin, Adam(twin.parameters()), BATCHES[:2], squared_error)
    optimizer = Adam(model.parameters()) if before else None
    with observed(model) as lens:
        updates = record(lens, sl.norm("parameter_updates"))
        train_by_hand(model, optimizer or Adam(model.parameters()), BATCHES[:2], squared_error)
    assert_steps_equal(updates, [norms(s.updates()) for s in truth], rtol=1e-5)


def test_an_optimizer_that_cannot_be_told_from_others_steps_and_is_reported() -> None:
    class Equal(SGD):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Equal)

    model = perceptron()
    with observed(model, on_error="report") as lens:
        reports = record_errors(lens)
        before = snapshot(model)
        train_by_hand(model, Equal(model.parameters(), lr=0.1), BATCHES[:1], squared_error)
        assert [str(r.error) for r in reports] == ["unhashable type: 'Equal'"]
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters())


def test_an_optimizer_of_another_model_moves_no_clock() -> None:
    model, other = perceptron(), perceptron()
    with observed(model) as lens:
        weights = record(lens, sl.norm("weights"))
        train_by_hand(other, SGD(other.parameters(), lr=0.1), BATCHES[:3], squared_error)
        assert (lens.current_step, weights) == (0, [])


@pytest.mark.parametrize("by_hand", [False, True])
def test_optimizers_made_for_other_tensors_in_every_step_disturb_nothing(by_hand: bool) -> None:
    """As those of adversarial perturbations are. Looking at the model again each time would cost."""
    model, twin = perceptron(), perceptron()
    ours = SGD(model.parameters(), lr=0.1)
    truth = train_by_hand(twin, SGD(twin.parameters(), lr=0.1), BATCHES[:3], squared_error)
    hooks: list[list[int]] = []
    with observed(model) as lens:
        updates, reduced = record(lens, sl.topic("weight_updates")), record(lens, sl.norm("weight_updates"))
        outputs = record(lens, sl.norm("activations"))
        for batch in BATCHES[:3]:
            perturbation = torch.zeros(5, requires_grad=True)
            perturbation.sum().backward()
            SGD([perturbation], lr=0.1).step()
            hooks.append(list(model.get_submodule("0")._forward_hooks))
            squared_error(model, batch).backward()
            if by_hand:
                with torch.no_grad():
                    for parameter in model.parameters():
                        assert parameter.grad is not None
                        parameter.sub_(0.1 * parameter.grad)
                lens.step()
            else:
                ours.step()
            model.zero_grad()
    changes = [of_role(s.updates(), "weight") for s in truth]
    assert_steps_equal(reduced, [norms(c) for c in changes], rtol=1e-4)
    assert [f.step for f in updates] == [f.step for f in outputs] == [0, 1, 2]
    assert hooks[0] == hooks[1] == hooks[2], "the hooks stay in place"


def test_parameters_added_to_an_optimizer_later_have_updates_from_then_on() -> None:
    model = perceptron()
    optimizer = optimizer_of(model, "2", "4")
    with observed(model) as lens:
        updates, weights = record(lens, sl.topic("weight_updates")), record(lens, sl.norm("weights"))
        rates = record(lens, sl.topic("learning_rate"))
        train_by_hand(model, optimizer, BATCHES[:1], squared_error)
        optimizer.add_param_group({"params": list(model.get_submodule("0").parameters()), "lr": 0.01})
        truth = train_by_hand(model, optimizer, BATCHES[1:2], squared_error)
    assert layer_sets(updates) == [("2", "4"), LAYERS]
    # A layer with a gradient could be another optimizer's, as long as the first step is open.
    assert [(f.step, f.layers) for f in weights] == [(0, ("2", "4")), (0, ("0",)), (1, LAYERS)]
    assert torch.equal(updates[1]["0"], of_role(truth[0].updates(), "weight")["0"])
    assert [f.to_dict() for f in rates] == [
        pytest.approx({"2": 0.1, "4": 0.1}),
        pytest.approx({"0": 0.01, "2": 0.1, "4": 0.1}),
    ]


def test_a_module_added_with_its_parameters_is_seen_in_every_topic_from_its_first_step() -> None:
    model = cast("nn.Sequential", perceptron())
    optimizer = SGD(model.parameters(), lr=0.1)
    topics = ("weights", "weight_updates", "weight_gradients", "activations", "layer_gradients")
    with observed(model) as lens:
        frames = {topic: record(lens, sl.norm(topic)) for topic in topics}
        raw, chosen = (
            record(lens, sl.norm("raw_gradients")),
            record(lens, sl.layers(nn.Linear), sl.norm("biases")),
        )
        train_by_hand(model, optimizer, BATCHES[:2], squared_error)
        model.append(nn.Linear(3, 3))
        optimizer.add_param_group({"params": model[5].parameters()})
        truth = train_by_hand(model, optimizer, BATCHES[2:4], squared_error)
    for topic, got in frames.items():
        assert [f.step for f in got] == [0, 1, 2, 3], topic
        assert ["5" in f for f in got] == [False, False, True, True], topic
    assert ["5.weight" in f for f in raw] == [False, False, True, True]
    expected = [norms(of_role(s.updates(), "weight")) for s in truth]
    assert_steps_equal(frames["weight_updates"][2:], expected, steps=[2, 3], rtol=1e-5)
    assert ["5" in f for f in chosen] == [False, False, True, True]


def test_a_layer_that_was_added_can_be_selected_at_once() -> None:
    model = cast("nn.Sequential", perceptron())
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        record(lens, sl.norm("weights"))
        train_by_hand(model, optimizer, BATCHES[:1], squared_error)
        model.append(nn.Linear(3, 3))
        optimizer.add_param_group({"params": model[5].parameters()})
        updates = record(lens, sl.layers("5"), sl.norm("weight_updates"))
        outputs = record(lens, sl.topic("activations"), sl.layers("5"))
        train_by_hand(model, optimizer, BATCHES[1:2], squared_error)
    assert layer_sets(updates) == layer_sets(outputs) == [("5",)]


def test_a_layer_that_is_frozen_and_thawed_has_gradients_only_while_it_learns() -> None:
    model = perceptron()
    optimizer = optimizer_of(model, *LAYERS)
    with observed(model) as lens:
        gradients, raw = record(lens, sl.norm("weight_gradients")), record(lens, sl.norm("raw_gradients"))
        backward = record(lens, sl.norm("layer_gradients"))
        for frozen in (False, True, False):
            model.get_submodule("0").requires_grad_(not frozen)
            train_by_hand(model, optimizer, BATCHES[:1], squared_error)
    assert layer_sets(gradients) == [LAYERS, ("2", "4"), LAYERS]
    assert ["0.weight" in f for f in raw] == [True, False, True]
    assert ["0" in f for f in backward] == [True, False, True]


def test_a_layer_frozen_from_the_start_and_thawed_later_is_seen_in_raw_gradients() -> None:
    model = perceptron()
    model.get_submodule("0").requires_grad_(False)
    optimizer = optimizer_of(model, *LAYERS)
    with observed(model) as lens:
        raw = record(lens, sl.norm("raw_gradients"))
        train_by_hand(model, optimizer, BATCHES[:1], squared_error)
        model.get_submodule("0").requires_grad_(True)
        train_by_hand(model, optimizer, BATCHES[1:2], squared_error)
    assert ["0.weight" in f for f in raw] == [False, True]


def test_a_head_that_is_replaced_with_its_optimizer_is_followed(caplog: pytest.LogCaptureFixture) -> None:
    model = perceptron()
    with observed(model) as lens, caplog.at_level(logging.WARNING, "streamlens"):
        weights, outputs = record(lens, sl.topic("weights")), record(lens, sl.topic("activations"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES[:2], squared_error)
        cast("nn.Sequential", model)[4] = nn.Linear(4, 3)
        optimizer = SGD(model.parameters(), lr=0.1)
        truth = train_by_hand(model, optimizer, BATCHES[2:5], squared_error)
    for frame, step in zip(weights[2:], truth, strict=True):
        assert torch.equal(frame["4"], step.after["4.weight"])
    assert "4" in outputs[-1]
    assert caplog.messages == []


def test_a_copy_of_the_model_can_be_trained_without_touching_the_run() -> None:
    model = perceptron()
    with observed(model) as lens:
        frames = [
            record(lens, sl.norm(n)) for n in ("weights", "activations", "layer_gradients", "raw_gradients")
        ]
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES[:1], squared_error)
        twin = copy.deepcopy(model)
        train_by_hand(twin, SGD(twin.parameters(), lr=0.1), BATCHES[1:3], squared_error)
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES[1:2], squared_error)
    assert [points(f) for f in frames] == [[(0, 0), (1, 0)]] * 4

"""Activations and their gradients against layers called by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.checkpoint import checkpoint

import streamlens as sl
from tests.helpers.by_hand import Batch, norms, regression, squared_error, train_by_hand
from tests.helpers.recording import (
    assert_steps_equal,
    layer_sets,
    observed,
    points,
    record,
    record_errors,
)


def layer_by_layer(
    model: nn.Sequential, batches: Sequence[Batch], rate: float
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Outputs and their gradients of each layer, a mapping a step, of a run with SGD."""
    optimizer = SGD(model.parameters(), lr=rate)
    outputs: list[dict[str, Tensor]] = []
    gradients: list[dict[str, Tensor]] = []
    for x, target in batches:
        kept: dict[str, Tensor] = {}
        for name, layer in model.named_children():
            x = layer(x)
            x.retain_grad()
            kept[name] = x
        nn.functional.mse_loss(x, target).backward()
        optimizer.step()
        optimizer.zero_grad()
        outputs.append({name: value.detach().clone() for name, value in kept.items()})
        gradients.append({name: cast("Tensor", value.grad).clone() for name, value in kept.items()})
    return outputs, gradients


def perceptron(*, inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=inplace), nn.Linear(4, 3))


def convnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))


MODELS: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "perceptron": (perceptron, (6, 5)),
    "convnet": (convnet, (6, 1, 4, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_activations_and_their_gradients_are_those_of_layers_called_by_hand(name: str) -> None:
    make, shape = MODELS[name]
    model, batches = make(), regression(1, 3, shape)
    outputs, gradients = layer_by_layer(copy.deepcopy(model), batches, 0.1)
    with observed(model) as lens:
        raw = record(lens, sl.topic("activations")), record(lens, sl.topic("layer_gradients"))
        reduced = record(lens, sl.norm("activations")), record(lens, sl.norm("layer_gradients"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), batches, squared_error)
    for frames, values in zip(raw, (outputs, gradients), strict=True):
        assert_steps_equal(frames, values)
        assert {f.kind for f in frames} == {sl.Kind.MICRO_STEP}
    for frames, values in zip(reduced, (outputs, gradients), strict=True):
        assert_steps_equal(frames, [norms(v) for v in values], rtol=2e-6)
        assert {f.kind for f in frames} == {sl.Kind.MICRO_STEP}


def test_a_model_that_is_one_layer_has_activations_under_the_empty_name() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    batches = regression(1, 2, (6, 5))
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    with observed(model) as lens:
        raw, gradients = record(lens, sl.topic("activations")), record(lens, sl.norm("layer_gradients"))
        train_by_hand(model, SGD(model.parameters(), lr=0.0), batches, squared_error)
    outputs = [nn.functional.linear(x, weight, bias) for x, _ in batches]
    assert_steps_equal(raw, [{"": output} for output in outputs])
    wanted = [2 * (o - y) / o.numel() for o, (_, y) in zip(outputs, batches, strict=True)]
    assert_steps_equal(gradients, [norms({"": value}) for value in wanted], rtol=2e-6)


def test_depth_0_reaches_the_output_of_the_model_itself() -> None:
    model, batches = perceptron(), regression(1, 2, (6, 5))
    with observed(model) as lens:
        whole = record(lens, sl.layers(depth=0), sl.topic("activations"))
        outputs = record(lens, sl.topic("network_output"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), batches, squared_error)
    assert_steps_equal(whole, [{"": f[""]} for f in outputs])
    assert len(whole) == 2


class Repeats(nn.Module):
    """One activation module used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.act = nn.Tanh()
        self.second = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.act(self.act(self.first(self.act(x)))))
        return out


def test_a_module_used_several_times_gives_one_key_a_call_in_order() -> None:
    torch.manual_seed(0)
    model = Repeats()
    twin = copy.deepcopy(model)
    (x, target) = regression(1, 1, (6, 5))[0]
    chain = [x.clone().requires_grad_()]
    for step in (torch.tanh, twin.first, torch.tanh, torch.tanh, twin.second):
        chain.append(step(chain[-1]))
    _, act0, first, act1, act2, second = chain
    loss = nn.functional.mse_loss(second, target)
    grads = torch.autograd.grad(loss, [first, act0, act1, act2, second])
    keys = ("first", "act", "act@1", "act@2", "second")
    with observed(model) as lens:
        raw, gradients = record(lens, sl.topic("activations")), record(lens, sl.topic("layer_gradients"))
        reduced = record(lens, sl.norm("activations"))
        inputs = x.clone().requires_grad_()
        nn.functional.mse_loss(model(inputs), target).backward()
        SGD(model.parameters(), lr=0.1).step()
    outputs = dict(zip(keys, (first, act0, act1, act2, second), strict=True))
    assert_steps_equal(raw, [{k: v.detach() for k, v in outputs.items()}])
    assert_steps_equal(reduced, [norms(outputs)], rtol=2e-6)
    assert_steps_equal(gradients, [dict(zip(keys, grads, strict=True))])


@dataclass
class Parts:
    hidden: Tensor
    label: str


class Nested(nn.Module):
    """A layer whose output is nested in some way."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 3)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x))


class Unwraps(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any], unwrap: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.nested = Nested(wrap)
        self.unwrap = unwrap

    def forward(self, x: Tensor) -> Tensor:
        return self.unwrap(self.nested(x))


NESTINGS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda t: (t * 2, None), lambda o: cast("Tensor", o[0])),
    "dict": (lambda t: {"scores": [t * 2]}, lambda o: cast("Tensor", o["scores"][0])),
    "dataclass": (lambda t: Parts(t * 2, "x"), lambda o: cast("Tensor", o.hidden)),
    "mask-first": (lambda t: (torch.ones(3, dtype=torch.bool), t * 2), lambda o: cast("Tensor", o[1])),
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_of_a_nested_output_the_first_tensor_with_a_gradient_is_taken(nesting: str) -> None:
    torch.manual_seed(0)
    model = Unwraps(*NESTINGS[nesting])
    (x, target) = regression(1, 1, (6, 5))[0]
    expected = (model.nested.inner(x) * 2).detach()
    with observed(model) as lens:
        chosen = sl.layers("nested")
        raw = record(lens, chosen, sl.topic("activations"))
        gradients = record(lens, chosen, sl.topic("layer_gradients"))
        squared_error(model, (x, target)).backward()
        SGD(model.parameters(), lr=0.1).step()
    assert_steps_equal(raw, [{"nested": expected}])
    assert_steps_equal(gradients, [{"nested": 2 * (expected - target) / expected.numel()}], rtol=1e-5)


@dataclass
class Outputs:
    label: str
    scores: Tensor
    hidden: Tensor


OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "tuple": (lambda s, h: (s, h), lambda o: o),
    "dict": (
        lambda s, h: {"scores": {"of": s}, "hidden": [h]},
        lambda o: (o["scores"]["of"], o["hidden"][0]),
    ),
    "dataclass": (lambda s, h: Outputs("x", s, h), lambda o: (o.scores, o.hidden)),
}


class TwoHeaded(nn.Module):
    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.lower, self.upper = nn.Linear(5, 4), nn.Linear(4, 3)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        hidden = self.lower(x)
        return self.wrap(self.upper(hidden), hidden)


@pytest.mark.parametrize("nesting", OUTPUTS)
def test_a_model_with_a_nested_output_and_losses_on_several_parts_is_seen_whole(nesting: str) -> None:
    wrap, unwrap = OUTPUTS[nesting]
    torch.manual_seed(0)
    model = TwoHeaded(wrap)
    twin = copy.deepcopy(model)
    x, target = regression(1, 1, (6, 5))[0]
    hidden = twin.lower(x)
    scores = twin.upper(hidden)
    total = nn.functional.mse_loss(scores, target) + 0.1 * hidden.square().mean()
    expected = dict(zip(("lower", "upper"), torch.autograd.grad(total, [hidden, scores]), strict=True))
    optimizer = SGD(model.parameters(), lr=0.0)
    with observed(model) as lens:
        losses = lens.watch_loss(nn.functional.mse_loss), lens.watch_loss(lambda h: h.square().mean())
        frames, made = record(lens, sl.topic("layer_gradients")), record(lens, sl.topic("network_output"))
        parts, marks = record(lens, sl.topic("loss")), record(lens, sl.topic("batch_finished"))
        for _ in range(2):
            found, inner = unwrap(model(x))
            values = losses[0](found, target), 0.1 * losses[1](inner)
            (values[0] + values[1]).backward()
            optimizer.step()
    for frame in frames:
        for layer, gradient in expected.items():
            torch.testing.assert_close(frame[layer], gradient)
    assert points(frames) == points(made) == points(marks) == points(parts) == [(0, 0), (1, 0)]
    assert torch.equal(made[0][""], scores.detach())
    assert parts[0][""].tolist() == pytest.approx([values[0].item(), values[1].item() / 0.1])


def test_a_raw_activation_overwritten_in_place_is_reported_or_right_but_never_wrong() -> None:
    model, batches = perceptron(inplace=True), regression(1, 4, (6, 5))
    outputs, _ = layer_by_layer(perceptron(), batches, 0.1)
    with observed(model, on_error="report") as lens:
        reports = record_errors(lens)
        frames = record(lens, sl.topic("activations"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), batches, squared_error)
    assert [frame.step for frame in frames] == [0, 1, 2, 3]
    for frame, values in zip(frames, outputs, strict=True):
        assert {"1", "2"} <= set(frame.layers)
        for layer, value in frame.items():
            assert torch.equal(value, values[layer]), (frame.step, layer)
        if "0" not in frame:
            reported = [r for r in reports if r.step == frame.step]
            assert [type(r.error) for r in reported] == [sl.OverwrittenActivationError]
            assert "'0'" in str(reported[0].error)
    assert frames[-1].layers == ("0", "1", "2")


def test_reductions_of_an_activation_overwritten_in_place_are_those_before_it() -> None:
    model, batches = perceptron(inplace=True), regression(1, 3, (6, 5))
    outputs, gradients = layer_by_layer(perceptron(), batches, 0.1)
    with observed(model) as lens:
        frames = record(lens, sl.norm("activations"))
        backward = record(lens, sl.norm("layer_gradients"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), batches, squared_error)
    assert_steps_equal(frames, [norms(v) for v in outputs], rtol=2e-6)
    assert_steps_equal(backward, [norms(v) for v in gradients], rtol=2e-6)


class AddsInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lower = nn.Linear(5, 5)
        self.upper = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.lower(x)
        hidden += x
        out: Tensor = self.upper(hidden)
        return out


def test_a_residual_added_in_place_does_not_change_the_activation_seen() -> None:
    torch.manual_seed(0)
    model = AddsInPlace()
    (x, target) = regression(1, 1, (6, 5))[0]
    expected = model.lower(x).detach()
    optimizer = SGD(model.parameters(), lr=0.0)
    with observed(model, on_error="report") as lens:
        raw, reduced = record(lens, sl.topic("activations")), record(lens, sl.norm("activations"))
        for _ in range(2):
            squared_error(model, (x, target)).backward()
            optimizer.step()
    assert "lower" not in raw[0]
    assert torch.equal(raw[1]["lower"], expected)
    assert reduced[0]["lower"].item() == pytest.approx(float(expected.norm()))


class FrozenHalf(nn.Module):
    def __init__(self, without_gradients: Callable[[], Any]) -> None:
        super().__init__()
        self.backbone = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)
        self.without_gradients = without_gradients

    def forward(self, x: Tensor) -> Tensor:
        with self.without_gradients():
            hidden = self.backbone(x)
        out: Tensor = self.head(hidden.clone())
        return out


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_a_part_without_gradients_has_activations_and_no_layer_gradients(
    without_gradients: Callable[[], Any],
) -> None:
    torch.manual_seed(0)
    model = FrozenHalf(without_gradients)
    twin = copy.deepcopy(model)
    batches = regression(1, 2, (6, 5))
    truth = train_by_hand(twin, SGD(twin.parameters(), lr=0.1), batches, squared_error)
    with observed(model) as lens:
        outputs, gradients = record(lens, sl.topic("activations")), record(lens, sl.topic("layer_gradients"))
        reduced, raw = record(lens, sl.norm("activations")), record(lens, sl.topic("raw_gradients"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), batches, squared_error)
    assert layer_sets(outputs) == layer_sets(reduced) == [("backbone", "head")] * 2
    assert layer_sets(gradients) == [("head",)] * 2
    assert_steps_equal(raw, [s.gradients for s in truth])
    for frame, (x, _) in zip(outputs, batches, strict=True):
        assert torch.equal(frame["backbone"], twin.backbone(x))


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.head = nn.Linear(4, 3)
        self.call = partial(checkpoint, use_reentrant=reentrant)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.call(self.block, self.stem(x)))
        return out


def test_a_wrapper_that_checkpoints_does_not_show_in_the_names() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 3))
    model = copy.deepcopy(plain)
    model[1] = checkpoint_wrapper(model[1])
    found: list[list[sl.Frame]] = []
    for each in (plain, model):
        with observed(each) as lens:
            frames = [record(lens, sl.norm(t)) for t in ("parameters", "parameter_updates", "activations")]
            frames.append(record(lens, sl.layers("1.*"), sl.norm("weights")))
            train_by_hand(each, SGD(each.parameters(), lr=0.1), regression(1, 2, (6, 5)), squared_error)
        found.append([frame for each in frames for frame in each])
    assert [f.to_dict() for f in found[0]] == [f.to_dict() for f in found[1]]
    assert found[0][-1].layers == ("1.0",)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_is_seen_once_a_step_with_right_values(reentrant: bool) -> None:
    torch.manual_seed(0)
    model = Checkpointed(reentrant=reentrant)
    batches = regression(1, 3, (6, 5))
    plain = nn.Sequential(model.stem, *model.block, model.head)
    outputs, gradients = layer_by_layer(copy.deepcopy(plain), batches, 0.1)
    keys = dict(zip(("0", "1", "2", "3"), ("stem", "block.0", "block.1", "head"), strict=True))
    with observed(model) as lens:
        raw = record(lens, sl.topic("activations"))
        backward = record(lens, sl.norm("layer_gradients"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), batches, squared_error)
    assert points(raw) == [(0, 0), (1, 0), (2, 0)]
    assert_steps_equal(raw, [{keys[k]: v for k, v in o.items()} for o in outputs])
    assert points(backward) == [(0, 0), (1, 0), (2, 0)]
    for frame, values in zip(backward, gradients, strict=True):
        assert {"stem", "head"} <= set(frame.layers) <= set(keys.values())
        for key, value in values.items():
            if keys[key] in frame:
                assert frame[keys[key]].item() == pytest.approx(float(value.norm()), rel=1e-5)


def test_accumulated_gradients_of_outputs_come_once_a_micro_step() -> None:
    model, batches = perceptron(), regression(1, 4, (6, 5))
    with observed(model) as lens:
        outputs, gradients = record(lens, sl.norm("activations")), record(lens, sl.norm("layer_gradients"))
        train_by_hand(model, Adam(model.parameters()), batches, squared_error, accumulate=2)
    assert points(outputs) == points(gradients) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_forward_that_raises_leaves_nothing_behind_in_the_next_step() -> None:
    model, batches = perceptron(), regression(1, 2, (6, 5))
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        frames = record(lens, sl.norm("activations"))
        train_by_hand(model, optimizer, batches[:1], squared_error)
        with pytest.raises(RuntimeError, match="shapes"):
            model(torch.zeros(6, 9))
        train_by_hand(model, optimizer, batches[1:], squared_error)
    assert points(frames) == [(0, 0), (1, 0)]
    assert frames[1].layers == ("0", "1", "2")


def test_no_raw_activation_can_be_read_after_its_delivery() -> None:
    model = perceptron()
    kept: list[sl.Frame] = []
    with observed(model) as lens:
        lens.pipe(sl.topic("activations")).subscribe(kept.append)
        train_by_hand(model, SGD(model.parameters(), lr=0.1), regression(1, 1, (6, 5)), squared_error)
    with pytest.raises(sl.ExpiredFrameError, match="clone"):
        kept[0]["0"]


def test_values_delivered_are_detached() -> None:
    model = perceptron()
    seen: list[bool] = []
    with observed(model) as lens:
        for name in ("activations", "layer_gradients", "weights", "weight_gradients", "network_output"):
            lens.pipe(sl.topic(name)).subscribe(lambda f: seen.extend(f[k].requires_grad for k in f))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), regression(1, 1, (6, 5)), squared_error)
    assert seen
    assert not any(seen)

"""Which forwards and backwards count where loops are not plain."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import SGD

import streamlens as sl
from tests.helpers.by_hand import Batch, norms, regression, squared_error, train_by_hand
from tests.helpers.recording import assert_steps_equal, layer_sets, numbers, observed, points, record

BATCHES = regression(1, 4, (4, 5))


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


class Pieces(nn.Module):
    """A module that is never called, only its parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(5, 4), nn.Tanh())
        self.head = nn.Linear(4, 3)


def through_parts(model: nn.Module, batch: Batch) -> Tensor:
    pieces = cast("Pieces", model)
    return mse_loss(pieces.head(pieces.encoder(batch[0])), batch[1])


def test_a_module_whose_root_is_never_called_counts_by_its_parts() -> None:
    model = Pieces()
    twin = copy.deepcopy(model)
    truth: list[dict[str, Tensor]] = []
    optimizer = SGD(twin.parameters(), lr=0.1)
    for x, y in BATCHES:
        first = twin.encoder[0](x)
        second = torch.tanh(first)
        third = twin.head(second)
        truth.append({"encoder.0": first.detach(), "encoder.1": second.detach(), "head": third.detach()})
        mse_loss(third, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    with observed(model) as lens:
        outputs, backward = record(lens, sl.topic("activations")), record(lens, sl.norm("layer_gradients"))
        made, weights = record(lens, sl.topic("network_output")), record(lens, sl.norm("weights"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES, through_parts)
    assert_steps_equal(outputs, truth)
    assert_steps_equal(made, [{"": values["head"]} for values in truth])
    assert points(outputs) == points(backward) == points(weights) == [(k, 0) for k in range(4)]
    assert layer_sets(backward) == [("encoder.0", "encoder.1", "head")] * 4


def test_parts_called_with_accumulation_give_one_micro_step_a_backward() -> None:
    model = Pieces()
    with observed(model) as lens:
        outputs = record(lens, sl.norm("activations"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES, through_parts, accumulate=2)
    assert points(outputs) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_watched_loss_of_a_model_whose_root_is_never_called_is_seen() -> None:
    model = Pieces()
    with observed(model) as lens:
        criterion = lens.watch_loss(mse_loss)
        losses = record(lens, sl.topic("loss"))

        def loss_of(m: nn.Module, batch: Batch) -> Tensor:
            pieces = cast("Pieces", m)
            return criterion(pieces.head(pieces.encoder(batch[0])), batch[1])

        steps = train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES, loss_of)
    assert numbers(losses) == pytest.approx([s.losses[0] for s in steps])


def test_a_part_in_eval_mode_does_not_count_for_its_own_parts_in_training_mode() -> None:
    model = Pieces()
    with observed(model) as lens:
        outputs = record(lens, sl.norm("activations"))
        model.eval()
        model.encoder[0].train()
        model.encoder(BATCHES[0][0])
        model.train()
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES[:1], through_parts)
    assert layer_sets(outputs) == [("encoder.0", "encoder.1", "head")]


def test_forward_called_directly_leaves_parameter_topics_right(caplog: pytest.LogCaptureFixture) -> None:
    model = perceptron()
    twin = copy.deepcopy(model)

    def loss_of(m: nn.Module, batch: Batch) -> Tensor:
        return mse_loss(m.forward(batch[0]), batch[1])

    steps = train_by_hand(twin, SGD(twin.parameters(), lr=0.1), BATCHES, loss_of)
    with observed(model) as lens, caplog.at_level(logging.WARNING, "streamlens"):
        updates, outputs = record(lens, sl.norm("parameter_updates")), record(lens, sl.norm("activations"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES, loss_of)
    assert_steps_equal(updates, [norms(s.updates()) for s in steps], rtol=1e-5)
    assert {f.layers for f in outputs} == {("0", "1", "2")}
    assert caplog.messages == []


def test_only_parameters_subscribed_and_forward_called_directly_warns_of_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = perceptron()
    with observed(model) as lens, caplog.at_level(logging.WARNING, "streamlens"):
        weights = record(lens, sl.norm("weights"))
        steps = train_by_hand(
            model, SGD(model.parameters(), lr=0.1), BATCHES, lambda m, b: mse_loss(m.forward(b[0]), b[1])
        )
    assert points(weights) == [(k, 0) for k in range(len(steps))]
    assert caplog.messages == []


def test_gradients_taken_by_autograd_grad_are_seen_in_layers_and_end_the_micro_step() -> None:
    model = perceptron()
    parameters = list(model.parameters())
    optimizer = SGD(parameters, lr=0.1)
    with observed(model) as lens:
        backward, consumed = (
            record(lens, sl.norm("layer_gradients")),
            record(lens, sl.norm("parameter_gradients")),
        )
        outputs = record(lens, sl.norm("activations"))
        for k, batch in enumerate(BATCHES):
            grads = torch.autograd.grad(squared_error(model, batch), parameters)
            if k % 2:
                for parameter, grad in zip(parameters, grads, strict=True):
                    parameter.grad = grad
                optimizer.step()
    assert points(outputs) == points(backward) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert layer_sets(backward) == [("0", "1", "2")] * 4
    assert points(consumed) == [(0, 1), (1, 1)]


def test_a_gradient_penalty_belongs_to_the_forward_and_the_loss_after_it_counts() -> None:
    model = perceptron()
    twin = copy.deepcopy(model)
    x, y = BATCHES[0]

    def total(m: nn.Module, outputs: dict[str, Tensor] | None = None) -> Tensor:
        inputs = x.clone().requires_grad_()
        made = inputs
        for name, layer in m.named_children() if outputs is not None else ():
            made = layer(made)
            cast("dict[str, Tensor]", outputs)[name] = made
        output = made if outputs is not None else m(inputs)
        (slope,) = torch.autograd.grad(output.sum(), inputs, create_graph=True)
        return criterion(output + slope.square().sum(), y)

    criterion = mse_loss
    kept: dict[str, Tensor] = {}
    loss = total(twin, kept)
    truth = torch.autograd.grad(loss, list(kept.values()))
    with observed(model) as lens:
        criterion = lens.watch_loss(mse_loss)
        losses, backward = record(lens, sl.topic("loss")), record(lens, sl.topic("layer_gradients"))
        raw = record(lens, sl.topic("raw_gradients"))
        total(model).backward()
        SGD(model.parameters(), lr=0.1).step()
    assert numbers(losses) == pytest.approx([loss.item()])
    assert points(backward) == points(raw) == points(losses) == [(0, 0)]
    for layer, value in zip(kept, truth, strict=True):
        torch.testing.assert_close(backward[0][layer], value, rtol=1e-4, atol=1e-6)


def test_layers_that_only_a_gradient_penalty_reaches_have_no_layer_gradient() -> None:
    # The loss is of the slope alone, which depends on the output of tanh but not on the model's.
    model = perceptron()
    x = BATCHES[0][0].clone().requires_grad_()
    with observed(model) as lens:
        backward = record(lens, sl.topic("layer_gradients"))
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        slope.square().sum().backward()
        SGD(model.parameters(), lr=0.1).step()
    assert layer_sets(backward) == [("0", "1")]


def test_a_backward_of_the_loss_that_keeps_its_graph_gives_its_layer_gradients() -> None:
    model = perceptron()
    twin = copy.deepcopy(model)
    x, y = BATCHES[0]
    kept = []
    made = x
    for layer in twin.children():
        made = layer(made)
        kept.append(made)
    truth = torch.autograd.grad(mse_loss(made, y), kept)
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        backward, outputs = record(lens, sl.topic("layer_gradients")), record(lens, sl.norm("activations"))
        for _ in range(2):
            loss = squared_error(model, (x, y))
            with warnings.catch_warnings():
                # PyTorch advises against it, once a process.
                warnings.simplefilter("ignore")
                loss.backward(create_graph=True)
            optimizer.step()
            for parameter in model.parameters():
                parameter.grad = None
    assert points(backward) == points(outputs) == [(0, 0), (1, 0)]
    assert_steps_equal(backward[:1], [dict(zip(("0", "1", "2"), truth, strict=True))])


def test_two_backwards_through_one_forward_are_one_micro_step() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    x, y = BATCHES[0]
    with observed(model) as lens:
        outputs, gradients = (
            record(lens, sl.norm("activations")),
            record(lens, sl.norm("parameter_gradients")),
        )
        for _ in range(2):
            output = model(x)
            mse_loss(output, y).backward(retain_graph=True)
            output.abs().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert points(outputs) == points(gradients) == [(0, 0), (1, 0)]


def test_two_forwards_before_one_backward_are_calls_of_one_micro_step() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        outputs, backward = record(lens, sl.norm("activations")), record(lens, sl.norm("layer_gradients"))
        for _ in range(2):
            (model(BATCHES[0][0]) - model(BATCHES[1][0])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert {(f.step, f.micro_step) for f in outputs + backward} == {(0, 0), (1, 0)}
    assert sorted(layer for f in outputs if f.step == 1 for layer in f) == [
        "0",
        "0@1",
        "1",
        "1@1",
        "2",
        "2@1",
    ]
    assert layer_sets(backward) == [("0", "0@1", "1", "1@1", "2", "2@1")] * 2


def test_a_forward_that_raises_half_way_does_not_number_the_calls_of_the_next() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    failing = model.get_submodule("1")
    with observed(model) as lens:
        outputs, backward = record(lens, sl.topic("activations")), record(lens, sl.norm("layer_gradients"))
        train_by_hand(model, optimizer, BATCHES[:1], squared_error)

        def refuse(*_: object) -> None:
            raise MemoryError("out of memory")

        handle = failing.register_forward_pre_hook(refuse)
        with pytest.raises(MemoryError):
            model(BATCHES[1][0])
        handle.remove()
        expected = model.get_submodule("0").forward(BATCHES[2][0]).detach()
        train_by_hand(model, optimizer, BATCHES[2:3], squared_error)
    assert layer_sets(outputs) == layer_sets(backward) == [("0", "1", "2")] * 2
    assert torch.equal(outputs[1]["0"], expected)


def test_a_function_transform_of_the_model_counts_as_nothing() -> None:
    model = perceptron()
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    with observed(model) as lens:
        outputs = record(lens, sl.norm("activations"))

        def value(p: dict[str, Tensor], x: Tensor) -> Tensor:
            return cast("Tensor", torch.func.functional_call(model, p, (x,))).sum()

        torch.func.vmap(torch.func.grad(value), in_dims=(None, 0))(parameters, BATCHES[0][0])
        assert outputs == []
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES[:1], squared_error)
    assert layer_sets(outputs) == [("0", "1", "2")]

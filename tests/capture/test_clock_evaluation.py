"""Evaluation, eval mode and pauses: what is not training emits nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import streamlens as sl
from tests.helpers.by_hand import (
    Batch,
    of_role,
    regression,
    squared_error,
    train_by_hand,
)
from tests.helpers.recording import observed, points, record

BATCHES = regression(1, 6, (4, 5))


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 3))


def evaluate_in_eval_mode(model: nn.Module) -> None:
    model.eval()
    with torch.no_grad():
        model(BATCHES[0][0])
    model.train()


def evaluate_in_eval_mode_with_grad(model: nn.Module) -> None:
    model.eval()
    model(BATCHES[0][0])
    model.train()


def evaluate_without_grad(model: nn.Module) -> None:
    with torch.no_grad():
        model(BATCHES[0][0])


def evaluate_in_inference_mode(model: nn.Module) -> None:
    model.eval()
    with torch.inference_mode():
        model(BATCHES[0][0])
    model.train()


def sample_with_dropout(model: nn.Module) -> None:
    model.eval()
    model.get_submodule("2").train()
    model(BATCHES[0][0])
    model.train()


def evaluate_a_part_with_grad(model: nn.Module) -> None:
    model.eval()
    with torch.no_grad(), torch.enable_grad():
        model.get_submodule("0")(BATCHES[0][0])
    model.train()


EVALUATIONS = (
    evaluate_in_eval_mode,
    evaluate_in_eval_mode_with_grad,
    evaluate_without_grad,
    evaluate_in_inference_mode,
    sample_with_dropout,
    evaluate_a_part_with_grad,
)
ALL_TOPICS = (
    "activations",
    "layer_gradients",
    "raw_gradients",
    "input_data",
    "network_output",
    "weights",
    "weight_updates",
    "batch_started",
    "batch_finished",
)


@pytest.mark.parametrize("evaluate", EVALUATIONS)
def test_evaluation_between_steps_emits_nothing_and_moves_no_clock(
    evaluate: Callable[[nn.Module], None],
) -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        frames = {name: record(lens, sl.topic(name)) for name in ALL_TOPICS}
        for batch in BATCHES[:3]:
            train_by_hand(model, optimizer, [batch], squared_error)
            before = {name: len(got) for name, got in frames.items()}
            step = lens.current_step
            evaluate(model)
            evaluate(model)
            assert {name: len(got) for name, got in frames.items()} == before
            assert lens.current_step == step
    for name, got in frames.items():
        assert points(got) == [(0, 0), (1, 0), (2, 0)], name
    assert {f.layers for f in frames["activations"]} == {("0", "1", "2", "3")}


@pytest.mark.parametrize("evaluate", EVALUATIONS)
def test_evaluation_before_the_first_step_emits_nothing(evaluate: Callable[[nn.Module], None]) -> None:
    model = perceptron()
    with observed(model) as lens:
        frames = [record(lens, sl.topic(name)) for name in ALL_TOPICS]
        evaluate(model)
        assert not any(frames)
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES[:1], squared_error)
    assert [points(f) for f in frames] == [[(0, 0)]] * len(frames)


def test_evaluation_between_forward_and_backward_leaves_the_micro_step_alone() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        outputs, gradients = record(lens, sl.norm("activations")), record(lens, sl.norm("layer_gradients"))
        for batch in BATCHES[:2]:
            loss = squared_error(model, batch)
            evaluate_in_eval_mode_with_grad(model)
            loss.backward()
            optimizer.step()
    assert points(outputs) == points(gradients) == [(0, 0), (1, 0)]
    assert {f.layers for f in outputs + gradients} == {("0", "1", "2", "3")}


@pytest.mark.parametrize("fused", [False, True])
def test_paused_regions_emit_nothing_and_the_next_update_is_that_of_its_own_step(fused: bool) -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1, fused=fused)
    with observed(model) as lens:
        frames = {name: record(lens, sl.topic(name)) for name in ALL_TOPICS}
        train_by_hand(model, optimizer, BATCHES[:1], squared_error)
        with lens.paused():
            train_by_hand(model, optimizer, BATCHES[1:3], squared_error)
        assert {len(got) for got in frames.values()} == {1}
        truth = train_by_hand(model, optimizer, BATCHES[3:4], squared_error)
    assert {len(got) for got in frames.values()} == {2}
    change = frames["weight_updates"][1]
    for layer, value in of_role(truth[0].updates(), "weight").items():
        assert torch.equal(change[layer], value)


def test_a_paused_loop_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens, caplog.at_level(logging.WARNING, "streamlens"):
        record(lens, sl.norm("weights"))
        with lens.paused():
            train_by_hand(model, optimizer, BATCHES, squared_error)
    assert caplog.messages == []


def test_while_a_cuda_graph_is_captured_nothing_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    with observed(model) as lens:
        frames = [record(lens, sl.norm(t)) for t in ("weights", "weight_gradients", "activations")]
        for capturing[0] in (True, True, False):
            optimizer.zero_grad()
            model(torch.ones(4, 5)).sum().backward()
            optimizer.step()
    assert [len(seen) for seen in frames] == [1, 1, 1]


def test_pauses_nest() -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        frames = record(lens, sl.norm("weights"))
        with lens.paused():
            with lens.paused():
                pass
            train_by_hand(model, optimizer, BATCHES[:1], squared_error)
        assert frames == []
        train_by_hand(model, optimizer, BATCHES[:1], squared_error)
    assert len(frames) == 1


def grad_mode_off() -> AbstractContextManager[object]:
    return torch.no_grad()


def grad_mode_on() -> AbstractContextManager[object]:
    return nullcontext()


@pytest.mark.parametrize("wrap", [grad_mode_on, grad_mode_off])
def test_counting_by_gradients_takes_eval_mode_and_leaves_out_no_grad(
    wrap: Callable[[], AbstractContextManager[object]],
) -> None:
    model = perceptron().eval()
    optimizer = SGD(model.parameters(), lr=0.1)

    def loss_of(m: nn.Module, batch: Batch) -> Tensor:
        with wrap():
            m(batch[0])
        return squared_error(m, batch)

    with observed(model, count="grad") as lens:
        frames = record(lens, sl.norm("activations"))
        train_by_hand(model, optimizer, BATCHES[:2], loss_of)
    repeats = {layer for f in frames for layer in f if "@" in layer}
    assert {(f.step, f.micro_step) for f in frames} == {(0, 0), (1, 0)}
    assert repeats == (set() if wrap is grad_mode_off else {"0@1", "1@1", "2@1", "3@1"})


def test_a_loop_in_eval_mode_gets_one_warning_that_names_the_remedy(caplog: pytest.LogCaptureFixture) -> None:
    model = perceptron().eval()
    with observed(model) as lens, caplog.at_level(logging.WARNING, "streamlens"):
        weights, outputs = record(lens, sl.norm("weights")), record(lens, sl.norm("activations"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES, squared_error)
    assert len(weights) == 6
    assert outputs == []
    assert len(caplog.messages) == 1
    assert "count='grad'" in caplog.messages[0]


def test_a_loop_in_training_mode_gets_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = perceptron()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens, caplog.at_level(logging.WARNING, "streamlens"):
        record(lens, sl.norm("weights"))
        for batch in BATCHES:
            train_by_hand(model, optimizer, [batch], squared_error)
            evaluate_in_eval_mode_with_grad(model)
    assert caplog.messages == []


def test_a_disabled_run_emits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMLENS_DISABLED", "1")
    model = perceptron()
    with observed(model) as lens:
        frames = [record(lens, sl.topic(name)) for name in ALL_TOPICS]
        train_by_hand(model, SGD(model.parameters(), lr=0.1), BATCHES[:2], squared_error)
    assert not any(frames)

"""The batch, its labels, the model's output and the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss
from torch.optim import SGD

import streamlens as sl
from tests.helpers.by_hand import Batch, regression, squared_error, train_by_hand
from tests.helpers.recording import assert_steps_equal, numbers, observed, points, record


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def test_input_and_output_are_the_batch_and_what_the_model_made_of_it() -> None:
    model, batches = perceptron(), regression(1, 3, (6, 5))
    outputs: list[Tensor] = []

    def loss_of(m: nn.Module, batch: Batch) -> Tensor:
        outputs.append(m(batch[0]))
        return mse_loss(outputs[-1], batch[1])

    with observed(model) as lens:
        data, made = record(lens, sl.topic("input_data")), record(lens, sl.topic("network_output"))
        norms = record(lens, sl.norm("input_data"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), batches, loss_of)
    assert_steps_equal(data, [{"": x} for x, _ in batches])
    assert_steps_equal(made, [{"": o.detach()} for o in outputs])
    assert numbers(norms) == pytest.approx([float(x.norm()) for x, _ in batches])
    assert {f.kind for f in data + made} == {sl.Kind.MICRO_STEP}


def watch_module(lens: sl.Lens) -> Callable[[Tensor, Tensor], Tensor]:
    return lens.watch_loss(nn.MSELoss())


def watch_function(lens: sl.Lens) -> Callable[[Tensor, Tensor], Tensor]:
    return lens.watch_loss(mse_loss)


@pytest.mark.parametrize("watch", [watch_module, watch_function])
def test_a_watched_loss_gives_its_value_and_the_labels(
    watch: Callable[[sl.Lens], Callable[[Tensor, Tensor], Tensor]],
) -> None:
    model, batches = perceptron(), regression(1, 4, (6, 5))
    with observed(model) as lens:
        criterion = watch(lens)
        losses, labels = record(lens, sl.topic("loss")), record(lens, sl.topic("input_labels"))
        steps = train_by_hand(
            model,
            SGD(model.parameters(), lr=0.1),
            batches,
            lambda m, batch: criterion(m(batch[0]), batch[1]),
            accumulate=2,
        )
    assert numbers(losses) == pytest.approx([loss for s in steps for loss in s.losses], rel=1e-6)
    assert points(losses) == points(labels) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [f.layers for f in losses] == [("",)] * 4
    assert all(torch.equal(f[""], y) for f, (_, y) in zip(labels, batches, strict=True))


def test_a_loss_module_given_to_observe_is_watched_with_keyword_arguments_too() -> None:
    model, batches = perceptron(), regression(1, 2, (6, 5))
    criterion = nn.MSELoss()
    with observed(model, loss=criterion) as lens:
        losses, labels = record(lens, sl.topic("loss")), record(lens, sl.topic("input_labels"))
        steps = train_by_hand(
            model,
            SGD(model.parameters(), lr=0.1),
            batches,
            lambda m, b: criterion(input=m(b[0]), target=b[1]),
        )
    assert numbers(losses) == pytest.approx([s.losses[0] for s in steps])
    assert all(torch.equal(f[""], y) for f, (_, y) in zip(labels, batches, strict=True))


def test_a_loss_module_that_takes_the_place_of_one_that_is_gone_is_watched() -> None:
    model, (batch,) = perceptron(), regression(1, 1, (6, 5))
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        losses = record(lens, sl.topic("loss"))
        for step in range(5):
            criterion = lens.watch_loss(nn.MSELoss())
            criterion(model(batch[0]), batch[1]).backward()
            optimizer.step()
            assert len(losses) == step + 1
            # So that the next one lies where this one lay.
            del criterion
    assert {f.components for f in losses} == {()}


def test_the_batch_is_the_first_tensor_also_where_a_gradient_reaches_another() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Parameter(torch.zeros(1, 3))
            self.cell = nn.RNNCell(5, 3)

        def forward(self, x: Tensor, state: Tensor) -> Tensor:
            return cast("Tensor", self.cell(x, state.expand(len(x), -1)))

    model, batches = Recurrent(), regression(1, 2, (6, 5))
    with observed(model) as lens:
        data = record(lens, sl.topic("input_data"))
        train_by_hand(
            model,
            SGD(model.parameters(), lr=0.1),
            batches,
            lambda m, batch: mse_loss(m(batch[0], model.start * 1), batch[1]),
        )
    assert_steps_equal(data, [{"": x} for x, _ in batches])


@pytest.mark.parametrize("watched", [False, True])
def test_a_loss_that_is_a_part_of_a_model_whose_root_is_never_called_is_not_its_output(watched: bool) -> None:
    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(5, 3)
            self.criterion = nn.MSELoss()

    model, batches = Task(), regression(1, 3, (6, 5))
    outputs: list[Tensor] = []

    def loss_of(m: nn.Module, batch: Batch) -> Tensor:
        outputs.append(model.body(batch[0]))
        return cast("Tensor", model.criterion(outputs[-1], batch[1]))

    with observed(model, loss=model.criterion if watched else None) as lens:
        made = record(lens, sl.topic("network_output"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), batches, loss_of)
    assert_steps_equal(made, [{"": o.detach()} for o in outputs])


def test_two_watched_losses_are_components_of_one_frame() -> None:
    model, batches = perceptron(), regression(1, 2, (6, 5))
    parts: list[tuple[float, float]] = []
    with observed(model) as lens:
        squared, absolute = lens.watch_loss(mse_loss), lens.watch_loss(l1_loss)
        frames = record(lens, sl.topic("loss"))

        def loss_of(m: nn.Module, batch: Batch) -> Tensor:
            output = m(batch[0])
            first, second = squared(output, batch[1]), absolute(output, batch[1])
            parts.append((first.item(), second.item()))
            return first + second

        train_by_hand(model, SGD(model.parameters(), lr=0.1), batches, loss_of)
    assert [f.components for f in frames] == [("mse_loss", "l1_loss")] * 2
    assert [tuple(f[""].tolist()) for f in frames] == [pytest.approx(p) for p in parts]


def test_a_loss_scaled_in_place_for_accumulation_keeps_the_value_it_was_computed_with() -> None:
    model, batches = perceptron(), regression(1, 2, (6, 5))
    optimizer = SGD(model.parameters(), lr=0.1)
    values: list[float] = []
    with observed(model) as lens:
        criterion = lens.watch_loss(mse_loss)
        losses = record(lens, sl.topic("loss"))
        for x, y in batches:
            loss = criterion(model(x), y)
            values.append(loss.item())
            loss /= 2
            loss.backward()
        optimizer.step()
    assert numbers(losses) == pytest.approx(values)


@dataclass
class Answer:
    loss: Tensor | None
    logits: Tensor


class WithLoss(nn.Module):
    """Computes its loss itself where it is given labels, as language models do."""

    def __init__(self, *, as_dict: bool) -> None:
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.as_dict = as_dict

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Answer | dict[str, Tensor | None]:
        logits = self.head(x)
        loss = None if labels is None else mse_loss(logits, labels)
        return {"loss": loss, "logits": logits} if self.as_dict else Answer(loss, logits)


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_model_output_that_carries_its_loss_gives_loss_and_labels(as_dict: bool) -> None:
    model, batches = WithLoss(as_dict=as_dict), regression(1, 2, (6, 5))
    values: list[float] = []

    def loss_of(m: nn.Module, batch: Batch) -> Tensor:
        output = m(batch[0], labels=batch[1])
        loss: Tensor = output["loss"] if as_dict else output.loss
        values.append(loss.item())
        return loss

    with observed(model) as lens:
        losses, labels = record(lens, sl.topic("loss")), record(lens, sl.topic("input_labels"))
        train_by_hand(model, SGD(model.parameters(), lr=0.1), batches, loss_of)
    assert numbers(losses) == pytest.approx(values)
    assert all(torch.equal(f[""], y) for f, (_, y) in zip(labels, batches, strict=True))


def test_a_loss_that_needs_no_gradient_or_follows_an_evaluation_is_not_emitted() -> None:
    model, batches = perceptron(), regression(1, 2, (6, 5))
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        criterion = lens.watch_loss(mse_loss)
        losses = record(lens, sl.topic("loss"))
        for x, y in batches:
            output = model(x)
            loss = criterion(output, y)
            criterion(output.detach(), y)
            with torch.no_grad():
                criterion(model(x), y)
            model.eval()
            criterion(model(x), y)
            model.train()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert points(losses) == [(0, 0), (1, 0)]
    assert [f.values.ndim for f in losses if isinstance(f.values, Tensor)] == [1, 1]


def test_batch_marks_carry_the_index_of_the_pass_within_its_epoch() -> None:
    model, batches = perceptron(), regression(1, 4, (6, 5))
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        started, finished = record(lens, sl.topic("batch_started")), record(lens, sl.topic("batch_finished"))
        for _ in lens.epochs(2):
            train_by_hand(model, optimizer, batches, squared_error, accumulate=2)
    assert numbers(started) == numbers(finished) == [0, 1, 2, 3] * 2
    assert [f.epoch for f in started] == [f.epoch for f in finished] == [0] * 4 + [1] * 4
    assert points(started) == points(finished) == [(s, m) for s in range(4) for m in range(2)]


def test_epoch_marks_carry_the_index_and_lie_in_their_own_epoch() -> None:
    model, batches = perceptron(), regression(1, 2, (6, 5))
    optimizer = SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        started, finished = record(lens, sl.topic("epoch_started")), record(lens, sl.topic("epoch_finished"))
        for epoch in lens.epochs(3):
            assert lens.epoch == epoch
            train_by_hand(model, optimizer, batches, squared_error)
    assert numbers(started) == numbers(finished) == [0, 1, 2]
    assert [f.epoch for f in started] == [f.epoch for f in finished] == [0, 1, 2]
    assert [f.step for f in started] == [0, 2, 4]
    assert [f.step for f in finished] == [1, 3, 5]
    assert {f.kind for f in started + finished} == {sl.Kind.EVENT}

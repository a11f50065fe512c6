"""What a subscriber waits for in vain is said, once, and what to do about it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim import SGD, Optimizer

import streamlens as sl
from streamlens.chain import ErrorReport
from tests.helpers.by_hand import regression, squared_error, train_by_hand


def reports_of(topic: str, *, loss: nn.Module | None = None, steps: int = 3) -> list[str]:
    """What is reported while a subscriber of a topic sees a loop that watches no loss by itself."""
    model, reports = nn.Linear(5, 3), list[ErrorReport]()
    with sl.observe(model, loss=loss) as lens:
        lens.errors.subscribe(reports.append)
        lens.pipe(sl.topic(topic)).subscribe(lambda frame: None)
        optimizer: Optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        train_by_hand(model, optimizer, regression(0, steps, (4, 5)), squared_error)
    return [str(report.error) for report in reports]


@pytest.mark.parametrize(
    ("topic", "remedy"),
    [
        ("loss", "observe(model, loss=criterion)"),
        ("input_labels", "observe(model, loss=criterion)"),
        ("optimizer_state.exp_avg", "the optimizer keeps momentum_buffer"),
    ],
)
def test_a_topic_the_run_turns_out_not_to_have_is_reported_once_with_the_remedy(
    topic: str, remedy: str
) -> None:
    (message,) = reports_of(topic)
    assert repr(topic) in message
    assert remedy in message


@pytest.mark.parametrize("topic", ["weights", "network_output", "optimizer_state.momentum_buffer"])
def test_what_the_run_has_is_not_reported(topic: str) -> None:
    assert reports_of(topic) == []


def test_a_watched_loss_that_is_never_called_on_the_model_is_reported_as_such() -> None:
    (message,) = reports_of("loss", loss=nn.MSELoss())
    assert "must be called" in message


def test_a_loss_without_labels_is_reported_to_who_asked_for_labels() -> None:
    model, reports = nn.Linear(2, 1), list[ErrorReport]()
    optimizer = SGD(model.parameters(), lr=0.1)
    with sl.observe(model) as lens:
        lens.errors.subscribe(reports.append)
        lens.pipe(sl.topic("loss", "input_labels")).subscribe(lambda frame: None)
        energy = lens.watch_loss(lambda output: output.square().mean())
        for _ in range(3):
            energy(model(torch.ones(1, 2))).backward()
            optimizer.step()
    (report,) = reports
    assert "'input_labels'" in str(report.error)
    assert "target=" in str(report.error)


def test_a_later_subscriber_is_told_too_and_a_loss_that_comes_is_no_absence() -> None:
    model, reports, losses = nn.Linear(5, 3), list[ErrorReport](), list[sl.Frame]()
    optimizer = SGD(model.parameters(), lr=0.1)
    batches = regression(0, 2, (4, 5))
    with sl.observe(model) as lens:
        lens.errors.subscribe(reports.append)
        criterion = lens.watch_loss(mse_loss)
        lens.pipe(sl.norm("weights")).subscribe(lambda frame: None)
        train_by_hand(model, optimizer, batches, squared_error)
        assert reports == []
        lens.pipe(sl.topic("loss")).subscribe(losses.append)
        train_by_hand(model, optimizer, batches, lambda m, batch: criterion(m(batch[0]), batch[1]))
    assert len(losses) == 2
    assert reports == []

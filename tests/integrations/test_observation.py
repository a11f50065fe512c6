"""What both callbacks rest on: each epoch begins and ends once, and a state is taken up once."""

from __future__ import annotations

import torch
from torch import nn

import streamlens as sl
from streamlens.integrations._observation import Observation
from tests.helpers.recording import numbers, record


def steps(model: nn.Module, count: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()


def test_an_epoch_begins_and_ends_once_however_often_it_is_said() -> None:
    frames: dict[str, list[sl.Frame]] = {}

    def chains(lens: sl.Lens) -> None:
        frames.update({name: record(lens, sl.topic(name)) for name in ("epoch_started", "epoch_finished")})

    model = nn.Linear(3, 2)
    observation = Observation(chains, {"on_error": "raise"}, None)
    observation.begin_epoch(0)  # nothing is observed yet
    observation.end_epoch()
    observation.open(model)
    observation.end_epoch()  # none has begun
    for epoch in (5, 5, 6):
        observation.begin_epoch(epoch)
        steps(model, 2)
    for _ in range(2):
        observation.end_epoch()
    observation.begin_epoch(7)
    observation.close()
    assert numbers(frames["epoch_started"]) == [0, 1, 2]
    assert numbers(frames["epoch_finished"]) == [0, 1]
    assert [f.step for f in frames["epoch_finished"]] == [3, 5]


def test_a_loaded_state_is_taken_up_by_the_next_lens_alone() -> None:
    model = nn.Linear(3, 2)
    first = Observation(lambda lens: None, {}, None)
    lens = first.open(model)
    steps(model, 3)
    saved = first.state_dict()
    first.close()
    assert lens.closed
    second = Observation(lambda lens: None, {}, None)
    second.load_state_dict(saved)
    assert second.state_dict() == saved, "also before there is a lens"
    assert second.open(model).current_step == 2
    steps(model, 4)
    assert second.lens.current_step == 6
    assert second.open(model).current_step == 6
    second.close()


def test_a_state_loaded_while_a_lens_is_open_moves_that_lens() -> None:
    model = nn.Linear(3, 2)
    observation = Observation(lambda lens: None, {}, None)
    observation.open(model)
    steps(model, 3)
    saved = observation.state_dict()
    steps(model, 2)
    observation.load_state_dict(saved)
    assert observation.lens.current_step == 2
    observation.close()

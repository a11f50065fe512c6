"""Callback: frames to a function, off the training thread."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import streamlens as sl
from streamlens.frame import Frame
from streamlens.sinks.callback import Callback
from tests.helpers.sinks import Connected, norms


def test_the_function_gets_lists_of_frames_on_a_thread_of_its_own() -> None:
    calls: list[tuple[list[Frame], int]] = []
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sl.observe(model) as lens:
        lens.pipe(sl.norm("weights")).subscribe(
            Callback(lambda frames: calls.append((frames, threading.get_ident())))
        )
        for _ in range(5):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    assert [frame.step for frames, _ in calls for frame in frames] == list(range(5))
    assert all(type(frames) is list for frames, _ in calls)
    assert threading.get_ident() not in {thread for _, thread in calls}


@pytest.mark.parametrize(("retries", "calls", "written"), [(0, 1, 0), (2, 3, 1)])
def test_what_the_function_raises_is_reported_and_it_is_called_again_if_asked(
    retries: int, calls: int, written: int
) -> None:
    seen: list[int] = []

    def failing(frames: list[Frame]) -> None:
        seen.append(len(frames))
        if len(seen) <= 2:
            raise RuntimeError("not yet")

    chain = Connected(Callback(failing, retries=retries))
    assert chain.send(norms(0, [1.0])) == bool(written)
    chain.close()
    assert len(seen) == calls
    assert (chain.stats.written, chain.stats.failed) == (written, 1 - written)
    assert chain.reports == ([] if written else ["sink Callback: not yet"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fn": 3}, TypeError, "a function of a list of frames, got 3"),
        ({"fn": print, "seconds": 0}, ValueError, "seconds above 0; got 0"),
        ({"fn": print, "retries": -1}, ValueError, "at least 0; got -1"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Callback(**arguments)

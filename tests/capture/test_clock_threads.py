"""Forwards on other threads, and of models that call themselves, do not disturb the one that counts."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from torch import Tensor, nn

import streamlens as sl
from tests.helpers.recording import observed, record


class Waiting(nn.Module):
    """Has another thread evaluate the model in the middle of its training forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.evaluate = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.evaluate:
            self.evaluate = False
            with torch.no_grad():
                thread = threading.Thread(target=self, args=(torch.ones(1, 3),))
                thread.start()
                thread.join()
        out: Tensor = self.second(x)
        return out


def test_an_evaluation_on_another_thread_leaves_the_pass_alone() -> None:
    model = Waiting()
    with observed(model) as lens:
        frames, outputs = record(lens, sl.norm("activations")), record(lens, sl.norm("network_output"))
        model.evaluate = True
        x = torch.randn(2, 3)
        out = model(x)
        out.sum().backward()
    assert [frame.layers for frame in frames] == [("first", "second")]
    assert outputs[0][""].item() == pytest.approx(out.norm().item())


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, depth: int = 0) -> Tensor:
        out: Tensor = self.layer(x)
        return self(out, depth - 1) if depth else out


def test_a_model_that_calls_itself_gives_one_output_and_its_layers_as_repeated() -> None:
    model = Recursive()
    with observed(model) as lens:
        frames, outputs = record(lens, sl.norm("activations")), record(lens, sl.norm("network_output"))
        model(torch.ones(2, 3), 2).sum().backward()
    assert [frame.layers for frame in frames] == [("layer", "layer@1", "layer@2")]
    assert [frame.layers for frame in outputs] == [("",)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_emits_nothing() -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        frames = record(lens, sl.norm("weights"))
        child = os.fork()
        if child == 0:
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            os._exit(len(frames))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert len(frames) == 1

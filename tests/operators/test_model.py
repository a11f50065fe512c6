"""The seam of metrics that evaluate the model: when they are due, and that they leave no trace."""

from __future__ import annotations

import gc
import random
import weakref

import numpy as np
import pytest
import torch
from reactivex.subject import Subject
from torch import nn

import streamlens as sl
from streamlens.frame import Frame
from streamlens.nodes import Emitted
from streamlens.operators._base import relabelled
from streamlens.operators._model import FindModel, ModelNode, on_model, undisturbed
from streamlens.stream import Stream


class _Disturbing(ModelNode):
    """Does to a run what a careless evaluation does, and gives the sum of the first weight."""

    def evaluate(self, model: nn.Module, frame: Frame) -> Emitted:
        model.eval()
        torch.rand(3)
        np.random.rand(2)  # noqa: NPY002
        random.random()
        with torch.no_grad():
            model(torch.zeros(1, 4))
        total = next(model.parameters()).detach().sum()
        return relabelled(frame, "first", total.reshape(1), layers=("",))


def _first(model: nn.Module | None = None) -> sl.Operator:
    def make(stream: Stream, find: FindModel) -> ModelNode:
        return _Disturbing(stream, find)

    return lambda source: on_model(source, make, "first()", operator="first", model=model)


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 2))


def _steps(model: nn.Module, n: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sums = []
    for _ in range(n):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        sums.append(next(model.parameters()).sum().item())
    return sums


def test_a_lens_without_topic_is_due_after_each_update_of_its_cadence() -> None:
    model = _net()
    got: list[Frame] = []
    lens = sl.observe(model)
    lens.pipe(sl.every(2), _first()).subscribe(got.append)
    sums = _steps(model, 5)
    lens.close()
    assert [f.step for f in got] == [0, 2, 4]
    assert [float(f[""]) for f in got] == pytest.approx([sums[k] for k in (0, 2, 4)])


def test_a_stream_of_frames_says_when() -> None:
    model = _net()
    got: list[Frame] = []
    lens = sl.observe(model)
    lens.pipe(sl.topic("epoch_finished"), _first()).subscribe(got.append)
    for _ in lens.epochs(2):
        _steps(model, 3)
    lens.close()
    assert [f.step for f in got] == [2, 5]


def test_training_is_bit_identical_and_evaluation_emits_nothing() -> None:
    plain, watched = _net(), _net()
    activations: list[Frame] = []
    torch.manual_seed(1)
    random.seed(1)
    expected = [_steps(plain, 4), torch.rand(1).item(), random.random()]
    lens = sl.observe(watched, count="grad")
    lens.pipe(_first()).subscribe(lambda frame: None)
    lens.pipe(sl.norm("activations")).subscribe(activations.append)
    torch.manual_seed(1)
    random.seed(1)
    assert [_steps(watched, 4), torch.rand(1).item(), random.random()] == expected
    assert watched.training
    assert [f.step for f in activations] == [0, 1, 2, 3]
    lens.close()


def test_undisturbed_restores_modes_of_parts_and_every_generator() -> None:
    model = _net()
    model[1].eval()
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())  # type: ignore[index]  # noqa: NPY002

    def careless() -> None:
        with undisturbed(model):
            model.train()
            torch.rand(1), np.random.rand(1), random.random()  # noqa: NPY002
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        careless()
    assert [m.training for m in model] == [True, False, True]
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_plain_stream_needs_the_model_by_name() -> None:
    source: Subject[Frame] = Subject()
    with pytest.raises(sl.StreamlensError, match=r"needs the model.*model=model"):
        _first()(source)
    with pytest.raises(TypeError, match=r"takes an nn.Module, got int"):
        _first(3)(source)  # type: ignore[arg-type]


def test_a_model_given_is_held_weakly() -> None:
    source: Subject[Frame] = Subject()
    model = _net()
    got: list[Frame] = []
    reference = weakref.ref(model)
    _first(model)(source).subscribe(got.append)
    source.on_next(Frame("loss", 0, ("",), torch.zeros(1)))
    source.on_next(Frame("loss", 0, ("",), torch.zeros(1)))
    assert [f.step for f in got] == [0]
    del model
    gc.collect()
    assert reference() is None
    source.on_next(Frame("loss", 1, ("",), torch.zeros(1)))
    assert len(got) == 1

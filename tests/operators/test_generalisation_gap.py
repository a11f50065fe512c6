"""`generalisation_gap`: training minus test accuracy, both counted by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reactivex.subject import Subject
from torch import Tensor, nn

import streamlens as sl
from streamlens.frame import Frame, Kind
from tests._runs import Recipe, same, small_model, train
from tests.helpers.recording import observed, record
from tests.operators.support import resumed


def data(count: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=g), torch.randint(0, 3, (count,), generator=g)


def right(model: nn.Module, x: Tensor, y: Tensor) -> int:
    with torch.no_grad():
        return int((model(x).argmax(1) == y).sum())


def test_all_training_batches_since_the_last_evaluation_count_by_their_examples() -> None:
    model, criterion = small_model(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, y = data(40, 99)
    wanted: list[float] = []
    with observed(model, loss=criterion) as lens:
        got = record(lens, sl.generalisation_gap([(x, y)], every=3))
        hits = seen = 0
        for k in range(7):
            batch, labels = data(3 + 5 * (k % 2), k)
            out = model(batch)
            hits, seen = hits + int((out.argmax(1) == labels).sum()), seen + len(labels)
            optimizer.zero_grad()
            criterion(out, labels).backward()
            optimizer.step()
            if k % 3 == 0:
                with lens.paused():
                    wanted.append(hits / seen - right(model, x, y) / 40)
                hits = seen = 0
    assert [f.step for f in got] == [0, 3, 6]
    assert [float(f[""]) for f in got] == pytest.approx(wanted, abs=1e-6)
    assert {f.topic for f in got} == {"generalisation_gap"}


@pytest.mark.parametrize("cadence", [None, 2])
def test_each_epoch_or_on_the_lenss_cadence(cadence: int | None) -> None:
    model, criterion = small_model(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with observed(model, loss=criterion) as lens:
        before = () if cadence is None else (sl.every(cadence),)
        got = record(lens, *before, sl.generalisation_gap([data(9, 9)]))
        for _ in lens.epochs(2):
            for k in range(3):
                optimizer.zero_grad()
                batch, labels = data(4, k)
                criterion(model(batch), labels).backward()
                optimizer.step()
    assert [f.step for f in got] == ([2, 5] if cadence is None else [0, 2, 4])


def test_with_a_training_loader_both_are_of_the_same_weights() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    (x, y), (u, v) = data(30, 1), data(17, 2)
    wanted = []
    with observed(model) as lens:
        got = record(
            lens, sl.generalisation_gap([(u, v)], train=[(x[:20], y[:20]), (x[20:], y[20:])], every=1)
        )
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            with lens.paused():
                wanted.append(right(model, x, y) / 30 - right(model, u, v) / 17)
    assert [float(f[""]) for f in got] == pytest.approx(wanted, abs=1e-6)


def plain_frames(steps: int) -> list[Frame]:
    out: list[Frame] = []
    for k in range(steps):
        x, y = data(4, k)
        out.append(Frame("network_output", k, ("",), (x[:, :3],), kind=Kind.MICRO_STEP))
        out.append(Frame("input_labels", k, ("",), (y,), kind=Kind.MICRO_STEP))
        if k % 2:
            out.append(Frame("tick", k + 1, ("",), torch.zeros(1)))
    return out


def test_on_a_plain_stream_other_topics_say_when_and_state_survives() -> None:
    model, (x, y) = small_model(), data(12, 50)

    def make() -> sl.Operator:
        return sl.generalisation_gap([(x, y)], model=model)

    frames = plain_frames(6)
    source: Subject[Frame] = Subject()
    got: list[Frame] = []
    source.pipe(make()).subscribe(got.append)
    for item in frames:
        source.on_next(item)
    test = right(model, x, y) / 12
    # A step's tally is known when a later frame of outputs or labels comes.
    known = [[0], [1, 2], [3, 4]]
    hits = {k: int((data(4, k)[0][:, :3].argmax(1) == data(4, k)[1]).sum()) for k in range(6)}
    wanted = [sum(hits[k] for k in ks) / (4 * len(ks)) - test for ks in known]
    assert [float(f[""]) for f in got] == pytest.approx(wanted, abs=1e-6)
    for at in (4, 7):
        again = resumed(make, frames, at)
        assert [float(f[""]) for f in again] == pytest.approx(wanted, abs=1e-6)


def test_without_training_batches_there_is_no_frame() -> None:
    model = small_model()
    source: Subject[Frame] = Subject()
    got: list[Frame] = []
    source.pipe(sl.generalisation_gap([data(5, 0)], model=model)).subscribe(got.append)
    source.on_next(Frame("tick", 0, ("",), torch.zeros(1)))
    assert got == []


@pytest.mark.parametrize("loader", [False, True])
def test_training_is_bit_identical(loader: bool) -> None:
    recipe = Recipe("convolutions", "adam", accumulation=2)
    held_back = [(torch.randn(6, 16), torch.zeros(6).long())]

    @contextlib.contextmanager
    def observing(model: nn.Module, criterion: nn.Module) -> Iterator[None]:
        with sl.observe(model, loss=criterion, on_error="raise") as lens:
            got = record(lens, sl.generalisation_gap(held_back, train=held_back if loader else None, every=1))
            yield
        assert len(got) == recipe.steps

    assert same(train(recipe), train(recipe, observing))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3,), {}, TypeError, r"generalisation_gap\(\) takes a loader"),
        (([1],), {"train": 3}, TypeError, "takes a loader"),
        (([1],), {"every": -1}, ValueError, "every=-1"),
        (([1],), {"class_dim": "x"}, ValueError, "class_dim='x'"),
    ],
)
def test_bad_arguments_are_named(
    arguments: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sl.generalisation_gap(*arguments, **options)


def test_a_plain_stream_needs_the_model() -> None:
    with pytest.raises(sl.StreamlensError, match=r"generalisation_gap\(\) needs the model"):
        Subject[Frame]().pipe(sl.generalisation_gap([data(4, 0)]))

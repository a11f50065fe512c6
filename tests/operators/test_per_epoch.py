from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reactivex.subject import Subject

from streamlens import observe
from streamlens.frame import Frame
from streamlens.operators import every, per_epoch, topic
from tests.operators.support import (
    Run,
    as_dicts,
    assert_same,
    chain_of,
    flat,
    frame,
    ragged,
    resumed,
    run,
    streams,
)
from tests.operators.test_window import NAMED, Rows

LENGTH = 5


def oracle(stream: Rows, name: str) -> dict[tuple[int, str], float]:
    out: dict[tuple[int, str], float] = {}
    for epoch in {step // LENGTH for step, _ in stream}:
        inside = [(step, values) for step, values in stream if step // LENGTH == epoch]
        for layer in {layer for _, values in inside for layer in values}:
            known = [v[layer] for _, v in inside if layer in v and math.isfinite(v[layer])]
            out[inside[-1][0], layer] = NAMED[name](known) if known else math.nan
    return out


def frames_of(stream: Rows) -> list[Frame]:
    return [frame(s, v, epoch=s // LENGTH) for s, v in stream]


@given(streams(), st.sampled_from(sorted(NAMED)))
def test_equals_a_list_comprehension_with_gaps_and_nan(stream: Rows, name: str) -> None:
    out = run(per_epoch(name), frames_of(stream))
    assert_same(flat(out), oracle(stream, name), rel=1e-6, abs_=1e-6)


@given(streams(), st.sampled_from(["mean", "std", "last", "median"]), st.integers(0, 14))
def test_interrupted_and_resumed_equals_uninterrupted(stream: Rows, name: str, at: int) -> None:
    frames = frames_of(stream)
    got = resumed(lambda: per_epoch(name), frames, min(at, len(frames)))
    assert_same(flat(got), flat(run(per_epoch(name), frames)), rel=0, abs_=0)


def test_a_long_epochs_mean_keeps_its_digits_in_float32() -> None:
    frames = [Frame("x", s, ("a",), torch.tensor([1000.1])) for s in range(3000)]
    (out,) = run(per_epoch(), frames)
    assert out.to_dict()["a"] == pytest.approx(float(torch.tensor(1000.1)), rel=1e-6)


def test_a_function_is_given_the_whole_epoch() -> None:
    frames = [frame(s, {"a": float(s)}) for s in range(4)]
    (out,) = run(per_epoch(lambda values: values[-1] - values[0]), frames)
    assert (out.topic, out.to_dict()) == ("x.epoch_function", {"a": 3.0})


def test_ragged_frames_are_folded_layer_by_layer() -> None:
    frames = [ragged(s, {"a": torch.full((2,), float(s)), "b": torch.full((3,), 1.0)}) for s in range(3)]
    (out,) = run(per_epoch("sum"), frames)
    assert [v.tolist() for v in out.values] == [[3.0, 3.0], [3.0, 3.0, 3.0]]


def test_frames_of_an_earlier_epoch_are_dropped_and_nan_is_counted() -> None:
    source: Subject[Frame] = Subject()
    out: list[Frame] = []
    chain = chain_of(source.pipe(per_epoch()), out.append)
    for epoch, x in [(0, 1.0), (1, math.nan), (0, 5.0), (1, 3.0)]:
        source.on_next(frame(epoch, {"a": x}, epoch=epoch))
    source.on_completed()
    assert [f.to_dict()["a"] for f in out] == [1.0, 3.0]
    assert (chain.counts["late"], chain.cells[0].skipped) == (1, 1)


def test_a_runs_epoch_closes_with_its_mark() -> None:
    training = Run()
    out: list[Frame] = []
    training.stream().pipe(per_epoch()).subscribe(out.append)
    training.push(frame(0, {"a": 1.0}), frame(1, {"a": 2.0}))
    training.close_step(1)
    assert not out
    training.end_epoch(1, 0)
    assert as_dicts(out) == [(1, {"a": 1.5})]


def test_every_counts_epochs() -> None:
    source: Subject[Frame] = Subject()
    out: list[Frame] = []
    source.pipe(per_epoch(), every(2)).subscribe(out.append)
    for step in range(10):
        source.on_next(frame(step, {"a": 1.0}, epoch=step // 2))
    source.on_completed()
    assert [f.epoch for f in out] == [0, 2, 4]


def test_on_a_lens_the_loss_of_each_epoch_is_averaged() -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses: list[float] = []
    out: list[Frame] = []
    with observe(model, on_error="raise") as lens:
        criterion = lens.watch_loss(torch.nn.functional.mse_loss)
        lens.pipe(topic("loss"), per_epoch()).subscribe(out.append)
        for _ in lens.epochs(2):
            for _ in range(3):
                optimizer.zero_grad()
                loss = criterion(model(torch.ones(2, 1)), torch.zeros(2, 1))
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        means = [sum(losses[:3]) / 3, sum(losses[3:]) / 3]
        assert [f.epoch for f in out] == [0, 1]
        assert [float(f[""]) for f in out] == pytest.approx(means, rel=1e-5)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="'avg'"):
        per_epoch("avg")
    with pytest.raises(TypeError, match="reduce=None"):
        per_epoch(None)  # type: ignore[arg-type]

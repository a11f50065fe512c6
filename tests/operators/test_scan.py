from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reactivex.subject import Subject
from torch import Tensor

from streamlens.frame import Frame, Lease
from streamlens.operators import scan
from streamlens.stream import Operator
from tests.operators.support import NUMBERS, frame, ragged, resumed, run


def plus(total: Tensor | float, item: Frame) -> Tensor:
    assert isinstance(item.values, Tensor)
    return item.values + total


def plus_frame(total: Frame, item: Frame) -> Frame:
    assert isinstance(item.values, Tensor)
    assert isinstance(total.values, Tensor)
    return item.replace(values=total.values + item.values, topic="total")


@given(st.lists(NUMBERS, max_size=12))
def test_without_a_seed_starts_at_the_first_values_and_equals_accumulate(numbers: list[float]) -> None:
    out = run(scan(plus), [frame(s, {"a": x}) for s, x in enumerate(numbers)])
    assert [f.to_dict()["a"] for f in out] == list(itertools.accumulate(numbers))
    assert all(f.topic == "x.scan" for f in out)


@given(st.lists(NUMBERS, max_size=12), st.integers(0, 12), st.booleans())
def test_interrupted_and_resumed_equals_uninterrupted(numbers: list[float], at: int, whole: bool) -> None:
    frames = [frame(s, {"a": x}) for s, x in enumerate(numbers)]
    seed = frame(0, {"a": 1.0}, "total") if whole else torch.ones(1, dtype=torch.float64)

    def build() -> Operator:
        return scan(plus_frame if whole else plus, seed)

    got = resumed(build, frames, min(at, len(frames)))
    assert [f.to_dict() for f in got] == [f.to_dict() for f in run(build(), frames)]


def test_a_seed_is_the_result_before_the_first_frame() -> None:
    assert [f.to_dict()["a"] for f in run(scan(plus, 10.0), [frame(0, {"a": 1.0})])] == [11.0]


def test_a_frame_that_is_returned_is_given_as_it_is() -> None:
    out = run(scan(plus_frame, frame(0, {"a": 0.0})), [frame(s, {"a": 2.0}) for s in range(2)])
    assert [(f.topic, f.to_dict()["a"]) for f in out] == [("total", 2.0), ("total", 4.0)]


def test_a_number_stands_for_every_layer() -> None:
    out = run(scan(lambda n, _: n + 1, 0), [frame(s, {"a": 1.0, "b": 1.0}) for s in range(2)])
    assert out[-1].to_dict() == {"a": 2.0, "b": 2.0}


def test_a_function_that_writes_into_its_seed_does_not_reach_other_subscriptions() -> None:
    def careless(total: Tensor, item: Frame) -> Tensor:
        assert isinstance(item.values, Tensor)
        return total.add_(item.values)

    operator = scan(careless, torch.zeros(1, dtype=torch.float64))
    for _ in range(2):
        assert [f.to_dict()["a"] for f in run(operator, [frame(0, {"a": 1.0})])] == [1.0]


def test_raw_values_that_are_returned_are_copied() -> None:
    weights, lease = torch.ones(2), Lease()
    source: Subject[Frame] = Subject()
    out: list[Frame] = []
    source.pipe(scan(lambda _, item: item.values)).subscribe(out.append)
    source.on_next(ragged(0, {"a": weights}, lease=lease))
    source.on_next(ragged(1, {"a": weights}, lease=lease))
    weights.zero_()
    lease.end()
    assert [f.values[0].tolist() for f in out] == [[1.0, 1.0], [1.0, 1.0]]
    source.on_completed()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="got 3"):
        scan(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="seed='x'"):
        scan(plus, "x")  # type: ignore[arg-type]

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reactivex.subject import Subject

from streamlens.frame import Frame, Lease
from streamlens.operators import diff
from tests.operators.support import assert_same, chain_of, flat, frame, ragged, resumed, run, streams

Rows = list[tuple[int, dict[str, float]]]


def oracle(stream: Rows, lag: int) -> dict[tuple[int, str], float]:
    """Differences to the last-but-`lag` finite value, from a layer's own frame number `lag` on."""
    history: dict[str, list[float]] = {}
    frames: dict[str, int] = {}
    out: dict[tuple[int, str], float] = {}
    for step, values in stream:
        for layer, x in values.items():
            past = history.setdefault(layer, [])
            if frames.get(layer, 0) >= lag:
                known = math.isfinite(x) and len(past) >= lag
                out[step, layer] = x - past[-lag] if known else math.nan
            frames[layer] = frames.get(layer, 0) + 1
            if math.isfinite(x):
                past.append(x)
    return out


@given(streams(), st.integers(1, 4))
def test_equals_a_loop_layer_by_layer_with_gaps_and_nan(stream: Rows, lag: int) -> None:
    assert_same(flat(run(diff(lag), [frame(s, v) for s, v in stream])), oracle(stream, lag))


@given(streams(), st.integers(1, 3), st.integers(0, 14))
def test_interrupted_and_resumed_equals_uninterrupted(stream: Rows, lag: int, at: int) -> None:
    frames = [frame(s, v) for s, v in stream]
    got = resumed(lambda: diff(lag), frames, min(at, len(frames)))
    assert_same(flat(got), flat(run(diff(lag), frames)), rel=0, abs_=0)


def test_the_topic_names_the_lag() -> None:
    frames = [frame(s, {"a": float(s * s)}) for s in range(4)]
    assert [(f.topic, f.to_dict()["a"]) for f in run(diff(), frames)] == [
        ("x.diff", 1.0),
        ("x.diff", 3.0),
        ("x.diff", 5.0),
    ]
    assert [f.topic for f in run(diff(3), frames)] == ["x.diff3"]


def test_nan_is_counted() -> None:
    source: Subject[Frame] = Subject()
    chain = chain_of(source.pipe(diff()), lambda _: None)
    for step, x in enumerate([1.0, math.nan, 2.0]):
        source.on_next(frame(step, {"a": x}))
    assert chain.cells[0].skipped == 1
    source.on_completed()


def test_raw_frames_are_compared_with_copies_of_what_they_were() -> None:
    weights, lease = torch.ones(2), Lease()
    source: Subject[Frame] = Subject()
    out: list[Frame] = []
    source.pipe(diff()).subscribe(out.append)
    source.on_next(ragged(0, {"a": weights}, lease=lease))
    weights.add_(4)
    lease.end()
    source.on_next(ragged(1, {"a": weights}))
    assert [v.tolist() for v in out[0].values] == [[4.0, 4.0]]
    source.on_completed()


@pytest.mark.parametrize("lag", [0, -1, 1.5, True])
def test_a_lag_that_is_no_positive_number_of_frames_is_refused(lag: int) -> None:
    with pytest.raises(ValueError, match="lag="):
        diff(lag)

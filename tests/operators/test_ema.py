from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reactivex.subject import Subject

from streamlens.frame import Frame, Kind, Lease
from streamlens.operators import ema
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


def oracle(
    stream: Iterable[tuple[int, dict[str, float]]], decay: float, *, corrected: bool = False
) -> dict[tuple[int, str], float]:
    averages: dict[str, float] = {}
    counts: dict[str, int] = {}
    out: dict[tuple[int, str], float] = {}
    for step, values in stream:
        for layer, x in values.items():
            if math.isfinite(x):
                before = averages.get(layer, 0.0 if corrected else x)
                averages[layer] = decay * before + (1 - decay) * x
                counts[layer] = counts.get(layer, 0) + 1
            average = averages.get(layer, math.nan)
            out[step, layer] = (
                average / (1 - decay ** counts[layer]) if corrected and layer in counts else average
            )
    return out


@given(streams(), st.sampled_from([0.1, 0.5, 0.9, 0.999]), st.booleans())
def test_equals_the_recurrence_layer_by_layer_with_gaps_nan_and_inf(
    stream: list[tuple[int, dict[str, float]]], decay: float, corrected: bool
) -> None:
    out = run(ema(decay, bias_correction=corrected), [frame(s, v) for s, v in stream])
    assert_same(flat(out), oracle(stream, decay, corrected=corrected), rel=1e-6, abs_=1e-6)


@given(streams(), st.integers(0, 14), st.booleans())
def test_interrupted_and_resumed_equals_uninterrupted(
    stream: list[tuple[int, dict[str, float]]], at: int, corrected: bool
) -> None:
    frames = [frame(s, v) for s, v in stream]
    at = min(at, len(frames))
    assert_same(
        flat(resumed(lambda: ema(0.7, bias_correction=corrected), frames, at)),
        flat(run(ema(0.7, bias_correction=corrected), frames)),
        rel=0,
        abs_=0,
    )


def test_starts_at_the_first_value() -> None:
    assert as_dicts(run(ema(0.9), [frame(0, {"a": 10.0}), frame(1, {"a": 20.0})])) == [
        (0, {"a": 10.0}),
        (1, {"a": pytest.approx(11.0)}),
    ]


def test_half_life_is_the_frames_after_which_a_value_weighs_half() -> None:
    out = run(ema(half_life=4), [frame(0, {"a": 1.0}), *(frame(s, {"a": 0.0}) for s in range(1, 9))])
    assert out[4].to_dict()["a"] == pytest.approx(0.5)
    assert out[8].to_dict()["a"] == pytest.approx(0.25)


def test_nan_and_inf_are_skipped_and_counted() -> None:
    source: Subject[Frame] = Subject()
    out: list[Frame] = []
    chain = chain_of(source.pipe(ema(0.5)), out.append)
    for step, x in enumerate([2.0, math.nan, math.inf, 4.0]):
        source.on_next(frame(step, {"a": x}))
    assert [f.to_dict()["a"] for f in out] == [2.0, 2.0, 2.0, 3.0]
    assert chain.cells[0].skipped == 2
    source.on_completed()


def test_half_precision_is_averaged_in_float32() -> None:
    x = torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16)
    out = run(ema(0.999), [Frame("x", s, ("a",), x[s : s + 1]) for s in (0, 1)])
    assert isinstance(out[1].values, torch.Tensor)
    assert out[1].values.dtype == torch.float32
    assert float(out[1].values[0]) == pytest.approx(1 + 0.0078125e-3, rel=1e-7)


def test_topics_of_one_stream_have_averages_of_their_own() -> None:
    out = run(ema(0.5), [frame(0, {"a": 0.0}, "p"), frame(0, {"a": 8.0}, "q"), frame(1, {"a": 2.0}, "p")])
    assert [(f.topic, f.to_dict()["a"]) for f in out] == [("p.ema", 0.0), ("q.ema", 8.0), ("p.ema", 1.0)]


def test_ragged_raw_frames_are_averaged_and_the_average_outlives_them() -> None:
    weights = {"a": torch.ones(2, 2), "b": torch.ones(3)}
    lease = Lease()
    source: Subject[Frame] = Subject()
    out: list[Frame] = []
    source.pipe(ema(0.5)).subscribe(out.append)
    source.on_next(ragged(0, weights, lease=lease))
    for tensor in weights.values():
        tensor.mul_(5)
    lease.end()
    source.on_next(ragged(1, weights))
    assert [v.flatten()[0].item() for v in out[0].values] == [1.0, 1.0]
    assert [v.flatten()[0].item() for v in out[1].values] == [3.0, 3.0]
    source.on_completed()


def test_what_was_given_does_not_change_later() -> None:
    out = run(ema(0.5), [frame(s, {"a": float(s)}) for s in range(3)])
    assert [f.to_dict()["a"] for f in out] == [0.0, 0.5, 1.25]


def test_components_that_change_start_afresh() -> None:
    one = frame(0, {"": [1.0]}, components=("ce",))
    two = frame(1, {"": [5.0, 7.0]}, components=("ce", "l2"))
    assert [f.components for f in run(ema(0.5), [one, two])] == [("ce",), ("ce", "l2")]


def test_micro_steps_of_a_run_are_averaged_first() -> None:
    training = Run()
    out: list[Frame] = []
    training.stream(Kind.MICRO_STEP).pipe(ema(0.5)).subscribe(out.append)
    for step, pair in enumerate([(1.0, 3.0), (5.0, 7.0)]):
        for micro, x in enumerate(pair):
            training.push(frame(step, {"": x}, "loss", micro_step=micro, kind=Kind.MICRO_STEP))
        training.update(step)
    assert as_dicts(out) == [(0, {"": 2.0}), (1, {"": 4.0})]


@pytest.mark.parametrize("decay", [0, 1, -0.5, 1.5, math.nan, True, "0.9"])
def test_a_decay_outside_zero_and_one_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        ema(decay)


def test_neither_or_both_of_decay_and_half_life_is_refused() -> None:
    with pytest.raises(TypeError, match="either a decay"):
        ema()
    with pytest.raises(TypeError, match="either a decay"):
        ema(0.9, half_life=3)
    with pytest.raises(ValueError, match="half_life=0"):
        ema(half_life=0)

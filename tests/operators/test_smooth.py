from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reactivex.subject import Subject

from streamlens.frame import Frame
from streamlens.operators import smooth
from tests.operators.support import assert_same, chain_of, flat, frame, ragged, resumed, run, streams

Rows = list[tuple[int, dict[str, float]]]
SIGMAS = st.sampled_from([0.5, 1.0, 2.5])


def oracle(stream: Rows, sigma: float) -> dict[tuple[int, str], float]:
    reach = max(1, int(4 * sigma + 0.5))
    out: dict[tuple[int, str], float] = {}
    for step, values in stream:
        for layer in values:
            pairs = [
                (math.exp(-((step - s) ** 2) / (2 * sigma**2)), v[layer])
                for s, v in stream
                if step - reach <= s <= step and layer in v and math.isfinite(v[layer])
            ]
            weight = sum(w for w, _ in pairs)
            out[step, layer] = sum(w * x for w, x in pairs) / weight if pairs else math.nan
    return out


@given(streams(), SIGMAS)
def test_equals_the_weighted_mean_of_the_past_with_gaps_and_nan(stream: Rows, sigma: float) -> None:
    out = run(smooth(sigma), [frame(s, v) for s, v in stream])
    assert_same(flat(out), oracle(stream, sigma), rel=1e-6, abs_=1e-6)


@given(streams(), SIGMAS, st.integers(0, 14))
def test_interrupted_and_resumed_equals_uninterrupted(stream: Rows, sigma: float, at: int) -> None:
    frames = [frame(s, v) for s, v in stream]
    got = resumed(lambda: smooth(sigma), frames, min(at, len(frames)))
    assert_same(flat(got), flat(run(smooth(sigma), frames)), rel=0, abs_=0)


def test_a_constant_stays_what_it_is_from_the_first_frame_on() -> None:
    out = run(smooth(3), [frame(s, {"a": 7.0}) for s in range(30)])
    assert [f.to_dict()["a"] for f in out] == pytest.approx([7.0] * 30)


def test_lags_a_line_by_about_eight_tenths_of_sigma() -> None:
    out = run(smooth(20), [frame(s, {"a": float(s)}) for s in range(200)])
    assert 199 - out[-1].to_dict()["a"] == pytest.approx(0.8 * 20, rel=0.05)


def test_ragged_frames_are_smoothed_layer_by_layer() -> None:
    frames = [ragged(s, {"a": torch.full((2,), 1.0 * s), "b": torch.full((3,), 5.0)}) for s in range(2)]
    out = run(smooth(1), frames)
    weight = math.exp(-0.5)
    assert out[1].values[0].tolist() == pytest.approx([1 / (1 + weight)] * 2)
    assert out[1].values[1].tolist() == pytest.approx([5.0] * 3)


def test_late_frames_and_nan_are_counted() -> None:
    source: Subject[Frame] = Subject()
    chain = chain_of(source.pipe(smooth(1)), lambda _: None)
    for step, x in [(1, 1.0), (2, math.nan), (0, 1.0)]:
        source.on_next(frame(step, {"a": x}))
    assert (chain.counts["late"], chain.cells[0].skipped) == (1, 1)
    source.on_completed()


@pytest.mark.parametrize("sigma", [0, -1, math.nan, math.inf, True])
def test_a_sigma_that_is_not_positive_is_refused(sigma: float) -> None:
    with pytest.raises(ValueError, match="sigma is a positive number"):
        smooth(sigma)

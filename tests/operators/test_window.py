from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reactivex.subject import Subject
from torch import Tensor

from streamlens import observe
from streamlens.frame import Frame, Kind
from streamlens.operators import every, norm, topic, window
from streamlens.stream import Operator
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

NAMED: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": statistics.fmean,
    "sum": math.fsum,
    "max": max,
    "min": min,
    "std": lambda xs: statistics.stdev(xs) if len(xs) > 1 else math.nan,
    "median": statistics.median,
    "first": lambda xs: xs[0],
    "last": lambda xs: xs[-1],
}
Rows = list[tuple[int, dict[str, float]]]


def oracle(stream: Rows, size: int, hop: int, name: str) -> dict[tuple[int, str], float]:
    """Every window that a later frame, or its own last step's, shows to be over."""
    latest = max((step for step, _ in stream), default=-1)
    out: dict[tuple[int, str], float] = {}
    for start in range(0, latest + 1, hop):
        end = start + size - 1
        if end > latest:
            continue
        inside = [values for step, values in stream if start <= step <= end]
        for layer in {layer for values in inside for layer in values}:
            known = [v[layer] for v in inside if layer in v and math.isfinite(v[layer])]
            out[end, layer] = NAMED[name](known) if known else math.nan
    return out


SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 8))


@given(streams(), SHAPES, st.sampled_from(sorted(NAMED)))
def test_equals_a_list_comprehension_tumbling_and_sliding_with_gaps_and_nan(
    stream: Rows, shape: tuple[int, int], name: str
) -> None:
    size, hop = shape
    out = run(window(size, hop, name), [frame(s, v) for s, v in stream])
    assert_same(flat(out), oracle(stream, size, hop, name), rel=1e-6, abs_=1e-6)


@given(streams(), SHAPES, st.booleans(), st.integers(0, 14))
def test_interrupted_and_resumed_equals_uninterrupted(
    stream: Rows, shape: tuple[int, int], partial: bool, at: int
) -> None:
    frames = [frame(s, v) for s, v in stream]

    def build() -> Operator:
        return window(*shape, "mean", partial=partial)

    assert_same(flat(resumed(build, frames, min(at, len(frames)))), flat(run(build(), frames)), rel=0, abs_=0)


@given(streams(), st.integers(1, 6))
def test_a_function_is_given_time_first_and_nan_where_a_layer_is_missing(stream: Rows, size: int) -> None:
    def missing(values: Tensor) -> Tensor:
        return values.isnan().sum(0).double() * 100 + len(values)

    finite = [(s, {k: v if math.isfinite(v) else 0.0 for k, v in values.items()}) for s, values in stream]
    out = run(window(size, reduce=missing), [frame(s, v) for s, v in finite])
    wanted: dict[tuple[int, str], float] = {}
    for end, layer in oracle(finite, size, size, "mean"):
        inside = [values for step, values in finite if end - size < step <= end]
        wanted[end, layer] = sum(layer not in v for v in inside) * 100 + len(inside)
    assert flat(out) == wanted


def test_a_window_is_labelled_by_its_last_step_and_given_with_that_steps_frame() -> None:
    frames = [frame(s, {"a": float(s)}, epoch=s // 3) for s in range(4)]
    out = run(window(2), frames, complete=False)
    assert [(f.topic, f.step, f.epoch, f.to_dict()["a"]) for f in out] == [
        ("x.mean2", 1, 0, 0.5),
        ("x.mean2", 3, 1, 2.5),
    ]


def test_an_open_window_is_given_at_the_end_only_if_asked() -> None:
    frames = [frame(s, {"a": float(s)}) for s in range(5)]
    assert [f.step for f in run(window(3), frames)] == [2]
    assert as_dicts(run(window(3, partial=True), frames)) == [(2, {"a": 1.0}), (4, {"a": 3.5})]
    assert [f.step for f in run(window(3, 1, partial=True), frames)] == [2, 3, 4]


def test_frames_after_their_window_and_repeated_ones_are_dropped_and_counted() -> None:
    source: Subject[Frame] = Subject()
    out: list[Frame] = []
    chain = chain_of(source.pipe(window(2, reduce="sum")), out.append)
    for step, x in [(0, 1.0), (0, 9.0), (2, 4.0), (1, 9.0), (3, 1.0)]:
        source.on_next(frame(step, {"a": x}))
    assert as_dicts(out) == [(1, {"a": 1.0}), (3, {"a": 5.0})]
    assert (chain.counts["late"], chain.counts["duplicate"]) == (1, 1)
    source.on_completed()


def test_frames_permuted_within_an_open_window_are_put_in_order() -> None:
    frames = [frame(s, {"a": float(s)}) for s in (2, 0, 1, 3)]
    assert as_dicts(run(window(4, reduce="first"), frames)) == [(3, {"a": 0.0})]


def test_nan_and_inf_are_counted_once_also_where_windows_overlap() -> None:
    source: Subject[Frame] = Subject()
    chain = chain_of(source.pipe(window(3, 1)), lambda _: None)
    for step, x in enumerate([1.0, math.nan, math.inf, 2.0]):
        source.on_next(frame(step, {"a": x}))
    assert chain.cells[0].skipped == 2
    source.on_completed()


def test_half_precision_is_summed_in_float32() -> None:
    frames = [Frame("x", s, ("a",), torch.tensor([2048.0 if s == 0 else 1.0]).half()) for s in range(4)]
    (out,) = run(window(4, reduce="sum"), frames)
    assert out.to_dict()["a"] == 2051.0


def test_components_are_kept() -> None:
    frames = [frame(s, {"a": [float(s), 1.0]}, components=("p", "q")) for s in range(2)]
    (out,) = run(window(2), frames)
    assert out.components == ("p", "q")
    assert out.to_dict()["a"].tolist() == [0.5, 1.0]


def test_ragged_frames_are_reduced_layer_by_layer() -> None:
    frames = [
        ragged(s, {"a": torch.full((2, 2), float(s)), "b": torch.full((3,), -float(s))}) for s in range(2)
    ]
    (out,) = run(window(2, reduce="max"), frames)
    assert [(v.shape, float(v.flatten()[0])) for v in out.values] == [((2, 2), 1.0), ((3,), 0.0)]


def test_every_counts_windows_also_further_down_the_chain() -> None:
    source: Subject[Frame] = Subject()
    out: list[Frame] = []
    source.pipe(window(3), topic("x.mean3"), every(2)).subscribe(out.append)
    for step in range(15):
        source.on_next(frame(step, {"a": 1.0}))
    assert [f.step for f in out] == [2, 8, 14]
    source.on_completed()


def test_every_counts_sliding_windows() -> None:
    source: Subject[Frame] = Subject()
    out: list[Frame] = []
    source.pipe(window(3, 1), every(4)).subscribe(out.append)
    for step in range(12):
        source.on_next(frame(step, {"a": 1.0}))
    assert [f.step for f in out] == [2, 6, 10]
    source.on_completed()


def test_the_closing_of_its_last_step_closes_a_window_whose_frame_was_dropped() -> None:
    training = Run()
    out: list[Frame] = []
    training.stream().pipe(window(3)).subscribe(out.append)
    for step in range(3):
        if step != 2:
            training.push(frame(step, {"a": float(step)}))
        training.close_step(step)
    assert as_dicts(out) == [(2, {"a": 0.5})]


def test_layers_that_another_optimizer_updates_later_in_the_last_step_follow_once() -> None:
    training = Run()
    out: list[Frame] = []
    training.stream().pipe(window(2, reduce="sum")).subscribe(out.append)
    for step in range(2):
        training.push(frame(step, {"a": 1.0}), frame(step, {"b": 2.0}))
        training.close_step(step)
    assert as_dicts(out) == [(1, {"a": 2.0}), (1, {"b": 4.0})]


def test_a_window_whose_beginning_was_not_observed_is_partial() -> None:
    training = Run()
    training.runtime = type("At5", (type(training.runtime),), {"step": 5})(on_error="raise")
    whole: list[Frame] = []
    partial: list[Frame] = []
    training.stream().pipe(window(4)).subscribe(whole.append)
    training.stream().pipe(window(4, partial=True)).subscribe(partial.append)
    for step in range(5, 12):
        training.push(frame(step, {"a": 1.0}))
    assert [f.step for f in whole] == [11]
    assert [f.step for f in partial] == [7, 11]


def test_micro_steps_of_a_run_are_averaged_first() -> None:
    training = Run()
    out: list[Frame] = []
    training.stream(Kind.MICRO_STEP).pipe(window(2, reduce="max")).subscribe(out.append)
    for step, pair in enumerate([(1.0, 9.0), (2.0, 4.0)]):
        for micro, x in enumerate(pair):
            training.push(frame(step, {"": x}, micro_step=micro, kind=Kind.MICRO_STEP))
        training.update(step)
    assert as_dicts(out) == [(1, {"": 5.0})]


def test_on_a_lens_a_window_is_there_when_its_last_step_has_been_made() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out: list[Frame] = []
    norms: list[float] = []
    with observe(model, on_error="raise") as lens:
        lens.pipe(norm("weights"), window(3)).subscribe(out.append)
        for _ in range(3):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            norms.append(float(model.weight.detach().norm()))
        assert [f.step for f in out] == [2]
    assert out[0].to_dict()[""] == pytest.approx(statistics.fmean(norms), rel=1e-6)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="size=0"):
        window(0)
    with pytest.raises(ValueError, match="hop=-1"):
        window(3, -1)
    with pytest.raises(ValueError, match="did you mean 'mean'"):
        window(3, reduce="maen")
    with pytest.raises(TypeError, match="reduce=3"):
        window(3, reduce=3)  # type: ignore[arg-type]

"""A topic's numbers within bounds: against loops over all of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamlens.views.live.envelope import Envelope

NUMBERS = st.lists(
    st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0]), min_size=1, max_size=400
)

RATIOS = st.lists(
    st.floats(1e-6, 1e3) | st.sampled_from([0.0, -1.0, math.nan, math.inf]), min_size=1, max_size=300
)


def filled(values: list[list[float]], most: int = 200, every: int = 1) -> Envelope:
    """A number a step for each series."""
    kept = Envelope(most)
    layers = tuple(f"l{i}" for i in range(len(values)))
    for step, numbers in enumerate(zip(*values, strict=True)):
        kept.add(step * every, step // 10, layers, (), np.array(numbers)[:, np.newaxis])
    return kept


def points(kept: Envelope, series: int = 0) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for which, step, _, value in kept.lines().T.tolist():
        if which == series:
            found.setdefault(int(step), []).append(value)
    return found


def test_a_short_run_is_kept_as_it_is() -> None:
    kept = filled([[1.0, math.nan, 3.0], [4.0, 5.0, -math.inf]])
    rows = sorted(kept.lines().T.tolist(), key=lambda row: (row[1], row[0]))
    assert [row[:3] for row in rows] == [[s, t, 0.0] for t in (0.0, 1.0, 2.0) for s in (0.0, 1.0)]
    np.testing.assert_array_equal([row[3] for row in rows], [1.0, 4.0, math.nan, 5.0, 3.0, -math.inf])


@settings(max_examples=60, deadline=None)
@given(NUMBERS)
def test_every_point_is_one_of_the_run_and_the_extremes_of_each_stretch_are_among_them(
    values: list[float],
) -> None:
    kept = filled([values], most=40)
    found = points(kept)
    for step, drawn in found.items():
        for value in drawn:
            assert value == values[step] or (math.isnan(value) and math.isnan(values[step]))
    for start in range(0, len(values), kept.width):
        stretch = values[start : start + kept.width]
        here = [v for s, drawn in found.items() if start <= s < start + kept.width for v in drawn]
        finite = [v for v in stretch if math.isfinite(v)]
        if finite:
            assert min(finite) in here
            assert max(finite) in here
        assert any(not math.isfinite(v) for v in stretch) == any(not math.isfinite(v) for v in here)
    last = values[-1]
    assert any(v == last or (math.isnan(v) and math.isnan(last)) for v in found[len(values) - 1])


@pytest.mark.parametrize("series", [1, 3, 50])
@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_points_stay_within_the_bound_however_long_the_run(series: int, steps: int) -> None:
    generator = np.random.default_rng(0)
    kept = filled(generator.normal(size=(series, steps)).tolist(), most=2000)
    assert kept.lines().shape[1] <= 2000 + series  # the last point of each line
    assert kept.cells().shape[1] <= 1000
    assert len(kept.series) == series


def test_more_series_than_there_is_room_for_are_left_out_and_counted() -> None:
    kept = filled([[float(i)] for i in range(100)], most=160)
    assert len(kept.series) == 10
    assert kept.left_out == 90
    assert sorted(kept.lines()[3].tolist()) == [float(i) for i in range(10)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.floats(1e-6, 1e3) | st.sampled_from([0.0, -1.0, math.nan, math.inf]), min_size=1, max_size=300
    )
)
def test_a_cell_is_the_mean_of_the_logarithms_of_its_steps(values: list[float]) -> None:
    kept = filled([values], most=32)
    cells = kept.cells().T.tolist()
    assert [int(cell[1]) for cell in cells] == list(range(0, len(values), kept.width))
    for _, first, last, end, mean, bad in cells:
        inside = values[int(first) : int(last) + 1]
        logs = [math.log10(v) for v in inside if math.isfinite(v) and v > 0]
        assert bool(bad) == any(not math.isfinite(v) or v < 0 for v in inside)
        assert mean == pytest.approx(sum(logs) / len(logs)) if logs else mean == -math.inf
        assert end == (first + kept.width if int(last) + 1 < len(values) else last + 1)


def test_a_layer_that_comes_late_and_one_that_is_missing_have_no_numbers_there() -> None:
    kept = Envelope(1000)
    for step in range(4):
        kept.add(step, 0, ("a",), (), np.array([[1.0 + step]]))
    kept.add(4, 0, ("a", "b"), (), np.array([[5.0], [6.0]]))
    kept.add(5, 0, ("b",), (), np.array([[7.0]]))
    assert points(kept, 0) == {0: [1.0], 1: [2.0], 2: [3.0], 3: [4.0], 4: [5.0]}
    assert points(kept, 1) == {4: [6.0], 5: [7.0]}


def test_several_numbers_of_one_step_are_drawn_from_the_smallest_to_the_largest() -> None:
    kept = Envelope(1000)
    for value in (2.0, 1.0, 3.0, 2.5):
        kept.add(0, 0, ("",), (), np.array([[value]]))
    assert sorted(points(kept)[0]) == [1.0, 3.0]


def test_a_number_that_comes_late_has_its_place() -> None:
    kept = Envelope(1000)
    for step in (0, 1, 5, 3, 6):
        kept.add(step, 0, ("",), (), np.array([[float(step)]]))
    assert points(kept).keys() >= {0, 1, 3, 5, 6}
    steps = kept.lines()[1].tolist()
    assert steps == sorted(steps)


def test_what_lies_beyond_a_step_is_forgotten() -> None:
    kept = filled([[float(v) for v in range(20)]])
    kept.settle()
    kept.cut(9)
    assert kept.changed == 0
    assert max(points(kept)) == 9
    kept.add(10, 0, ("l0",), (), np.array([[-1.0]]))
    assert points(kept)[10] == [-1.0]


@settings(max_examples=40, deadline=None)
@given(NUMBERS, st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_what_is_told_bit_by_bit_is_the_whole(values: list[float], pieces: list[int]) -> None:
    kept = Envelope(40)
    mirror: list[list[float]] = []
    step = 0
    for piece in pieces:
        for value in values[step : step + piece]:
            kept.add(step, 0, ("",), (), np.array([[value]]))
            step += 1
        changed = kept.changed
        if changed is not None:
            since = kept.begin(changed)
            mirror = [row for row in mirror if row[1] < since] + kept.lines(changed).T.tolist()
        kept.settle()
        assert kept.changed is None
    np.testing.assert_array_equal(np.array(mirror).reshape(-1, 4), kept.lines().T)

"""Splitting, thinning and smoothing, against loops in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamlens.views.series import Series, draw_table, exponential_average, split, thin_indices
from tests.views.fakes import rows

values_with_bad = st.lists(
    st.one_of(st.floats(-1e6, 1e6), st.just(math.nan), st.just(math.inf), st.just(-math.inf)),
    min_size=1,
    max_size=400,
)


def series(values: list[float], name: str = "a") -> Series:
    steps = np.arange(len(values))
    return Series(name, steps, np.zeros_like(steps), np.asarray(values, dtype=np.float64))


@given(values_with_bad, st.integers(5, 60))
def test_thinning_keeps_the_extremes_the_ends_and_a_bad_value_within_its_bound(
    values: list[float], limit: int
) -> None:
    kept = thin_indices(np.array(values), limit).tolist()
    finite = [v for v in values if math.isfinite(v)]
    assert len(kept) <= limit
    assert kept == sorted(set(kept))
    assert {0, len(values) - 1} <= set(kept)
    shown = [values[i] for i in kept]
    if finite:
        assert min(finite) in shown
        assert max(finite) in shown
    if len(finite) < len(values):
        assert any(not math.isfinite(v) for v in shown)


def test_thinning_keeps_every_value_of_a_short_series() -> None:
    assert thin_indices(np.array([3.0, 1.0, 2.0]), 5).tolist() == [0, 1, 2]


def test_thinning_to_fewer_than_five_points_is_an_error() -> None:
    with pytest.raises(ValueError, match="max_points is 4"):
        thin_indices(np.zeros(10), 4)


def test_split_keeps_the_order_of_the_layers_and_sorts_steps() -> None:
    table = rows({"z": [1, 2], "a": [3, 4]}).iloc[::-1]
    assert [s.name for s in split(table)] == ["a", "z"]
    ordered = split(table, order=["z", "b", "a"])
    assert [(s.name, s.steps.tolist(), s.values.tolist()) for s in ordered] == [
        ("z", [0, 1], [1.0, 2.0]),
        ("a", [0, 1], [3.0, 4.0]),
    ]


def test_micro_steps_become_their_mean_and_one_nan_among_them_stays_visible() -> None:
    table = pd.DataFrame(
        {"step": [0, 0, 1, 1, 2], "layer": "", "value": [1.0, 3.0, 5.0, math.nan, 7.0], "epoch": 0}
    )
    (line,) = split(table)
    assert line.steps.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(line.values, [2.0, math.nan, 7.0])


def test_a_table_without_a_needed_column_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"without the column 'value'.*given step, layer"):
        split(pd.DataFrame({"step": [0], "layer": [""]}))


def test_the_exponential_average_follows_its_formula_and_steps_over_bad_values() -> None:
    values = [4.0, 2.0, math.nan, 8.0, math.inf, 1.0]
    half_life = 3.0
    decay = 0.5 ** (1 / half_life)
    state, expected = 4.0, [4.0]
    for value in values[1:]:
        if math.isfinite(value):
            state = decay * state + (1 - decay) * value
        expected.append(state if math.isfinite(value) else math.nan)
    np.testing.assert_allclose(exponential_average(np.array(values), half_life), expected)


def test_what_a_logarithmic_axis_cannot_show_is_a_gap_in_the_line_and_a_mark() -> None:
    points, flags = draw_table([series([1.0, 0.0, math.nan, math.inf, -2.0, 5.0])], 100, log=True)
    np.testing.assert_array_equal(points["value"], [1.0, math.nan, math.nan, math.nan, math.nan, 5.0])
    assert list(zip(flags["step"], flags["flag"], strict=True)) == [
        (1, "0"),
        (2, "NaN"),
        (3, "+inf"),
        (4, "-2"),
    ]


def test_a_linear_axis_shows_zero_and_below_and_marks_only_what_is_not_finite() -> None:
    points, flags = draw_table([series([0.0, -2.0, -math.inf])], 100, log=False)
    np.testing.assert_array_equal(points["value"], [0.0, -2.0, math.nan])
    assert flags["flag"].tolist() == ["-inf"]


def test_many_long_lines_share_the_points_there_are() -> None:
    lines = [series(np.sin(np.arange(5000) / 9).tolist(), f"layer{i}") for i in range(20)]
    points, _ = draw_table(lines, 2000, log=False)
    assert len(points) <= 2000
    assert points["series"].nunique() == 20

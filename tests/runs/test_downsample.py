"""Down-sampling that loses no spike and no gap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from streamlens.runs.downsample import extremes

series = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int64, np.bool_]),
    st.integers(0, 120),
    elements=None,
)


@given(values=series, max_points=st.integers(5, 40))
def test_positions_ascend_are_few_enough_and_span_the_series(
    values: np.ndarray[tuple[int], np.dtype[np.generic]], max_points: int
) -> None:
    kept = extremes(values, max_points)
    assert len(kept) <= max_points
    assert (np.diff(kept) > 0).all()
    if len(values):
        assert kept[0] == 0
        assert kept[-1] == len(values) - 1
    if len(values) <= max_points:
        assert len(kept) == len(values)


@given(values=series, max_points=st.integers(5, 40))
def test_extremes_and_nan_of_the_whole_series_are_kept(
    values: np.ndarray[tuple[int], np.dtype[np.float64]], max_points: int
) -> None:
    kept = values[extremes(values, max_points)]
    numbers = values[~np.isnan(values)]
    if len(numbers):
        assert np.nanmin(kept.astype(float)) == float(numbers.min())
        assert np.nanmax(kept.astype(float)) == float(numbers.max())
    assert np.isnan(kept).any() == np.isnan(values).any()


@given(spikes=st.dictionaries(st.integers(0, 9), st.floats(1, 9), min_size=1))
def test_spikes_far_apart_are_all_kept_whatever_their_heights(spikes: dict[int, float]) -> None:
    values = np.zeros(10_000)
    places = [1000 * i + 500 for i in spikes]
    values[places] = list(spikes.values())
    assert set(places) <= set(extremes(values, 100).tolist())


def test_a_single_gap_in_a_long_series_is_kept() -> None:
    values = np.arange(10_000.0)
    values[6789] = np.nan
    assert 6789 in extremes(values, 100)


def test_complex_values_count_by_magnitude() -> None:
    values = np.ones(1000, np.complex64)
    values[345] = 5j
    values[678] = 0
    assert {345, 678} <= set(extremes(values, 10).tolist())


def test_arrays_are_thinned_evenly() -> None:
    values = np.empty(1000, object)
    assert extremes(values, 5).tolist() == [0, 249, 499, 749, 999]


def test_fewer_than_five_points_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 5"):
        extremes(np.zeros(3), 4)

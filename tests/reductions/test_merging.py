from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamlens.reductions import Statistic, Statistics, merge_statistics, statistics_to_merge, summarise

Array = np.ndarray[Any, Any]
NUMBERS = st.one_of(st.floats(-100, 100, width=32), st.sampled_from([math.nan, math.inf, -math.inf]))

STATISTICS = (
    Statistic("count"),
    Statistic("sum"),
    Statistic("sum_of_squares"),
    Statistic("sum_of_powers", 0.0),
    Statistic("sum_of_powers", 3.0),
    Statistic("centred", 2.0),
    Statistic("centred", 3.0),
    Statistic("centred", 4.0),
    Statistic("minimum"),
    Statistic("maximum"),
    Statistic("absmax"),
)


def by_numpy(x: Array, statistic: Statistic) -> float:
    """The statistic of some numbers, all at once; an independent twin."""
    match statistic.name:
        case "count":
            return float(x.size)
        case "sum":
            return float(x.sum())
        case "sum_of_squares":
            return float((x**2).sum())
        case "sum_of_powers":
            return float((np.abs(x) ** statistic.order if statistic.order else x != 0).sum())
    if not x.size:
        return math.nan
    match statistic.name:
        case "centred":
            return float(((x - x.mean()) ** statistic.order).sum())
        case "minimum":
            return float(x.min())
        case "maximum":
            return float(x.max())
    assert statistic.name == "absmax"
    return float(np.abs(x).max())


def part(layers: list[Array], statistics: tuple[Statistic, ...] = STATISTICS) -> tuple[Statistics, Tensor]:
    vectors = {s: torch.tensor([by_numpy(x, s) for x in layers], dtype=torch.float64) for s in statistics}
    return vectors, torch.tensor([float(x.size) for x in layers], dtype=torch.float64)


@settings(deadline=None)
@given(st.lists(st.lists(NUMBERS, max_size=6), min_size=1, max_size=5))
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_merged_parts_equal_numpy_on_all_elements_at_once(pieces: list[list[float]]) -> None:
    arrays = [np.array(piece, dtype=np.float64) for piece in pieces]
    merged, count = merge_statistics([part([x, 2 * x + 1]) for x in arrays])
    whole = np.concatenate(arrays)
    assert count.tolist() == [whole.size, whole.size]
    for statistic in STATISTICS:
        wanted = [by_numpy(x, statistic) for x in (whole, 2 * whole + 1)]
        scale = max((abs(w) for w in wanted if math.isfinite(w)), default=0.0) + 1e6
        assert merged[statistic].tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-12 * scale, nan_ok=True)


def test_parts_of_a_constant_do_not_deviate() -> None:
    parts = [part([np.full(n, 0.1)]) for n in (3, 7, 11, 13)]
    for statistics, count in parts:
        # The sums are off by their own rounding, which is not the elements' doing.
        statistics[Statistic("sum")].copy_(count * 0.1)
        for order in (2.0, 3.0, 4.0):
            statistics[Statistic("centred", order)].zero_()
    merged, _ = merge_statistics(parts)
    assert [float(merged[Statistic("centred", order)]) for order in (2.0, 3.0, 4.0)] == [0.0, 0.0, 0.0]


def test_a_large_mean_does_not_swallow_the_deviations() -> None:
    draw = np.random.default_rng(0)
    pieces = [1e8 + draw.standard_normal(50) for _ in range(4)]
    merged, _ = merge_statistics([part([x]) for x in pieces])
    for order in (2.0, 3.0, 4.0):
        wanted = by_numpy(np.concatenate(pieces) - 1e8, Statistic("centred", order))
        assert float(merged[Statistic("centred", order)]) == pytest.approx(wanted, rel=1e-5)


def test_the_statistics_of_shards_merge_into_those_of_the_tensor() -> None:
    tensor = torch.randn(64, 33, generator=torch.Generator().manual_seed(0))
    needs = statistics_to_merge([Statistic("centred", 2.0), Statistic("minimum")])
    merged, count = merge_statistics([summarise([shard], needs) for shard in tensor.chunk(5)])
    assert count.tolist() == [64 * 33]
    assert float(merged[Statistic("centred", 2.0)]) == pytest.approx(
        np.var(tensor.numpy(), dtype=np.float64) * tensor.numel(), rel=1e-6
    )
    assert float(merged[Statistic("minimum")]) == tensor.numpy().min()


def test_a_statistic_names_what_it_is_merged_with() -> None:
    assert Statistic("sum_of_squares").merges_with == ()
    assert Statistic("centred", 2.0).merges_with == (Statistic("sum"),)
    assert statistics_to_merge([Statistic("centred", 4.0), Statistic("sum")]) == (
        Statistic("centred", 4.0),
        Statistic("sum"),
        Statistic("centred", 2.0),
        Statistic("centred", 3.0),
    )
    alone = part([np.ones(3)], (Statistic("centred", 2.0),))
    with pytest.raises(ValueError, match=r"cannot be merged without .*'sum'.*statistics_to_merge"):
        merge_statistics([alone, alone])


def test_no_part_and_a_statistic_that_does_not_merge_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one part"):
        merge_statistics([])
    strange = ({Statistic("median"): torch.ones(1)}, torch.ones(1))
    with pytest.raises(ValueError, match=r"'median'.* does not merge"):
        merge_statistics([strange, strange])


def test_nothing_is_waited_for() -> None:
    # A meta tensor has no values: whoever asks for one raises, as whoever waits for a device would.
    values = {s: torch.ones(2, device="meta") for s in STATISTICS}
    merged, count = merge_statistics([(values, torch.ones(2, device="meta"))] * 2)
    assert {v.device.type for v in (*merged.values(), count)} == {"meta"}

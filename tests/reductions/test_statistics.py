"""What the ways of computing statistics owe each other: on the host in pieces, by rows, on a device."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from streamlens.operators._quantiles import Quantiles
from streamlens.operators.histogram import Histogram
from streamlens.reductions import CHUNK, Bins, Statistic, accumulate, chunks_of, row_statistics, summarise
from streamlens.reductions.summaries import summarise_on_device
from tests.reductions.test_merging import STATISTICS, by_numpy

ALL = (*STATISTICS, Statistic("nonzero"), Statistic("nonfinite"))
# On a device these are summed in float32, which has no squares of what is beyond 1e19.
IN_FLOAT32 = (Statistic("sum_of_squares"), Statistic("sum_of_powers", 3.0))
DRAW = torch.Generator().manual_seed(0)
TENSORS: dict[str, Tensor] = {
    "float32": torch.randn(37, 11, generator=DRAW) + 2,
    "float64": torch.randn(40, generator=DRAW, dtype=torch.float64),
    "half": torch.randn(40, generator=DRAW).half(),
    "bfloat16": torch.randn(40, generator=DRAW).bfloat16(),
    "integer": torch.arange(-3, 9),
    "boolean": torch.tensor([True, False, True]),
    "empty": torch.empty(0),
    "0-dim": torch.tensor(-2.0),
    "constant": torch.full((7,), 0.1),
    "nan": torch.tensor([1.0, math.nan, 0.0]),
    "inf": torch.tensor([1.0, -math.inf, 0.0]),
    "small": 1e-25 * torch.randn(40, generator=DRAW),
    "large": 1e25 * torch.randn(40, generator=DRAW),
}


def oracle(tensor: Tensor, statistic: Statistic) -> float:
    x = tensor.double().numpy().ravel()
    if statistic.name == "nonzero":
        return float(np.count_nonzero(x))
    if statistic.name == "nonfinite":
        return float(x.size - np.isfinite(x).sum())
    if statistic.name == "centred" and x.size and x.min() == x.max():
        return 0.0
    return by_numpy(x, statistic)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("name", TENSORS)
def test_host_and_device_agree_with_numpy(name: str) -> None:
    tensor = TENSORS[name]
    for way in (summarise, summarise_on_device):
        values, count = way([tensor, tensor[:0] if tensor.ndim else torch.empty(0)], ALL)
        assert count.tolist() == [tensor.numel(), 0]
        for s in ALL:
            wanted = oracle(tensor, s)
            if way is summarise_on_device and name in ("small", "large") and s in IN_FLOAT32:
                continue
            scale = tensor.double().abs().max().item() ** max(1.0, s.order) if tensor.numel() else 0.0
            tolerance = 1e-6 * scale * tensor.numel() if math.isfinite(scale) else 0.0
            assert float(values[s][0]) == pytest.approx(wanted, rel=3e-6, abs=tolerance, nan_ok=True), s
            nothing = oracle(torch.empty(0), s)
            assert float(values[s][1]) == pytest.approx(nothing, nan_ok=True), s


def test_statistics_asked_for_together_equal_those_asked_for_alone() -> None:
    tensor = torch.randn(3 * CHUNK + 17, generator=torch.Generator().manual_seed(1)) - 1
    together = accumulate(chunks_of(tensor), ALL)
    for statistic, value in zip(ALL, together, strict=True):
        assert accumulate(chunks_of(tensor), (statistic,)) == [pytest.approx(value, rel=1e-6)]
        assert value == pytest.approx(oracle(tensor, statistic), rel=1e-5, abs=1e-6 * tensor.numel())


def test_rows_are_summarised_each_by_itself() -> None:
    rows = torch.randn(5, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for statistic, values in row_statistics(rows, ALL).items():
        assert values.tolist() == pytest.approx([oracle(row, statistic) for row in rows], rel=1e-9)


def test_powers_that_leave_the_range_of_a_float_are_not_finite_and_no_error() -> None:
    pieces = torch.tensor([1e150, -2e150, 0.0], dtype=torch.float64).split(2)
    second, fourth = accumulate(pieces, (Statistic("centred", 2.0), Statistic("centred", 4.0)))
    assert second == pytest.approx(14 / 3 * 1e300)
    assert not math.isfinite(fourth)


def test_a_first_piece_unlike_the_others_costs_no_precision() -> None:
    draw = torch.Generator().manual_seed(4)
    tensor = torch.cat([100 + torch.randn(CHUNK, generator=draw), torch.randn(3 * CHUNK, generator=draw)])
    tensor[CHUNK - 3] = 1e4
    for first in (tensor, tensor.flip(0)):
        values = accumulate(chunks_of(first), tuple(Statistic("centred", float(k)) for k in (2, 3, 4)))
        wanted = [oracle(first, Statistic("centred", float(k))) for k in (2, 3, 4)]
        assert values == pytest.approx(wanted, rel=5e-5)


def test_a_piece_that_is_not_finite_makes_all_deviations_nan_and_leaves_the_sum() -> None:
    for place in (0, 5):
        tensor = torch.arange(8.0)
        tensor[place] = math.inf
        total, deviations = accumulate(tensor.split(3), (Statistic("sum"), Statistic("centred", 2.0)))
        assert (total, math.isnan(deviations)) == (math.inf, True)


@pytest.mark.parametrize("name", ["float32", "half", "integer"])
def test_nothing_waits_for_a_device(name: str) -> None:
    # A meta tensor has no values: whoever asks for one raises, as whoever waits for a device would.
    tensor = TENSORS[name].to("meta")
    values, count = summarise([tensor, tensor], ALL)
    assert {v.device.type for v in (*values.values(), count)} == {"meta"}
    assert {tuple(v.shape) for v in values.values()} == {(2,)}


def test_an_unknown_statistic_is_refused() -> None:
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=r"'median'.* is not known"):
            summarise([torch.ones(3, device=device)], (Statistic("median"),))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_not_waited_for_and_agrees_with_the_host() -> None:
    operators = [
        Histogram(Bins(-2.0, 2.0, 8)),
        Histogram(Bins(1e-3, 10.0, 8, log=True)),
        Quantiles((0.0, 0.3, 1.0), "quantiles", ("a", "b", "c")),
        Quantiles((0.5,), "median", sample=100),
    ]
    tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (3, 300, 70_000, 70_000)]
    tensors[1][5] = math.nan
    on_device = [tensor.cuda() for tensor in tensors]
    torch.cuda.set_sync_debug_mode("error")
    try:
        summed, _ = summarise(on_device, ALL)
        reduced = [operator.reduce(on_device) for operator in operators]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for statistic, values in summarise(tensors, ALL)[0].items():
        assert torch.allclose(summed[statistic].cpu(), values, rtol=1e-4, atol=1e-2, equal_nan=True), (
            statistic
        )
    for operator, found in zip(operators, reduced, strict=True):
        assert torch.allclose(found.cpu(), operator.reduce(tensors), rtol=1e-5, equal_nan=True)

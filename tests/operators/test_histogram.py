from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from streamlens import observe
from streamlens.frame import Frame
from streamlens.lens import Lens
from streamlens.operators import histogram, topic
from streamlens.operators.histogram import Histogram
from streamlens.reductions import CHUNK, Bins, bin_edges
from streamlens.runs import RunWriter, read_run
from streamlens.sinks import Table
from streamlens.stream import Operator
from tests.operators.support import NUMBERS, ragged, run


def counted_by_hand(components: tuple[str, ...], elements: list[float]) -> list[int]:
    """Each element put where a bin's name says that it belongs, one after the other."""
    counts = [0] * len(components)
    for element in elements:
        (place,) = [i for i, name in enumerate(components) if belongs(name, element)]
        counts[place] += 1
    return counts


def belongs(name: str, element: float) -> bool:
    if name in ("-inf", "inf", "nan"):
        return str(element) == name
    low, high = (float(np.float32(end)) for end in name[1:-1].split(","))
    above = low <= element if name[0] == "[" else low < element
    below = element <= high if name[-1] == "]" else element < high
    return above and below and math.isfinite(element)


def counts(operator: Operator, tensor: Tensor) -> tuple[tuple[str, ...], list[float]]:
    (out,) = run(operator, [ragged(0, {"a": tensor})])
    assert out.topic == "x.histogram"
    return out.components, out.to_dict()["a"].tolist()


EDGY = st.sampled_from(
    [0.0, -0.0, 0.5, 1.0, -1.0, 0.1, -0.1, 1e-45, 1e-9, 1e3, -1e3, 3e38, math.inf, -math.inf, math.nan]
)
OPERATORS = {
    "equal widths": histogram(bins=10, range=(-1, 1)),
    "one bin": histogram(bins=1, range=(0, 1)),
    "thirds": histogram(bins=3, range=(-0.1, 0.1)),
    "logarithmic": histogram(),
    "logarithmic of a range": histogram(bins=5, log=True, range=(0.1, 1)),
    "far from zero": histogram(bins=16, range=(1000, 1001)),
}


@pytest.mark.parametrize("name", OPERATORS)
@given(elements=st.lists(st.one_of(EDGY, NUMBERS, st.floats(-2, 2, width=32)), max_size=20))
def test_each_element_is_counted_once_where_its_bins_name_says(name: str, elements: list[float]) -> None:
    tensor = torch.tensor(elements, dtype=torch.float32)
    components, got = counts(OPERATORS[name], tensor)
    assert got == counted_by_hand(components, tensor.tolist())
    assert sum(got) == len(elements)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges_and_their_neighbours_are_told_apart(name: str, dtype: torch.dtype) -> None:
    components = counts(OPERATORS[name], torch.empty(0))[0]
    edges = bin_edges(components)
    assert edges is not None
    ends = torch.tensor(
        [np.float32(e) for e in {e for pair in edges for e in pair} if math.isfinite(e)], dtype=dtype
    )
    up, down = (ends.nextafter(torch.tensor(far, dtype=dtype)) for far in (math.inf, -math.inf))
    tensor = torch.cat([ends, up, down])
    assert counts(OPERATORS[name], tensor)[1] == counted_by_hand(components, tensor.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.half, torch.bfloat16])
def test_equals_numpy_over_many_pieces(dtype: torch.dtype) -> None:
    x = torch.randn(2 * CHUNK + 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    _, got = counts(histogram(bins=40, range=(-2, 2)), x)
    wanted, _ = np.histogram(x.double().numpy(), bins=40, range=(-2, 2))
    # NumPy's edges are of double precision, ours of single: they differ where no float lies between.
    assert np.abs(np.array(got[2:-3]) - wanted).max() <= (1 if dtype == torch.float64 else 0)
    assert sum(got) == x.numel()


def test_special_tensors() -> None:
    operator = histogram(bins=2, range=(-4, 4))
    assert counts(operator, torch.empty(0, 3))[1] == [0] * 7
    assert counts(operator, torch.tensor(1.5))[1] == [0, 0, 0, 1, 0, 0, 0]
    assert counts(operator, torch.tensor([True, False]))[1] == [0, 0, 0, 2, 0, 0, 0]
    assert counts(operator, torch.arange(-6, 7))[1] == [0, 2, 4, 5, 2, 0, 0]
    assert counts(operator, torch.tensor([1 - 2j]))[1] == [0, 0, 1, 1, 0, 0, 0]
    assert counts(operator, torch.tensor([[0.0, -1.0], [0.0, 9.0]]).to_sparse())[1] == [0, 0, 1, 2, 1, 0, 0]
    assert counts(operator, torch.randn(4, 5).t()[::2])[1] != counts(operator, torch.empty(0))[1]
    assert counts(operator, torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30]))[1] == [
        1,
        1,
        0,
        0,
        1,
        1,
        1,
    ]


def test_names_are_the_bins() -> None:
    assert counts(histogram(bins=2, range=(0, 1)), torch.empty(0))[0] == (
        "-inf",
        "(-inf,0)",
        "[0,0.5)",
        "[0.5,1]",
        "(1,inf)",
        "inf",
        "nan",
    )
    assert counts(histogram(bins=2, range=(0.01, 1), log=True), torch.empty(0))[0] == (
        "-inf",
        "(-inf,-1)",
        "[-1,-0.1]",
        "(-0.1,-0.01]",
        "(-0.01,0.01)",
        "[0.01,0.1)",
        "[0.1,1]",
        "(1,inf)",
        "inf",
        "nan",
    )
    default = counts(histogram(), torch.empty(0))[0]
    assert len(default) == 2 * 48 + 6
    assert default[51] == "[1e-09,1.7782794e-09)"


def test_edges_can_be_read_back_from_components() -> None:
    components = counts(histogram(bins=2, range=(0, 1)), torch.empty(0))[0]
    edges = bin_edges(components)
    assert edges is not None
    assert edges[:-1] == (
        (-math.inf, -math.inf),
        (-math.inf, 0),
        (0, 0.5),
        (0.5, 1),
        (1, math.inf),
        (math.inf, math.inf),
    )
    assert all(map(math.isnan, edges[-1]))
    assert bin_edges(("p0", "p50", "p75", "p100")) is None
    assert bin_edges(("-inf", "low", "inf", "nan")) is None
    assert bin_edges(()) is None


@given(st.lists(NUMBERS, max_size=20), st.integers(-3, 3))
def test_scaled_values_in_a_scaled_range_fall_into_the_same_bins(numbers: list[float], exponent: int) -> None:
    x, c = torch.tensor(numbers), 2.0**exponent
    mirrored = counts(histogram(), -x)[1]
    assert mirrored[:-1] == counts(histogram(), x)[1][-2::-1]
    # Below the smallest float32 a half is zero, and lies in another bin: there nothing has been scaled.
    assume(torch.equal(c * x / c, x))
    first = counts(histogram(bins=8, range=(-16, 16)), x)[1]
    assert counts(histogram(bins=8, range=(-16 * c, 16 * c)), c * x)[1] == first


def test_layers_and_rows_are_each_by_itself() -> None:
    draw = torch.Generator().manual_seed(1)
    layers = {"a": torch.randn(5, generator=draw), "b": torch.randn(3, 3, generator=draw)}
    (out,) = run(histogram(), [ragged(0, layers)])
    assert isinstance(out.values, Tensor)
    assert out.values.dtype == torch.float32
    for name, tensor in layers.items():
        assert out.to_dict()[name].tolist() == counts(histogram(), tensor)[1]
    rows = torch.randn(2, 6, generator=draw)
    (stacked,) = run(histogram(), [Frame("x", 0, ("a", "b"), rows)])
    assert stacked.to_dict()["b"].tolist() == counts(histogram(), rows[1])[1]


def test_small_and_large_layers_of_several_types_are_each_by_itself() -> None:
    draw = torch.Generator().manual_seed(7)
    sizes = (3, 0, 500, CHUNK - 100, CHUNK + 5, 8, 9)
    layers = {f"l{i}": torch.randn(size, generator=draw) for i, size in enumerate(sizes)}
    layers["l2"] = layers["l2"].double()
    layers["l5"][2] = math.nan
    (out,) = run(histogram(), [ragged(0, layers)])
    for name, tensor in layers.items():
        assert out.to_dict()[name].tolist() == counts(histogram(), tensor)[1], name


def test_counts_of_parts_add_up_to_those_of_the_whole() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(2))
    reduction = Histogram(Bins(-2.0, 2.0, 8))
    parts = [reduction.reduce([part]) for part in x.chunk(3)]
    assert torch.equal(reduction.merge(parts), reduction.reduce([x]))


@pytest.mark.parametrize("bins", [Bins(-2.0, 2.0, 8), Bins(1e-3, 10.0, 8, log=True)])
def test_on_a_device_nothing_is_waited_for_and_counts_are_the_same(bins: Bins) -> None:
    # A meta tensor has no values: whoever asks for one raises, as whoever waits for a device would.
    reduction = Histogram(bins)
    assert reduction.reduce([torch.empty(40, device="meta")] * 2).shape == (2, len(bins.components))
    x = torch.cat([torch.linspace(-3, 3, 40), torch.tensor([math.nan, math.inf, -math.inf, 0.0])])
    flats = [x, x[:7], x[:0], x[:40]]
    on_device = bins._counted(torch.cat(flats), [flat.numel() for flat in flats], on_host=False)
    assert on_device.tolist() == bins.count(flats).tolist()
    assert bins.count(flats)[0].tolist() == counted_by_hand(bins.components, x.tolist())


def test_pushed_down_on_a_lens_stored_and_in_tables(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    got: list[Frame] = []
    table = Table()
    with observe(model, on_error="raise") as lens:
        narrowed = lens.pipe(topic("weights"), histogram())
        assert isinstance(narrowed, Lens)
        narrowed.subscribe(got.append)
        narrowed.subscribe(table)
        with RunWriter(tmp_path / "run.db", "a") as writer:
            lens.pipe(topic("weights")).subscribe(lambda raw: writer.write([raw]))
            model(torch.ones(3, 6)).sum().backward()
            optimizer.step()
    (pushed,) = got
    for name, index in (("0", 0), ("2", 2)):
        layer = model[index]
        assert isinstance(layer, nn.Linear)
        assert pushed.to_dict()[name].tolist() == counts(histogram(), layer.weight.detach())[1]
    with RunWriter(tmp_path / "counts.db", "a") as writer:
        writer.write([pushed])
    with read_run(tmp_path / "counts.db") as kept:
        shown = kept.dataframe("weights.histogram")
    assert shown[shown["layer"] == "2"]["component"].tolist() == list(pushed.components)
    with read_run(tmp_path / "run.db") as stored:
        (replayed,) = run(histogram(), list(stored.frames("weights")))
    assert torch.equal(torch.as_tensor(replayed.values), torch.as_tensor(pushed.values))
    rows: Any = table.dataframe
    assert tuple(rows[rows["layer"] == "0"]["component"]) == pushed.components
    assert rows["value"].sum() == 6 * 4 + 4 * 2


def test_wrong_arguments_are_refused() -> None:
    for bins in (0, -1, 2.5, True):
        with pytest.raises(
            ValueError, match=r"histogram\(bins=.*\): the number of bins is a whole number from 1 on"
        ):
            histogram(bins=bins)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"pass the pair \(low, high\)"):
        histogram(range=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"'b' is no number"):
        histogram(range=(1, "b"))  # type: ignore[arg-type]
    for ends in ((1.0, 1.0), (2.0, 1.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="the range begins below its end, and both are finite"):
            histogram(range=ends)
    with pytest.raises(ValueError, match="magnitudes, which are above 0"):
        histogram(range=(-1, 1), log=True)
    with pytest.raises(ValueError, match=r"need range=\(low, high\)"):
        histogram(log=False)
    for ends in ((1e6, 1e6 + 1), (0, 1e39), (-1e39, 1)):
        with pytest.raises(
            ValueError, match="cannot tell these edges apart; pass fewer bins or a wider range"
        ):
            histogram(range=ends)
    with pytest.raises(TypeError, match="is a topic such as 'weights', got 30"):
        histogram(30)  # type: ignore[arg-type]


def test_equal_ones_are_shared_and_a_plan_says_what_is_counted() -> None:
    assert Histogram(Bins(0.0, 1.0, 4)) == Histogram(Bins(0.0, 1.0, 4))
    assert hash(Histogram(Bins(0.0, 1.0, 4))) == hash(Histogram(Bins(0.0, 1.0, 4)))
    assert Histogram(Bins(0.0, 1.0, 4)).describe() == "histogram of 4 bins from 0 to 1"
    assert "48 logarithmic bins a sign" in Histogram(Bins(1e-9, 1e3, 48, log=True)).describe()

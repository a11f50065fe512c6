from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from streamlens import observe
from streamlens.frame import Frame
from streamlens.lens import Lens
from streamlens.operators import median, percentile_bands, quantiles, topic
from streamlens.operators._quantiles import Quantiles, sample_positions
from streamlens.stream import Operator
from tests.operators.support import NUMBERS, ragged, run

LEVELS = (0.0, 0.1, 0.25, 0.5, 0.9, 1.0)


def quantile_by_hand(elements: list[float], level: float) -> float:
    """From sorted Python numbers: NaN before all else, no arithmetic with infinity that has no share."""
    if not elements or any(math.isnan(e) for e in elements):
        return math.nan
    ordered = sorted(elements)
    place = level * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    share = place - math.floor(place)
    return low if low == high or share == 0 else low * (1 - share) + high * share


def _tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    dense = torch.randn(3, 4, 5, generator=draw)
    return {
        "float32": dense,
        "float64": dense.double() / 3,
        "half": dense.half(),
        "bfloat16": dense.bfloat16(),
        "integer": torch.tensor([3, 2**24 + 1, 2**24 + 1, 2**24 + 1, -7]),
        "boolean": dense > 0,
        "complex": torch.tensor([1 + 2j, -3 + 4j]),
        "0-dim": torch.tensor(-2.5),
        "empty": torch.empty(0, 3),
        "one element": torch.tensor([4.0]),
        "two elements": torch.tensor([4.0, -1.0]),
        "nan": torch.tensor([1.0, math.nan, 3.0]),
        "inf": torch.tensor([1.0, math.inf, math.inf, -math.inf]),
        "opposite infinities": torch.tensor([-math.inf, math.inf]),
        "not contiguous": dense.transpose(0, 2)[::2],
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 7),
        "equal": torch.full((9,), 0.1),
        "large": 3e38 * torch.tensor([1.0, -1.0, 0.5]),
        "sparse": torch.tensor([[0.0, 3.0], [0.0, -1.0]]).to_sparse(),
    }


TENSORS = _tensors()


def elements_of(tensor: Tensor) -> list[float]:
    dense = tensor.to_dense() if tensor.is_sparse else tensor
    real = torch.view_as_real(dense) if dense.is_complex() else dense
    return [float(x) for x in real.reshape(-1).tolist()]


@pytest.mark.parametrize("what", TENSORS)
def test_exact_quantiles_equal_those_of_sorted_numbers(what: str) -> None:
    tensor = TENSORS[what]
    elements = elements_of(tensor)
    (out,) = run(quantiles(q=LEVELS), [ragged(0, {"a": tensor})])
    (middle,) = run(median(), [ragged(0, {"a": tensor})])
    assert isinstance(out.values, Tensor)
    assert out.values.dtype == (torch.float64 if what == "float64" else torch.float32)
    wanted = [quantile_by_hand(elements, level) for level in LEVELS]
    assert out.values[0].tolist() == pytest.approx(wanted, rel=1e-6, nan_ok=True)
    assert middle.to_dict()["a"] == pytest.approx(quantile_by_hand(elements, 0.5), rel=1e-6, nan_ok=True)


def test_names_of_topics_and_components() -> None:
    values = [ragged(0, {"a": torch.arange(101.0)})]
    (bands,) = run(percentile_bands(), values)
    assert bands.topic == "x.percentile_bands"
    assert bands.components == ("p0", "p5", "p25", "p50", "p75", "p95", "p100")
    assert bands.to_dict()["a"].tolist() == pytest.approx([0, 5, 25, 50, 75, 95, 100])
    (own,) = run(percentile_bands(percentiles=(99.9, 2)), values)
    assert own.components == ("p2", "p99.9")
    assert own.to_dict()["a"].tolist() == pytest.approx([2, 99.9])
    (levels,) = run(quantiles(q=(0.75, 0.1)), values)
    assert (levels.topic, levels.components) == ("x.quantiles", ("q0.75", "q0.1"))
    assert levels.to_dict()["a"].tolist() == pytest.approx([75, 10])
    (middle,) = run(median(), values)
    assert (middle.topic, middle.components, middle.to_dict()) == ("x.median", (), {"a": 50.0})


@given(st.lists(NUMBERS, min_size=1, max_size=30), st.floats(0.125, 8, width=16), NUMBERS)
def test_equal_numpy_and_follow_scale_and_shift(numbers: list[float], c: float, d: float) -> None:
    x = torch.tensor(numbers, dtype=torch.float64)

    def value(tensor: Tensor, levels: tuple[float, ...] = LEVELS) -> Any:
        return run(quantiles(q=levels), [ragged(0, {"a": tensor})])[0].to_dict()["a"]

    assert value(x) == pytest.approx(np.quantile(x.numpy(), LEVELS))
    assert value(c * x + d) == pytest.approx(c * value(x) + d, abs=1e-9)
    assert value(-x, tuple(1 - q for q in LEVELS)) == pytest.approx(-value(x), abs=1e-9)


def test_layers_of_one_size_and_of_several_are_each_by_itself() -> None:
    draw = torch.Generator().manual_seed(1)
    layers = {f"l{i}": torch.randn(n, generator=draw) for i, n in enumerate((7, 12, 7, 1, 70_000, 70_000, 7))}
    layers["l0"][3] = math.nan
    (out,) = run(quantiles(q=LEVELS), [ragged(0, layers)])
    assert out.layers == tuple(layers)
    for name, tensor in layers.items():
        wanted = np.quantile(tensor.double().numpy(), LEVELS)
        assert out.to_dict()[name] == pytest.approx(wanted, rel=1e-6, nan_ok=True)


def test_a_reduction_of_stacked_values_is_by_row_and_changes_nothing() -> None:
    rows = torch.randn(4, 9, generator=torch.Generator().manual_seed(2))
    before = rows.clone()
    for operator in (median(), quantiles(q=LEVELS), median(sample=3)):
        (out,) = run(operator, [Frame("x", 0, tuple("abcd"), rows)])
        assert len(out.values) == 4
    assert torch.equal(rows, before)
    (out,) = run(median(), [Frame("x", 0, tuple("abcd"), rows)])
    assert list(out.to_dict().values()) == pytest.approx(np.median(rows.numpy(), axis=1).tolist())


def test_more_elements_than_torch_quantile_takes() -> None:
    # 16,777,216 is its limit.
    many = torch.zeros(16_777_217 + 16, dtype=torch.int8)
    many[:5] = torch.tensor([-3, 9, 9, 9, 9])
    (out,) = run(quantiles(q=(0.0, 0.5, 1.0), sample=1000), [ragged(0, {"a": many})])
    assert out.to_dict()["a"].tolist() == [-3.0, 0.0, 9.0]
    (exact,) = run(median(), [ragged(0, {"a": many})])
    assert exact.to_dict()["a"] == 0.0


@pytest.mark.parametrize("level", [0.05, 0.5, 0.9])
def test_a_sampled_quantile_is_off_by_the_standard_error_stated(level: float) -> None:
    size, sample = 20_000, 400
    draw = np.random.default_rng(3)
    # The level that was hit, of a uniform distribution, is the value itself.
    tensors = {str(i): torch.from_numpy(draw.random(size)) for i in range(200)}
    values = run(quantiles(q=(level,), sample=sample), [ragged(0, tensors)])[0].values
    assert isinstance(values, Tensor)
    errors = values[:, 0].numpy() - level
    stated = math.sqrt(level * (1 - level) / sample)
    assert 0.85 * stated < errors.std() < 1.15 * stated
    assert abs(errors.mean()) < 4 * stated / math.sqrt(len(errors)) + 1 / sample


def test_the_value_of_a_sampled_median_of_a_normal_is_off_as_stated() -> None:
    sample = 400
    draw = np.random.default_rng(4)
    tensors = {str(i): torch.from_numpy(draw.standard_normal(20_000)) for i in range(200)}
    medians = np.array(list(run(median(sample=sample), [ragged(0, tensors)])[0].to_dict().values()))
    assert medians.std() == pytest.approx(math.sqrt(math.pi / 2 / sample), rel=0.15)


@pytest.mark.parametrize("period", [50, 64, 100])
def test_a_pattern_in_the_layout_does_not_fall_into_step_with_the_sample(period: int) -> None:
    # Every n-th element of this matrix is one column, which has one value.
    matrix = torch.arange(float(period)).repeat(20_000 // period + 1)[:20_000]
    sample = 20_000 // period
    value = run(median(sample=sample), [ragged(0, {"a": matrix})])[0].to_dict()["a"]
    assert abs(value / period - 0.5) < 4 * math.sqrt(0.25 / sample)


def test_a_sample_reads_distinct_elements_of_each_part_the_same_ones_always() -> None:
    for size, sample in ((10, 10), (11, 10), (1000, 7), (100_003, 100)):
        places = sample_positions(size, sample, torch.device("cpu")).tolist()
        sample_positions.cache_clear()
        assert sample_positions(size, sample, torch.device("cpu")).tolist() == places
        assert all(math.floor(i * size / sample) <= p < (i + 1) * size / sample for i, p in enumerate(places))
        assert len(set(places)) == sample


def test_a_sample_as_large_as_the_tensor_is_exact_and_ends_are_exact_always() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(5))
    values = [ragged(0, {"a": x})]
    exact = run(percentile_bands(), values)[0].to_dict()["a"]
    assert run(percentile_bands(sample=5000), values)[0].to_dict()["a"].tolist() == exact.tolist()
    sampled = run(percentile_bands(sample=50), values)[0].to_dict()["a"]
    assert (sampled[0], sampled[-1]) == (x.min(), x.max())
    assert sampled[3] != exact[3]


def test_random_numbers_of_the_run_are_left_alone() -> None:
    sample_positions.cache_clear()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(median(sample=10), [ragged(0, {"a": torch.ones(1000)})])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "operator", [median(), percentile_bands(), percentile_bands(sample=9), median(sample=9)]
)
def test_on_a_lens_they_are_pushed_down(operator: Operator) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6), nn.BatchNorm1d(6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    got: list[Frame] = []
    with observe(model, on_error="raise") as lens:
        for name in ("weights", "weight_updates", "activations"):
            narrowed = lens.pipe(topic(name), operator)
            assert isinstance(narrowed, Lens)
            narrowed.subscribe(got.append)
            lens.pipe(topic(name)).subscribe(lambda raw: got.extend(run(operator, [raw])))
        model(torch.randn(3, 6, generator=torch.Generator().manual_seed(6))).square().sum().backward()
        optimizer.step()
    assert len(got) == 6
    by_topic: dict[str, list[dict[str, Any]]] = {}
    for item in got:
        by_topic.setdefault(item.topic, []).append(item.to_dict())
    for pushed, plain in by_topic.values():
        assert set(pushed) == set(plain)
        for layer, value in pushed.items():
            assert value == pytest.approx(plain[layer])


@pytest.mark.parametrize("sample", [None, 5])
def test_on_a_device_nothing_is_waited_for_and_values_are_the_same(sample: int | None) -> None:
    reduction = Quantiles(LEVELS, "quantiles", tuple(map(str, LEVELS)), sample)
    # A meta tensor has no values: whoever asks for one raises, as whoever waits for a device would.
    assert reduction.reduce([torch.empty(40, device="meta")] * 2).shape == (2, len(LEVELS))


def test_the_devices_way_equals_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    import streamlens.operators._quantiles as module

    tensors = [TENSORS[what] for what in ("float32", "nan", "inf", "one element", "equal")]
    reduction = Quantiles(LEVELS, "quantiles", tuple(map(str, LEVELS)))
    host = reduction.reduce(tensors)
    monkeypatch.setattr(module, "_picked_on_host", module._picked)
    assert torch.allclose(reduction.reduce(tensors), host, equal_nan=True)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"quantiles\(q=\(0.5, 1.5\)\): 1.5 is no number from 0 to 1"):
        quantiles(q=(0.5, 1.5))
    with pytest.raises(ValueError, match=r"nan is no number"):
        quantiles(q=(math.nan,))
    with pytest.raises(ValueError, match=r"at least one number, each of them once"):
        quantiles(q=())
    with pytest.raises(ValueError, match=r"each of them once"):
        percentile_bands(percentiles=(5, 5.0))
    with pytest.raises(TypeError, match=r"pass a sequence of numbers from 0 to 100"):
        percentile_bands(percentiles=5)  # type: ignore[arg-type]
    for sample in (0, -1, 1.5, True):
        with pytest.raises(
            ValueError, match=r"median\(sample=.*\): the sample is how many elements are read"
        ):
            median(sample=sample)  # type: ignore[arg-type]
    for operator in (median, quantiles, percentile_bands):
        with pytest.raises(TypeError, match="is a topic such as 'weights'"):
            operator((0.5,))  # type: ignore[arg-type]


def test_equal_reductions_are_equal_and_a_plan_says_what_is_sampled() -> None:
    assert Quantiles((0.5,), "median") == Quantiles((0.5,), "median")
    assert hash(Quantiles((0.5,), "median")) == hash(Quantiles((0.5,), "median"))
    assert Quantiles((0.5,), "median") != Quantiles((0.5,), "median", sample=5)
    assert Quantiles((0.5,), "median", sample=5).describe() == "median of 5 elements"

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from reactivex.subject import Subject
from torch import Tensor, nn

from streamlens import observe
from streamlens.frame import Frame, to_numpy
from streamlens.lens import Lens
from streamlens.operators import (
    absmax,
    kurtosis,
    maximum,
    mean,
    minimum,
    nonfinite,
    norm,
    reduce,
    rms,
    skewness,
    std,
    topic,
    total,
    var,
    zero_fraction,
)
from streamlens.runs import RunWriter, read_run
from streamlens.runtime import default_runtime
from streamlens.stream import Operator
from tests.operators.support import NUMBERS, frame, ragged, run, same

Array = np.ndarray[Any, Any]


def _p_norm(order: float) -> Callable[[Array], float]:
    return lambda x: float(np.linalg.norm(x, order)) if x.size else 0.0


def _extreme(fn: Callable[[Array], Any]) -> Callable[[Array], float]:
    return lambda x: float(fn(x)) if x.size else math.nan


def _var(ddof: int) -> Callable[[Array], float]:
    return lambda x: float(np.sum((x - x.mean()) ** 2) / (x.size - ddof)) if x.size > ddof else math.nan


def _moment(fn: Callable[[Array], Any]) -> Callable[[Array], float]:
    def oracle(x: Array) -> float:
        if not x.size or not np.isfinite(x).all() or x.min() == x.max():
            return math.nan
        return float(fn(x / np.abs(x).max()))  # scaled, since SciPy's powers leave float64's range too

    return oracle


ORACLES: dict[str, tuple[Operator, Callable[[Array], float]]] = {
    "norm2": (norm(), _p_norm(2)),
    "norm1": (norm(order=1), _p_norm(1)),
    "norm3.5": (norm(order=3.5), _p_norm(3.5)),
    "norm0": (norm(order=0), _p_norm(0)),
    "norminf": (norm(order=math.inf), _p_norm(math.inf)),
    "mean": (mean(), lambda x: float(x.mean()) if x.size else math.nan),
    "var": (var(), _var(1)),
    "population_var": (var(unbiased=False), _var(0)),
    "std": (std(), lambda x: math.sqrt(_var(1)(x))),
    "population_std": (std(unbiased=False), lambda x: math.sqrt(_var(0)(x))),
    "minimum": (minimum(), _extreme(np.min)),
    "maximum": (maximum(), _extreme(np.max)),
    "total": (total(), lambda x: float(x.sum())),
    "absmax": (absmax(), _extreme(lambda x: np.max(np.abs(x)))),
    "skewness": (skewness(), _moment(scipy.stats.skew)),
    "kurtosis": (kurtosis(), _moment(scipy.stats.kurtosis)),
    "zero_fraction": (zero_fraction(), lambda x: float(np.mean(x == 0)) if x.size else math.nan),
    "nonfinite": (nonfinite(), lambda x: float(np.sum(~np.isfinite(x)))),
    "rms": (rms(), lambda x: math.sqrt(float(np.mean(x**2))) if x.size else math.nan),
}


def _tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    dense = torch.randn(2, 3, 4, 5, generator=draw)
    return {
        "float32": dense,
        "float64": dense.double(),
        "half": dense.half(),
        "bfloat16": dense.bfloat16(),
        "integer": torch.arange(-3, 9),
        "0-dim": torch.tensor(-2.5),
        "empty": torch.empty(0, 3),
        "one element": torch.tensor([4.0]),
        "nan": torch.tensor([1.0, math.nan, -3.0]),
        "inf": torch.tensor([1.0, -math.inf, 2.0]),
        "not contiguous": dense.transpose(0, 3)[::2],
        "channels last": dense.to(memory_format=torch.channels_last),
        "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 7),
        "large": 1e30 * dense,
        "small": 1e-30 * dense,
        "large mean": 1e4 + dense,
        "constant": torch.full((3, 5), 0.1),
        "zeros among others": dense * (dense > 0),
        "boolean": dense > 0,
        "many pieces": 3 + torch.randn(150_001, generator=draw),
        "many pieces, constant": torch.full((150_001,), 0.1),
        "many pieces, one odd": torch.arange(150_001) == 7,
        "many pieces, half": torch.rand(150_001, generator=draw).half(),
    }


TENSORS = _tensors()
LOOSE = {"half": 1e-3, "bfloat16": 1e-3, "large mean": 1e-4, "many pieces, constant": 1e-5}
# Standardised moments are differences of numbers around 1.
ABSOLUTE = {"skewness": 1e-5, "kurtosis": 1e-5}


def as_array(tensor: Tensor) -> Array:
    return to_numpy(tensor).astype(np.float64).ravel()


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("what", TENSORS)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_equals_numpy_in_double_precision(what: str, name: str) -> None:
    operator, oracle = ORACLES[name]
    tensor = TENSORS[what]
    (out,) = run(operator, [ragged(0, {"a": tensor})])
    assert out.topic == f"x.{name}"
    assert isinstance(out.values, Tensor)
    assert out.values.dtype == (torch.float64 if what == "float64" else torch.float32)
    wanted = oracle(as_array(tensor))
    if abs(wanted) > torch.finfo(torch.float32).max:
        wanted = math.copysign(math.inf, wanted)
    assert same(float(out.values[0]), wanted, rel=LOOSE.get(what, 2e-6), abs_=ABSOLUTE.get(name, 1e-38))


@pytest.mark.parametrize("name", ORACLES)
def test_rows_of_stacked_values_equal_each_row_by_itself(name: str) -> None:
    operator, oracle = ORACLES[name]
    rows = TENSORS["float32"].reshape(6, 20)[:, :7]
    (out,) = run(operator, [Frame("x", 0, tuple("abcdef"), rows)])
    assert isinstance(out.values, Tensor)
    assert out.values.dtype == torch.float32
    assert out.values.tolist() == pytest.approx([oracle(as_array(row)) for row in rows], rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", ORACLES)
def test_stacked_values_without_elements_are_as_empty_tensors(name: str) -> None:
    operator, oracle = ORACLES[name]
    (out,) = run(operator, [Frame("x", 0, ("a",), torch.empty(1, 0))])
    assert isinstance(out.values, Tensor)
    assert same(float(out.values[0]), oracle(np.empty(0)))


def test_norms_of_a_complex_tensor_are_of_magnitudes_and_the_rest_of_its_parts() -> None:
    z = torch.tensor([3 + 4j, 1 - 2j])
    for stacked in (False, True):
        values = Frame("x", 0, ("a",), z[None]) if stacked else ragged(0, {"a": z})
        got = {name: run(ORACLES[name][0], [values])[0].to_dict()["a"] for name in ORACLES}
        parts, magnitudes = np.array([3.0, 4.0, 1.0, -2.0]), np.abs(z.numpy())
        expected = {
            name: oracle(magnitudes if name.startswith("norm") or name == "absmax" else parts)
            for name, (_, oracle) in ORACLES.items()
        }
        assert got == pytest.approx(expected)
        assert got["norm2"] == pytest.approx(float(np.linalg.norm(z.numpy())))


@given(st.lists(NUMBERS, min_size=2, max_size=20), st.floats(0.125, 8, width=16))
def test_scale_laws(numbers: list[float], c: float) -> None:
    x = torch.tensor(numbers, dtype=torch.float64)

    def value(operator: Operator, tensor: Tensor) -> float:
        return float(run(operator, [ragged(0, {"a": tensor})])[0]["a"])

    for operator in (norm(), norm(order=1), norm(order=math.inf), rms(), std(), mean(), maximum()):
        assert value(operator, c * x) == pytest.approx(c * value(operator, x), rel=1e-9, abs=1e-9)
    assert value(var(), c * x) == pytest.approx(c**2 * value(var(), x), rel=1e-9, abs=1e-9)
    assert value(total(), c * x) == pytest.approx(c * value(total(), x), rel=1e-9, abs=1e-9)
    assert value(absmax(), -c * x) == pytest.approx(c * value(absmax(), x))
    for operator, sign in ((skewness(), -1), (kurtosis(), 1)):
        if value(std(), x) > 1e-3:
            assert value(operator, c * x + 5) == pytest.approx(value(operator, x), rel=1e-6, abs=1e-6)
            assert value(operator, -x) == pytest.approx(sign * value(operator, x), rel=1e-6, abs=1e-6)
    assert value(zero_fraction(), c * x) == value(zero_fraction(), x)
    assert value(var(), x + 50) == pytest.approx(value(var(), x), rel=1e-7, abs=1e-7)
    assert value(norm(order=0), c * x) == value(norm(order=0), x)


@given(st.lists(NUMBERS, min_size=1, max_size=20))
def test_kurtosis_exceeds_squared_skewness_less_two(numbers: list[float]) -> None:
    x = ragged(0, {"a": torch.tensor(numbers, dtype=torch.float64)})
    third, fourth = (run(operator, [x])[0].to_dict()["a"] for operator in (skewness(), kurtosis()))
    assert math.isnan(fourth) or fourth >= third**2 - 2 - 1e-9


def test_elements_that_a_sparse_tensor_does_not_hold_are_zeros() -> None:
    dense = torch.tensor([[0.0, 3.0, 0.0], [0.0, -1.0, math.inf]])
    places, values = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 2]]), torch.tensor([1.0, 2.0, -1.0, math.inf])
    twice = torch.sparse_coo_tensor(places, values, (2, 3), check_invariants=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that compressed layouts are a beta of PyTorch's
        tensors = (dense, twice, dense.to_sparse_csr())
    for name, (operator, _) in ORACLES.items():
        wanted, *got = (run(operator, [ragged(0, {"a": t})])[0].to_dict()["a"] for t in tensors)
        assert got == pytest.approx([wanted, wanted], nan_ok=True), name


def test_half_precision_does_not_overflow() -> None:
    x = torch.full((10_000,), 300.0).half()
    assert run(norm(), [ragged(0, {"a": x})])[0].to_dict()["a"] == pytest.approx(30_000)
    assert run(mean(), [ragged(0, {"a": x})])[0].to_dict()["a"] == pytest.approx(300)


def test_a_topic_named_first_is_selected_on_a_stream() -> None:
    out = run(norm("p"), [frame(0, {"a": [3.0, 4.0]}, "p"), frame(0, {"a": [1.0, 1.0]}, "q")])
    assert [(f.topic, f.to_dict()) for f in out] == [("p.norm2", {"a": 5.0})]


def test_on_a_lens_reductions_are_pushed_down_and_equal_the_tensors_own() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    got: list[Frame] = []
    with observe(model, on_error="raise") as lens:
        for operator, _ in ORACLES.values():
            narrowed = lens.pipe(topic("weights"), operator)
            assert isinstance(narrowed, Lens)
            narrowed.subscribe(got.append)
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        weights = {n: p.detach() for n, p in model.named_parameters() if n.endswith("weight")}
        for name, (_, oracle) in ORACLES.items():
            wanted = {n.removesuffix(".weight"): oracle(as_array(w)) for n, w in weights.items()}
            (frame_of_it,) = [f for f in got if f.topic == f"weights.{name}"]
            assert frame_of_it.to_dict() == pytest.approx(wanted, rel=1e-5, abs=ABSOLUTE.get(name)), name


def test_stored_frames_give_what_the_run_gave(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(3)
    frame_of_run = ragged(4, {"a": torch.randn(5, 3, generator=draw), "b": torch.randn(7, generator=draw)})
    with RunWriter(tmp_path / "run.db", "a") as writer:
        writer.write([frame_of_run])
    with read_run(tmp_path / "run.db") as stored:
        for name, (operator, _) in ORACLES.items():
            (live,), (replayed,) = run(operator, [frame_of_run]), run(operator, stored.frames("x"))
            assert (replayed.topic, replayed.step) == (live.topic, 4)
            assert replayed.to_dict() == live.to_dict(), name


def test_what_is_reduced_already_is_reduced_again_as_frames() -> None:
    model = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out: list[Frame] = []
    with observe(model, on_error="raise") as lens:
        lens.pipe(norm("weights"), maximum()).subscribe(out.append)
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        assert out[0].topic == "weights.norm2.maximum"
        assert float(out[0][""]) == pytest.approx(float(model.weight.detach().norm()))


def test_a_function_of_ones_own_reduces_each_layer() -> None:
    def spread(tensor: Tensor) -> Tensor:
        return torch.stack([tensor.min(), tensor.max()])

    values = ragged(0, {"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([[2.0]])})
    (out,) = run(reduce(spread, name="spread", components=("low", "high")), [values])
    assert (out.topic, out.components) == ("x.spread", ("low", "high"))
    assert {k: v.tolist() for k, v in out.to_dict().items()} == {"a": [1.0, 5.0], "b": [2.0, 2.0]}


def test_a_layer_on_which_the_function_raises_is_left_out_and_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(default_runtime(), "on_error", "report")
    reported: list[str] = []
    subscription = default_runtime().errors.subscribe(lambda report: reported.append(report.where))

    def picky(tensor: Tensor) -> float:
        if tensor.numel() == 1:
            raise ArithmeticError("too few")
        return float(tensor.sum())

    values = ragged(0, {"a": torch.ones(1), "b": torch.ones(2)})
    (out,) = run(reduce(picky, name="picky"), [values])
    assert out.to_dict() == {"b": 2.0}
    assert reported == ["picky of layer 'a'"]
    subscription.dispose()


@pytest.mark.parametrize("order", [-1, math.nan, "2", True])
def test_an_order_that_is_no_number_from_zero_on_is_refused(order: float) -> None:
    with pytest.raises(ValueError, match=r"norm\(order="):
        norm(order=order)


@pytest.mark.parametrize(
    "operator",
    [
        absmax,
        kurtosis,
        maximum,
        mean,
        minimum,
        nonfinite,
        norm,
        rms,
        skewness,
        std,
        total,
        var,
        zero_fraction,
    ],
)
def test_a_first_argument_that_is_no_topic_is_refused(operator: Callable[[Any], Operator]) -> None:
    with pytest.raises(TypeError, match="is a topic such as 'weights', got 2"):
        operator(2)


def test_bad_functions_and_names_are_refused() -> None:
    with pytest.raises(TypeError, match="got 3"):
        reduce(3, name="x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="needs a name"):
        reduce(torch.sum, name="")


def test_the_source_must_be_a_stream() -> None:
    with pytest.raises(TypeError, match="an operator takes an Observable"):
        norm()([1, 2])  # type: ignore[arg-type]
    assert Subject().pipe(norm()) is not None

"""`dead_fraction` and `unit_saturation`, against loops over units."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reactivex.subject import Subject
from torch import Tensor, nn

import streamlens as sl
from streamlens.frame import Frame, Kind
from streamlens.operators._units import DeadFraction, UnitSaturation
from tests._runs import Recipe, same, train
from tests.helpers.recording import observed, record
from tests.operators.support import ragged, resumed, run


def dead_by_hand(outputs: Tensor, units: int) -> float:
    """Goes through every unit's outputs one by one."""
    dead = 0
    for u in range(outputs.shape[units]):
        dead += all(v == 0 for v in outputs.select(units, u).reshape(-1).tolist())
    return dead / outputs.shape[units]


def sparse(shape: tuple[int, ...], seed: int, share: float = 0.6) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(shape, generator=g) > share
    return torch.randn(shape, generator=g) * keep


def acts(step: int, values: dict[str, Tensor], **fields: Any) -> Frame:
    return ragged(step, values, "activations", kind=Kind.MICRO_STEP, **fields)


@pytest.mark.parametrize(
    ("shape", "units"),
    [((3, 7), 1), ((2, 6, 2, 2), 1), ((2, 3, 5), 2), ((2, 4, 1, 2, 2), 1), ((6,), 0)],
    ids=["dense", "image", "sequence", "volume", "one example"],
)
@given(seed=st.integers(0, 99))
def test_equals_a_loop_over_units(shape: tuple[int, ...], units: int, seed: int) -> None:
    outputs = sparse(shape, seed)
    (got,) = run(sl.dead_fraction(), [acts(0, {"a": outputs})])
    assert got.topic == "activations.dead_fraction"
    assert float(got["a"]) == pytest.approx(dead_by_hand(outputs, units))


def test_the_dimension_of_units_can_be_named() -> None:
    outputs = sparse((2, 5, 3), 4, 0.8)
    (got,) = run(sl.dead_fraction(unit_dim=1), [acts(0, {"a": outputs})])
    assert float(got["a"]) == pytest.approx(dead_by_hand(outputs, 1))
    assert float(got["a"]) != pytest.approx(dead_by_hand(outputs, 2))


def test_on_a_lens_it_is_pushed_down_and_equals_the_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(inplace=True), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wanted: list[float] = []
    handle = model[1].register_forward_hook(lambda *a: wanted.append(dead_by_hand(a[2].detach(), 1)))
    with observed(model) as lens:
        chain = lens.pipe(sl.layers(nn.ReLU), sl.dead_fraction())
        assert isinstance(chain, sl.Lens)
        got = record(lens, sl.layers(nn.ReLU), sl.dead_fraction())
        for _ in range(3):
            model(torch.randn(2, 4)).sum().backward()
            optimizer.step()
    handle.remove()
    assert [float(f["1"]) for f in got] == pytest.approx(wanted)
    assert any(wanted)


class Sequences(nn.Module):
    """Channels first, then features last, also in four dimensions: shapes alone tell these apart wrongly."""

    def __init__(self) -> None:
        super().__init__()
        conv, linear = nn.Conv1d(2, 6, 3), nn.Linear(6, 9)
        with torch.no_grad():
            for bias, dead in ((conv.bias, 2), (linear.bias, 5)):
                assert bias is not None
                bias.copy_(torch.where(torch.arange(len(bias)) < dead, -9.0, 1.0))
        self.first, self.then = nn.Sequential(conv, nn.ReLU()), nn.Sequential(linear, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.then(self.first(x).transpose(1, 2)[:, :, None, :])
        return out


def test_on_a_lens_units_are_those_of_the_modules_whatever_the_shape() -> None:
    torch.manual_seed(0)
    model = Sequences()
    wanted: list[float] = []
    model.get_submodule("first.1").register_forward_hook(
        lambda *a: wanted.append(dead_by_hand(a[2].detach(), 1))
    )
    model.get_submodule("then.1").register_forward_hook(
        lambda *a: wanted.append(dead_by_hand(a[2].detach(), 3))
    )
    with observed(model) as lens:
        got = record(lens, sl.layers(nn.ReLU), sl.dead_fraction())
        by_health = record(lens, sl.dead_units(share=0.3, start=(1, 1)))
        model(torch.randn(3, 2, 8)).sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
    (frame,) = got
    assert frame.layers == ("first.1", "then.1")
    assert [float(frame[name]) for name in frame.layers] == pytest.approx(wanted)
    assert wanted == pytest.approx([2 / 6, 5 / 9])
    assert [alert.layers for alert in by_health] == [("first.1", "then.1")]


def test_on_a_lens_a_dimension_that_is_named_holds_for_all() -> None:
    model = Sequences()
    with observed(model) as lens:
        (_, last) = (record(lens, sl.dead_fraction(unit_dim=d)) for d in (1, -1))
        outputs: list[Tensor] = []
        handle = model.get_submodule("first.1").register_forward_hook(
            lambda *a: outputs.append(a[2].detach())
        )
        model(torch.randn(1, 2, 8)).sum().backward()
    handle.remove()
    assert float(last[0]["first.1"]) == pytest.approx(dead_by_hand(outputs[0], 2))


def test_modules_say_nothing_of_other_topics() -> None:
    conv = nn.Conv1d(3, 4, 2)
    model = nn.Sequential(conv)
    with torch.no_grad():
        conv.weight[:, :, 0] = 0.0
    with observed(model) as lens:
        (got,) = (record(lens, sl.dead_fraction("weights")),)
        model(torch.randn(2, 3, 5)).sum().backward()
        torch.optim.SGD(model.parameters(), 0.0).step()
    assert float(got[0]["0"]) == 0.5


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.complex64, torch.float64])
def test_outputs_of_any_type_have_units(dtype: torch.dtype) -> None:
    outputs = torch.tensor([[0, 1, 0], [0, 0, 1]]).to(dtype)
    (got,) = run(sl.dead_fraction(), [acts(0, {"a": outputs})])
    assert float(got["a"]) == pytest.approx(1 / 3)


def test_edge_shapes_and_nan() -> None:
    values = {
        "none": torch.zeros(0, 3),
        "number": torch.tensor(0.0),
        "nan": torch.tensor([[math.nan, 0.0]]),
        "half": torch.zeros(2, 2, dtype=torch.float16),
        "whole": torch.tensor([[0, 1]]),
    }
    (got,) = run(sl.dead_fraction(), [acts(0, values)])
    assert math.isnan(float(got["none"]))
    assert [float(got[n]) for n in ("number", "nan", "half", "whole")] == [1, 0.5, 1, 0.5]


def test_equal_reductions_are_equal() -> None:
    assert DeadFraction() == DeadFraction(None) != DeadFraction(1)
    assert hash(DeadFraction(1)) == hash(DeadFraction(1))


# -- over a window ---------------------------------------------------------------------------


@given(st.integers(1, 4), st.lists(st.integers(0, 99), min_size=4, max_size=9))
def test_over_a_window_a_unit_is_dead_only_if_it_is_throughout(size: int, seeds: list[int]) -> None:
    outputs = [sparse((2, 6), seed, 0.7) for seed in seeds]
    frames = [acts(k, {"a": value}) for k, value in enumerate(outputs)]
    got = run(sl.dead_fraction(window=size), frames)
    full = range(0, len(outputs) - size + 1, size)
    wanted = [dead_by_hand(torch.cat(outputs[k : k + size]), 1) for k in full]
    assert [float(f["a"]) for f in got] == pytest.approx(wanted)
    assert [f.step for f in got] == [k + size - 1 for k in full]
    assert {f.topic for f in got} == {f"activations.dead_fraction.window{size}"}


def test_on_a_lens_a_window_ends_with_its_last_update_and_has_every_micro_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs: list[Tensor] = []
    handle = model[1].register_forward_hook(lambda *a: outputs.append(a[2].detach().clone()))
    after: list[int] = []
    with observed(model) as lens:
        got = record(lens, sl.layers(nn.ReLU), sl.dead_fraction(window=2))
        for _ in range(5):
            for _ in range(2):
                model(torch.randn(1, 4)).sum().backward()
            optimizer.step()
            after.append(len(got))
    handle.remove()
    assert after == [0, 1, 1, 2, 2]
    wanted = [dead_by_hand(torch.cat(outputs[k : k + 4]), 1) for k in (0, 4)]
    assert [float(f["1"]) for f in got] == pytest.approx(wanted)
    assert [f.step for f in got] == [1, 3]


def test_a_window_that_was_joined_late_is_not_given() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        lens.pipe(sl.norm("weights")).subscribe(lambda _: None)
        got: list[Frame] = []
        for k in range(9):
            if k == 4:
                got = record(lens, sl.dead_fraction(window=3))
            model(torch.randn(2, 4)).sum().backward()
            optimizer.step()
    assert [f.step for f in got] == [8]


def test_every_takes_some_steps_of_a_window_and_then_counts_windows() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with observed(model) as lens:
        thinned = record(lens, sl.every(3), sl.dead_fraction(window=4))
        second = record(lens, sl.dead_fraction(window=2), sl.every(2))
        for _ in range(8):
            model(torch.randn(2, 4)).sum().backward()
            optimizer.step()
    assert [f.step for f in thinned] == [3, 7]
    assert [f.step for f in second] == [1, 5]


def test_late_frames_are_dropped_and_other_shapes_left_out() -> None:
    frames = [
        acts(0, {"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}),
        acts(3, {"a": torch.ones(1, 2), "b": torch.zeros(1, 3)}),
        acts(1, {"a": torch.ones(1, 2)}),
    ]
    got = run(sl.dead_fraction(window=2), [*frames, acts(4, {"a": torch.zeros(1, 2)})])
    assert [(f.step, f.to_dict()) for f in got] == [(1, {"a": 1.0, "b": 1.0}), (3, {"a": 0.0, "b": 1.0})]


def test_a_layer_whose_units_change_is_reported_and_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    source: Subject[Frame] = Subject()
    stream = sl.dead_fraction(window=2)(source)
    assert isinstance(stream, sl.Stream)
    reports: list[Any] = []
    monkeypatch.setattr(stream.runtime, "on_error", "report")
    stream.runtime.errors.subscribe(reports.append)
    got: list[Frame] = []
    stream.subscribe(got.append)
    source.on_next(acts(0, {"a": torch.zeros(1, 2), "b": torch.zeros(1, 2)}))
    source.on_next(acts(1, {"a": torch.zeros(1, 3), "b": torch.zeros(1, 2)}))
    source.on_completed()
    assert [f.to_dict() for f in got] == [{"b": 1.0}]
    assert "had 2 units before, and 3 now: pass unit_dim=" in str(reports[0].error)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_resumed_window_remembers_who_was_alive(at: int) -> None:
    frames = [acts(k, {"a": sparse((1, 8), k, 0.8)}) for k in range(4)]
    wanted = [f.to_dict() for f in run(sl.dead_fraction(window=4), frames)]
    got = resumed(lambda: sl.dead_fraction(window=4), frames, at)
    assert [f.to_dict() for f in got] == wanted
    assert len(wanted) == 1


def test_numbers_are_refused_with_the_remedy() -> None:
    model = nn.Linear(2, 2)
    with sl.observe(model) as lens, pytest.raises(sl.StreamlensError, match=r"needs whole tensors.*while"):
        lens.pipe(sl.norm("activations"), sl.dead_fraction(None, window=2))
    source: Subject[Frame] = Subject()
    source.pipe(sl.dead_fraction(window=2)).subscribe(lambda _: None)
    with pytest.raises(sl.StreamlensError, match="needs whole tensors"):
        source.on_next(Frame("activations", 0, ("a",), torch.ones(1)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 0}, ValueError, r"dead_fraction\(window=0\)"),
        ({"window": 2.0}, ValueError, r"window=2.0"),
        ({"unit_dim": 0}, ValueError, r"unit_dim=0.*dimension 0 counts the examples"),
        ({"topic": 3}, TypeError, "topic"),
        ({"topic": 3, "window": 2}, TypeError, "topic"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sl.dead_fraction(**options)(Subject())


# -- bounded units ---------------------------------------------------------------------------


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=30), st.sampled_from([0.0, 0.01, 0.2]))
def test_saturated_outputs_equal_a_count(values: list[float], margin: float) -> None:
    (got,) = run(sl.unit_saturation(lower=-1, upper=2, margin=margin), [acts(0, {"a": torch.tensor(values)})])
    low, high = torch.tensor([-1 + 3 * margin, 2 - 3 * margin]).tolist()
    wanted = sum(v <= low or v >= high for v in values) / len(values)
    assert got.topic == "activations.unit_saturation"
    assert float(got["a"]) == pytest.approx(wanted, abs=1e-6)


@given(st.integers(0, 99), st.sampled_from([2.0, 10.0]))
def test_saturation_is_that_of_the_scaled_range(seed: int, c: float) -> None:
    x = torch.rand(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (once,) = run(sl.unit_saturation(lower=0, upper=1, margin=0.1), [acts(0, {"a": x})])
    (scaled,) = run(sl.unit_saturation(lower=0, upper=c, margin=0.1), [acts(0, {"a": c * x})])
    assert float(once["a"]) == float(scaled["a"])


def test_on_a_lens_each_bounded_module_has_its_own_ends() -> None:
    torch.manual_seed(0)
    kinds = {"sig": nn.Sigmoid(), "tan": nn.Tanh(), "soft": nn.Softsign(), "hard": nn.Hardtanh(-2, 0.5)}
    model = nn.Sequential()
    for name, kind in kinds.items():
        model.add_module(f"{name}_in", nn.Linear(6, 6))
        model.add_module(name, kind)
    model.add_module("relu6", nn.ReLU6())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10)
    ends = {"sig": (0, 1), "tan": (-1, 1), "soft": (-1, 1), "hard": (-2, 0.5)}
    outputs: dict[str, Tensor] = {}
    for name in kinds:
        model.get_submodule(name).register_forward_hook(
            lambda m, i, o, name=name: outputs.__setitem__(name, o.detach().clone())
        )
    with observed(model) as lens:
        got, some = record(lens, sl.unit_saturation()), record(lens, sl.layers("tan"), sl.unit_saturation())
        model(torch.randn(9, 6)).sum().backward()
    found = {name: float(v) for f in got for name, v in f.items()}
    for name, (low, high) in ends.items():
        near = 0.01 * (high - low)
        out = outputs[name].double()
        wanted = ((out <= low + near) | (out >= high - near)).double().mean()
        assert found[name] == pytest.approx(float(wanted)), name
    assert set(found) == set(ends)
    assert [f.layers for f in some] == [("tan",)]
    assert found["tan"] > 0


def test_what_has_no_bounded_module_says_what_to_pass() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with sl.observe(model) as lens, pytest.raises(sl.LayerNotFoundError, match=r"no bounded module.*lower="):
        lens.pipe(sl.unit_saturation())
    with pytest.raises(sl.StreamlensError, match=r"no model to ask: pass lower= and upper="):
        sl.unit_saturation()(Subject())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lower": 0}, "both ends"),
        ({"lower": 1, "upper": 1}, "the range is empty"),
        ({"margin": 0.5}, "margin=0.5"),
        ({"lower": math.nan, "upper": 1}, "lower=nan"),
        ({"lower": 0, "upper": "x"}, "upper='x'"),
    ],
)
def test_bad_ranges_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sl.unit_saturation(**options)


def test_nan_is_not_saturated_and_nothing_is_nan() -> None:
    values = {"a": torch.tensor([math.nan, 1.0]), "none": torch.empty(0)}
    (got,) = run(sl.unit_saturation(lower=0, upper=1), [acts(0, values)])
    assert float(got["a"]) == 0.5
    assert math.isnan(float(got["none"]))


def test_training_is_bit_identical() -> None:
    recipe = Recipe("convolutions", "adam", accumulation=2, steps=4)

    @contextlib.contextmanager
    def observing(model: nn.Module, criterion: nn.Module) -> Iterator[None]:
        with sl.observe(model, loss=criterion) as lens:
            got = record(lens, sl.dead_fraction(window=2))
            lens.pipe(sl.unit_saturation(lower=0, upper=1)).subscribe(lambda _: None)
            lens.pipe(sl.saturation(window=2)).subscribe(lambda _: None)
            yield
        assert len(got) == 2

    assert same(train(recipe), train(recipe, observing))


def test_units_of_sparse_tensors_count_their_zeros() -> None:
    sparse = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 1.0]]).to_sparse()
    assert DeadFraction().reduce([sparse]).item() == pytest.approx(1 / 3)
    assert UnitSaturation(0.0, 2.0).reduce([sparse]).item() == pytest.approx(5 / 6)

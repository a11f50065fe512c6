"""RatioLR against hand-written loops, and its laws on a model problem."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from reactivex.subject import Subject
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import streamlens as sl
from streamlens import control
from streamlens.control import RatioLR, _attachment
from streamlens.frame import Frame
from tests._runs import small_model, steps_of


def ratios_by_hand(model: nn.Module, before: dict[str, Tensor]) -> list[float]:
    """|W_k - W_{k-1}| / |W_k| of each weight matrix."""
    pairs = [(before[n], p.detach()) for n, p in model.named_parameters() if n.endswith("weight")]
    return [float((after - old).norm() / after.norm()) for old, after in pairs]


def sgd(model: nn.Module, lr: float = 0.05) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


@pytest.mark.parametrize("mode", ["base", "current"])
@pytest.mark.parametrize("sizes", [None, (20, 15)])
def test_it_does_what_a_loop_written_by_hand_does(mode: Any, sizes: tuple[int, int] | None) -> None:
    gamma, target, base = 0.6, 2e-2, 0.05
    model, rate = small_model(), base
    optimizer = sgd(model)
    mean: float | None = 0.0 if mode == "base" else None
    expected = []
    for seed in range(12):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        list(steps_of(model, optimizer, 1, seed=seed))
        ratios = ratios_by_hand(model, before)
        weights = sizes or (1, 1)
        new = sum(w * r for w, r in zip(weights, ratios, strict=True)) / sum(weights)
        mean = new if mean is None else gamma * new + (1 - gamma) * mean
        rate = (base if mode == "base" else rate) * min(target / mean, 500.0)
        optimizer.param_groups[0]["lr"] = rate
        expected.append(rate)

    watched = small_model()
    optimizer = sgd(watched)
    with sl.observe(watched, on_error="raise") as lens:
        controller = RatioLR(
            target=target,
            smoothing=gamma,
            mode=mode,
            layer_weights="equal" if sizes is None else "parameters",
        )
        lens.pipe(sl.uw_ratio()).subscribe(controller)
        rates = []
        for seed in range(12):
            list(steps_of(watched, optimizer, 1, seed=seed))
            rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx(expected, rel=1e-4)


def test_groups_keep_their_proportion_and_bounds_hold() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.01}], lr=1.0
    )
    with sl.observe(model, on_error="raise") as lens:
        lens.pipe(sl.uw_ratio()).subscribe(RatioLR(target=1e-2, max_lr=0.2))
        list(steps_of(model, optimizer, 1))
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert first == pytest.approx(10 * second)
        lens.pipe(sl.topic("learning_rate.action")).subscribe(lambda f: seen.append(f))
        seen: list[Frame] = []
        list(steps_of(model, optimizer, 1, seed=1))
        assert seen[0].components == ("group 0", "group 1")
        assert seen[0].values.tolist() == [[g["lr"] for g in optimizer.param_groups]]  # type: ignore[union-attr]


def test_a_rate_that_is_a_tensor_is_set_in_place() -> None:
    model = small_model()
    rate = torch.tensor(0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with sl.observe(model, on_error="raise") as lens:
        lens.pipe(sl.uw_ratio()).subscribe(RatioLR(mode="current"))
        list(steps_of(model, optimizer, 3))
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) != pytest.approx(0.05)


# -- LambdaLR --------------------------------------------------------------------------------


def test_for_lambda_lr_a_call_gives_the_factor_of_the_listing() -> None:
    controller = RatioLR(target=1e-2, smoothing=0.9)
    assert controller(0) == 1.0
    source: Subject[Frame] = Subject()
    source.subscribe(controller)
    mean = 0.0
    for step, ratio in enumerate([0.0, 4e-2, 1e-6, 5e-2]):
        source.on_next(Frame("uw_ratio", step, ("a", "b"), torch.tensor([ratio, 3 * ratio])))
        mean = 0.9 * 2 * ratio + 0.1 * mean
        assert controller(step) == pytest.approx(1.0 if mean <= 1e-9 else min(1e-2 / mean, 500.0), rel=1e-5)
    tiny = RatioLR(target=1.0)
    tiny(0)
    source.subscribe(tiny)
    source.on_next(Frame("uw_ratio", 0, ("a",), torch.tensor([1e-5])))
    assert tiny(0) == 500.0


def test_lambda_lr_and_its_state_work_and_the_controller_sets_nothing_itself() -> None:
    def run(interrupted: bool) -> list[float]:
        rates: list[float] = []
        saved: Any = None
        for part in [range(6)] if not interrupted else [range(3), range(3, 6)]:
            model = small_model()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            controller = RatioLR(target=1e-2)
            scheduler = LambdaLR(optimizer, controller)
            lens = sl.observe(model, on_error="raise")
            lens.pipe(sl.uw_ratio()).subscribe(controller)
            if saved:
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                scheduler.load_state_dict(saved[2])
            for seed in part:
                list(steps_of(model, optimizer, 1, seed=seed))
                unset = optimizer.param_groups[0]["lr"]
                assert not rates or unset == rates[-1]
                scheduler.step()
                rates.append(optimizer.param_groups[0]["lr"])
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
            lens.close()
        plain(saved[2]["lr_lambdas"])
        return rates

    def plain(value: Any) -> None:
        assert type(value) in {dict, list, str, int, float, bool, type(None)}, type(value)
        for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            plain(entry)

    expected = run(interrupted=False)
    assert len(set(expected)) == 6
    assert run(interrupted=True) == expected


@pytest.mark.parametrize("options", [{"mode": "current"}, {"per_layer": True}])
def test_only_the_law_of_the_listing_is_callable(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="serves LambdaLR"):
        RatioLR(**options)(0)


# -- the model problem: a ratio that is proportional to the rate ---------------------------------

TARGET = 1e-3


def model_problem(
    base: float, ideal: float, steps: int, *, lag: int = 0, **options: Any
) -> tuple[list[float], RatioLR]:
    """The rates over steps where the ratio is target * lr / ideal."""
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=base)
    controller = RatioLR(optimizer, target=TARGET, **options)
    source: Subject[Frame] = Subject()
    source.subscribe(controller)
    rates = [base]
    for step in range(steps):
        ratio = torch.tensor([TARGET * optimizer.param_groups[0]["lr"] / ideal], dtype=torch.float64)
        source.on_next(Frame("uw_ratio", step, ("a",), ratio))
        rates.append(optimizer.param_groups[0]["lr"])
    source.on_completed()
    return rates, controller


@pytest.mark.parametrize(("base", "ideal"), [(1.0, 0.01), (0.1, 0.01), (0.01, 0.01), (1e-4, 0.01)])
def test_base_settles_at_the_geometric_mean_of_base_and_ideal(base: float, ideal: float) -> None:
    rates, _ = model_problem(base, ideal, 200)
    assert rates[-1] == pytest.approx(math.sqrt(base * ideal), rel=1e-6)


def test_with_base_rates_ten_apart_end_about_three_apart_and_the_target_is_missed() -> None:
    (*_, high), _ = model_problem(0.1, 1e-3, 200)
    (*_, low), _ = model_problem(0.01, 1e-3, 200)
    assert high / low == pytest.approx(math.sqrt(10), rel=1e-6)
    assert min(high, low) / 1e-3 > 3


@pytest.mark.parametrize("base", [1.0, 1e-2, 1e-4])
def test_current_reaches_the_target_from_any_base_rate(base: float) -> None:
    rates, _ = model_problem(base, 0.01, 200, mode="current")
    assert rates[-1] == pytest.approx(0.01, rel=1e-6)


@pytest.mark.parametrize("lag", [False, True])
@pytest.mark.parametrize("smoothing", [1.0, 0.9, 0.5])
@pytest.mark.parametrize(("share", "settles"), [(0.93, True), (1.07, False)])
def test_current_is_stable_up_to_the_edge_that_its_docstring_states_and_no_further(
    smoothing: float, share: float, settles: bool, lag: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_attachment, "lagging", lambda frame: lag)
    gain = share * 2 * (2 - smoothing) / smoothing
    rates, _ = model_problem(0.01 * 1.0001, 0.01, 400, mode="current", smoothing=smoothing, gain=gain)
    deviation = max(abs(math.log(rate / 0.01)) for rate in rates[-20:])
    assert deviation < 2e-6 if settles else deviation > 1e-2


@pytest.mark.parametrize(("smoothing", "settles"), [(0.05, True), (0.9, True), (0.98, True), (1.0, False)])
def test_base_is_stable_for_any_smoothing_below_one(smoothing: float, settles: bool) -> None:
    rates, _ = model_problem(0.0101, 0.01, 400, smoothing=smoothing)
    rest = math.sqrt(0.0101 * 0.01)
    deviation = max(abs(math.log(rate / rest)) for rate in rates[-20:])
    assert deviation < 1e-5 if settles else deviation > 1e-3


def test_base_deviates_by_one_minus_two_gamma_times_as_much_a_step() -> None:
    rates, _ = model_problem(0.01 * 1.0002, 0.01, 20, smoothing=0.8)
    rest = math.sqrt(0.01 * 1.0002 * 0.01)
    off = [math.log(rate / rest) for rate in rates]
    assert off[12] / off[11] == pytest.approx(1 - 2 * 0.8, rel=1e-3)


def test_the_target_may_follow_a_schedule() -> None:
    schedule = control.ExponentialDecay(1e-2, 0.9)
    a, _ = RatioLR(target=schedule), RatioLR(target=control.Constant(1.0))
    b = RatioLR(target=1e-2, schedule=control.ExponentialDecay(1.0, 0.9))
    assert a.target_at(5) == pytest.approx(1e-2 * 0.9**5)
    assert b.target_at(5) == pytest.approx(1e-2 * 0.9**5)
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    controller = RatioLR(optimizer, target=schedule, mode="current", smoothing=1.0)
    source: Subject[Frame] = Subject()
    source.subscribe(controller)
    for step in range(6):
        rate = optimizer.param_groups[0]["lr"]
        source.on_next(Frame("uw_ratio", step, ("a",), torch.tensor([0.1 * rate], dtype=torch.float64)))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.9**5 / 0.1)


# -- per layer -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["base", "current"])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
    ],
)
def test_per_layer_scales_each_layers_own_step_as_a_loop_by_hand_does(make: Any, mode: Any) -> None:
    target = 5e-3
    model = small_model()
    optimizer = make(model.parameters())
    scales: dict[str, float] = {}
    for seed in range(6):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        list(steps_of(model, optimizer, 1, seed=seed))
        ratios = ratios_by_hand(model, before)
        scales = {layer: target / r for layer, r in zip(("0", "2"), ratios, strict=True)}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                step = parameter - before[name]
                parameter.copy_(before[name] + scales[name[0]] * step)

    watched = small_model()
    other = make(watched.parameters())
    with sl.observe(watched, on_error="raise") as lens:
        seen: list[Frame] = []
        controller = RatioLR(target=target, smoothing=1.0, mode=mode, per_layer=True)
        lens.pipe(sl.uw_ratio()).subscribe(controller)
        lens.pipe(sl.topic("step_scale.action")).subscribe(seen.append)
        rates = [group["lr"] for group in other.param_groups]
        for seed in range(6):
            before = {n: p.detach().clone() for n, p in watched.named_parameters()}
            list(steps_of(watched, other, 1, seed=seed))
            assert ratios_by_hand(watched, before) == pytest.approx([target] * 2, rel=0.25)
        assert [group["lr"] for group in other.param_groups] == rates
    for mine, theirs in zip(watched.parameters(), model.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)
    assert seen[-1].to_dict() == pytest.approx(scales, rel=1e-3)


@pytest.mark.parametrize("inner", [1, 3])
def test_curvature_pairs_of_lbfgs_are_those_of_the_steps_as_they_were_scaled(inner: int) -> None:
    model = small_model().double()
    model.register_parameter("turn", nn.Parameter(torch.tensor([1.0 + 0.5j], dtype=torch.complex128)))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=inner, max_eval=20)
    data = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=data, dtype=torch.float64)
    y = torch.randint(0, 3, (32,), generator=data)
    points: list[Tensor] = []
    slopes: list[Tensor] = []

    def flat(tensors: Any) -> Tensor:
        real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
        return torch.cat([t.detach().reshape(-1) for t in real]).clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y) + model.get_parameter("turn").abs().square().sum()
        loss.backward()
        points.append(flat(model.parameters()))
        slopes.append(flat(p.grad for p in model.parameters()))
        return loss

    with sl.observe(model, on_error="raise") as lens:
        controller = RatioLR(target=5e-3, smoothing=1.0, per_layer=True)
        lens.pipe(sl.uw_ratio()).subscribe(controller)
        scales: list[float] = []
        lens.pipe(sl.topic("step_scale.action")).subscribe(lambda frame: scales.extend(frame.values.tolist()))
        for _ in range(6):
            optimizer.step(closure)
    assert max(abs(scale - 1) for scale in scales) > 0.5
    state = next(iter(optimizer.state.values()))
    moved = [b - a for a, b in pairwise(points)]
    turned = [b - a for a, b in pairwise(slopes)]
    pairs = list(zip(state["old_stps"], state["old_dirs"], strict=True))
    kept = [(s, y) for s, y in zip(moved, turned, strict=True) if float(s @ y) > 1e-10]
    assert len(pairs) == len(kept) > 3
    for (step, change), (s, y) in zip(pairs, kept, strict=True):
        assert torch.allclose(step, s, rtol=1e-6, atol=1e-12)
        assert torch.allclose(change, y, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("mode", ["base", "current"])
def test_per_layer_brings_the_loss_down_with_lbfgs_too(mode: Any) -> None:
    model = small_model()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe")
    data = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 4, generator=data), torch.randint(0, 3, (64,), generator=data)
    losses: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    with sl.observe(model, on_error="raise") as lens:
        lens.pipe(sl.uw_ratio()).subscribe(RatioLR(target=2e-2, mode=mode, smoothing=1.0, per_layer=True))
        losses.extend(float(optimizer.step(closure).detach()) for _ in range(40))
    assert all(after < before + 0.02 for before, after in pairwise(losses))
    assert losses[-1] < 0.75 * losses[0]


# -- what it refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "bas"}, "did you mean 'base'"),
        ({"layer_weights": "size"}, "'equal' or 'parameters'"),
        ({"target": 0.0}, r"target=0.0\): it is a finite number above 0"),
        ({"smoothing": 1.5}, "lies in"),
        ({"gain": 0.5}, 'pass mode="current"'),
        ({"mode": "current", "gain": -1.0}, "gain=-1.0"),
        ({"max_factor": 1.0}, "greatest factor is above 1"),
        ({"min_lr": 1.0, "max_lr": 0.5}, "must lie below"),
        ({"per_layer": True, "max_lr": 1.0}, "scales steps and no rate"),
        ({"slew_limit": 0.5}, "slew limit is a factor above 1"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RatioLR(**options)


def test_what_it_lacks_is_said_when_it_is_subscribed() -> None:
    source: sl.Stream = sl.stream.as_stream(Subject())
    with pytest.raises(sl.StreamlensError, match=r"RatioLR\(per_layer=True\) needs the model"):
        source.subscribe(RatioLR(per_layer=True))
    with pytest.raises(sl.StreamlensError, match=r'layer_weights="parameters"\) needs the model'):
        source.subscribe(RatioLR(layer_weights="parameters"))
    with pytest.raises(sl.StreamlensError, match=r"pass SetRate\(optimizer=...\)"):
        source.subscribe(control.SetRate())
    with pytest.raises(TypeError, match=r"takes an optimizer of torch\.optim"):
        RatioLR(1e-3)  # type: ignore[arg-type]


def test_frames_with_more_than_a_number_a_layer_are_reported() -> None:
    model = small_model()
    with sl.observe(model) as lens:
        reports: list[str] = []
        lens.errors.subscribe(lambda report: reports.append(str(report)))
        lens.pipe(sl.topic("weights")).subscribe(RatioLR())
        list(steps_of(model, sgd(model), 1))
    assert "takes one number a layer, such as uw_ratio() gives, and 'weights' has more" in reports[0]

"""FixedRatio against a search by hand, and what it cannot do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import streamlens as sl
from streamlens.control import ClipAt, ExponentialDecay, FixedRatio, RatioLR
from streamlens.frame import Frame
from tests._runs import small_model, steps_of


def searched(weight: Tensor, step: Tensor, target: float) -> float:
    """The scale of a step for which its norm is the target's share of the new weight's, by bisection."""
    weight, step = weight.double(), step.double()
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        ratio = float((middle * step).norm() / (weight - middle * step).norm())
        low, high = (middle, high) if ratio < target else (low, middle)
    return low


def by_hand(model: nn.Module, lr: float, target: Callable[[int], float], seeds: range) -> None:
    """Plain SGD whose gradients are scaled a layer, the bias like its weight."""
    for k, seed in enumerate(seeds):
        data = torch.Generator().manual_seed(seed)
        model.zero_grad()
        x, y = torch.randn(6, 4, generator=data), torch.randint(0, 3, (6,), generator=data)
        nn.functional.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for layer in (model[0], model[2]):  # type: ignore[index]
                scale = searched(layer.weight, lr * layer.weight.grad, target(k))
                for parameter in (layer.weight, layer.bias):
                    parameter -= lr * scale * parameter.grad


@pytest.mark.parametrize("target", [1e-3, 0.3, ExponentialDecay(0.1, 0.5)])
@pytest.mark.parametrize("lr", [1e-4, 3.0])
def test_it_does_what_a_search_by_hand_does(lr: float, target: Any) -> None:
    alone, watched = small_model(), small_model()
    at = target if callable(target) else lambda step: target
    by_hand(alone, lr, at, range(5))
    optimizer = SGD(watched.parameters(), lr=lr)
    with sl.observe(watched, on_error="raise") as lens:
        lens.pipe(sl.uw_ratio()).subscribe(FixedRatio(target))
        for seed in range(5):
            list(steps_of(watched, optimizer, 1, seed=seed))
    for a, b in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(lr=st.floats(1e-5, 1e3), target=st.floats(1e-3, 0.9), of=st.sampled_from(["weights", "parameters"]))
def test_every_layer_meets_the_target_whatever_the_rate_is(lr: float, target: float, of: Any) -> None:
    model = small_model()
    optimizer = SGD(model.parameters(), lr=lr, maximize=target > 0.5)
    ratios: list[float] = []
    with sl.observe(model, on_error="raise") as lens:
        lens.pipe(sl.uw_ratio(of=of)).subscribe(lambda frame: ratios.extend(frame.values.tolist()))
        lens.pipe(sl.uw_ratio()).subscribe(FixedRatio(target, of=of))
        list(steps_of(model, optimizer, 2))
    assert len(ratios) == (4 if of == "weights" else 8)
    assert ratios == pytest.approx([target] * len(ratios), rel=2e-3)


def test_every_scale_is_announced_with_its_cause() -> None:
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    actions: list[Frame] = []
    plain: dict[str, float] = {}
    with sl.observe(model, on_error="raise") as lens:
        lens.pipe(sl.ratio("weight_gradients", "weights")).subscribe(lambda f: plain.update(f.to_dict()))
        lens.pipe(sl.uw_ratio()).subscribe(FixedRatio(1e-2))
        lens.pipe(sl.topic("gradient_scale.action")).subscribe(actions.append)
        list(steps_of(model, optimizer, 3))
    assert [(f.step, f.layers) for f in actions] == [(k, ("0", "2")) for k in range(3)]
    assert actions[0].meta["old"] == (1.0, 1.0)
    assert actions[1].meta["old"] == actions[0].meta["new"] == tuple(actions[0].values.tolist())  # type: ignore[union-attr]
    assert actions[0].meta["cause"].endswith(", and 0.01 is the target")
    assert actions[0].meta["text"].startswith("FixedRatio set gradient_scale from 1 to ")


def test_what_is_zero_is_left_as_it_is_and_the_rest_meets_the_target() -> None:
    model = small_model()
    nn.init.zeros_(model.get_parameter("2.weight"))
    optimizer = SGD(model.parameters(), lr=0.1)
    scales: list[list[float]] = []
    ratios: list[dict[str, Any]] = []
    with sl.observe(model, on_error="raise") as lens:
        controller = FixedRatio(1e-2)
        lens.pipe(sl.uw_ratio()).subscribe(lambda frame: ratios.append(frame.to_dict()))
        lens.pipe(sl.uw_ratio()).subscribe(controller)
        now = controller.scales_now
        scales.extend([float(s) for s in now.values()] for _ in steps_of(model, optimizer, 2))
    # No gradient reaches the first layer, and the second one has no weights, at first.
    assert scales[0] == [1.0, 1.0]
    assert 1.0 not in scales[1]
    assert ratios[1] == pytest.approx({"0": 1e-2, "2": 1e-2}, rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_with_a_gradient_that_is_not_finite_all_scales_stay_as_they_were(bad: float) -> None:
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.0)
    optimizer.param_groups[0]["lr"] = 0.1
    scales: list[list[float]] = []
    with sl.observe(model, on_error="raise") as lens:
        controller = FixedRatio(1e-2)
        lens.pipe(sl.norm("weight_gradients")).subscribe(controller)
        for k in range(3):
            data = torch.Generator().manual_seed(k)
            optimizer.zero_grad()
            model(torch.randn(3, 4, generator=data)).square().sum().backward()
            kept = {n: p.detach().clone() for n, p in model.named_parameters()}
            if k == 1:
                model.get_parameter("0.weight").grad[0, 0] = bad  # type: ignore[index]
            optimizer.step()
            scales.append([float(s) for s in controller.scales_now.values()])
            if k == 1:
                model.load_state_dict(kept)
        assert controller.held == 1
    assert scales[1] == scales[0]
    assert scales[2] != scales[1]


def test_a_layer_without_the_gradient_that_it_had_holds_the_others() -> None:
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    with sl.observe(model, on_error="raise") as lens:
        controller = FixedRatio(1e-2)
        lens.pipe(sl.norm("weight_gradients")).subscribe(controller)
        list(steps_of(model, optimizer, 1))
        before = {k: float(v) for k, v in controller.scales_now.items()}
        optimizer.zero_grad()
        model(torch.ones(1, 4)).sum().backward()
        model[0].weight.grad = None
        optimizer.step()
        assert controller.held == 1
        assert {k: float(v) for k, v in controller.scales_now.items()} == before


@settings(max_examples=15, deadline=None)
@given(factors=st.lists(st.sampled_from([1e-8, 1e-3, 1.0, 1e3, math.nan, math.inf, 0.0]), max_size=8))
def test_scales_keep_their_bounds_and_their_slew_under_any_gradients(factors: list[float]) -> None:
    model = nn.Linear(3, 2, bias=False)
    optimizer = SGD(model.parameters(), lr=1.0)
    torch.manual_seed(0)
    with sl.observe(model, on_error="raise") as lens:
        controller = FixedRatio(1e-2, min_scale=1e-2, max_scale=30.0, slew_limit=4.0)
        lens.pipe(sl.norm("weight_gradients")).subscribe(controller)
        before = 1.0
        for factor in factors:
            optimizer.zero_grad()
            kept = model.weight.detach().clone()
            (model(torch.ones(1, 3)).sum() * factor).backward()
            optimizer.step()
            with torch.no_grad():
                model.weight.copy_(kept)
            now = float(controller.scales_now[""])
            assert 1e-2 <= now <= 30.0
            assert before / 4 * (1 - 1e-9) <= now <= before * 4 * (1 + 1e-9)
            if not math.isfinite(factor):
                assert now == before
            before = now


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3, sparse=True)
        self.head = nn.Linear(3, 2, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(x).mean(1).bfloat16())
        return out


def test_sparse_gradients_and_half_precision_meet_the_target() -> None:
    torch.manual_seed(0)
    model = Embedded()
    optimizer = SGD(model.parameters(), lr=0.1)
    ratios: list[dict[str, float]] = []
    with sl.observe(model, on_error="raise") as lens:
        lens.pipe(sl.uw_ratio()).subscribe(lambda frame: ratios.append(frame.to_dict()))
        lens.pipe(sl.uw_ratio()).subscribe(FixedRatio(0.25))
        model(torch.tensor([[1, 1, 3]])).square().sum().backward()
        optimizer.step()
    assert ratios[0]["embed"] == pytest.approx(0.25, rel=1e-3)
    # A number of bfloat16 has three digits.
    assert ratios[0]["head"] == pytest.approx(0.25, rel=2e-2)


def test_a_rate_that_is_a_tensor_and_a_fused_optimizer_under_a_grad_scaler_meet_the_target() -> None:
    model = small_model()
    optimizer = SGD(model.parameters(), lr=torch.tensor(0.5), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9)
    ratios: list[float] = []
    with sl.observe(model, on_error="raise") as lens:
        lens.pipe(sl.uw_ratio()).subscribe(lambda frame: ratios.extend(frame.values.tolist()))
        lens.pipe(sl.uw_ratio()).subscribe(FixedRatio(0.05))
        scaler.scale(model(torch.ones(2, 4)).square().sum()).backward()
        scaler.step(optimizer)
    assert ratios == pytest.approx([0.05, 0.05], rel=1e-3)


OTHERS: list[tuple[Callable[[Any], Optimizer], str]] = [
    (lambda ps: SGD(ps, lr=0.1, momentum=0.9), r"this one has momentum=0\.9"),
    (lambda ps: SGD(ps, lr=0.1, weight_decay=0.1), r"this one has weight_decay=0\.1"),
    (lambda ps: SGD(ps, lr=0.1, momentum=0.5, nesterov=True), "momentum=0.5, nesterov=True"),
    (lambda ps: torch.optim.Adam(ps, lr=0.1), "Adam is none"),
    (lambda ps: Doubled(ps, lr=0.1), "Doubled is none"),
]


class Doubled(SGD):
    """Not plain any more."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return super().step(closure)


@pytest.mark.parametrize(("make", "complaint"), OTHERS)
def test_any_other_optimizer_is_an_error_that_names_the_way_out(
    make: Callable[[Any], Optimizer], complaint: str
) -> None:
    way_out = rf"{complaint}: RatioLR\(per_layer=True\) scales the steps of any optimizer"
    model = small_model()
    optimizer = make(model.parameters())
    with pytest.raises(ValueError, match=way_out):
        FixedRatio(optimizer=optimizer)
    with (
        sl.observe(model, optimizers=[optimizer], start=0) as lens,
        pytest.raises(sl.StreamlensError, match=way_out),
    ):
        lens.pipe(sl.uw_ratio()).subscribe(FixedRatio())
    # It need not have been named to anybody.
    with sl.observe(model, start=0) as lens, pytest.raises(sl.StreamlensError, match=way_out) as refusal:
        lens.pipe(sl.uw_ratio()).subscribe(FixedRatio())
    assert "name it: FixedRatio(optimizer=...)" in str(refusal.value)


@pytest.mark.parametrize(("make", "complaint"), OTHERS)
def test_one_that_is_made_after_subscribing_is_reported_at_its_first_update_and_left_alone(
    make: Callable[[Any], Optimizer], complaint: str
) -> None:
    model, alone = small_model(), small_model()
    reports: list[str] = []
    with sl.observe(model) as lens:
        lens.errors.subscribe(lambda report: reports.append(str(report)))
        controller = FixedRatio()
        lens.pipe(sl.uw_ratio()).subscribe(controller)
        list(steps_of(model, make(model.parameters()), 3))
    assert len(reports) == 1
    assert "RatioLR(per_layer=True) scales" in reports[0]
    assert controller.standing_back
    list(steps_of(alone, make(alone.parameters()), 3))
    assert all(map(torch.equal, model.parameters(), alone.parameters()))


def test_an_optimizer_that_lies_about_is_no_objection_to_one_that_will_do() -> None:
    model = small_model()
    other = torch.optim.AdamW(model.parameters(), lr=0.1)
    ratios: list[float] = []
    with sl.observe(model, on_error="raise") as lens:
        optimizer = SGD(model.parameters(), lr=0.1)
        subscription = lens.pipe(sl.uw_ratio()).subscribe(FixedRatio(0.05))
        subscription.dispose()
        lens.pipe(sl.uw_ratio()).subscribe(FixedRatio(0.05, optimizer=optimizer))
        lens.pipe(sl.uw_ratio()).subscribe(lambda frame: ratios.extend(frame.values.tolist()))
        list(steps_of(model, optimizer, 1))
    assert ratios == pytest.approx([0.05, 0.05], rel=1e-3)
    assert not other.state


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"target": 0}, r"target=0\): a ratio lies between 0 and 1"),
        ({"target": 1.0}, r"target=1.0\): a ratio"),
        ({"target": math.nan}, r"target=nan\): a ratio"),
        ({"of": "weight"}, r"of='weight'\): did you mean 'weights'"),
        ({"slew_limit": 1.0}, "the slew limit is a factor above 1"),
    ],
)
def test_arguments_out_of_their_range_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        FixedRatio(**options)


def test_a_schedule_that_leaves_its_range_is_reported_and_scales_nothing() -> None:
    model, alone = small_model(), small_model()
    reports: list[str] = []
    with sl.observe(model) as lens:
        lens.errors.subscribe(lambda report: reports.append(str(report)))
        lens.pipe(sl.uw_ratio()).subscribe(FixedRatio(lambda step: 1.0 - step))
        list(steps_of(model, SGD(model.parameters(), lr=0.1), 2))
    list(steps_of(alone, SGD(alone.parameters(), lr=0.1), 2))
    assert "the target at step 1 is 0.0, not between 0 and 1" in reports[1]
    assert all(map(torch.equal, model.parameters(), alone.parameters()))


@pytest.mark.parametrize("other", [ClipAt, lambda: RatioLR(per_layer=True)])
def test_who_steers_gradients_or_steps_beside_it_is_an_error(other: Callable[[], Any]) -> None:
    model = small_model()
    with sl.observe(model) as lens:
        lens.pipe(sl.uw_ratio()).subscribe(FixedRatio())
        with pytest.raises(sl.StreamlensError, match="FixedRatio steers already"):
            lens.pipe(sl.uw_ratio()).subscribe(other())

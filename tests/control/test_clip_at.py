"""ClipAt against a loop written by hand, and under whatever norms may come."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

import streamlens as sl
from streamlens.control import ClipAt
from streamlens.frame import Frame
from tests._runs import small_model, steps_of
from tests.control._steps import one_step


def momentum(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


class ByHand:
    """AutoClip as its authors wrote it, with a window."""

    def __init__(self, model: nn.Module, percentile: float, window: int) -> None:
        self.model, self.percentile, self.window = model, percentile, window
        self.norms: list[float] = []
        self.clipped: list[float] = []

    def __call__(self) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        self.norms.append(norm)
        limit = float(np.percentile(self.norms[-self.window :], self.percentile))
        if norm > limit:
            self.clipped.append(norm)
            for gradient in gradients:
                gradient *= limit / norm


@pytest.mark.parametrize(("percentile", "window"), [(10, 1000), (50, 4), (90.5, 7), (0, 3), (100, 5)])
def test_it_does_what_a_loop_written_by_hand_does(percentile: float, window: int) -> None:
    alone, watched = small_model(), small_model()
    optimizer = momentum(alone)
    by_hand = ByHand(alone, percentile, window)
    for seed in range(15):
        one_step(alone, optimizer, seed, by_hand)

    optimizer = momentum(watched)
    actions: list[Frame] = []
    with sl.observe(watched, on_error="raise") as lens:
        controller = ClipAt(percentile, window=window)
        controller.actions.subscribe(actions.append)
        lens.pipe(sl.norm("weight_gradients")).subscribe(controller)
        for seed in range(15):
            one_step(watched, optimizer, seed)
    for a, b in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert [f.meta["old"] for f in actions] == pytest.approx(by_hand.clipped, rel=1e-4)
    assert (len(actions) == 0) == (percentile == 100)


def test_weight_gradients_is_what_remains_and_the_action_says_why() -> None:
    model = small_model()
    optimizer = momentum(model)
    remains: list[float] = []
    actions: list[Frame] = []
    with sl.observe(model, on_error="raise") as lens:
        lens.pipe(sl.norm("parameter_gradients")).subscribe(
            lambda frame: remains.append(float(frame.values.square().sum().sqrt()))
        )
        lens.pipe(sl.norm("weight_gradients")).subscribe(ClipAt(0))
        lens.pipe(sl.topic("gradient_norm.action")).subscribe(actions.append)
        list(steps_of(model, optimizer, 6))
    assert remains == pytest.approx(np.minimum.accumulate(remains), rel=1e-5)
    assert actions
    assert all(f.meta["new"] == pytest.approx(remains[f.step], rel=1e-5) for f in actions)
    count = actions[0].step + 1
    assert f"is the limit, by the 0th percentile of the last {count} norms" in actions[0].meta["cause"]
    assert actions[0].meta["text"].startswith("ClipAt clipped the gradient from a norm of ")


def scalar() -> tuple[nn.Linear, Optimizer]:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return model, torch.optim.SGD(model.parameters(), lr=1.0)


def feed(model: nn.Linear, optimizer: Optimizer, gradient: float) -> float:
    """A step whose gradient is given; what the optimizer made of it."""
    optimizer.zero_grad()
    model(torch.tensor([[gradient]])).sum().backward()
    optimizer.step()
    used = -model.weight.item()
    nn.init.zeros_(model.weight)
    return used


numbers = st.floats(2.0**-10, 2.0**10, width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0])


@settings(max_examples=25, deadline=None)
@given(gradients=st.lists(numbers, max_size=12), percentile=st.floats(0, 100), slew=st.floats(1.1, 3))
def test_the_limit_keeps_its_bounds_and_its_slew_under_any_gradients(
    gradients: list[float], percentile: float, slew: float
) -> None:
    model, optimizer = scalar()
    with sl.observe(model, on_error="raise") as lens:
        controller = ClipAt(percentile, window=5, min_norm=0.1, max_norm=20.0, slew_limit=slew)
        lens.pipe(sl.norm("weight_gradients")).subscribe(controller)
        before = math.inf
        for gradient in gradients:
            used = feed(model, optimizer, gradient)
            limit = float(controller.histories["weight"]["limit"])
            if not math.isfinite(gradient):
                assert limit == before
                assert not math.isfinite(used)
                continue
            assert 0.1 <= limit <= 20.0
            if math.isfinite(before):
                assert before / slew * (1 - 1e-12) <= limit <= before * slew * (1 + 1e-12)
            assert abs(used) == pytest.approx(min(abs(gradient), limit), rel=1e-5)
            before = limit
        assert controller.held == sum(not math.isfinite(g) for g in gradients)


def test_a_step_that_lacks_a_gradient_is_clipped_at_the_limit_as_it_was() -> None:
    model = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)})
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    norms: list[float] = []

    def step(a: float | None, b: float) -> None:
        optimizer.zero_grad()
        model["a"].weight.grad = None if a is None else torch.tensor([[a]])
        model["b"].weight.grad = torch.tensor([[b]])
        optimizer.step()

    with sl.observe(model, on_error="raise") as lens:
        controller = ClipAt(50)
        lens.pipe(sl.norm("weight_gradients")).subscribe(controller)
        lens.pipe(sl.norm("weight_gradients")).subscribe(
            lambda f: norms.append(float(f.values.square().sum().sqrt()))
        )
        step(3.0, 4.0)
        step(None, 12.0)
        assert controller.held == 1
        assert controller.histories["a.weight"]["count"] == 1
        step(3.0, 4.0)
    assert norms == pytest.approx([5.0, 5.0, 5.0])


def test_each_optimizer_has_norms_and_a_limit_of_its_own() -> None:
    model = small_model()
    body = torch.optim.SGD(model[0].parameters(), lr=0.1)
    head = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with sl.observe(model, on_error="raise") as lens:
        controller, only = ClipAt(10), ClipAt(10, optimizer=head, dry_run=True)
        lens.pipe(sl.norm("weight_gradients")).subscribe(controller)
        lens.pipe(sl.norm("weight_gradients")).subscribe(only)
        for seed in range(2):
            one_step(model, body, seed, head.step)
    assert {name: int(h["count"]) for name, h in controller.histories.items()} == {
        "0.weight": 2,
        "2.weight": 2,
    }
    assert set(only.histories) == {"2.weight"}


def test_a_fused_optimizer_under_a_grad_scaler_is_clipped_by_its_unscaled_gradient() -> None:
    def run(scale: float) -> tuple[list[Tensor], list[float]]:
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        norms: list[float] = []
        with sl.observe(model, on_error="raise") as lens:
            controller = ClipAt(20)
            controller.actions.subscribe(lambda frame: norms.append(frame.meta["old"]))
            lens.pipe(sl.norm("weight_gradients")).subscribe(controller)
            for seed in range(5):
                data = torch.Generator().manual_seed(seed)
                optimizer.zero_grad()
                loss = model(torch.randn(3, 4, generator=data)).square().sum()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        return [p.detach() for p in model.parameters()], norms

    (plain, norms), (scaled, seen) = run(1), run(2.0**10)
    assert norms
    assert seen == pytest.approx(norms, rel=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(plain, scaled, strict=True))


def test_it_learns_in_a_dry_run_and_changes_nothing() -> None:
    alone, watched = small_model(), small_model()
    for model in (alone, watched):
        optimizer = momentum(model)
        lens = sl.observe(model, on_error="raise")
        said: list[Frame] = []
        controller = ClipAt(10, dry_run=True)
        controller.actions.subscribe(said.append)
        if model is watched:
            lens.pipe(sl.norm("weight_gradients")).subscribe(controller)
        list(steps_of(model, optimizer, 5))
        lens.close()
    assert said
    assert "ClipAt would have clipped the gradient" in said[0].meta["text"]
    assert all(map(torch.equal, watched.parameters(), alone.parameters()))


def test_its_state_is_plain_and_loads_from_a_file(tmp_path: Any) -> None:
    model = small_model()
    optimizer = momentum(model)
    with sl.observe(model, on_error="raise") as lens:
        lens.pipe(sl.norm("weight_gradients")).subscribe(ClipAt(10, window=3))
        list(steps_of(model, optimizer, 5))
        torch.save(copy.deepcopy(lens.state_dict()), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert "histories" in str(loaded)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"percentile": 101}, r"percentile=101\): it lies between 0 and 100"),
        ({"percentile": math.nan}, r"percentile=nan\): it lies between 0 and 100"),
        ({"percentile": "high"}, r"percentile='high'\): it lies between 0 and 100"),
        ({"window": 1}, r"window=1\): a percentile needs at least 2 norms"),
        ({"window": 2.5}, r"window=2.5\): a percentile needs"),
        ({"min_norm": 2, "max_norm": 1}, "the least value must lie below the greatest"),
    ],
)
def test_arguments_out_of_their_range_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ClipAt(**options)


def test_two_controllers_of_the_gradients_are_an_error_at_subscribe() -> None:
    model = small_model()
    with sl.observe(model) as lens:
        lens.pipe(sl.norm("weight_gradients")).subscribe(ClipAt())
        with pytest.raises(sl.StreamlensError, match="ClipAt would steer the gradients that ClipAt steers"):
            lens.pipe(sl.norm("weight_gradients")).subscribe(ClipAt(20))
        lens.pipe(sl.norm("weight_gradients")).subscribe(ClipAt(20, dry_run=True))

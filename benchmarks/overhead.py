"""Overhead of observing on a training step, beside the good hand-written version of the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

import streamlens as sl
from benchmarks.models import mlp
from benchmarks.timing import Timing, interleave
from streamlens.lab.models import ResNet18

__all__ = ["idle", "mlp_overhead", "operators_200_layers", "resnet_overhead"]

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass
class _Training:
    """A model, an optimizer and one batch, trained on over and over."""

    model: nn.Module
    make_optimizer: MakeOptimizer
    batch: tuple[Tensor, Tensor]
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = self.make_optimizer(list(self.model.parameters()))

    def gradients(self) -> None:
        x, y = self.batch
        self.optimizer.zero_grad()
        functional.cross_entropy(self.model(x), y).backward()

    def step(self) -> None:
        self.gradients()
        self.optimizer.step()


class _ByHand(_Training):
    """What a good engineer writes: multi-tensor calls, one stack, one transfer a step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parameters: list[Tensor] = list(self.model.parameters())
        self.before = [p.detach().clone() for p in self.parameters]
        self.log: list[list[float]] = []

    def step(self) -> None:
        self.gradients()
        with torch.no_grad():
            torch._foreach_copy_(self.before, self.parameters)
            gradients = torch._foreach_norm([p.grad for p in self.parameters if p.grad is not None])
            self.optimizer.step()
            torch._foreach_sub_(self.before, self.parameters)
            updates = torch._foreach_norm(self.before)
            weights = torch._foreach_norm(self.parameters)
            # The ratio is made of the same numbers and costs nothing more.
            self.log.append(torch.stack([*gradients, *updates, *weights]).tolist())


def _observed(training: _Training) -> sl.Lens:
    """The three metrics of the comparison, at every step, into a Table."""
    table = sl.sinks.Table()
    lens = sl.observe(training.model)
    lens.pipe(sl.norm("parameters")).subscribe(table)
    lens.pipe(sl.norm("parameter_gradients")).subscribe(table)
    lens.pipe(sl.uw_ratio(of="parameters")).subscribe(table)
    return lens


def mlp_overhead(make_optimizer: MakeOptimizer, rounds: int = 40) -> dict[str, Timing]:
    """Bare, by hand, observed and idle on the MLP at batch 128."""
    torch.manual_seed(0)
    batch = (torch.randn(128, 784), torch.randint(0, 10, (128,)))
    runs = {name: _Training(mlp(), make_optimizer, batch) for name in ("bare", "streamlens", "idle")}
    by_hand = _ByHand(mlp(), make_optimizer, batch)
    lens, unused = _observed(runs["streamlens"]), sl.observe(runs["idle"].model)
    steps = {**{name: run.step for name, run in runs.items()}, "by hand": by_hand.step}
    try:
        return interleave(steps, baseline="bare", rounds=rounds, repeat=5)
    finally:
        lens.close()
        unused.close()


def resnet_overhead(rounds: int = 5) -> dict[str, Timing]:
    """Bare and observed on a ResNet18 at batch 128, 32x32 images."""
    torch.manual_seed(0)
    batch = (torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,)))
    runs = {
        name: _Training(ResNet18(), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), batch)
        for name in ("bare", "streamlens")
    }
    lens = _observed(runs["streamlens"])
    try:
        return interleave({n: r.step for n, r in runs.items()}, baseline="bare", rounds=rounds, warm_up=1)
    finally:
        lens.close()


def _tiny(layers: int, width: int) -> _Training:
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
    batch = (torch.randn(1, width), torch.zeros(1, dtype=torch.long))
    return _Training(model, lambda p: torch.optim.SGD(p, lr=1e-3), batch)


def idle(rounds: int = 200) -> float:
    """Seconds a step that a lens without a subscriber costs."""
    runs = {name: _tiny(1, 4) for name in ("bare", "idle")}
    lens = sl.observe(runs["idle"].model)
    try:
        timings = interleave({n: r.step for n, r in runs.items()}, baseline="bare", rounds=rounds, repeat=20)
    finally:
        lens.close()
    return timings["idle"].seconds - timings["bare"].seconds


def operators_200_layers(rounds: int = 60) -> float:
    """Seconds a step that 200 layers through 5 operators cost, from the hook to a callable."""
    runs = {name: _tiny(200, 32) for name in ("bare", "observed")}
    lens = sl.observe(runs["observed"].model)
    seen: list[int] = []
    lens.pipe(
        sl.norm("weights"),
        sl.ema(0.9),
        sl.where(lambda frame: len(frame) > 0),
        sl.diff(),
        sl.rename("change"),
    ).subscribe(lambda frame: seen.append(frame.step))
    try:
        timings = interleave({n: r.step for n, r in runs.items()}, baseline="bare", rounds=rounds)
    finally:
        lens.close()
    return timings["observed"].seconds - timings["bare"].seconds


def controllers(rounds: int = 100) -> dict[str, float]:
    """Seconds a step that controllers of gradients cost, with 20 layers of 64x64 and their biases."""
    controlled = {"ClipAt": sl.control.ClipAt(10), "FixedRatio": sl.control.FixedRatio(1e-3)}
    runs = {}
    for name in ("bare", *controlled):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(20)])
        batch = (torch.randn(32, 64), torch.zeros(32, dtype=torch.long))
        runs[name] = _Training(model, lambda p: torch.optim.SGD(p, lr=1e-3), batch)
    lenses = [sl.observe(runs[name].model) for name in controlled]
    for lens, controller in zip(lenses, controlled.values(), strict=True):
        lens.pipe(sl.norm("weight_gradients"), sl.every(1_000_000)).subscribe(controller)
    try:
        timings = interleave({n: r.step for n, r in runs.items()}, baseline="bare", rounds=rounds)
    finally:
        for lens in lenses:
            lens.close()
    return {name: timings[name].seconds - timings["bare"].seconds for name in controlled}

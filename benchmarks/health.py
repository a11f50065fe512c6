"""What `health()` costs, on the networks that overhead is measured on."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

import streamlens as sl
from benchmarks.models import mlp
from benchmarks.timing import Timing, interleave
from streamlens.lab.models import ResNet18

__all__ = ["mlp_health", "resnet_health"]

_CADENCE = 20
"""Steps after which everything that health looks at has come once; half of it in the first hundred."""


class _Training:
    """A model and its optimizer, trained on one batch; with `health()`, if rules are given."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], health: sl.Operator | None = None) -> None:
        self.model = model
        self.batch = (torch.randn(128, *shape), torch.randint(0, 10, (128,)))
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.loss = functional.cross_entropy
        self.lens: sl.Lens | None = None
        if health is not None:
            self.lens = sl.observe(model)
            self.loss = self.lens.watch_loss(functional.cross_entropy)
            self.lens.pipe(health).subscribe(sl.sinks.Table())

    def step(self) -> None:
        x, y = self.batch
        self.optimizer.zero_grad()
        self.loss(self.model(x), y).backward()
        self.optimizer.step()

    def close(self) -> None:
        if self.lens is not None:
            self.lens.close()


def _measure(runs: dict[str, _Training], rounds: int, repeat: int) -> dict[str, Timing]:
    try:
        steps = {name: run.step for name, run in runs.items()}
        return interleave(steps, baseline="bare", rounds=rounds, repeat=repeat, warm_up=1)
    finally:
        for run in runs.values():
            run.close()


def mlp_health(rounds: int = 40) -> dict[str, Timing]:
    """On the MLP at batch 128: the default set, and without the one rule that looks at every output."""
    torch.manual_seed(0)
    runs = {
        "bare": _Training(mlp(), (784,)),
        "health": _Training(mlp(), (784,), sl.health()),
        "sparser": _Training(
            mlp(),
            (784,),
            sl.health(sl.nonfinite_values(every=10), sl.exploding_gradients(every=10)),
        ),
    }
    return _measure(runs, rounds, _CADENCE)


def resnet_health(rounds: int = 2) -> dict[str, Timing]:
    """On a ResNet18 at batch 128, 32x32 images."""
    torch.manual_seed(0)
    runs = {
        "bare": _Training(ResNet18(), (3, 32, 32)),
        "health": _Training(ResNet18(), (3, 32, 32), sl.health()),
    }
    return _measure(runs, rounds, _CADENCE // 2)

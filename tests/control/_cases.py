"""A run for every controller that is exported, in which it acts: a new one has to be given one here."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

import streamlens as sl
from streamlens import control

__all__ = ["CASES", "CONTROLLERS", "Case"]

_BASES = {"Controller", "GradientController"}

CONTROLLERS = [
    name
    for name in control.__all__
    if name == "act"
    or (
        (inspect.isclass(found := getattr(control, name)) and issubclass(found, control.Controller))
        and name not in _BASES
    )
]
"""What is exported and steers, by name."""


def _momentum(parameters: list[torch.nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _halved(frame: sl.Frame, rate: float) -> float:
    return rate / 2 if frame.values.max() > 0.05 else rate * 1.1  # type: ignore[union-attr]


@dataclass(frozen=True)
class Case:
    """A controller on a small model.

    Attributes:
        make: Makes it; given `dry_run=True`, one that only says what it would do.
        chain: The operators in front of it.
        optimizer: Makes the optimizer.
        emitted: A number given by hand after each step, as the topic `number`, if the chain takes that.
        recommends: Whether it leaves what it recommends to others.
    """

    make: Callable[..., control.Controller]
    chain: tuple[Any, ...] = (sl.uw_ratio(),)
    optimizer: Callable[[list[torch.nn.Parameter]], Optimizer] = _momentum
    emitted: Callable[[int], float] | None = None
    recommends: bool = False


def _number() -> tuple[Any, ...]:
    return (sl.topic("number"),)


CASES: dict[str, list[Case]] = {
    "ClipAt": [
        Case(lambda **o: control.ClipAt(30, window=4, slew_limit=1.5, **o), (sl.norm("weight_gradients"),))
    ],
    "FixedRatio": [
        Case(
            lambda **o: control.FixedRatio(1e-2, slew_limit=1.5, **o),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        )
    ],
    "Freeze": [
        Case(
            lambda **o: control.Freeze(below=0.2, patience=2, thaw_after=2, **o), (sl.uw_ratio(), sl.ema(0.5))
        ),
        Case(
            lambda **o: control.Freeze(below=0.2, patience=2, thaw_after=3, keep_gradients=True, **o),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        ),
    ],
    "NoiseScaleBatch": [
        Case(
            lambda **o: control.NoiseScaleBatch(16, high=512, **o),
            _number(),
            emitted=lambda step: 40.0 * step,
            recommends=True,
        )
    ],
    "RatioLR": [
        Case(lambda **o: control.RatioLR(mode="base", smoothing=0.5, **o)),
        Case(lambda **o: control.RatioLR(mode="current", smoothing=0.5, gain=0.7, **o)),
        Case(lambda **o: control.RatioLR(mode="current", smoothing=0.5, per_layer=True, **o)),
    ],
    "ReduceOnPlateau": [
        Case(
            lambda **o: control.ReduceOnPlateau(patience=1, factor=0.5, **o),
            _number(),
            emitted=lambda step: 1.0 / (1 + step // 3),
        )
    ],
    "Rollback": [
        Case(
            lambda **o: control.Rollback(every=2, confirm=1, factor=0.5, **o),
            _number(),
            emitted=lambda step: math.nan if step in (4, 7) else 1.0,
        )
    ],
    "SetRate": [Case(control.SetRate, (control.scheduled(control.ExponentialDecay(0.5, 0.5)),))],
    "Stop": [Case(lambda **o: control.Stop(patience=2, **o), _number(), emitted=lambda step: 1.0)],
    "act": [Case(lambda **o: control.act(_halved, slew_limit=1.3, **o), (sl.uw_ratio(), sl.ema(0.7)))],
}

"""What the callbacks of both frameworks are given to do."""

from __future__ import annotations

from typing import Any

import torch

import streamlens as sl
from tests.helpers.recording import record

TOPICS = ("parameters", "parameter_gradients", "parameter_updates", "raw_gradients", "loss")


class Recorder:
    """Chains of a callback that keep what they are given."""

    def __init__(self, **chains: Any) -> None:
        self.chains = chains
        self.frames: dict[str, list[sl.Frame]] = {}

    def __call__(self, lens: sl.Lens) -> None:
        for name, operators in self.chains.items():
            operators = operators if isinstance(operators, tuple) else (operators,)
            self.frames[name] = record(lens, *operators)

    def __getitem__(self, name: str) -> list[sl.Frame]:
        return self.frames[name]

    def rows(self) -> dict[str, list[tuple[Any, ...]]]:
        """Everything that tells frames apart."""
        return {
            name: [
                (f.topic, f.step, f.epoch, f.micro_step, f.layers, torch.as_tensor(f.values).tolist())
                for f in frames
            ]
            for name, frames in self.frames.items()
        }


RESUMED: dict[str, Any] = {
    "ratio": (sl.uw_ratio(), sl.ema(0.8)),
    "window": (sl.norm("weight_gradients"), sl.window(3)),
    "loss": (sl.topic("loss"), sl.ema(0.5)),
    "passes": sl.norm("activations"),
    "epochs": (sl.norm("weights"), sl.per_epoch()),
    "started": sl.topic("epoch_started"),
    "finished": sl.topic("epoch_finished"),
}
"""Chains with state, and events that must come once."""

"""`Pace`: how long a step took, and how many examples it had."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from streamlens.frame import Kind

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine

__all__ = ["Pace"]

_MODEL: Final = ("",)


class Pace:
    """Measures `step_time` and `examples_per_second`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._examples = 0
        self._last_update: float | None = None

    def pass_begins(self) -> None:
        """A counted forward begins: the step's first one has no examples yet."""
        if self._engine.clock.micro_step == 0:
            self._examples = 0

    def count_examples(self, data: Tensor) -> None:
        """Note the size of a batch."""
        self._examples += data.shape[0] if data.ndim else 1

    def step_time(self) -> float | None:
        """Seconds since the step before had its (first) update; None in the first step."""
        now = time.perf_counter()
        last, self._last_update = self._last_update, now
        return None if last is None else now - last

    def emit(self, elapsed: float | None) -> None:
        """Emit both, if the step's duration is known."""
        engine = self._engine
        if not elapsed or not engine.due_now or not engine.wanted(("step_time", "examples_per_second")):
            return
        engine.emit("step_time", _MODEL, torch.tensor([elapsed]), Kind.STEP)
        if self._examples:
            rate = torch.tensor([self._examples / elapsed])
            engine.emit("examples_per_second", _MODEL, rate, Kind.STEP)

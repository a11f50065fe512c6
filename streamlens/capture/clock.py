"""`Clock`: which step, micro-step and epoch a run is in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["Clock"]


class Clock:
    """Counts optimizer updates, and forward/backward passes within them. Knows no tensors.

    Attributes:
        step: The optimizer update that is open, from 0.
        epoch: Advances only when told.
        micro_step: The forward/backward pass within the step, from 0.
        updated: Whether an optimizer has stepped in the open step.
        in_pass: Whether a forward has begun whose backward has not run.
        passes: Counted passes so far, which tells old backward graphs from the current one.
        batch: Passes so far in this epoch.
    """

    def __init__(self) -> None:
        self.step = 0
        self.epoch = 0
        self.micro_step = 0
        self.updated = False
        self.in_pass = False
        self.passes = 0
        self.batch = 0
        self._passes_in_step = 0

    def begin_pass(self) -> bool:
        """A counted forward begins; whether it is a new micro-step and not more of the open one."""
        if self.in_pass:
            return False
        self.in_pass = True
        self.micro_step = self._passes_in_step
        self._passes_in_step += 1
        self.passes += 1
        return True

    def end_pass(self) -> None:
        """A backward has run, or an update has come without one."""
        if self.in_pass:
            self.in_pass = False
            self.batch += 1

    @property
    def counted(self) -> bool:
        """Whether the open step has had a counted forward."""
        return self._passes_in_step > 0

    def close_step(self) -> int:
        """The open step is over; returns its number."""
        closed = self.step
        self.step += 1
        self.micro_step = 0
        self.updated = False
        self.in_pass = False
        self._passes_in_step = 0
        return closed

    def end_epoch(self) -> int:
        """The epoch is over; returns its number."""
        ended = self.epoch
        self.epoch += 1
        self.batch = 0
        return ended

    def state_dict(self) -> dict[str, Any]:
        """Where the clock stands."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "micro_step": self.micro_step,
            "updated": self.updated,
            "passes": self._passes_in_step,
            "batch": self.batch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another clock stood."""
        self.step = int(state["step"])
        self.epoch = int(state["epoch"])
        self.micro_step = int(state["micro_step"])
        self.updated = bool(state["updated"])
        self._passes_in_step = int(state["passes"])
        self.batch = int(state["batch"])
        self.in_pass = False

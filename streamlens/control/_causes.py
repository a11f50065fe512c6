"""What makes a controller act once: an alert that starts, or a value that is not finite."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch

from streamlens.chain import Mark, MarkKind
from streamlens.control.controller import Controller
from streamlens.control.decision import Decision
from streamlens.frame import Frame

__all__ = ["TriggeredController", "alert_state", "nonfinite"]


def alert_state(frame: Frame) -> str | None:
    """`"start"` or `"end"` if a frame is that of an alert, else None."""
    state = frame.meta.get("state")
    return str(state) if "rule" in frame.meta and state in ("start", "end") else None


def nonfinite(frame: Frame) -> str | None:
    """What of a frame is NaN or infinite first, as a sentence's end."""
    for layer, value in frame.items():
        wrong = ~value.isfinite()
        if bool(wrong.any()):
            where = f"{frame.topic} of {layer}" if layer else frame.topic
            return f"{where} is {float(value[wrong].flatten()[0]):g} at step {frame.step}"
    return None


class TriggeredController(Controller):
    """A controller that acts on a cause, once the update is made, whichever rank saw it.

    Frames that tell a cause come at any moment, on some ranks later than on others. All ranks therefore
    ask each other at every update, one small collective; on a stream without a model, at every frame.

    Subclasses write `cause_of` and `act_on`.

    Args:
        dry_run: Only say what would be done.
    """

    __slots__ = ()

    needs_finite = False
    any_rank = True
    whole_steps: ClassVar[bool] = False
    """Whether to wait until all optimizers that step together have stepped."""

    def __init__(self, *, dry_run: bool = False) -> None:
        super().__init__(dry_run=dry_run)
        self._cause: str | None = None
        self._asked = -1

    @abstractmethod
    def cause_of(self, frame: Frame) -> str | None:
        """Why to act, as the end of a sentence, if a frame tells."""

    @abstractmethod
    def act_on(self, cause: str | None, step: int) -> Decision | None:
        """What to do after the update of a step, with what has been told since the last one."""

    def after(self, step: int) -> None:
        """All ranks have decided after the update of a step, and what was decided is done."""

    def attached(self) -> None:
        """See `Controller.attached`."""
        self._asked = -1
        if self.engine is not None:
            self.hold(self.runtime.on_mark(self._on_mark))

    def take(self, frame: Frame, noted: object) -> None:
        """Note a cause; without an engine, which tells of updates, act at once."""
        runtime = self._links.runtime
        if runtime is None or not self.concerns(frame):
            return
        cause = runtime.attempt(f"{self.name}.cause_of", self.cause_of, frame)
        self._cause = self._cause or cause
        if self.engine is None:
            self._decide(frame)

    def propose(self, frame: Frame, noted: object) -> Decision | None:
        """See `Controller.propose`."""
        cause, self._cause = self._cause, None
        return None if self.standing_back else self.act_on(cause, frame.step)

    def _on_mark(self, mark: Mark) -> None:
        engine = self.engine
        if engine is None or mark.step <= self._asked or mark.kind is MarkKind.EPOCH:
            return
        if mark.kind is MarkKind.UPDATE and self.whole_steps and len(engine.updates.owners.known) > 1:
            # Another one may be about to change what this would set; the step's closing tells.
            return
        self._asked = mark.step
        values = torch.tensor([float(mark.step)])
        tick = Frame("update", mark.step, ("",), values, epoch=mark.epoch, source=engine.name)
        # Frames of this burst are handed over behind it: this is behind them.
        engine.post(lambda: engine.post(lambda: self._decide(tick)))

    def _decide(self, frame: Frame) -> None:
        runtime = self._links.runtime
        if runtime is not None:
            self.conclude(frame, runtime.attempt(f"{self.name}.propose", self.propose, frame, None))
            runtime.post(lambda: self.after(frame.step) if self._links.runtime is runtime else None)

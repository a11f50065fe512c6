"""What makes a controller act once: an alert that starts, or a value that is not finite."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch

from streamlens.chain import Mark, MarkKind
from streamlens.control.controller import Controller
from streamlens.control.decision import Decision
from streamlens.frame import Frame

__all__ = ["TriggeredController", "alert_cause", "alert_state", "nonfinite"]


def alert_state(frame: Frame) -> str | None:
    """`"start"` or `"end"` if a frame is that of an alert, else None."""
    state = frame.meta.get("state")
    return str(state) if "rule" in frame.meta and state in ("start", "end") else None


def alert_cause(frame: Frame) -> str | None:
    """The first sentence of an alert that starts."""
    if alert_state(frame) != "start":
        return None
    return f"alert {frame.meta['rule']}: {str(frame.meta.get('text', '')).partition('. ')[0]}"


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
    between_updates: ClassVar[bool] = False
    """Whether a reason that comes between two updates is acted on there, where there is one rank."""
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

    @property
    def uneasy(self) -> bool:
        """Whether this rank knows of something that is wrong still."""
        return False

    def after(self, step: int, *, calm: bool) -> None:
        """All ranks have decided after the update of a step, and what was decided is done.

        Args:
            step: The step.
            calm: Whether no rank was uneasy.
        """

    def closed(self, step: int) -> None:
        """A step is over, and the next one has not begun."""

    def attached(self) -> None:
        """See `Controller.attached`."""
        self._asked = -1
        if self.engine is not None:
            self.hold(self.runtime.on_mark(self._on_mark))

    def take(self, frame: Frame, noted: object) -> None:
        """Note a cause, and act at once where there is no update, or no other rank, to wait for."""
        runtime = self._links.runtime
        if runtime is None or not self.concerns(frame):
            return
        cause = runtime.attempt(f"{self.name}.cause_of", self.cause_of, frame)
        self._cause = self._cause or cause
        alone = self.between_updates and self._cause is not None and not self.several_ranks
        if self.engine is None or alone:
            self._decide(frame)

    def propose(self, frame: Frame, noted: object) -> Decision | None:
        """See `Controller.propose`."""
        cause, self._cause = self._cause, None
        return None if self.standing_back else self.act_on(cause, frame.step)

    def _on_mark(self, mark: Mark) -> None:
        engine = self.engine
        if engine is None or mark.kind is MarkKind.EPOCH:
            return
        closed = mark.kind is MarkKind.CLOSED
        if mark.step <= self._asked:
            if closed:
                self._later(lambda: self.closed(mark.step))
            return
        if not closed and self.whole_steps and len(engine.updates.owners.known) > 1:
            # Another one may be about to change what this would set; the step's closing tells.
            return
        self._asked = mark.step
        values = torch.tensor([float(mark.step)])
        tick = Frame("update", mark.step, ("",), values, epoch=mark.epoch, source=engine.name)
        # Frames of this burst are handed over behind it: this is behind them.
        self._later(lambda: self._later(lambda: self._decide(tick, closed=closed)))

    def _decide(self, frame: Frame, *, closed: bool = False) -> None:
        mine = self.runtime.attempt(f"{self.name}.propose", self.propose, frame, None)
        calm = not self.conclude(frame, mine, held=self.uneasy)
        # Behind what other controllers do in this burst.
        self._later(lambda: self.after(frame.step, calm=calm))
        if closed:
            self._later(lambda: self.closed(frame.step))

    def _later(self, do: Callable[[], None]) -> None:
        """Do something after everything of this burst, if the controller is then still of this run."""
        runtime = self.runtime

        def guarded() -> None:
            if self._links.runtime is runtime:
                runtime.attempt(self.name, do)

        runtime.post(guarded)

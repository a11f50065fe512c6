"""`Stop`: ends training on an alert, a NaN or a plateau."""

from __future__ import annotations

from typing import Literal

from streamlens.capture.source import Source
from streamlens.control._causes import TriggeredController, alert_cause, alert_state, nonfinite
from streamlens.control._plateau import Plateau, the_number
from streamlens.control.decision import Decision
from streamlens.frame import Frame

__all__ = ["Stop"]

_TOPIC = "stop.action"


class Stop(TriggeredController):
    """Asks training to end: `lens.should_stop` becomes True, after the update of the step that told why.

    It ends a chain of whatever there is a reason in, and the first reason counts:

    - an alert that starts: `lens.pipe(sl.diverging()).subscribe(Stop())`, or all of `sl.health()`;
    - a NaN or infinite value of any other frame: `lens.pipe(sl.loss()).subscribe(Stop())`;
    - with `patience`, a plateau: more than `patience` frames in a row whose one number is no better
      than the best so far, as `ReduceOnPlateau` counts them.

    Nothing is interrupted: the step is completed, `lens.batches()` gives no further batch and ends its
    epoch, `lens.epochs()` gives no further epoch, our callbacks end the Trainer's loop, and any other
    loop asks `lens.should_stop`. A reason between two updates, such as a validation's at the end of an
    epoch, counts there, and no further batch is begun; ranks of `torch.distributed` ask each other at the
    next update. It acts once; a run that goes on (`lens.should_stop = False`) is not
    stopped again by this one. What any rank sees stops all of them, after the same step.

    Args:
        patience: How many frames in a row may bring nothing better; no plateau stops it if None.
        mode: Whether lower is better (`"min"`) or higher (`"max"`).
        threshold: By how much better counts as better.
        threshold_mode: Whether that is a share of the best so far (`"rel"`) or a difference (`"abs"`).
        on_nan: Whether a NaN or infinite value stops it; else such a frame is no input.
        dry_run: Only say what would be done.

    Attributes:
        stopped: Whether it has acted.

    Raises:
        ValueError: One of them is out of its range.

    Example:
        `lens.pipe(sl.topic("validation_loss")).subscribe(Stop(patience=5))`
    """

    __slots__ = ("_on_nan", "_rule")

    between_updates = True

    def __init__(
        self,
        patience: int | None = None,
        *,
        mode: Literal["min", "max"] = "min",
        threshold: float = 1e-4,
        threshold_mode: Literal["rel", "abs"] = "rel",
        on_nan: bool = True,
        dry_run: bool = False,
    ) -> None:
        super().__init__(dry_run=dry_run)
        rule = Plateau(self.name, mode, 0 if patience is None else patience, threshold, threshold_mode)
        self._rule = None if patience is None else rule
        self._on_nan = on_nan
        self._plateau = Plateau.start()
        self.stopped = False

    @property
    def action_topics(self) -> tuple[str, ...]:
        """The topic of its action."""
        return (_TOPIC,)

    def cause_of(self, frame: Frame) -> str | None:
        """See `TriggeredController.cause_of`.

        Raises:
            StreamlensError: A plateau is looked for, and the frame holds more than one number.
        """
        if alert_state(frame) is not None:
            return alert_cause(frame)
        if (wrong := nonfinite(frame)) is not None:
            self.held += not self._on_nan
            return wrong if self._on_nan else None
        if self._rule is None:
            return None
        frames = self._rule.take(self._plateau, the_number(self.name, frame))
        best = self._plateau["best"]
        return (
            f"{frame.topic} has brought nothing better than {best:.4g} in {frames} frames" if frames else None
        )

    def act_on(self, cause: str | None, step: int) -> Decision | None:
        """See `TriggeredController.act_on`."""
        if cause is None or self.stopped:
            return None
        return Decision(_TOPIC, (0.0,), (1.0,), cause, deed="stopped training")

    def decided(self, decision: Decision) -> None:
        """See `Controller.decided`."""
        self.stopped = True

    def apply(self, decision: Decision) -> None:
        """Ask for the end."""
        if isinstance(self.runtime, Source):
            self.runtime.should_stop = True

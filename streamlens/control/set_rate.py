"""`SetRate`: the learning rate is what a stream says."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from streamlens.control._plateau import the_number
from streamlens.control._rates import RateController
from streamlens.control.bounds import Bounds

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from streamlens.control.decision import Decision
    from streamlens.frame import Frame

__all__ = ["SetRate"]


class SetRate(RateController):
    """Sets the learning rate of every parameter group to the one number of the frame.

    The frame holds one number, such as those of `scheduled(...)` or of `lens.emit("my_rate", 0.01)`.
    It acts after the update of step k; the rate is in force from step k + 1 on. A NaN or infinite
    value changes nothing.

    Args:
        optimizer: Whose rate; that of all optimizers of the observed model if None.
        min_lr: The least rate set.
        max_lr: The greatest rate set.
        slew_limit: The greatest factor between one rate and the next.
        dry_run: Only say what would be done.

    Raises:
        TypeError: `optimizer` is none.
        ValueError: The bounds contradict each other.

    Example:
        `lens.pipe(sl.control.scheduled(sl.control.ExponentialDecay(0.1, 0.999))).subscribe(SetRate())`
    """

    __slots__ = ("_bounds",)

    def __init__(
        self,
        optimizer: Optimizer | None = None,
        *,
        min_lr: float = 0.0,
        max_lr: float = math.inf,
        slew_limit: float | None = None,
        dry_run: bool = False,
    ) -> None:
        super().__init__(optimizer, dry_run=dry_run)
        self._bounds = Bounds(min_lr, max_lr, slew_limit)

    def propose(self, frame: Frame, noted: Any) -> Decision | None:
        """See `Controller.propose`.

        Raises:
            StreamlensError: The frame holds more than one number.
        """
        wanted = the_number(self.name, frame)
        old = self.rates()
        if not self.undisturbed(old):
            return None
        new = [self._bounds.limit(rate, wanted) for rate in old]
        return self.decision(old, new, f"{frame.topic} is {wanted:.4g} at step {frame.step}")

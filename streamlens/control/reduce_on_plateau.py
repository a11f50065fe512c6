"""`ReduceOnPlateau`: a lower learning rate where a number has stopped getting better."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from streamlens.control._plateau import Plateau, the_number
from streamlens.control._rates import RateController
from streamlens.control.bounds import Bounds
from streamlens.operators._base import is_number

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from streamlens.control.decision import Decision
    from streamlens.frame import Frame

__all__ = ["ReduceOnPlateau"]


class ReduceOnPlateau(RateController):
    """Multiplies the learning rate by a factor where the one number of a stream stops getting better.

    The rule is that of `torch.optim.lr_scheduler.ReduceLROnPlateau`, for any stream: a loss, a validation
    accuracy that was emitted, a norm, a moving average of one of them. A frame is better if its number lies
    beyond the best so far by the threshold; after more than `patience` frames in a row that are not, every
    group's rate becomes rate * factor. Patience counts frames, so that `every(100)`, `window(100)` or
    `per_epoch()` in front make it one of hundreds of steps or of epochs. In two ways it is not PyTorch's:
    that counts a NaN as a frame that is no better, and here a NaN or infinite number is left out; and of a
    best below zero, where that takes a slightly worse number for a better one, a share is one of its size.

    It acts after the update of step k; the rate is in force from step k + 1 on.

    Args:
        optimizer: Whose rate; that of all optimizers of the observed model if None.
        mode: Whether lower is better (`"min"`) or higher (`"max"`).
        factor: What the rate is multiplied by, in (0, 1).
        patience: How many frames in a row may bring nothing better.
        threshold: By how much better counts as better.
        threshold_mode: Whether that is a share of the best so far (`"rel"`) or a difference (`"abs"`).
        cooldown: Frames after a reduction that are not counted.
        min_lr: The least rate set.
        max_lr: The greatest rate set.
        slew_limit: The greatest factor by which one action may lower the rate.
        dry_run: Only say what would be done.

    Raises:
        TypeError: `optimizer` is none.
        ValueError: One of them is out of its range, or the bounds contradict each other.

    Example:
        `lens.pipe(sl.loss(), sl.window(100)).subscribe(ReduceOnPlateau(patience=5))`
    """

    __slots__ = ("_bounds", "_factor", "_rule")

    def __init__(
        self,
        optimizer: Optimizer | None = None,
        *,
        mode: Literal["min", "max"] = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: Literal["rel", "abs"] = "rel",
        cooldown: int = 0,
        min_lr: float = 0.0,
        max_lr: float = math.inf,
        slew_limit: float | None = None,
        dry_run: bool = False,
    ) -> None:
        super().__init__(optimizer, dry_run=dry_run)
        if not is_number(factor) or not 0 < factor < 1:
            raise ValueError(f"ReduceOnPlateau(factor={factor!r}): what the rate is multiplied by, in (0, 1)")
        self._rule = Plateau("ReduceOnPlateau", mode, patience, threshold, threshold_mode, cooldown)
        self._bounds = Bounds(min_lr, max_lr, slew_limit)
        self._factor = factor
        self._plateau = Plateau.start()

    def propose(self, frame: Frame, noted: Any) -> Decision | None:
        """See `Controller.propose`.

        Raises:
            StreamlensError: The frame holds more than one number.
        """
        number = the_number(self.name, frame)
        old = self.rates()
        if not self.undisturbed(old):
            return None
        frames = self._rule.take(self._plateau, number)
        if not frames:
            return None
        # A rate that is below its bound already is left there: nothing is raised here.
        new = [min(rate, self._bounds.limit(rate, rate * self._factor)) for rate in old]
        best = self._plateau["best"]
        cause = f"{frame.topic} has brought nothing better than {best:.4g} in {frames} frames"
        return self.decision(old, new, cause)

"""`NoiseScaleBatch`: the batch size that the gradient noise scale recommends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from streamlens.control._plateau import the_number
from streamlens.control.bounds import Bounds
from streamlens.control.controller import Controller
from streamlens.control.decision import Decision
from streamlens.frame import Frame
from streamlens.operators._base import is_number, is_whole

__all__ = ["NoiseScaleBatch"]

_TOPIC: Final = "batch_size.action"


class NoiseScaleBatch(Controller):
    """Recommends a batch size from the gradient noise scale; changes it only through your function.

    It ends a chain of `sl.gradient_noise_scale()`, of which it takes the number of the whole model (layer
    `""`) and leaves those of single parameters aside. The noise scale B is the batch size at which
    training takes twice the least number of steps and twice the least number of samples (McCandlish
    et al. 2018): far below it larger batches cost nothing, far above it they bring nothing. It grows as the
    loss falls. Wanted are `share` * B samples, within bounds, in multiples of `multiple_of`, by a factor of
    at most `slew_limit` from one frame to the next; nothing is done while that is within a factor of
    `tolerance` of the present size. `sl.every(100)` in front makes it act that rarely.

    Without `on_change` an action is a recommendation: a frame of `batch_size.action`, and the next one
    starts from it. `on_change(size)` is called after the update of step k, on every rank, to make the
    batches from then on of that size (a sampler reads it, or the number of micro-batches follows it); what
    it raises is reported, and the size stays. The learning rate is not touched: a larger batch carries a
    larger one, in proportion as long as it is below the noise scale.

    The noise scale is NaN while its estimate is none, and such a frame changes nothing. A snapshot keeps
    `batch_size`; after a resume make your batches from it, since `on_change` is not called again.

    Args:
        batch_size: The samples of an update as it is, over all micro-batches and ranks.
        on_change: Called with a new size.
        high: The greatest size.
        low: The least size; `multiple_of` if None.
        multiple_of: What sizes are multiples of, such as the size of a micro-batch times the ranks.
        share: The size wanted, as a share of the noise scale.
        tolerance: The factor by which the size wanted has to differ, from 1 on.
        slew_limit: The greatest factor between one size and the next, from 2 on.
        dry_run: Only say what would be done.

    Attributes:
        batch_size: The samples of an update, as set or recommended last.

    Raises:
        TypeError: `on_change` cannot be called.
        ValueError: A number is out of its range, or sizes contradict each other.

    Example:
        `lens.pipe(sl.gradient_noise_scale(), sl.every(100)).subscribe(NoiseScaleBatch(128, high=4096))`
    """

    __slots__ = ("_bounds", "_multiple_of", "_on_change", "_share", "_tolerance")

    def __init__(
        self,
        batch_size: int,
        on_change: Callable[[int], object] | None = None,
        *,
        high: int,
        low: int | None = None,
        multiple_of: int = 1,
        share: float = 1.0,
        tolerance: float = 1.25,
        slew_limit: float = 2.0,
        dry_run: bool = False,
    ) -> None:
        super().__init__(dry_run=dry_run)
        if on_change is not None and not callable(on_change):
            raise TypeError(f"NoiseScaleBatch(on_change={on_change!r}): a function of a batch size, or None")
        low = multiple_of if low is None else low
        sizes = {"multiple_of": multiple_of, "batch_size": batch_size, "low": low, "high": high}
        for name, size in sizes.items():
            # The first of them is what the others are divided by.
            if not is_whole(size) or size < 1 or size % multiple_of:
                of = "" if name == "multiple_of" else f", a multiple of {multiple_of}"
                raise ValueError(f"NoiseScaleBatch({name}={size!r}): a whole number from 1 on{of}")
        if not low <= batch_size <= high:
            raise ValueError(
                f"NoiseScaleBatch(batch_size={batch_size}): it lies from low={low} to high={high}"
            )
        if not is_number(share) or not 0 < share < math.inf:
            raise ValueError(f"NoiseScaleBatch(share={share!r}): a finite number above 0")
        for name, value, least in (("tolerance", tolerance, 1), ("slew_limit", slew_limit, 2)):
            if not is_number(value) or not least <= value < math.inf:
                raise ValueError(f"NoiseScaleBatch({name}={value!r}): a finite number from {least} on")
        self._on_change = on_change
        self._bounds = Bounds(low, high, slew_limit)
        self._multiple_of, self._share, self._tolerance = multiple_of, share, tolerance
        self.batch_size = batch_size

    @property
    def action_topics(self) -> tuple[str, ...]:
        """The topic of its actions."""
        return (_TOPIC,)

    def attached(self) -> None:
        """See `Controller.attached`.

        Raises:
            StreamlensError: Another controller sets the batch size.
        """
        if self.engine is not None and self._on_change is not None:
            self.claim("batch size", None)

    def concerns(self, frame: Frame) -> bool:
        """See `Controller.concerns`: the noise scale of the whole model."""
        return frame.layers == ("",)

    def propose(self, frame: Frame, noted: Any) -> Decision | None:
        """See `Controller.propose`.

        Raises:
            StreamlensError: The frame holds more than one number.
        """
        scale = the_number(self.name, frame)
        old = self.batch_size
        limited = self._bounds.limit(old, self._share * scale)
        # Towards the present size, so that neither a bound nor the slew limit is passed.
        towards = math.floor if limited > old else math.ceil
        new = towards(limited / self._multiple_of) * self._multiple_of
        if max(new / old, old / new) < self._tolerance:
            return None
        deed = f"recommended a batch size of {new} instead of {old}" if self._on_change is None else ""
        cause = f"the gradient noise scale is {scale:.4g} samples at step {frame.step}"
        return Decision(_TOPIC, (float(old),), (float(new),), cause, deed=deed)

    def apply(self, decision: Decision) -> None:
        """Tell the function."""
        size = int(decision.new[0])
        if self._on_change is not None:
            self._on_change(size)
        self.batch_size = size

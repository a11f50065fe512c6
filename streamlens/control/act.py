"""`act`: any function becomes a controller."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from streamlens.control._rates import RateController, check_optimizer
from streamlens.control.bounds import Bounds
from streamlens.control.controller import Controller
from streamlens.control.decision import Decision
from streamlens.errors import StreamlensError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from streamlens.frame import Frame

__all__ = ["act"]

Rule: TypeAlias = Callable[["Frame", float], float | None]
"""A function of a frame and the present value to the value wanted; None changes nothing."""


def act(
    fn: Rule,
    *,
    optimizer: Optimizer | None = None,
    read: Callable[[], float] | None = None,
    write: Callable[[float], None] | None = None,
    name: str = "learning_rate",
    low: float = 0.0,
    high: float = math.inf,
    slew_limit: float | None = None,
    dry_run: bool = False,
) -> Controller:
    """Make a controller of a function: it is given a frame and the present value, and returns the next.

    By default the value is the learning rate (the first group's; the others keep their proportion to
    it). With `read` and `write` it is whatever these read and write, such as a dropout probability.
    Bounds, slew limit, the record of every action, state, agreement across ranks and `dry_run` are given;
    a function that raises or gives NaN changes nothing, nor is it called with a frame that is not finite.
    A function that keeps something from one frame to the next keeps it outside `lens.state_dict()`:
    let an operator such as `ema` or `scan` in front do that.

    Args:
        fn: `fn(frame, value)` returns the value wanted, or None for no change.
        optimizer: Whose learning rate; that of all optimizers of the observed model if None.
        read: Gives the present value of something else.
        write: Sets it.
        name: What the value is called; its actions are the topic `<name>.action`.
        low: The least value set.
        high: The greatest value set.
        slew_limit: The greatest factor by which one action may raise or lower it.
        dry_run: Only say what would be done.

    Returns:
        The controller, to be subscribed to a chain.

    Raises:
        TypeError: `fn` cannot be called, or only one of `read` and `write` is given.
        ValueError: The bounds contradict each other.

    Example:
        >>> def halve_where_it_rises(frame, rate):
        ...     return rate / 2 if frame.values.max() > 0.01 else None
        >>> controller = act(halve_where_it_rises, low=1e-5)
    """
    if not callable(fn):
        raise TypeError(f"act() takes a function of a frame and a value, got {fn!r}")
    bounds = Bounds(low, high, slew_limit)
    if read is None and write is None:
        if name != "learning_rate":
            raise TypeError(f"act(name={name!r}): what is to be steered? Pass read= and write=")
        return _RateRule(fn, optimizer, bounds, dry_run=dry_run)
    if read is None or write is None or optimizer is not None:
        raise TypeError("act() takes either an optimizer, whose rate it sets, or both read= and write=")
    if name == "learning_rate":
        raise TypeError("act(read=, write=) steers something else than the rate: name it, name='dropout'")
    return _Rule(fn, read, write, name, bounds, dry_run=dry_run)


def _called(fn: Rule) -> str:
    return f"act({getattr(fn, '__name__', type(fn).__name__)})"


def _wanted(fn: Rule, frame: Frame, value: float) -> float | None:
    wanted = fn(frame, value)
    if wanted is None:
        return None
    try:
        return float(wanted)
    except (TypeError, ValueError):
        raise StreamlensError(f"{_called(fn)} gave {wanted!r}, which is no number, nor None") from None


class _RateRule(RateController):
    """A function that sets the learning rate."""

    __slots__ = ("_bounds", "_fn")

    def __init__(self, fn: Rule, optimizer: Optimizer | None, bounds: Bounds, *, dry_run: bool) -> None:
        check_optimizer("act", optimizer)
        self._fn, self._bounds = fn, bounds
        super().__init__(optimizer, dry_run=dry_run)

    @property
    def name(self) -> str:
        return _called(self._fn)

    def propose(self, frame: Frame, noted: Any) -> Decision | None:
        old = self.rates()
        if not self.undisturbed(old):
            return None
        wanted = _wanted(self._fn, frame, old[0])
        if wanted is None:
            return None
        shares = [rate / old[0] if old[0] else 1.0 for rate in old]
        new = [self._bounds.limit(rate, wanted * share) for rate, share in zip(old, shares, strict=True)]
        return self.decision(old, new, f"{_called(self._fn)} asked for {wanted:.4g} of {frame.topic}")


class _Rule(Controller):
    """A function that sets whatever it is given the means to set."""

    __slots__ = ("_bounds", "_fn", "_read", "_what", "_write")

    def __init__(
        self,
        fn: Rule,
        read: Callable[[], float],
        write: Callable[[float], None],
        what: str,
        bounds: Bounds,
        *,
        dry_run: bool,
    ) -> None:
        self._fn, self._read, self._write, self._bounds = fn, read, write, bounds
        self._what = what
        super().__init__(dry_run=dry_run)

    @property
    def name(self) -> str:
        return _called(self._fn)

    @property
    def action_topics(self) -> tuple[str, ...]:
        return (f"{self._what}.action",)

    def attached(self) -> None:
        if self.engine is not None:
            self.claim(self._what, None)

    def propose(self, frame: Frame, noted: Any) -> Decision | None:
        old = float(self._read())
        wanted = _wanted(self._fn, frame, old)
        if wanted is None:
            return None
        cause = f"{_called(self._fn)} asked for {wanted:.4g} of {frame.topic}"
        return Decision(self.action_topics[0], (old,), (self._bounds.limit(old, wanted),), cause)

    def apply(self, decision: Decision) -> None:
        self._write(decision.new[0])

"""`Callback`: frames to a function, on a thread of the sink's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from streamlens.frame import Frame
from streamlens.sink import Sink

__all__ = ["Callback"]


class Callback(Sink):
    """Calls a function with a list of frames, at least once a second if there are some.

    The function runs on the sink's own thread, so that it may take its time: training waits for it no
    longer than for any other sink. Its frames lie on the host and may be kept, but other sinks share
    them: their tensors must not be changed in place. What it raises is reported, and training goes on.

    A function that shall be called on the training thread, at once and with the model's own tensors, is
    subscribed itself, without this.

    Args:
        fn: Takes a list of frames, oldest first. A named model's name stands in their topics (`"G/loss"`)
            and layers (`"G.fc"`).
        seconds: How long a frame may wait before the function is called.
        retries: How often it is called again with the same frames when it has raised.

    Raises:
        TypeError: `fn` is not callable.
        ValueError: `seconds` is not positive, or `retries` negative.

    Example:
        >>> lens.pipe(health()).subscribe(Callback(lambda frames: mail(frames[-1].meta["text"])))
    """

    def __init__(
        self, fn: Callable[[list[Frame]], object], *, seconds: float = 1.0, retries: int = 0
    ) -> None:
        if not callable(fn):
            raise TypeError(f"Callback(fn) takes a function of a list of frames, got {fn!r}")
        if not seconds > 0:
            raise ValueError(f"Callback(seconds=) is a number of seconds above 0; got {seconds!r}")
        if retries < 0:
            raise ValueError(f"Callback(retries=) is a number of calls, at least 0; got {retries!r}")
        self._fn = fn
        self.max_latency = seconds
        self.retries = retries

    def write(self, frames: Sequence[Frame]) -> None:
        """Call the function with these frames."""
        self._fn(list(frames))

    def __repr__(self) -> str:
        return f"Callback({getattr(self._fn, '__qualname__', self._fn)!s})"

"""`Sink`: where streams end.

A sink writes frames somewhere: a file, a table, a screen. Only `write` must be written; queueing,
the transfer to the host, retries and the thread it runs on are given.
"""

from __future__ import annotations

import atexit
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, cast

import torch
from reactivex.abc import ObserverBase

from streamlens.errors import StreamlensError
from streamlens.frame import Frame

if TYPE_CHECKING:
    from torch import Tensor

    from streamlens.delivery import Proxy

__all__ = ["ALL_KINDS", "RunInfo", "Sink", "ValueKind", "check_tensors", "refusal", "value_kinds"]

ValueKind = Literal["scalar", "vector", "text", "image"]

ALL_KINDS: Final[frozenset[ValueKind]] = frozenset({"scalar", "vector", "text", "image"})
"""Every kind of value that a frame can carry."""

_IMAGE_CHANNELS: Final = (1, 3, 4)


@dataclass(frozen=True)
class RunInfo:
    """What a sink is told about the run whose frames it is about to receive.

    Attributes:
        id: A hex string of its own for each run; the same after a resume.
        name: The label of the run, or `""`.
        resumed_at: The last completed step of the snapshot that was loaded; None for a fresh run.
        metadata: What else is known about the run.
        resumption: What tells this loading of a snapshot from every other, also from another one of
            the same snapshot; `""` for a fresh run.
    """

    id: str
    name: str = ""
    resumed_at: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    resumption: str = ""


class Sink(ObserverBase[Frame], ABC):
    """The end of one or several chains.

    `open`, `write`, `flush` and `close` are called on the sink's one worker thread, never two at
    once, so that a sink needs no lock of its own unless others read from it. `open` comes before
    the first write, and again before the first write after a `close`. A sink that ends several
    chains closes with the last of them and opens again when it is subscribed again.

    A `write` that raises is tried again with the same frames, so it should write all of them or
    none. What it raises in the end is reported, and training goes on.

    Attributes:
        capacity: How many frames may be queued, those in a write under way included: a write is
            given half of them at most. A full queue holds the run up for 50 ms in all, then drops
            its oldest frames, counted, until it has drained.
        max_bytes: How many bytes of values may be queued, likewise. One frame may always wait,
            however large it is.
        max_latency: Seconds that a frame may wait before the worker takes it.
        retries: How often a failed write is tried again before its frames are given up. What a
            session lost is logged once more, with its number, when the sink closes.
        back_off: Seconds before the first retry; doubled for each one after it. A `SinkError` may ask
            for longer, or for no retry.
        kinds: What the sink can show. A chain that yields the run's own tensors is refused when it is
            subscribed to a sink that shows no vectors. Other frames of another kind are left out,
            counted as dropped and reported once a topic. By default a sink is given everything.

    Example:
        >>> class Printer(Sink):
        ...     def write(self, frames):
        ...         for frame in frames:
        ...             print(frame.topic, frame.step, frame.to_dict())
    """

    capacity: int = 10_000
    max_bytes: int = 256 * 2**20
    max_latency: float = 1.0
    retries: int = 3
    back_off: float = 0.02
    kinds: ClassVar[frozenset[ValueKind]] = ALL_KINDS

    received: Sequence[float] = ()
    """Wall times, in seconds since 1970, at which the frames of the write under way were emitted."""

    def open(self, run: RunInfo) -> None:
        """Get ready to write the frames of a run."""

    @abstractmethod
    def write(self, frames: Sequence[Frame]) -> None:
        """Write frames, oldest first.

        Args:
            frames: Frames on the host. Their tensors may be kept, but other sinks share them:
                they must not be changed in place. A named lens's name stands in their topics
                (`"G/loss"`) and layers (`"G.features.0"`).
        """

    def flush(self) -> None:
        """Bring what was written to where others can read it; comes after each round of writes."""

    def close(self) -> None:
        """Let go of what `open` took.

        A sink that holds frames beyond `write` and cannot keep them raises `SinkError(lost=...)` with
        their number, so that they are not counted as written.
        """

    def subscribed(self, dispose: Callable[[], None]) -> None:
        """Get to know that a chain ends here from now on; by default that is of no interest.

        Args:
            dispose: Ends the chain, for a sink that ends before the run does. Called on the thread that
                observes and trains.
        """

    def wall_times(self, frames: Sequence[Frame]) -> Sequence[float]:
        """When each of these frames was emitted, for use within `write`.

        Args:
            frames: The frames that `write` was given.

        Returns:
            Seconds since 1970, one a frame; the present time for frames that come from elsewhere.
        """
        if len(self.received) == len(frames):
            return self.received
        return [time.time()] * len(frames)

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until everything that the sink was given so far is written and flushed.

        Args:
            timeout: Seconds to wait at most; without limit by default.

        Returns:
            Whether that is done; False if time ran out or the flush failed.
        """
        from streamlens.delivery import drain

        return drain(self, timeout)

    # -- as the observer of an Observable that is no stream of ours --------------------------

    def on_next(self, frame: Frame) -> None:
        """Receive a frame from an Observable that was given the sink itself.

        An Observable does not say which of several subscriptions of one sink it serves: to end
        several plain Observables in one sink, merge them first.
        """
        self._plain_proxy().on_next(frame)

    def on_completed(self) -> None:
        """Write what is queued, then close."""
        self._plain_proxy().on_completed()

    def on_error(self, error: Exception) -> None:
        """Report an error that ended the Observable, write what is queued, then close."""
        self._plain_proxy().fail(error)

    def _plain_proxy(self) -> Proxy:
        proxy: Proxy | None = self.__dict__.get("_plain")
        if proxy is None or proxy.detached:
            from streamlens.delivery import default_delivery

            proxy = self.__dict__["_plain"] = default_delivery().connect(self, "an Observable")
        return proxy


@atexit.register
def _finish_workers() -> None:
    # Exit handlers run in reverse order. This one is registered here, and not by the delivery that
    # is imported with the first subscription, so that sources which close at exit come before it:
    # their last frames are still written.
    process = sys.modules.get("streamlens.delivery.process")
    if process is not None:
        process.finish_at_exit()


def check_tensors(sink: Sink, plan: str) -> None:
    """Raise for a sink that could show nothing of a chain of tensors.

    Args:
        sink: The sink that the chain ends in.
        plan: The chain, as text.

    Raises:
        StreamlensError: It shows no vectors.
    """
    if sink.kinds.isdisjoint({"vector", "image"}):
        name = type(sink).__name__
        raise StreamlensError(
            f"{name} shows {' and '.join(sorted(sink.kinds))} values, and the chain {plan} yields the "
            f"run's own tensors: {_REMEDY}, before subscribing {name}"
        )


_REMEDY: Final = "reduce them first, for example with norm() or histogram()"


def refusal(frame: Frame, sink: Sink) -> StreamlensError | None:
    """Why a sink cannot show a frame; None if it can."""
    if sink.kinds is ALL_KINDS:
        return None
    kinds = value_kinds(frame)
    if not sink.kinds.isdisjoint(kinds):
        return None
    remedy = f": {_REMEDY}" if "vector" in kinds else ""
    return StreamlensError(
        f"{type(sink).__name__} shows {' and '.join(sorted(sink.kinds))} values, and {frame.topic!r} holds "
        f"{kinds[0]} values{remedy}; its frames are left out here"
    )


def value_kinds(frame: Frame) -> tuple[ValueKind, ...]:
    """In which ways a frame can be shown, the most telling first.

    - `"text"`: its `meta` has a sentence under `"text"`;
    - `"scalar"`: a number a layer, or a number a layer and named component;
    - `"image"`: unsigned bytes of shape (height, width, 1, 3 or 4) a layer;
    - `"vector"`: any other tensor, and images too.

    Args:
        frame: The frame to look at.

    Returns:
        The kinds that apply.
    """
    text: tuple[ValueKind, ...] = ("text",) if "text" in frame.meta else ()
    if frame.stacked:
        values = cast("Tensor", frame.values)
        return (*text, *_kinds_of(values.shape[1:], values.dtype, len(frame.components)))
    kinds = {_kinds_of(value.shape, value.dtype, len(frame.components)) for value in frame.values}
    if len(kinds) == 1:
        return (*text, *kinds.pop())
    return (*text, "vector")


def _kinds_of(shape: torch.Size, dtype: torch.dtype, components: int) -> tuple[ValueKind, ...]:
    if not shape or (len(shape) == 1 and shape[0] == components):
        return ("scalar",)
    if dtype == torch.uint8 and len(shape) == 3 and shape[2] in _IMAGE_CHANNELS:
        return ("image", "vector")
    return ("vector",)

"""`Delivery`: what a runtime hands the ends of its chains to."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from reactivex.abc import DisposableBase, ObserverBase

from streamlens.delivery import process
from streamlens.delivery.channel import Channel
from streamlens.delivery.items import Item, SinkStats, Writer
from streamlens.delivery.transfer import Burst, Ticket, on_host
from streamlens.errors import StreamlensError
from streamlens.frame import Frame, Kind
from streamlens.sink import RunInfo, Sink

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Delivery", "Proxy", "default_delivery", "drain"]

_CHANNEL: Final = "_streamlens_channel"
"""Where a sink keeps its channel: the same one whichever deliveries it is connected to."""


class Proxy(ObserverBase[Frame], DisposableBase):
    """One chain's end at a sink. `Delivery.connect` makes it.

    Attributes:
        detached: Whether the chain has ended.
    """

    __slots__ = ("_channel", "_delivery", "_generation", "_rivals", "_writer", "detached")

    def __init__(self, delivery: Delivery, channel: Channel, writer: Writer) -> None:
        self._delivery = delivery
        self._channel = channel
        self._writer = writer
        self._generation = process.current_generation()
        self._rivals: set[tuple[str, str]] = set()
        self.detached = False

    def on_next(self, frame: Frame) -> None:
        """Queue a frame for the sink. Copies borrowed values, waits for nothing but a full queue."""
        if self.detached or self._generation != process.current_generation():
            return
        try:
            self._queue(frame)
        except Exception as error:
            self._delivery.report(error, f"sink {self._channel.name}")

    def on_completed(self) -> None:
        """The chain has completed."""
        self.dispose()

    def on_error(self, error: Exception) -> None:
        """The chain has ended with an error."""
        self.dispose()

    def fail(self, error: Exception) -> None:
        """The chain has ended with an error that nobody else reports."""
        self.dispose()
        self._delivery.report(error, f"the stream into {self._channel.name} (it has ended)")

    def dispose(self) -> None:
        """Let go of the sink, which closes with its last chain; does not wait for that."""
        if not self.detached:
            self.detached = True
            if self._generation == process.current_generation():
                self._channel.detach(self._writer)

    def _queue(self, frame: Frame) -> None:
        if frame.borrowed:
            frame = self._delivery.owned(frame)
        values = frame.values
        nbytes = values.nbytes if not isinstance(values, tuple) else sum(map(_nbytes, values))
        doubt = self._delivery.doubt_of(frame)
        ticket = None if doubt is None and on_host(frame) else self._delivery.board(frame, doubt)
        writer = self._writer
        item = Item(frame if ticket is None else None, ticket, writer.session, nbytes, time.time())
        topic = f"{frame.source}/{frame.topic}" if frame.source else frame.topic
        rival = self._channel.offer(item, writer, topic, frame.step, frame.layers)
        if rival is not None and (topic, rival.chain) not in self._rivals:
            self._rivals.add((topic, rival.chain))
            raise StreamlensError(
                f"two chains write {topic!r} of the same layers and steps to one {self._channel.name}: "
                f"{rival.chain!r} and {writer.chain!r}; the second one's frames are left out. Give one of "
                "them a topic of its own with rename(), or the models names with observe(model, name=...)"
            )


class Delivery:
    """Between the chains of one runtime and the sinks they end in.

    Frames are queued as they are handed over; only what lies on a device waits for `end_burst`,
    so that all sinks share one transfer a burst.

    Args:
        run: Tells what sinks get to know about the run, when the first frame comes.
        report: Receives failures and where they happened. If it raises, for a failure on a
            worker thread, the exception comes out of the next `end_burst`, `flush` or `close`.
    """

    def __init__(self, run: Callable[[], RunInfo], report: Callable[[Exception, str], None]) -> None:
        self._run = run
        self._report = report
        self._channels: list[Channel] = []
        self._retired: list[tuple[weakref.ref[Channel], str, SinkStats]] = []
        self._proxies: list[Proxy] = []
        self._burst: Burst | None = None
        self._owned: tuple[Frame, Frame] | None = None
        self._doubt: tuple[int, Tensor] | None = None
        self._raised: Exception | None = None

    def connect(self, sink: Sink, chain: str) -> Proxy:
        """The observer for a chain that ends in `sink`.

        Args:
            sink: The sink; it may end other chains too, of this delivery or of others.
            chain: The name of the chain in error messages.

        Returns:
            An observer that detaches when the chain completes, fails, or disposes it.
        """
        channel = _channel_of(sink)
        self._retire()
        self._retired = [entry for entry in self._retired if entry[0]() is not channel]
        if channel not in self._channels:
            self._channels.append(channel)
        proxy = Proxy(self, channel, channel.attach(chain, self._run, self._report_from_worker))
        self._proxies = [p for p in self._proxies if not p.detached]
        self._proxies.append(proxy)
        return proxy

    def _retire(self) -> None:
        """Keep no sink that nobody is subscribed to any more, only what became of its frames."""
        for channel in tuple(self._channels):
            if channel.at_rest:
                self._channels.remove(channel)
                self._retired.append((weakref.ref(channel), channel.name, channel.stats()))

    def end_burst(self) -> None:
        """Start the transfer of what was handed over since the last burst; waits for nothing."""
        self._owned = None
        burst, self._burst = self._burst, None
        if burst is not None:
            try:
                burst.settle()
            except Exception as error:
                self._report(error, "transfer to the host")
        self._raise_pending()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until every sink has written and flushed what it was given.

        Args:
            timeout: Seconds to wait at most, for all sinks together; without limit by default.

        Returns:
            Whether all of them did; False if time ran out or a write or flush failed.
        """
        self.end_burst()
        deadline = _deadline(timeout)
        asked = [(channel, channel.ask_flush()) for channel in self._live_channels()]
        done = [channel.await_flush(flush, _left(deadline)) for channel, flush in asked]
        self._raise_pending()
        return all(done)

    def close(self, timeout: float | None = None) -> bool:
        """Detach every chain; write, flush and close the sinks that no other delivery uses.

        Args:
            timeout: Seconds to wait at most, for all sinks together; without limit by default.
                What is not written by then is reported and given up.

        Returns:
            Whether everything was written.
        """
        self.end_burst()
        deadline = _deadline(timeout)
        for proxy in self._proxies:
            proxy.dispose()
        self._proxies.clear()
        channels = self._live_channels()
        asked = [(channel, channel.ask_flush()) for channel in channels if channel.in_use]
        done = [channel.await_flush(flush, _left(deadline)) for channel, flush in asked]
        done += [channel.finish(deadline) for channel in channels if not channel.in_use]
        process.restore_sigterm()
        self._retire()
        self._raise_pending()
        return all(done)

    def renew(self) -> None:
        """The run goes on from a snapshot: sinks that have begun to write it close and open again."""
        self.end_burst()
        for channel in self._live_channels():
            channel.renew(self._run)

    def stats(self) -> dict[str, SinkStats]:
        """The counters of every sink that this delivery was connected to, by its class's name."""
        stats: dict[str, SinkStats] = {}
        counted = [(channel.name, channel.stats()) for channel in self._live_channels()]
        counted += [
            (name, last if (channel := ref()) is None else channel.stats())
            for ref, name, last in self._retired
        ]
        for base, counts in counted:
            name, ordinal = base, 1
            while name in stats:
                ordinal += 1
                name = f"{base} #{ordinal}"
            stats[name] = counts
        return stats

    def report(self, error: Exception, where: str) -> None:
        """Pass on a failure on the training thread."""
        self._report(error, where)

    def owned(self, frame: Frame) -> Frame:
        """A copy of a borrowed frame that outlives its lease; sinks of one burst share it."""
        held = self._owned
        if held is None or held[0] is not frame:
            held = self._owned = (frame, frame.clone())
        return held[1]

    def doubt(self, step: int, overflow: Tensor) -> None:
        """Only a device knows whether this step is one; if not, what is NaN of it is not written.

        Args:
            step: The step.
            overflow: Above 0 if it is none. Of several updates in one step any may be none.
        """
        if self._doubt is not None and self._doubt[0] == step:
            overflow = self._doubt[1] + overflow.to(self._doubt[1].device, non_blocking=True)
        self._doubt = (step, overflow)

    def doubt_of(self, frame: Frame) -> Tensor | None:
        """Above 0 if a frame's step was none; None where that is certain."""
        doubt = self._doubt
        return doubt[1] if doubt is not None and (frame.step, frame.kind) == (doubt[0], Kind.STEP) else None

    def board(self, frame: Frame, doubt: Tensor | None = None) -> Ticket:
        """Let a frame that lies on a device travel with the burst under way."""
        while True:
            burst = self._burst
            if burst is None:
                burst = self._burst = Burst()
            ticket = burst.add(frame, doubt)
            if ticket is not None:
                return ticket
            # A worker has lost patience and started the transfer: this is the next burst.
            self._burst = None

    def _live_channels(self) -> list[Channel]:
        return [c for c in self._channels if c.generation == process.current_generation()]

    def _report_from_worker(self, error: Exception, where: str) -> None:
        try:
            self._report(error, where)
        except Exception as raised:
            self._raised = raised

    def _raise_pending(self) -> None:
        raised, self._raised = self._raised, None
        if raised is not None:
            raise raised


def default_delivery() -> Delivery:
    """The delivery that serves Observables which are no streams of ours."""
    from streamlens.runtime import default_runtime

    return default_runtime().delivery


def drain(sink: Sink, timeout: float | None = None) -> bool:
    """Wait until a sink has written and flushed what it was given, from wherever.

    Args:
        sink: The sink.
        timeout: Seconds to wait at most; without limit by default.

    Returns:
        Whether it did; False if time ran out, a write or flush failed, or the sink itself asks.
    """
    channel: Channel | None = sink.__dict__.get(_CHANNEL)
    if channel is None or channel.generation != process.current_generation():
        return True
    return channel.await_flush(channel.ask_flush(), timeout)


def _channel_of(sink: Sink) -> Channel:
    if not isinstance(sink, Sink):
        raise TypeError(f"a Delivery connects sinks, got {sink!r}; subscribe callables to the stream itself")
    channel: Channel | None = sink.__dict__.get(_CHANNEL)
    if channel is None or channel.generation != process.current_generation():
        channel = sink.__dict__[_CHANNEL] = Channel(sink)
    return channel


def _deadline(timeout: float | None) -> float:
    return float("inf") if timeout is None else time.monotonic() + timeout


def _left(deadline: float) -> float:
    return min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)


def _nbytes(value: Tensor) -> int:
    return value.numel() * value.element_size()

"""What a sink's queue holds, and what is said about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamlens.frame import Frame
from streamlens.sink import RunInfo

if TYPE_CHECKING:
    from streamlens.delivery.transfer import Ticket

__all__ = ["Flush", "Item", "Session", "SinkStats", "Writer", "as_exception", "labelled"]


@dataclass(frozen=True)
class SinkStats:
    """What became of the frames that were given to a sink.

    `emitted == written + dropped + queued` holds at any time.

    Attributes:
        emitted: Frames given to the sink.
        written: Frames that its `write` took and that it has not lost since.
        dropped: Frames lost: at a full queue, in failed writes, at a close that failed or ran out of time,
            and those that the sink cannot show, that another chain writes already, or whose step
            turned out to be none.
        queued: Frames that wait or are in a write under way.
        failed: Those of the dropped frames whose write failed for good, or that the sink's closing lost.
        last_error: The last exception of the sink.
    """

    emitted: int
    written: int
    dropped: int
    queued: int
    failed: int
    last_error: Exception | None


class Session:
    """The time between the first chain's subscription to a sink and the end of the last.

    Args:
        run: Gives what the sink is told when it opens.
        report: Receives failures and where they happened.
        before: What it goes on from, where the run went back to a snapshot.
    """

    __slots__ = ("_before", "_info", "abandoned", "ask", "ended", "failed", "report", "unflushed")

    def __init__(
        self,
        run: Callable[[], RunInfo],
        report: Callable[[Exception, str], None],
        before: Session | None = None,
    ) -> None:
        self._before = before
        self.ask = run
        self._info: RunInfo | None = None
        self.report = report
        self.ended = False
        self.abandoned = False
        """Whether `close(timeout)` ran out: what is failing now is not tried again."""
        self.failed = 0
        """Frames whose write failed for good."""
        self.unflushed = False
        """Whether the last flush failed, or the closing of the sink."""

    @property
    def run(self) -> RunInfo:
        """The run as it was when this was first asked for."""
        if self._info is None:
            self._info = self.ask()
        return self._info

    @property
    def sound(self) -> bool:
        """Whether everything that was given to the sink was written and flushed, so far."""
        whole = not (self.failed or self.unflushed)
        return whole and (self._before is None or self._before.sound)

    @property
    def begun(self) -> bool:
        """Whether `run` was asked for, because a frame came."""
        return self._info is not None


class Writer:
    """A chain that ends in a channel."""

    __slots__ = ("chain", "session")

    def __init__(self, chain: str, session: Session) -> None:
        self.chain = chain
        self.session = session


class Flush:
    """What somebody waits for who asked for a flush."""

    __slots__ = ("done", "failed")

    def __init__(self) -> None:
        self.done = False
        self.failed = False


@dataclass(slots=True)
class Item:
    """A frame in a queue: on the host, or on its way there.

    Attributes:
        frame: The frame as it was emitted; the ticket has it where there is one.
        ticket: The transfer to the host, if it needs one.
        session: The session it belongs to.
        nbytes: The size of its values.
        received: When it was emitted, in seconds since 1970.
    """

    frame: Frame | None
    ticket: Ticket | None
    session: Session
    nbytes: int
    received: float

    def on_host(self) -> Frame | None:
        """The frame on the host, under its label; waits for the transfer. None if its step was none."""
        frame = self.frame
        if self.ticket is not None:
            frame = self.ticket.take()
            if self.ticket.void:
                return None
        assert frame is not None
        return labelled(frame) if frame.source else frame


def labelled(frame: Frame) -> Frame:
    """A named lens's frame under the names that tell models apart: `G/topic`, `G.layer`."""
    source = frame.source
    layers = tuple(f"{source}.{layer}" if layer else source for layer in frame.layers)
    return frame.replace(topic=f"{source}/{frame.topic}", layers=layers, source="")


def as_exception(raised: BaseException) -> Exception:
    """What a sink raised, as an exception that can be reported."""
    if isinstance(raised, Exception):
        return raised
    return RuntimeError(f"a sink raised {type(raised).__name__}: {raised}")

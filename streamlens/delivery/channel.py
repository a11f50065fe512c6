"""`Channel`: one sink's queue, counters and worker thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from streamlens.delivery import process
from streamlens.delivery.backlog import Backlog
from streamlens.delivery.claims import Claims
from streamlens.delivery.items import Flush, Item, Session, SinkStats, Writer, as_exception
from streamlens.delivery.tally import Tally
from streamlens.errors import SinkError, StreamlensError
from streamlens.frame import Frame
from streamlens.sink import RunInfo, Sink, refusal

__all__ = ["Channel"]

_PATIENCE: Final = 0.05
"""Seconds that a full queue may hold the training thread up, until it has drained."""
_BATCH: Final = 1024
"""The most frames of one write: what is lost at once when a write fails for good."""
_SHORTEST_WAIT: Final = 0.001
"""Seconds that a worker sleeps at least, however small its sink's `max_latency`."""


class Channel:
    """What stands between the chains that end in a sink and the sink's methods.

    Args:
        sink: The sink, whose methods this channel alone calls.
    """

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.name = type(sink).__name__
        self.generation = process.current_generation()
        # One lock, reentrant because the SIGTERM handler may run while the main thread holds it;
        # waiting on a condition lets go of it altogether, also from there.
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._done = threading.Condition(self._lock)
        self._queue = Backlog(sink)
        self._tally = Tally()
        self._patience = _PATIENCE
        self._urgent = False
        self._flushes: list[Flush] = []
        self._writers: list[Writer] = []
        self._claims: Claims[Writer] = Claims()
        self._session: Session | None = None
        # The worker's own.
        self._thread: threading.Thread | None = None
        self._opened: Session | None = None
        self._refused: set[str] = set()

    # -- on the threads that emit and wait ---------------------------------------------------

    def attach(
        self, chain: str, run: Callable[[], RunInfo], report: Callable[[Exception, str], None]
    ) -> Writer:
        """Let one more chain end here."""
        with self._lock:
            if self._session is None or self._session.ended:
                self._session = Session(run, report)
            writer = Writer(chain, self._session)
            self._writers.append(writer)
            return writer

    def detach(self, writer: Writer) -> None:
        """The chain has ended; with the last one the sink closes, once it has written everything."""
        with self._lock:
            if writer in self._writers:
                self._writers.remove(writer)
                self._claims.release(writer)
                if not self._writers:
                    self.end()

    def renew(self, run: Callable[[], RunInfo]) -> None:
        """Close the sink once what is queued is written, and open it again with the next frame.

        Args:
            run: Whose run has changed. Another's session stays as it is, and so does one that has
                not begun, since it will be told the run as it is now.
        """
        with self._lock:
            old = self._session
            if old is None or old.ended or old.ask is not run or not old.begun:
                return
            self._session = Session(run, old.report, old)
            _ = self._session.run  # as it is now, though the sink may open later
            for writer in self._writers:
                writer.session = self._session
            # What was written of steps that come again is void.
            self._claims = Claims()
            old.ended = True
            self._rouse()

    @property
    def at_rest(self) -> bool:
        """Whether no chain ends here, nothing waits and no worker runs."""
        return not self.in_use and self._thread is None and not self._queue

    @property
    def in_use(self) -> bool:
        """Whether some chain ends here."""
        return bool(self._writers)

    def end(self) -> None:
        """Close the sink once everything queued is written; does not wait."""
        with self._lock:
            if self._session is not None:
                self._session.ended = True
            self._rouse()

    def offer(
        self, item: Item, writer: Writer, topic: str, step: int, layers: tuple[str, ...]
    ) -> Writer | None:
        """Queue a frame; cheap, unless the queue is full.

        Returns:
            The chain that has written one of these layers at this step already, if there is one;
            the frame is dropped then.
        """
        with self._lock:
            self._tally.emitted += 1
            rival = self._claims.claim(writer, topic, step, layers)
            if rival is not None:
                self._tally.dropped += 1
                return rival
            if self._thread is None:
                self._start(item.session)
            if not self._queue.roomy(item.nbytes):
                self._make_room(item.nbytes)
            self._queue.add(item)
            if not self._urgent and self._queue.half_full:
                self._rouse()
        return None

    def ask_flush(self) -> Flush:
        """Have the worker write and flush what is queued now; for `await_flush`."""
        flush = Flush()
        with self._lock:
            if self._thread is not None:
                self._flushes.append(flush)
                self._rouse()
            return flush

    def await_flush(self, flush: Flush, timeout: float | None) -> bool:
        """Wait for that flush.

        Returns:
            Whether all frames were written and flushed; False if time ran out, something failed,
            or the sink's own worker asks.
        """
        with self._lock:
            if self._thread is threading.current_thread():
                return False
            done = self._done.wait_for(lambda: flush.done or self._thread is None, timeout)
            return done and not flush.failed

    def finish(self, deadline: float) -> bool:
        """Wait until the worker has closed the sink and ended; give up what is left at `deadline`.

        Args:
            deadline: On the monotonic clock.

        Returns:
            Whether everything was written in time, with no write given up since the sink opened.
        """
        with self._lock:
            thread, session = self._thread, self._session
            if thread is None or thread is threading.current_thread():
                return session is None or session.sound
            left = min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
            in_time = self._done.wait_for(lambda: self._thread is not thread, left)
            if not in_time:
                waiting, in_write = len(self._queue), self._queue.in_write
                for given_up in (self._opened, session):
                    if given_up is not None:
                        given_up.abandoned = True
                self._drop(waiting)
                self._wake.notify_all()
        if in_time:
            # It has nothing left to do but return.
            thread.join(1.0)
            return session is None or session.sound
        error = StreamlensError(
            f"{self.name} did not finish in time: {waiting} frames were lost and {in_write} are in a write "
            "that has not come back; allow it more with close(timeout=...)"
        )
        if session is not None:
            self._fail(error, session)
        return False

    def stats(self) -> SinkStats:
        """The counters, all of one moment."""
        with self._lock:
            return self._tally.stats(len(self._queue) + self._queue.in_write)

    def _rouse(self) -> None:
        self._urgent = True
        self._wake.notify_all()

    def _start(self, session: Session) -> None:
        try:
            # Asked for here, where the run does not change meanwhile.
            _ = session.run
            thread = threading.Thread(target=self._work, name=f"streamlens-sink-{self.name}", daemon=True)
            thread.start()
        except Exception:
            self._tally.dropped += 1
            raise
        self._thread = thread
        self._tally.begin()
        process.worker_started(self)

    def _make_room(self, nbytes: int) -> None:
        if self._patience > 0 and threading.current_thread() is not self._thread and self._queue:
            ticket = self._queue.oldest.ticket
            if ticket is not None:
                # A burst larger than the queue: the worker cannot wait for its end.
                ticket.settle()
            self._rouse()
            start = time.monotonic()
            self._done.wait_for(lambda: self._queue.roomy(nbytes), self._patience)
            self._patience -= time.monotonic() - start
        while not self._queue.roomy(nbytes):
            self._drop(1)
            self._tally.overrun += 1

    def _drop(self, count: int) -> None:
        self._queue.drop(count)
        self._tally.dropped += count

    # -- on the worker -----------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._urgent:
                    self._wake.wait(max(_SHORTEST_WAIT, self.sink.max_latency))
                self._urgent = False
                asked, pending, failed = self._flushes, len(self._queue), self._tally.failed
                self._flushes = []
                hurry = bool(asked) or (self._session is not None and self._session.ended)
            wrote = self._drain(pending, hurry)
            flushed = self._opened is None or not (wrote or hurry) or self._call(self.sink.flush)
            with self._lock:
                for flush in asked:
                    flush.done, flush.failed = True, not flushed or self._tally.failed > failed
                if not self._queue:
                    self._patience = _PATIENCE
                session = self._opened or self._session
                if session is not None:
                    session.unflushed = not flushed
                over = not self._queue and session is not None and session.ended
                self._done.notify_all()
            if over and self._retire():
                return

    def _drain(self, pending: int, hurry: bool) -> bool:
        """Write the frames that were queued when this round began."""
        wrote = False
        while pending > 0:
            with self._lock:
                batch = self._queue.take(min(pending, _BATCH), hurry)
                self._done.notify_all()
            if not batch:
                break
            pending -= len(batch)
            wrote = self._write(batch) or wrote
        return wrote

    def _write(self, batch: list[Item]) -> bool:
        session = batch[0].session
        frames: list[Frame] = []
        received: list[float] = []
        for item in batch:
            try:
                frame = item.on_host()
                refused = None if frame is None else refusal(frame, self.sink)
            except Exception as error:
                self._count(session, failed=1)
                self._fail(error, session)
                continue
            if frame is not None and refused is None:
                frames.append(frame)
                received.append(item.received)
                continue
            self._count(session, dropped=1)
            if frame is not None and refused is not None and frame.topic not in self._refused:
                self._refused.add(frame.topic)
                self._fail(refused, session)
        if not frames:
            return False
        failure = self._try_write(session, frames, received)
        if failure is None:
            self._count(session, written=len(frames))
            return True
        self._count(session, failed=len(frames))
        self._fail(failure, session)
        return False

    def _try_write(self, session: Session, frames: list[Frame], received: list[float]) -> Exception | None:
        failure: Exception | None = None
        for attempt in range(max(0, self.sink.retries) + 1):
            if failure is not None and not self._wait_to_retry(session, failure, attempt):
                break
            try:
                self._open(session)
                self.sink.received = received
                self.sink.write(frames)
            except BaseException as raised:  # a worker that dies would stall its sink for good
                failure = as_exception(raised)
            else:
                return None
        return failure

    def _wait_to_retry(self, session: Session, failure: Exception, attempt: int) -> bool:
        """Whether the write is worth another attempt; it is time for that then."""
        wait = self.sink.back_off * 2 ** (attempt - 1)
        if isinstance(failure, SinkError):
            if not failure.retry:
                return False
            wait = max(wait, failure.after)
        with self._lock:
            return not self._wake.wait_for(lambda: session.abandoned, wait)

    def _open(self, session: Session) -> None:
        if self._opened is not session:
            self._close()
            self.sink.open(session.run)
            self._opened = session

    def _close(self) -> None:
        if self._opened is not None:
            if not self._call(self.sink.close):
                self._opened.unflushed = True
            self._opened = None
            self._refused.clear()

    def _call(self, hook: Callable[[], None]) -> bool:
        try:
            hook()
        except BaseException as raised:  # as above
            if self._opened is not None:
                failure = as_exception(raised)
                if isinstance(failure, SinkError) and failure.lost:
                    self._take_back(self._opened, failure.lost)
                self._fail(failure, self._opened)
            return False
        return True

    def _take_back(self, session: Session, lost: int) -> None:
        """Count frames as failed that a `write` took and that are lost all the same."""
        with self._lock:
            session.failed += lost
            self._tally.written -= lost
            self._tally.dropped += lost
            self._tally.failed += lost

    def _retire(self) -> bool:
        """Close the sink and end the thread, unless more frames have come meanwhile."""
        self._close()
        with self._lock:
            if self._queue:
                return False
            self._tally.tell(self.name)
            self._thread = None
            process.worker_ended(self)
            self._done.notify_all()
        return True

    def _count(self, session: Session, written: int = 0, dropped: int = 0, failed: int = 0) -> None:
        with self._lock:
            session.failed += failed
            self._tally.written += written
            self._tally.dropped += dropped + failed
            self._tally.failed += failed
            if self._queue.finished(written + dropped + failed):
                self._done.notify_all()

    def _fail(self, error: Exception, session: Session) -> None:
        self._tally.last_error = error
        session.report(error, f"sink {self.name}")

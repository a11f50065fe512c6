"""`redis`: the frames that `RedisStream` sinks of any number of processes write, as one Observable."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from typing import Any, Final

from reactivex import Observable
from reactivex.abc import DisposableBase, ObserverBase, SchedulerBase
from reactivex.disposable import Disposable

from streamlens.errors import StreamlensError, missing_package
from streamlens.frame import Frame
from streamlens.runs.codec import Layout
from streamlens.runs.messages import layout_of, unpack

__all__ = ["RedisFrames", "redis"]

_log = logging.getLogger("streamlens")

_BLOCK: Final = 0.2
"""Seconds that the server may keep an empty read waiting: how long a disposal takes at most."""
_BATCH: Final = 1000
_LONGEST_WAIT: Final = 5.0


def redis(
    url: str = "redis://localhost:6379/0",
    stream: str = "streamlens",
    *,
    run: str | None = None,
    start: str = "0",
    ends: int | None = None,
    timeout: float = 5.0,
) -> RedisFrames:
    """The frames that processes write to a Redis stream, as they come.

    Each is the frame that the sink was given, bit for bit, once and in the writer's order. Frames of several
    runs come interleaved: each is labelled in `frame.source` with its run's name, or the first eight digits
    of its id, so that operators keep them apart. With `run=`, those of this one come as they are.

    Reading begins with a subscription, on a thread of its own, on which frames are delivered, and goes on
    until the subscription is disposed of. Several subscriptions read apart: `reactivex.operators.share()`
    makes them one. A server that is gone is waited for; frames that were dropped from the stream before they
    were read are counted in `lost` and reported. Steps may come again where a run was resumed: a stream
    cannot take back what it gave.

    Args:
        url: The server.
        stream: The key of the stream.
        run: The name or id of the one run whose frames are wanted.
        start: From where on: `"0"` is everything that is there, `"$"` what comes from now on, an entry's id
            (such as an earlier reader's `position`) what follows it.
        ends: After how many sinks have closed the stream is complete; never by default.
        timeout: Seconds to wait for an answer of the server.

    Raises:
        ImportError: The `redis` package is missing.
        ValueError: An URL of another scheme, or `ends` below 1.

    Example:
        >>> redis("redis://collector:6379").pipe(topic("loss"), ema(0.9)).subscribe(print)  # doctest: +SKIP
    """
    try:
        from redis import Redis
    except ImportError as error:
        raise missing_package("sources.redis()", "redis", "redis") from error
    if ends is not None and ends < 1:
        raise ValueError(f"redis(ends={ends!r}): a number of sinks from 1 on, or None")
    client = Redis.from_url(
        url, socket_timeout=timeout + _BLOCK, socket_connect_timeout=timeout, retry=None, protocol=2
    )
    return RedisFrames(client, stream, run, start, ends)


class RedisFrames(Observable[Frame]):
    """What `redis()` gives.

    Attributes:
        position: The id of the last entry that was read by any subscription; pass it as `start=` to go on.
        lost: Frames that had been dropped from the stream before they were read.
    """

    def __init__(self, client: Any, stream: str, run: str | None, start: str, ends: int | None) -> None:
        super().__init__()
        self.position = start
        self.lost = 0
        self._client = client
        self._stream = stream
        self._run = run
        self._start = start
        self._ends = ends

    def _subscribe_core(
        self, observer: ObserverBase[Frame], scheduler: SchedulerBase | None = None
    ) -> DisposableBase:
        reader = _Reader(self, observer)
        reader.start()
        return Disposable(reader.stop)


class _Reader(threading.Thread):
    """One subscription."""

    def __init__(self, frames: RedisFrames, observer: ObserverBase[Frame]) -> None:
        super().__init__(name="streamlens-redis", daemon=True)
        self._frames = frames
        self._observer = observer
        self._client = frames._client
        self._stream = frames._stream
        self._stopping = threading.Event()
        self._layouts: dict[bytes, Layout] = {}
        self._next: dict[str, int] = {}
        self._ended = 0
        self._position = frames._start

    def stop(self) -> None:
        self._stopping.set()

    def run(self) -> None:
        """Read and deliver until it is over."""
        try:
            self._read()
        except Exception as error:
            self._observer.on_error(error)

    def _read(self) -> None:
        from redis import exceptions

        wait = 0.0
        while not self._stopping.wait(wait):
            try:
                if self._position == "$":
                    self._position = self._frames.position = self._last()
                found = self._client.xread({self._stream: self._position}, _BATCH, int(_BLOCK * 1000))
                entries = [entry for _, part in found for entry in part]
                self._fetch_layouts(fields for _, fields in entries)
            except (exceptions.ConnectionError, exceptions.TimeoutError) as error:
                if not wait:
                    _log.warning("the Redis server of %r is gone, and waited for: %s", self._stream, error)
                wait = min(2 * wait or 0.1, _LONGEST_WAIT)
                continue
            wait = 0.0
            for name, fields in entries:
                if self._stopping.is_set():
                    return
                self._take(fields)
                self._position = self._frames.position = name.decode()
                if self._ended == self._frames._ends:
                    self._observer.on_completed()
                    return

    def _last(self) -> str:
        """The id of the newest entry: what comes after it is new, also if nothing comes for a while."""
        newest = self._client.xrevrange(self._stream, count=1)
        return newest[0][0].decode() if newest else "0"

    def _fetch_layouts(self, entries: Iterable[Mapping[bytes, bytes]]) -> None:
        for name in {fields[b"layout"] for fields in entries if b"layout" in fields} - self._layouts.keys():
            text = self._client.hget(f"{self._stream}:layouts", name)
            if text is None:
                raise StreamlensError(
                    f"{self._stream!r} has frames without the layout that they name: the hash "
                    f"'{self._stream}:layouts' was deleted"
                )
            self._layouts[name] = layout_of(text.decode())

    def _take(self, fields: Mapping[bytes, bytes]) -> None:
        try:
            run, name = fields[b"run"].decode(), fields[b"name"].decode()
            writer = fields[b"writer"].decode()
        except KeyError as error:
            raise StreamlensError(
                f"{self._stream!r} has entries that no RedisStream sink has written: give its stream a key "
                "of its own"
            ) from error
        if self._frames._run not in (None, run, name):
            return
        event = fields.get(b"event")
        if event is not None:
            self._ended += event == b"ended"
            return
        number = int(fields[b"number"])
        # Who begins in the middle cannot know what came before.
        expected = self._next.get(writer, 0 if self._frames._start == "0" else number)
        if number < expected:
            return  # the answer to a write was lost, and the write repeated
        self._next[writer] = number + 1
        if number > expected:
            self._frames.lost += number - expected
            _log.warning(
                "%d frames of run %s never came to, or were dropped from %r before they were read",
                number - expected,
                name or run,
                self._stream,
            )
        frame = unpack(self._layouts[fields[b"layout"]], fields[b"head"].decode(), fields[b"data"])
        if self._frames._run is None:
            label = name or run[:8]
            frame = frame.replace(source=f"{label}.{frame.source}" if frame.source else label)
        self._observer.on_next(frame)

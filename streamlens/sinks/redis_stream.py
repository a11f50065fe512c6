"""`RedisStream`: frames of many processes and machines in one stream of a Redis server."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from streamlens.errors import SinkError, missing_package
from streamlens.frame import Frame
from streamlens.runs.messages import Packer
from streamlens.sink import RunInfo, Sink

__all__ = ["RedisStream"]


class RedisStream(Sink):
    """Appends frames to a Redis stream, from any number of processes; `sources.redis()` reads them.

    Every bit of every value comes back there, with types, shapes, components, epoch and meta, each frame
    once and in order, also when a write had to be repeated. An entry holds the values and some 150 bytes; the
    names of the layers are stored once, in the hash `<stream>:layouts`.

    What a server that is gone or slow does not take is tried again, then dropped, counted and reported,
    while training goes on; writing continues when it is back. A stream is a log: a run that is resumed
    appends to what it had, after an entry that says at which step.

    Args:
        url: The server, such as `redis://user:password@host:6379/0`.
        stream: The key of the stream.
        maxlen: How many entries are kept, about; the oldest are dropped beyond it. None for all.
        timeout: Seconds to wait for the server in one go.

    Raises:
        ImportError: The `redis` package is missing.
        ValueError: A timeout or number of entries that is not positive, or an URL of another scheme.

    Example:
        >>> lens.pipe(uw_ratio()).subscribe(RedisStream("redis://collector:6379"))  # doctest: +SKIP
    """

    def __init__(
        self,
        url: str = "redis://localhost:6379/0",
        stream: str = "streamlens",
        *,
        maxlen: int | None = 1_000_000,
        timeout: float = 5.0,
    ) -> None:
        try:
            import redis
        except ImportError as error:
            raise missing_package("RedisStream", "redis", "redis") from error
        if maxlen is not None and maxlen < 1:
            raise ValueError(
                f"RedisStream(maxlen=) is a number of entries from 1 on, or None; got {maxlen!r}"
            )
        if not timeout > 0:
            raise ValueError(f"RedisStream(timeout=) is a number of seconds above 0; got {timeout!r}")
        # Connects when it is first used. Retries are the delivery's, which counts what they do not save.
        self._client: Any = redis.Redis.from_url(
            url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=None
        )
        self.stream = stream
        self.back_off = 0.25
        self._maxlen = maxlen
        self._packer = Packer()
        self._run = RunInfo(id="")
        self._writer = ""
        self._next = 0
        self._tried: tuple[Frame, int] | None = None
        self._stored: set[str] = set()

    def open(self, run: RunInfo) -> None:
        """Append an entry that says which run begins or goes on.

        Raises:
            RedisError: The server cannot be reached.
        """
        self._run, self._writer, self._next, self._tried = run, uuid.uuid4().hex[:12], 0, None
        self._packer, self._stored = Packer(), set()
        metadata = {str(key): str(value) for key, value in run.metadata.items()}
        self._mark("began", {"resumed_at": run.resumed_at, "metadata": metadata})

    def write(self, frames: Sequence[Frame]) -> None:
        """Append frames, all or none of them.

        Raises:
            RedisError: The server did not say that it has them.
            SinkError: The sink is closed.
        """
        if not self._writer:
            raise SinkError("RedisStream was given frames while it was closed: call open(run) first")
        if self._tried is not None and self._tried[0] is not frames[0]:
            # Given up, but the server may have them all the same: their numbers are not used again.
            self._next += self._tried[1]
        self._tried = (frames[0], len(frames))
        pipe = self._client.pipeline(transaction=True)
        for number, (frame, at) in enumerate(zip(frames, self.wall_times(frames), strict=True), self._next):
            message = self._packer.pack(frame)
            if message.layout not in self._stored:
                pipe.hset(f"{self.stream}:layouts", message.layout, self._packer.layouts[message.layout])
            entry = {
                "run": self._run.id,
                "name": self._run.name,
                "writer": self._writer,
                "number": number,
                "at": repr(at),
                "layout": message.layout,
                "head": message.head,
                "data": message.data,
            }
            pipe.xadd(self.stream, entry, maxlen=self._maxlen, approximate=True)
        pipe.execute()
        self._stored = set(self._packer.layouts)
        self._next += len(frames)
        self._tried = None

    def close(self) -> None:
        """Append an entry that says that the run has ended, and disconnect."""
        if not self._writer:
            return
        try:
            self._mark("ended", {})
        finally:
            self._writer = ""
            self._client.close()

    def _mark(self, event: str, more: dict[str, Any]) -> None:
        entry = {"run": self._run.id, "name": self._run.name, "writer": self._writer, "event": event}
        self._client.xadd(
            self.stream, {**entry, "more": json.dumps(more)}, maxlen=self._maxlen, approximate=True
        )

    def __repr__(self) -> str:
        return f"RedisStream({self.stream!r})"

"""`Backlog`: the frames that one sink has not written yet, within the limits that it sets."""

from __future__ import annotations

from collections import deque

from streamlens.delivery.items import Item
from streamlens.sink import Sink

__all__ = ["Backlog"]


class Backlog:
    """Frames that wait, and those in the write under way. Its channel's lock guards it.

    Args:
        sink: Sets the limits, `capacity` and `max_bytes`.

    Attributes:
        in_write: How many frames are in the write under way.
    """

    def __init__(self, sink: Sink) -> None:
        self.in_write = 0
        self._sink = sink
        self._items: deque[Item] = deque()
        self._nbytes = self._nbytes_in_write = 0

    def __len__(self) -> int:
        """How many frames wait."""
        return len(self._items)

    @property
    def oldest(self) -> Item:
        """The frame that is written or dropped next."""
        return self._items[0]

    @property
    def half_full(self) -> bool:
        """Whether the worker had better come."""
        return 2 * len(self._items) > self._sink.capacity or 2 * self._nbytes > self._sink.max_bytes

    def roomy(self, nbytes: int) -> bool:
        """Whether a frame of that size may be added: where none waits, any may."""
        # What is being written takes room too: a write may hang for ever.
        frames, held = len(self._items) + self.in_write, self._nbytes + self._nbytes_in_write
        return not self._items or (frames < self._sink.capacity and held + nbytes <= self._sink.max_bytes)

    def add(self, item: Item) -> None:
        """Let a frame wait."""
        self._items.append(item)
        self._nbytes += item.nbytes

    def drop(self, count: int) -> None:
        """Give up the oldest frames."""
        for _ in range(count):
            self._nbytes -= self._items.popleft().nbytes

    def take(self, most: int, hurry: bool) -> list[Item]:
        """Begin a write: the oldest frames of one session that are on their way to the host.

        Args:
            most: At most so many; and half of what may wait.
            hurry: Also those whose transfer has not begun.
        """
        batch: list[Item] = []
        nbytes = 0
        most = min(most, max(1, self._sink.capacity // 2))
        while self._items and len(batch) < most:
            item = self._items[0]
            if batch and item.session is not batch[0].session:
                break
            if batch and nbytes + item.nbytes > self._sink.max_bytes // 2:
                break
            if not (hurry or item.ticket is None or item.ticket.ready(self._sink.max_latency)):
                break
            batch.append(self._items.popleft())
            nbytes += item.nbytes
        self._nbytes -= nbytes
        self.in_write, self._nbytes_in_write = len(batch), nbytes
        return batch

    def finished(self, count: int) -> bool:
        """So many frames of the write under way are done with; return whether all are."""
        self.in_write -= count
        if not self.in_write:
            self._nbytes_in_write = 0
        return not self.in_write

"""`Tally`: what became of a sink's frames, counted."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from streamlens.delivery.items import SinkStats

__all__ = ["Tally"]

_log = logging.getLogger("streamlens")


@dataclass(slots=True)
class Tally:
    """The counters of a channel, whose lock guards them.

    Attributes:
        emitted: Frames given to the sink.
        written: Frames that its `write` took and that it has not lost since.
        dropped: Frames lost, for whatever reason.
        failed: Those of them whose write failed for good, or that the sink lost after it.
        overrun: Those of them that a full queue had no room for.
        last_error: The last exception of the sink.
    """

    emitted: int = 0
    written: int = 0
    dropped: int = 0
    failed: int = 0
    overrun: int = 0
    last_error: Exception | None = None
    _failed_before: int = 0
    _overrun_before: int = 0

    def begin(self) -> None:
        """A worker starts: what was lost until now is another's."""
        self._failed_before, self._overrun_before = self.failed, self.overrun

    def tell(self, name: str) -> None:
        """Log what was lost since `begin`, if anything was.

        Args:
            name: What the sink is called.
        """
        failed, overrun = self.failed - self._failed_before, self.overrun - self._overrun_before
        parts = []
        if failed:
            parts.append(f"{failed:,} in writes that failed (the last: {self.last_error})")
        if overrun:
            parts.append(f"{overrun:,} because it was slower than the run")
        if parts:
            _log.warning("sink %s lost %s frames: %s", name, f"{failed + overrun:,}", " and ".join(parts))

    def stats(self, queued: int) -> SinkStats:
        """The counters as others see them.

        Args:
            queued: Frames that wait or are in a write under way.
        """
        return SinkStats(
            emitted=self.emitted,
            written=self.written,
            dropped=self.dropped,
            queued=queued,
            failed=self.failed,
            last_error=self.last_error,
        )

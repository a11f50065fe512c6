"""`Session`: one call of `observe` and what was subscribed through it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from streamlens.capture.source import Source
from streamlens.chain import Chain
from streamlens.notebook import CellKey

__all__ = ["Batches", "Session", "epochs"]

T = TypeVar("T")


def epochs(source: Source, n: int) -> Iterator[int]:
    """The epochs of a run up to number `n`, from where it is; none once it should stop.

    Args:
        source: The run.
        n: How many the whole run has.

    Raises:
        ValueError: `n` is no whole number.
    """
    if not isinstance(n, int) or isinstance(n, bool) or n < 0:
        raise ValueError(f"epochs() needs a whole number of at least 0, got {n!r}")
    return _epochs(source, n)


def _epochs(source: Source, n: int) -> Iterator[int]:
    source.in_epochs += 1
    try:
        while source.clock.epoch < n and not source.should_stop:
            epoch = source.clock.epoch
            source.emit_index("epoch_started", epoch)
            yield epoch
            if source.clock.epoch == epoch:
                source.end_epoch()
    finally:
        source.in_epochs -= 1


class Batches(Iterable[T]):
    """A loader whose end is the end of an epoch, unless `epochs()` sees to that.

    Once the run should stop it gives no more; the epoch it leaves is over.
    """

    def __init__(self, source: Source, loader: Iterable[T]) -> None:
        self._source = source
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[T]:
        begun = not self._source.should_stop
        for batch in self._loader if begun else ():
            yield batch
            if self._source.should_stop:
                break
        if begun and not self._source.in_epochs:
            self._source.end_epoch()


class Session:
    """One call of `observe`: what its lenses have subscribed, and whether it is closed."""

    def __init__(self, source: Source, cell: CellKey | None) -> None:
        self.source = source
        self.cell = cell
        self.closed = False

    def chains(self) -> list[Chain]:
        """The chains that were subscribed through this session."""
        return [chain for chain in self.source.chains if chain.session is self]

    def close(self, timeout: float | None) -> bool:
        """End this session's streams; the source ends with its last session."""
        if self.closed:
            return True
        self.closed = True
        self.source.sessions.discard(self)
        if self.source.inherited or not self.source.sessions:
            return self.source.shut_down(timeout)
        for chain in self.chains():
            self.source.finish(chain)
        return self.source.flush(timeout)

"""`Session`: one call of `observe` and what was subscribed through it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from streamlens.capture.source import Source
from streamlens.chain import Chain
from streamlens.notebook import CellKey

__all__ = ["Batches", "Session"]

T = TypeVar("T")


class Batches(Iterable[T]):
    """A loader whose end is the end of an epoch, unless `epochs()` sees to that."""

    def __init__(self, source: Source, loader: Iterable[T]) -> None:
        self._source = source
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[T]:
        yield from self._loader
        if not self._source.in_epochs:
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

"""`Windowed`: a stream whose frames each stand for a window of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from reactivex import Observable, abc

from streamlens.frame import Frame, Kind
from streamlens.stream import Stream

if TYPE_CHECKING:
    from typing import Any

__all__ = ["Epochs", "StepWindows", "Windowed", "Windows"]


class Windows(Protocol):
    """How a stream's windows are numbered; equal ones number them alike."""

    def index(self, frame: Frame) -> int:
        """The number of the window that a frame stands for, from 0."""
        ...


@dataclass(frozen=True)
class StepWindows:
    """Windows of `size` steps, a new one every `hop` steps, the first from step 0."""

    size: int
    hop: int

    def start(self, index: int) -> int:
        """The first step of a window."""
        return index * self.hop

    def end(self, index: int) -> int:
        """The last step of a window, which labels it."""
        return index * self.hop + self.size - 1

    def first_ending_at_or_after(self, step: int) -> int:
        """The first window that is not over before a step."""
        return max(0, -((self.size - 1 - step) // self.hop))

    def index(self, frame: Frame) -> int:
        """The number of the window that a frame stands for."""
        return self.first_ending_at_or_after(frame.step)


@dataclass(frozen=True)
class Epochs:
    """One window an epoch."""

    def index(self, frame: Frame) -> int:
        """The epoch."""
        return frame.epoch


class Windowed(Stream):
    """A stream of windows: `every(n)` counts windows on it, also further down the chain.

    Its `windows` number them.
    """

    windows: Windows

    @classmethod
    def of(cls, stream: Stream, windows: Windows) -> Windowed:
        """The stream as one of windows."""

        def subscribe(
            observer: abc.ObserverBase[Frame], scheduler: abc.SchedulerBase | None = None
        ) -> abc.DisposableBase:
            return stream.subscribe(observer, scheduler=scheduler)

        windowed = cls(
            subscribe,
            plan=stream.plan,
            runtime=stream.runtime,
            lens=stream.lens,
            kind=stream.kind,
            foreign=stream.foreign,
            raw=stream.raw,
            selectors=stream.selectors,
        )
        windowed.windows = windows
        return windowed

    def then(
        self, subscribe: abc.Subscription[Frame], step: str, *, kind: Kind | None = None, raw: bool = False
    ) -> Stream:
        """A stream of the same windows that follows this one; see `Stream.then`."""
        return Windowed.of(super().then(subscribe, step, kind=kind, raw=raw), self.windows)

    def _wrap(self, foreign: Observable[Any], name: str) -> Stream:
        return Windowed.of(super()._wrap(foreign, name), self.windows)

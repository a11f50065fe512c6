"""From the device to the host, once a burst, without waiting for the device."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from streamlens.frame import Frame

__all__ = ["Burst", "Ticket", "on_host"]


def on_host(frame: Frame) -> bool:
    """Whether all values of a frame lie in host memory."""
    values = frame.values
    if isinstance(values, Tensor):
        return values.is_cpu
    return all(value.is_cpu for value in values)


class Ticket:
    """A frame on its way to the host, shared by all sinks that it goes to.

    Attributes:
        frame: It.
        doubt: Above 0 if its step was none; None where that is certain.
    """

    __slots__ = ("_burst", "_lock", "_on_host", "doubt", "frame")

    def __init__(self, frame: Frame, burst: Burst, doubt: Tensor | None = None) -> None:
        self.frame = frame
        self.doubt = doubt
        self._burst = burst
        self._on_host = False
        self._lock = threading.Lock()

    def ready(self, patience: float) -> bool:
        """Whether its burst is over, or began more than `patience` seconds ago."""
        return self._burst.settled or time.monotonic() - self._burst.began >= patience

    def settle(self) -> None:
        """Start the transfer of its burst, if nothing has done so yet."""
        self._burst.settle()

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is on its way."""
        return _tensors(self.frame) if self.doubt is None else (*_tensors(self.frame), self.doubt)

    def moved(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Put other tensors in their place."""
        self.frame = _map(self.frame, fn)
        self.doubt = None if self.doubt is None else fn(self.doubt)

    @property
    def void(self) -> bool:
        """Whether the step was none and nothing but NaN is left of it; for frames that were taken."""
        doubt = self.doubt
        return doubt is not None and bool(doubt > 0) and all(map(_is_nan, _tensors(self.frame)))

    def take(self) -> Frame:
        """The frame on the host. Waits for the transfer: workers only call this."""
        with self._lock:
            if not self._on_host:
                self._burst.settle()
                self._burst.wait()
                # Copies of their own, so that a frame that is kept holds neither page-locked
                # memory nor the rest of its burst.
                self.moved(lambda value: value.clone() if value.is_cpu else value.cpu())
                self._on_host = True
            return self.frame


class Burst:
    """The frames of one burst that lie on a device.

    `settle` gathers them into one flat buffer a (device, dtype), starts one copy each into
    page-locked memory and records an event. None of this waits for the device: the workers do.
    Sparse tensors, tensor subclasses and devices other than CUDA's have no such copy; the workers
    fetch those one by one.
    """

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.settled = False
        self._tickets: dict[int, Ticket] = {}
        self._streams: dict[torch.device, Any] = {}
        self._events: list[Any] = []
        # Reentrant: a signal handler may flush in the middle of a burst.
        self._lock = threading.RLock()

    def add(self, frame: Frame, doubt: Tensor | None = None) -> Ticket | None:
        """Let a frame travel with this burst; the same frame for another sink travels once.

        Args:
            frame: A frame that owns its memory.
            doubt: Above 0 if its step was none, which only the device knows.

        Returns:
            Its ticket; None if the burst is over.
        """
        with self._lock:
            if self.settled:
                return None
            ticket = self._tickets.get(id(frame))
            if ticket is None:
                ticket = self._tickets[id(frame)] = Ticket(frame, self, doubt)
                for value in ticket.tensors():
                    if value.is_cuda and value.device not in self._streams:
                        # The emitting thread's stream computes the values: copies on that stream
                        # come after them, whichever thread asks for the copies.
                        self._streams[value.device] = torch.cuda.current_stream(value.device)
            return ticket

    def settle(self) -> None:
        """Start the transfer; the second call and later ones do nothing."""
        with self._lock:
            if self.settled:
                return
            try:
                moved = self._move()
                for ticket in self._tickets.values():
                    ticket.moved(lambda value: moved.get(id(value), value))
            finally:
                self.settled = True
                self._tickets.clear()
                self._streams.clear()

    @property
    def arrived(self) -> bool:
        """Whether the copies are there, so that nobody would have to wait."""
        return self.settled and all(event.query() for event in self._events)

    def wait(self) -> None:
        """Wait until the copies have arrived."""
        for event in self._events:
            event.synchronize()

    def _move(self) -> dict[int, Tensor]:
        """Start the copies; the host tensors by the identity of the tensors they copy."""
        groups: dict[tuple[torch.device, torch.dtype], dict[int, Tensor]] = {}
        for ticket in self._tickets.values():
            for value in ticket.tensors():
                if _gathers(value):
                    groups.setdefault((value.device, value.dtype), {})[id(value)] = value
        moved: dict[int, Tensor] = {}
        for (device, dtype), group in groups.items():
            stream = self._streams[device]
            with torch.cuda.stream(stream):
                flat = [value.reshape(-1) for value in group.values()]
                joined = flat[0] if len(flat) == 1 else torch.cat(flat)
                # The allocator of page-locked memory keeps what is given back, and waits for
                # copies under way: after the first steps nothing is allocated here.
                buffer = torch.empty(joined.shape, dtype=dtype, pin_memory=True)
                buffer.copy_(joined, non_blocking=True)
                # A blocking event lets the waiting worker sleep instead of spinning.
                event = torch.cuda.Event(blocking=True)
                event.record(stream)
            self._events.append(event)
            parts = buffer.split([value.numel() for value in group.values()])
            for part, (key, value) in zip(parts, group.items(), strict=True):
                moved[key] = part.view(value.shape)
        return moved


def _gathers(value: Tensor) -> bool:
    """Whether a tensor has flat device memory that can be joined with others'."""
    return value.is_cuda and type(value) is Tensor and value.layout == torch.strided


def _tensors(frame: Frame) -> tuple[Tensor, ...]:
    values = frame.values
    return (values,) if isinstance(values, Tensor) else values


def _is_nan(value: Tensor) -> bool:
    return bool((value if value.layout is torch.strided else value.coalesce().values()).isnan().all())


def _map(frame: Frame, fn: Callable[[Tensor], Tensor]) -> Frame:
    """The frame with `fn` applied to each tensor that it holds."""
    values = frame.values
    return frame.replace(values=fn(values) if isinstance(values, Tensor) else tuple(fn(v) for v in values))

"""Where metrics of whole tensors get them: raw frames, of several topics, at every step if need be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, TypeAlias

import torch
from reactivex import Observable, abc
from reactivex.disposable import SerialDisposable
from torch import Tensor

from streamlens.errors import StreamlensError, did_you_mean
from streamlens.frame import Frame
from streamlens.lens import Lens
from streamlens.operators._base import check_topics, checked_source, widened
from streamlens.operators.selection import topic as select
from streamlens.reductions import TINY, chunks_of, double_where_known
from streamlens.stream import Stream

__all__ = [
    "PARAMETERS",
    "Due",
    "at_every_step",
    "check_of",
    "check_whole",
    "copies",
    "dense",
    "dots",
    "first_step",
    "pieces_of",
    "tensors_of",
    "whole",
    "wide",
]

Due: TypeAlias = Callable[[int], bool]
"""Whether a step's result is wanted."""

PARAMETERS: Final = {
    "weights": ("weight_gradients", "weight_updates"),
    "biases": ("bias_gradients", "bias_updates"),
    "parameters": ("parameter_gradients", "parameter_updates"),
}
"""The topics of values of parameters, each with those of their gradients and of their updates."""


def check_of(operator: str, of: object) -> str:
    """The kind of parameters that an operator is of.

    Raises:
        ValueError: It is none of them.
    """
    if not isinstance(of, str) or of not in PARAMETERS:
        known = " or ".join(map(repr, PARAMETERS))
        raise ValueError(f"{operator}(of={of!r}): {did_you_mean(str(of), PARAMETERS) or f'it is {known}'}")
    return of


def tensors_of(source: Observable[Frame], topic: str | None, operator: str) -> Stream:
    """A stream of whole tensors, for an operator that needs them.

    Raises:
        StreamlensError: The stream is known to carry numbers.
        TypeError: The topic is not a name.
        UnknownTopicError: Nothing provides the topic.
        UnmergeableError: Several ranks hold parts of the tensors.
    """
    if topic is not None:
        source = select(*check_topics(operator, (topic,)))(source)
    stream = checked_source(source)
    if isinstance(stream, Lens):
        specs = [stream.source.spec(name) for name in stream.topics]
        if stream.view.reduction is not None or any(spec is not None and not spec.raw for spec in specs):
            raise _needs_tensors(operator, stream.plan_text)
        return whole(stream, f"{operator}()")
    return stream


def whole(lens: Lens, operator: str) -> Lens:
    """A lens for what needs whole tensors: nothing comes of it once the model lies in parts.

    Raises:
        UnmergeableError: Several ranks hold parts of the tensors now.
    """
    lens.source.check_whole(lens.topics, operator)
    return Lens(lens.source, lens.session, replace(lens.view, whole=operator))


def check_whole(frame: Frame, operator: str, least: int = 2) -> None:
    """Raise for a frame of numbers: stacked values with fewer than `least` dimensions.

    Raises:
        StreamlensError: It is one.
    """
    values = frame.values
    if isinstance(values, Tensor) and values.ndim < least and len(frame):
        raise _needs_tensors(operator, f"the frame of {frame.topic!r}")


def _needs_tensors(operator: str, what: str) -> StreamlensError:
    return StreamlensError(
        f"{operator}() needs whole tensors, and {what} has numbers: apply it to raw frames, such as those of "
        "topic('weights') of a lens, before any reduction. A stored run holds only what was computed while "
        f"it ran: there, subscribe {operator}() while training"
    )


def at_every_step(stream: Stream, history: int | None = None) -> tuple[Stream, Due, tuple[str, ...]]:
    """A lens without its cadence, for what needs the steps between those that are asked for.

    Args:
        stream: A lens, or any stream, which stays as it is.
        history: How many steps before the first one are needed; None for all of them.

    Returns:
        The stream, which of its steps a result is wanted of, and the plan as it was.
    """
    if not isinstance(stream, Lens):
        return stream, lambda _: True, stream.plan
    view = stream.view
    start = 0 if history is None else max(0, view.start - history)
    return Lens(stream.source, stream.session, replace(view, every=1, start=start)), view.due, stream.plan


def first_step(source: Stream) -> Stream:
    """The frames of the first step that gives any; what follows is asked for no longer."""

    def subscribe(
        observer: abc.ObserverBase[Frame], scheduler: abc.SchedulerBase | None = None
    ) -> abc.DisposableBase:
        connection = SerialDisposable()
        step: int | None = None

        def on_next(frame: Frame) -> None:
            nonlocal step
            step = frame.step if step is None else step
            if frame.step == step:
                observer.on_next(frame)
            else:
                connection.dispose()
                observer.on_completed()

        connection.disposable = source.subscribe(
            on_next, observer.on_error, observer.on_completed, scheduler=scheduler
        )
        return connection

    return source.then(subscribe, "first_step()", raw=source.raw)


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies by layer, for state whose tensors are worked on in place."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def dense(tensor: Tensor) -> Tensor:
    """A tensor's elements as it is computed with: dense, real, at least float32, of the local shard."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return widened(tensor)


def pieces_of(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of tensors of one shape that stay in a processor's cache; on a device, all at once."""
    if tensors[0].device.type == "cpu" and all(t.is_contiguous() for t in tensors):
        yield from zip(*(chunks_of(t.view(-1)) for t in tensors), strict=True)
    else:
        yield tensors


def wide(tensor: Tensor) -> Tensor:
    """A real tensor in double precision, where its device has that."""
    return tensor.to(double_where_known(tensor.device))


def dots(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """Dot products of pairs of dense tensors of equal shapes, in float64 where there is any."""
    return torch.stack([_dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(xs, ys, strict=True)])


def _dot(x: Tensor, y: Tensor, *, pieces: int = 1 << 18) -> Tensor:
    if x.device.type != "cpu" or x.dtype is torch.float64 or not x.numel():
        return torch.dot(wide(x), wide(y))
    total = 0.0
    for a, b in zip(x.split(pieces), y.split(pieces), strict=True):
        part = float(torch.dot(a, b))
        if not TINY < abs(part) < float("inf"):
            # The products may be out of float32's range where their operands are not.
            part = float(torch.dot(wide(a), wide(b)))
        total += part
    return torch.tensor(total, dtype=torch.float64)

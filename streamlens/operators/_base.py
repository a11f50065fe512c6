"""What the operators share: their sources, their nodes' bookkeeping, frames as plain state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard, cast

import torch
from reactivex import Observable
from torch import Tensor, nn

from streamlens.chain import current_chain
from streamlens.errors import StreamlensError
from streamlens.frame import Frame, Kind
from streamlens.lens import Lens
from streamlens.nodes import Node
from streamlens.runtime import Runtime
from streamlens.stream import Stream, as_stream

__all__ = [
    "OperatorNode",
    "TopicKey",
    "check_topics",
    "checked_source",
    "frame_from_state",
    "frame_state",
    "holds_kept_values",
    "is_number",
    "is_whole",
    "layers_of",
    "modules_of",
    "own",
    "per_topic_state",
    "relabelled",
    "widened",
]

TopicKey: TypeAlias = tuple[str, str]
"""State is kept apart by (source, topic): one stream may carry several topics of several models."""


def is_whole(value: object) -> TypeGuard[int]:
    """Whether an argument is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether an argument is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def checked_source(source: Observable[Frame]) -> Stream:
    """The source as a Stream that frames can be expected from.

    Raises:
        StreamlensError: It is a Lens with no topic selected.
        TypeError: It is no Observable.
    """
    stream = as_stream(source)
    stream.check_subscribable()
    return stream


def check_topics(operator: str, names: Sequence[object]) -> tuple[str, ...]:
    """Topic names as given to an operator, or an error that shows what was given."""
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{operator}() takes topic names such as 'weights', got {name!r}")
    return cast("tuple[str, ...]", tuple(names))


def modules_of(stream: Stream, operator: str) -> Mapping[str, nn.Module]:
    """The observed model's modules by layer name, held weakly.

    Raises:
        StreamlensError: The stream comes from no lens, so that only names are known.
    """
    lens = stream.lens if stream.lens is not None else stream
    if not isinstance(lens, Lens):
        raise StreamlensError(
            f"{operator} needs the model to tell module classes and depths, and this stream comes from no "
            "lens; give globs over the layers' names instead, such as layers('features.*')"
        )
    return lens.module_classes()


def widened(values: Tensor) -> Tensor:
    """Values as they are computed with: half precision and integers become float32."""
    if values.dtype in {torch.float32, torch.float64} or values.is_complex():
        return values
    return values.float()


def own(frame: Frame) -> Frame:
    """A frame that may be kept beyond its delivery."""
    return frame.clone() if frame.borrowed else frame


def holds_kept_values(frame: Frame, kept: Frame) -> bool:
    """Whether two frames of a topic hold values of one kind: stacked alike, or both ragged."""
    if frame.stacked != kept.stacked or frame.components != kept.components:
        return False
    return not frame.stacked or (
        cast("Tensor", frame.values).shape[1:] == cast("Tensor", kept.values).shape[1:]
    )


def relabelled(
    frame: Frame,
    topic: str,
    values: Tensor | Sequence[Tensor],
    *,
    layers: tuple[str, ...] | None = None,
    components: tuple[str, ...] = (),
) -> Frame:
    """A derived frame: another topic with values that own their memory, at the same point of the run."""
    return Frame(
        topic,
        frame.step,
        frame.layers if layers is None else layers,
        values,
        epoch=frame.epoch,
        micro_step=frame.micro_step,
        components=components,
        meta=frame.meta,
        kind=frame.kind,
        source=frame.source,
    )


def frame_state(frame: Frame) -> dict[str, Any]:
    """A frame as plain containers and tensors."""
    values = frame.values
    if not isinstance(values, Tensor):
        values = cast("Any", [v.clone() if frame.borrowed else v for v in values])
    return {
        "topic": frame.topic,
        "step": frame.step,
        "layers": list(frame.layers),
        "values": values,
        "epoch": frame.epoch,
        "micro_step": frame.micro_step,
        "components": list(frame.components),
        "meta": dict(frame.meta),
        "kind": frame.kind.value,
        "source": frame.source,
    }


def frame_from_state(state: Mapping[str, Any]) -> Frame:
    """The frame that `frame_state` described."""
    return Frame(**{**state, "kind": Kind(state["kind"])})


def per_topic_state(states: Mapping[TopicKey, Any]) -> list[dict[str, Any]]:
    """The states of the topics that a node keeps apart, as plain containers."""
    return [{"source": key[0], "topic": key[1], **state.state_dict()} for key, state in states.items()]


class OperatorNode(Node):
    """A node that counts what it skips and leaves out.

    Values that are not finite are counted on the device they lie on; the number is fetched only
    when somebody reads `skipped`.

    Args:
        runtime: The runtime of the stream, whose counters are kept too.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._chain = current_chain.get()
        self._seen = 0
        self._finite: dict[torch.device, Tensor] = {}

    @property
    def skipped(self) -> int:
        """How many values that are NaN or infinite were kept out of the state."""
        return self._seen - sum(int(finite.item()) for finite in self._finite.values())

    @skipped.setter
    def skipped(self, number: int) -> None:
        self._seen, self._finite = number, {}

    def count_finite(self, finite: Tensor) -> None:
        """Count the values of a mask that says which are finite."""
        self._seen += finite.numel()
        total = finite.sum()
        before = self._finite.get(total.device)
        self._finite[total.device] = total if before is None else before + total

    def count(self, what: str, number: int = 1) -> None:
        """Count an event of this chain and of its runtime."""
        if number:
            self._runtime.counts[what] += number
            if self._chain is not None:
                self._chain.counts[what] += number


def layers_of(frames: Iterable[Frame]) -> tuple[str, ...]:
    """Every layer of some frames once, in order of appearance."""
    # Frames of one topic mostly share one tuple: each is read once.
    distinct = {id(frame.layers): frame.layers for frame in frames}.values()
    if len(distinct) == 1:
        return next(iter(distinct))
    return tuple(dict.fromkeys(name for layers in distinct for name in layers))

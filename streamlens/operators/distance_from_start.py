"""`distance_from_start`: how far each layer has moved since it was first seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from reactivex import Observable
from torch import Tensor

from streamlens.chain import Mark, MarkKind
from streamlens.frame import Frame
from streamlens.lens import Lens
from streamlens.nodes import Emitted, stateful
from streamlens.operators._base import OperatorNode, TopicKey, relabelled
from streamlens.operators._merge import merged
from streamlens.operators._reductions import Norm, reduce_values
from streamlens.operators._tensors import (
    PARAMETERS,
    check_whole,
    copies,
    dense,
    first_step,
    tensors_of,
)
from streamlens.operators.ratio import divided
from streamlens.operators.selection import topic as select
from streamlens.runtime import Runtime
from streamlens.stream import Operator, Stream

__all__ = ["distance_from_start"]

_NORM = Norm(2.0)


def distance_from_start(topic: str | None = "weights", *, relative: bool = False) -> Operator:
    """How far each layer has moved: |W_k - W_start|, or that over |W_start| with `relative=True`.

    The start is what the layer was before the first update that is observed, so that the first distance
    is the norm of that update: on a Lens, for `"weights"`, `"biases"` and `"parameters"`, the first step's
    updates are taken along and subtracted. Of other topics and on other streams the start is the first
    frame, where the distance is 0. A layer that appears later starts with its own first frame. The start
    is part of the saved state and survives a resume.

    The input is raw frames of any shapes; the value is in the unit of the tensor and at least 0, as
    topic `<topic>.distance_from_start` (`.relative_distance_from_start`). NaN and inf pass
    through; a relative distance from a start of norm zero is NaN. A layer whose shape changes starts
    afresh. The cost is one copy of the tensors kept, and a subtraction and a norm a frame (and the copy
    that updates need, for one step); nothing waits for a GPU.

    Args:
        topic: The topic; None takes the stream as it is.
        relative: In units of the start's norm.

    Returns:
        The operator.

    Raises:
        TypeError: The topic is not a name.
        StreamlensError: When applied: the stream carries numbers and not tensors.
    """
    operator = f"distance_from_start({'relative=True' if relative else ''})"

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        stream = tensors_of(source, topic, "distance_from_start")
        updates = _updates_of(stream)
        inputs = [stream] if updates is None else [stream, first_step(updates)]
        updates_topic = "" if updates is None else updates.topics[0]
        return stateful(
            merged(stream, inputs, stream.plan),
            lambda: _Distance(stream.runtime, updates_topic, bool(relative)),
            operator,
            marks=True,
            kind=stream.kind,
        )

    return apply


def _updates_of(stream: Stream) -> Lens | None:
    """The updates of what a lens gives the values of."""
    if not isinstance(stream, Lens) or len(stream.topics) != 1 or stream.topics[0] not in PARAMETERS:
        return None
    base = Lens(stream.source, stream.session, replace(stream.view, topics=()))
    lens = select(PARAMETERS[stream.topics[0]][1])(base)
    assert isinstance(lens, Lens)
    return lens


class _Distance(OperatorNode):
    """Keeps each layer's start.

    Args:
        runtime: The stream's runtime.
        updates: The topic of updates, which follow the first frame of the values.
        relative: Divide by the start's norm.
    """

    def __init__(self, runtime: Runtime, updates: str, relative: bool) -> None:
        super().__init__(runtime)
        self._updates = updates
        self._relative = relative
        self._starts: dict[TopicKey, dict[str, Tensor]] = {}
        self._fresh: Frame | None = None
        """Layers whose start is their value after the update, until that is taken back."""

    def on_frame(self, frame: Frame) -> Emitted:
        """Distances of values; updates say where the values came from."""
        if frame.topic == self._updates:
            fresh = self._fresh
            return self._settle(dict(frame.items())) if fresh and fresh.step == frame.step else None
        check_whole(frame, "distance_from_start")
        out = [f for f in (self._settle(),) if f is not None]
        starts = self._starts.setdefault((frame.source, frame.topic), {})
        now = {name: dense(value) for name, value in frame.items()}
        known = tuple(n for n, x in now.items() if n in starts and starts[n].shape == x.shape)
        new = tuple(n for n in now if n not in known)
        for name in new:
            starts[name] = now[name].clone()
        if known:
            moved = tuple(now[name] - starts[name].to(now[name].device) for name in known)
            out.append(self._distances(frame, known, reduce_values(moved, _NORM)))
        if new:
            # Values of zero: only where and when it is counts until the updates have come.
            self._fresh = relabelled(frame, frame.topic, torch.zeros(len(new)), layers=new)
            if not self._updates:
                out += [f for f in (self._settle(),) if f is not None]
        return out

    def _settle(self, updates: Mapping[str, Tensor] = MappingProxyType({})) -> Frame | None:
        """What fresh layers give: they started where they are, but for their updates."""
        fresh, self._fresh = self._fresh, None
        if fresh is None:
            return None
        starts = self._starts[fresh.source, fresh.topic]
        moved: list[Tensor] = []
        for name in fresh.layers:
            start = starts[name]
            if name in updates and (update := dense(updates[name])).shape == start.shape:
                # Exact where the value has at most doubled or halved (Sterbenz's lemma).
                start.sub_(update)
                moved.append(update)
            else:
                moved.append(start - start)  # and not 0: NaN stays NaN
        return self._distances(fresh, fresh.layers, reduce_values(tuple(moved), _NORM))

    def _distances(self, frame: Frame, layers: tuple[str, ...], values: Tensor) -> Frame:
        name = "distance_from_start"
        if self._relative:
            starts = self._starts[frame.source, frame.topic]
            values = divided(values, reduce_values(tuple(starts[n] for n in layers), _NORM).to(values))
            name = "relative_distance_from_start"
        return relabelled(frame, f"{frame.topic}.{name}", values, layers=layers)

    def on_mark(self, mark: Mark) -> Emitted:
        """A step is over: no updates of it will come."""
        return self._settle() if mark.kind is MarkKind.CLOSED else None

    def on_completed(self) -> Emitted:
        """Nothing more will come."""
        return self._settle()

    def state_dict(self) -> dict[str, Any]:
        """The starts."""
        return {
            "topics": [
                {"source": source, "topic": topic, "starts": copies(starts)}
                for (source, topic), starts in self._starts.items()
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._fresh = None
        self._starts = {
            (saved["source"], saved["topic"]): copies(saved["starts"]) for saved in state["topics"]
        }

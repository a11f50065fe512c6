"""`per_step`: micro-step frames averaged over their step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from reactivex import Observable
from torch import Tensor

from streamlens.frame import Frame, Kind
from streamlens.nodes import Emitted, average_micro_steps, stateful
from streamlens.operators._base import OperatorNode, TopicKey, checked_source, layers_of, widened
from streamlens.operators._rows import Rows
from streamlens.runtime import Runtime
from streamlens.stream import Operator

__all__ = ["per_step"]


class _PerStep(OperatorNode):
    """Gathers each topic's frames of a step; gives their mean when a later step comes."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self._topics: dict[TopicKey, Rows] = {}

    def on_frame(self, frame: Frame) -> Emitted:
        if frame.kind is Kind.EVENT or not frame.layers:
            return frame
        rows = self._topics.setdefault((frame.source, frame.topic), Rows())
        out: list[Frame] = []
        if rows and frame.step < rows.frames[-1].step:
            self.count("late")
            return out
        if rows and frame.step > rows.frames[-1].step:
            out.append(_mean(rows.frames))
            rows.drop_before(frame.step)
        self.count("duplicate", len(rows.insert(frame)))
        return out

    def on_completed(self) -> Emitted:
        out = [_mean(rows.frames) for rows in self._topics.values() if rows]
        self._topics.clear()
        return out

    def state_dict(self) -> dict[str, Any]:
        return {
            "topics": [
                {"source": source, "topic": topic, "rows": rows.state_dict()}
                for (source, topic), rows in self._topics.items()
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._topics = {}
        for saved in state["topics"]:
            rows = self._topics[saved["source"], saved["topic"]] = Rows()
            rows.load_state_dict(saved["rows"])


def _mean(frames: Sequence[Frame]) -> Frame:
    last = frames[-1]
    if len(frames) == 1:
        return last.replace(kind=Kind.STEP)
    if last.stacked and all(frame.layers == last.layers for frame in frames):
        values = torch.stack([widened(cast("Tensor", frame.values)) for frame in frames])
        return last.replace(values=values.mean(0), kind=Kind.STEP)
    layers = layers_of(frames)
    held = [dict(frame.items()) for frame in frames]
    means = [torch.stack([widened(h[name]) for h in held if name in h]).mean(0) for name in layers]
    return last.replace(layers=layers, values=torch.stack(means) if last.stacked else means, kind=Kind.STEP)


def per_step() -> Operator:
    """One frame a step: the mean of its micro-step frames, layer by layer.

    Whatever needs one value a step (`ema`, `window`, a join with a parameter topic) does this by itself
    on a stream that comes from a Lens, where the update says that the step is complete. Other
    streams cannot know their last micro-step: there this operator gives a step's mean when a frame
    of a later step comes, or when the stream ends.

    A layer that is missing from a micro-step is averaged over the others; NaN makes the mean NaN.
    Frames of earlier steps are dropped and counted as late. Raw frames of a plain stream are
    copied until their step is over.

    Returns:
        The operator.

    Raises:
        StreamlensError: When applied to raw micro-step frames of a Lens, which would have to be
            kept; reduce them first.
    """

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        stream = checked_source(source)
        if stream.lens is not None:
            return average_micro_steps(stream)
        return stateful(stream, lambda: _PerStep(stream.runtime), "per_step()", kind=Kind.STEP)

    return apply

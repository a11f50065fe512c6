"""`cosine`: the angle between two topics' tensors, or between a tensor and itself a step earlier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from reactivex import Observable
from torch import Tensor

from streamlens.frame import Frame, Kind
from streamlens.nodes import Emitted, stateful
from streamlens.operators._base import OperatorNode, TopicKey, check_topics, relabelled
from streamlens.operators._merge import merged
from streamlens.operators._reductions import Norm, reduce_values
from streamlens.operators._tensors import (
    Due,
    at_every_step,
    check_whole,
    copies,
    dense,
    dots,
    tensors_of,
    wide,
)
from streamlens.operators.align import combine
from streamlens.runtime import Runtime
from streamlens.stream import Operator

__all__ = ["cosine"]

_NORM = Norm(2.0)


def cosine(a: str | None = None, b: str | None = None) -> Operator:
    """The cosine of the angle between tensors: <a, b> / (|a| |b|), layer by layer.

    With two topics it is between their tensors of one step, as topic `<a>_to_<b>.cosine`:
    `cosine("weight_updates", "weight_gradients")` is -1 for plain gradient descent. With one topic, or
    none (the stream as it is), it is between each layer's tensor and that of the step before, as topic
    `<a>.cosine`: 1 where gradients keep their direction, negative where they zigzag.

    The input is any raw topic, of any shape; the value has no unit and lies in [-1, 1]. It is NaN
    where one of the two is zero, and NaN and inf give NaN. With the step before: a tensor that is not
    finite is counted, and the last finite one stays the one to compare with; a layer's first tensor gives
    nothing, nor does one whose shape has changed; a step in which a layer is missing is passed over. On a
    Lens `every(n)` chooses the steps that are given, each compared with the step just before it (with the
    micro-step before it for topics of the forward and backward pass); on another stream the frame before
    is taken, whatever its step.

    The cost is three passes over the pair; with the step before also a copy of the tensors, kept (and
    saved) from one step to the next. Nothing waits for a GPU.

    Args:
        a: The topic; the stream as it is unless given.
        b: The other topic; the step before unless given.

    Returns:
        The operator.

    Raises:
        TypeError: A topic is not a name, or only `b` is given.
        StreamlensError: When applied: the stream carries numbers and not tensors, or raw micro-step
            frames with those of parameters.

    Example:
        `lens.pipe(cosine("weight_gradients"), ema(0.9))`
    """
    check_topics("cosine", [topic for topic in (a, b) if topic is not None])
    if b is not None and a is None:
        raise TypeError(f"cosine(b={b!r}) needs a too: cosine('weight_updates', {b!r})")
    if a is not None and b is not None:
        inputs = (
            partial(tensors_of, topic=a, operator="cosine"),
            partial(tensors_of, topic=b, operator="cosine"),
        )
        return combine(*inputs, fn=_cosines, name=f"{a}_to_{b}.cosine")

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        stream, due, plan = at_every_step(tensors_of(source, a, "cosine"), history=1)
        return stateful(
            merged(stream, [stream], plan), lambda: _ToPrevious(stream.runtime, due), "cosine()", raw=False
        )

    return apply


def _cosines(a: Tensor | Sequence[Tensor], b: Tensor | Sequence[Tensor]) -> Tensor:
    xs, ys = [dense(x) for x in a], [dense(y) for y in b]
    if any(x.shape != y.shape for x, y in zip(xs, ys, strict=True)):
        raise ValueError("cosine() takes two topics whose tensors have the same shapes, layer by layer")
    return _quotients(dots(xs, ys), reduce_values(tuple(xs), _NORM), reduce_values(tuple(ys), _NORM))


def _quotients(products: Tensor, a: Tensor, b: Tensor) -> Tensor:
    below = wide(a) * wide(b)
    values = (products / below).masked_fill_(below == 0, math.nan).clamp_(-1.0, 1.0)
    return values.to(a.dtype if a.dtype is b.dtype else torch.float64)


class _ToPrevious(OperatorNode):
    """Compares each layer's tensor with the last finite one before it.

    Args:
        runtime: The stream's runtime.
        due: Which steps are given.
    """

    def __init__(self, runtime: Runtime, due: Due) -> None:
        super().__init__(runtime)
        self._due = due
        self._previous: dict[TopicKey, dict[str, Tensor]] = {}

    def on_frame(self, frame: Frame) -> Emitted:
        """The cosines of the layers that have a tensor to compare with."""
        check_whole(frame, "cosine")
        previous = self._previous.setdefault((frame.source, frame.topic), {})
        now = {name: dense(value) for name, value in frame.items()}
        out: Frame | None = None
        norms = reduce_values(tuple(now.values()), _NORM) if now else torch.empty(0)
        both = tuple(n for n, x in now.items() if n in previous and previous[n].shape == x.shape)
        if both and self._due(frame.step):
            kept = [previous[name].to(now[name].device) for name in both]
            rows = norms if len(both) == len(now) else torch.stack([norms[list(now).index(n)] for n in both])
            products = dots([now[name] for name in both], kept)
            values = _quotients(products, rows, reduce_values(tuple(kept), _NORM))
            out = relabelled(frame, f"{frame.topic}.cosine", values, layers=both)
        within = frame.kind is Kind.MICRO_STEP and self._due(frame.step)
        if within or self._due(frame.step + 1):
            self._keep(previous, now, norms)
        return out

    def _keep(self, previous: dict[str, Tensor], now: Mapping[str, Tensor], norms: Tensor) -> None:
        finite = norms.isfinite()
        self.count_finite(finite)
        on_host = finite.tolist() if finite.device.type == "cpu" else None
        for i, (name, value) in enumerate(now.items()):
            before = previous.get(name)
            if before is None or before.shape != value.shape:
                # A tensor that is not finite compares as NaN, and is replaced by the first that is.
                previous[name] = value.clone()
            elif on_host is None:
                previous[name] = torch.where(finite[i], value, before.to(value.device))
            elif on_host[i]:
                before.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The tensors to compare with."""
        return {
            "topics": [
                {"source": source, "topic": topic, "previous": copies(previous)}
                for (source, topic), previous in self._previous.items()
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._previous = {
            (saved["source"], saved["topic"]): copies(saved["previous"]) for saved in state["topics"]
        }

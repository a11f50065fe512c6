"""`scan`: a running result of your own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from reactivex import Observable
from torch import Tensor

from streamlens.frame import Frame
from streamlens.nodes import Emitted, stateful
from streamlens.operators._base import (
    OperatorNode,
    TopicKey,
    checked_source,
    frame_from_state,
    frame_state,
    own,
    relabelled,
)
from streamlens.runtime import Runtime
from streamlens.stream import Operator

__all__ = ["ScanState", "scan"]

Values: TypeAlias = Tensor | tuple[Tensor, ...] | float

ScanState: TypeAlias = Frame | Values
"""What `scan` carries from frame to frame: a frame, or values as a frame has them."""


class _Scan(OperatorNode):
    """The latest result of each topic."""

    def __init__(
        self, runtime: Runtime, fn: Callable[[Any, Frame], ScanState], seed: ScanState | None
    ) -> None:
        super().__init__(runtime)
        self._fn = fn
        self._seed = seed
        self._topics: dict[TopicKey, ScanState] = {}

    def on_frame(self, frame: Frame) -> Emitted:
        if not frame.layers:
            return None
        key = (frame.source, frame.topic)
        if key in self._topics:
            result = self._fn(self._topics[key], frame)
        elif self._seed is not None:
            # A copy: a function that writes into its state must not reach other subscriptions.
            seed = self._seed
            copy = seed.replace(values=_copied(seed.values)) if isinstance(seed, Frame) else _copied(seed)
            result = self._fn(copy, frame)
        else:
            result = frame.values
        if isinstance(result, Frame):
            out = own(result)
            self._topics[key] = out
            return out
        state: Values = _copied(result) if frame.borrowed else result
        self._topics[key] = state
        values = torch.full((len(frame),), float(state)) if isinstance(state, int | float) else state
        named = isinstance(values, Tensor) and values.shape[1:2] == (len(frame.components),)
        components = frame.components if named else ()
        return relabelled(frame, f"{frame.topic}.scan", values, components=components)

    def state_dict(self) -> dict[str, Any]:
        return {
            "topics": [
                {"source": key[0], "topic": key[1], **_plain(state)} for key, state in self._topics.items()
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._topics = {}
        for saved in state["topics"]:
            kept = saved["state"]
            if saved["what"] == "frame":
                kept = frame_from_state(kept)
            elif saved["what"] == "tuple":
                kept = tuple(kept)
            self._topics[saved["source"], saved["topic"]] = kept


def _copied(values: Values) -> Values:
    if isinstance(values, Tensor):
        return values.clone()
    if isinstance(values, tuple):
        return tuple(tensor.clone() for tensor in values)
    return values


def _plain(state: ScanState) -> dict[str, Any]:
    if isinstance(state, Frame):
        return {"what": "frame", "state": frame_state(state)}
    if isinstance(state, tuple):
        return {"what": "tuple", "state": list(state)}
    return {"what": "value", "state": state}


def scan(fn: Callable[[Any, Frame], ScanState], seed: ScanState | None = None) -> Operator:
    """A running result: each frame, together with the last result, gives the next.

    ::

        --1--2--3--4--->
             scan(lambda total, frame: total + frame.values)
        --1--3--6--10-->

    The function returns values as a frame has them (a tensor whose first dimension is the layer, a
    tuple with a tensor a layer, or one number for all), which become topic `<topic>.scan`; or a
    whole frame, which is given as it is. Each topic of a stream has a result of its own. Without a
    seed the first frame's values are the first result.

    NaN reaches the function as it is. A frame on which the function raises is skipped and reported,
    and the result stays. The function must not write into its arguments: what was given to
    subscribers may share their memory. On a Lens, micro-step frames are averaged over their step
    first; raw values that it returns are copied.

    Args:
        fn: A function of the last result and the frame.
        seed: The result before the first frame, in place of the first frame's values.

    Returns:
        The operator.

    Raises:
        TypeError: `fn` is not callable, or the seed is neither a frame nor values of one.
    """
    if not callable(fn):
        raise TypeError(f"scan() takes a function of the last result and the frame, got {fn!r}")
    if seed is not None and not isinstance(seed, Frame | Tensor | tuple | int | float):
        raise TypeError(f"scan(seed={seed!r}): the seed is a frame, a tensor, a tuple of tensors or a number")
    plan = f"scan({getattr(fn, '__name__', type(fn).__name__)})"

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        stream = checked_source(source)
        return stateful(stream, lambda: _Scan(stream.runtime, fn, seed), plan, per_step=True)

    return apply

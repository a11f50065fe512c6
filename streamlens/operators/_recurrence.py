"""Elementwise recurrences: state and output of each layer from its state and its next value.

A `Recurrence` is the mathematics, on whole tensors. `RecurrenceNode` keeps the state of every layer
of every topic, and runs the recurrence once a frame while the layers stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch import Tensor

from streamlens.frame import Frame
from streamlens.nodes import Emitted
from streamlens.operators._base import OperatorNode, TopicKey, per_topic_state, relabelled, widened
from streamlens.runtime import Runtime

__all__ = ["LayerStates", "Recurrence", "RecurrenceNode"]

State: TypeAlias = tuple[Tensor, ...]
"""The tensors of a recurrence, each with the layer as its first dimension."""


class Recurrence(Protocol):
    """What is computed from one value to the next; every tensor has the layer as first dimension."""

    @property
    def warm_up(self) -> int:
        """Frames of a layer that give no output yet."""
        ...

    def start(self, values: Tensor) -> State:
        """The state before the first value, for values of this shape; owns its memory."""
        ...

    def step(self, state: State, values: Tensor) -> tuple[State, Tensor, Tensor]:
        """The next state, the output, and which values were finite.

        Neither the state nor the values may be changed in place: outputs may share their memory.
        """
        ...


class LayerStates:
    """The state of one topic's layers under one recurrence.

    Stacked frames keep one row a layer; ragged ones keep each layer's tensors by themselves. If a
    topic's values change their shape or components, it starts afresh.
    """

    def __init__(self, recurrence: Recurrence) -> None:
        self._recurrence = recurrence
        self._layers: tuple[str, ...] = ()
        self._rows: State = ()
        self._ragged: dict[str, State] = {}
        self._warming: dict[str, int] = {}
        self._signature: tuple[Any, ...] = ()
        self._partial: tuple[tuple[str, ...], Tensor] | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """Every layer seen."""
        return tuple(self._ragged) if self._ragged else self._layers

    @property
    def state(self) -> State | dict[str, State]:
        """The rows of all layers, or the tensors of each."""
        return self._ragged or self._rows

    def apply(
        self, frame: Frame, count_finite: Callable[[Tensor], None]
    ) -> tuple[tuple[str, ...], Tensor | tuple[Tensor, ...]]:
        """Take in a frame; gives the layers that have an output, and their outputs."""
        values = frame.values
        signature: tuple[Any, ...]
        if isinstance(values, Tensor):
            values = widened(values)
            signature = ("stacked", tuple(values.shape[1:]), frame.components, values.dtype)
        else:
            signature = ("ragged",)
        if signature != self._signature:
            self._layers, self._rows, self._ragged, self._warming = (), (), {}, {}
            self._partial = None
            self._signature = signature
        if not isinstance(values, Tensor):
            return self._apply_ragged(frame, values, count_finite)
        out = self._apply_stacked(frame.layers, values, count_finite)
        return self._ready(frame.layers, out)

    def _apply_stacked(
        self, layers: tuple[str, ...], values: Tensor, count_finite: Callable[[Tensor], None]
    ) -> Tensor:
        if layers is not self._layers and layers != self._layers:
            known = frozenset(self._layers)
            new = [i for i, name in enumerate(layers) if name not in known]
            if new:
                self._add(tuple(layers[i] for i in new), values if len(new) == len(layers) else values[new])
        if self._rows and self._rows[0].device != values.device:
            self._rows = tuple(t.to(values.device) for t in self._rows)
            self._partial = None
        if layers is self._layers or layers == self._layers:
            # Equal tuples compare by identity from the next frame on.
            self._layers = layers
            self._rows, out, finite = self._recurrence.step(self._rows, values)
        else:
            index = self._index_of(layers, values.device)
            rows, out, finite = self._recurrence.step(tuple(t[index] for t in self._rows), values)
            self._rows = tuple(t.index_copy(0, index, r) for t, r in zip(self._rows, rows, strict=True))
        count_finite(finite)
        return out

    def _add(self, names: tuple[str, ...], values: Tensor) -> None:
        fresh = self._recurrence.start(values)
        if self._layers:
            device = values.device
            fresh = tuple(torch.cat([t.to(device), f]) for t, f in zip(self._rows, fresh, strict=True))
        self._rows = fresh
        self._layers = (*self._layers, *names)
        self._partial = None
        if self._recurrence.warm_up:
            self._warming.update(dict.fromkeys(names, self._recurrence.warm_up))

    def _index_of(self, layers: tuple[str, ...], device: torch.device) -> Tensor:
        if self._partial is None or self._partial[0] != layers or self._partial[1].device != device:
            place = {name: i for i, name in enumerate(self._layers)}
            rows = torch.tensor([place[name] for name in layers], dtype=torch.long)
            self._partial = (layers, rows.to(device, non_blocking=True))
        return self._partial[1]

    def _apply_ragged(
        self, frame: Frame, values: tuple[Tensor, ...], count_finite: Callable[[Tensor], None]
    ) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
        outputs: list[Tensor] = []
        for name, value in zip(frame.layers, values, strict=True):
            row = widened(value).unsqueeze(0)
            state = self._ragged.get(name)
            if state is None or not _fits(state, self._recurrence.start(row[:0])):
                state = self._recurrence.start(row)
                if self._recurrence.warm_up:
                    self._warming[name] = self._recurrence.warm_up
            state, out, finite = self._recurrence.step(tuple(t.to(row.device) for t in state), row)
            self._ragged[name] = state
            outputs.append(out[0])
            count_finite(finite)
        warm = self._warm(frame.layers)
        return tuple(frame.layers[i] for i in warm), tuple(outputs[i] for i in warm)

    def _ready(self, layers: tuple[str, ...], out: Tensor) -> tuple[tuple[str, ...], Tensor]:
        if not self._warming:
            return layers, out
        warm = self._warm(layers)
        if len(warm) == len(layers):
            return layers, out
        return tuple(layers[i] for i in warm), out[warm]

    def _warm(self, layers: tuple[str, ...]) -> list[int]:
        warm: list[int] = []
        for i, name in enumerate(layers):
            left = self._warming.get(name, 0)
            if not left:
                warm.append(i)
            elif left == 1:
                del self._warming[name]
            else:
                self._warming[name] = left - 1
        return warm

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        signature = list(self._signature)
        if len(signature) > 1:
            signature[1:] = [list(signature[1]), list(signature[2]), str(signature[3]).removeprefix("torch.")]
        return {
            "layers": list(self._layers),
            "rows": list(self._rows),
            "ragged": {name: list(state) for name, state in self._ragged.items()},
            "warming": dict(self._warming),
            "signature": signature,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        signature = list(state["signature"])
        if len(signature) > 1:
            signature[1:] = [tuple(signature[1]), tuple(signature[2]), getattr(torch, signature[3])]
        self._signature = tuple(signature)
        self._layers = tuple(state["layers"])
        self._rows = tuple(state["rows"])
        self._ragged = {name: tuple(tensors) for name, tensors in state["ragged"].items()}
        self._warming = dict(state["warming"])
        self._partial = None


def _fits(state: Sequence[Tensor], fresh: Sequence[Tensor]) -> bool:
    return all(a.shape[1:] == b.shape[1:] and a.dtype == b.dtype for a, b in zip(state, fresh, strict=True))


class RecurrenceNode(OperatorNode):
    """Runs a recurrence on every topic of a stream, each by itself.

    Args:
        runtime: The stream's runtime.
        recurrence: What is computed.
        suffix: What is appended to the topic.
    """

    def __init__(self, runtime: Runtime, recurrence: Recurrence, suffix: str) -> None:
        super().__init__(runtime)
        self._recurrence = recurrence
        self._suffix = suffix
        self._topics: dict[TopicKey, LayerStates] = {}

    def on_frame(self, frame: Frame) -> Emitted:
        """The recurrence's outputs for the layers that have one."""
        if not frame.layers:
            return None
        states = self._topics.get((frame.source, frame.topic))
        if states is None:
            states = self._topics[frame.source, frame.topic] = LayerStates(self._recurrence)
        layers, values = states.apply(frame, self.count_finite)
        if not layers:
            return None
        return relabelled(
            frame, f"{frame.topic}.{self._suffix}", values, layers=layers, components=frame.components
        )

    def state_dict(self) -> dict[str, Any]:
        """The state of each topic."""
        return {"topics": per_topic_state(self._topics)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._topics = {}
        for saved in cast("list[dict[str, Any]]", state["topics"]):
            states = LayerStates(self._recurrence)
            states.load_state_dict(saved)
            self._topics[saved["source"], saved["topic"]] = states

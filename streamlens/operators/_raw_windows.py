"""`RawWindow`: what the raw tensors of some steps come to, without keeping them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from streamlens.chain import Mark, MarkKind
from streamlens.frame import Frame, Kind
from streamlens.nodes import Emitted
from streamlens.operators._base import OperatorNode, TopicKey, frame_from_state, frame_state, relabelled
from streamlens.operators._layout import UnitDimensions
from streamlens.operators._tensors import check_whole
from streamlens.operators._windowed import StepWindows
from streamlens.stream import Stream

__all__ = ["Gathered", "RawWindow", "check_window"]

Gathered: TypeAlias = dict[str, Tensor]
"""What is kept of one layer."""


def check_window(operator: str, window: object) -> None:
    """Raise unless it is a number of steps.

    Raises:
        ValueError: It is none.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"{operator}(window={window!r}): a number of steps from 1 on")


@dataclass
class _Open:
    """A topic's open window."""

    index: int
    covered: int
    """The first step from which every frame was seen."""
    at: Frame
    """The newest frame without its values."""
    layers: dict[str, Gathered] = field(default_factory=dict)


class RawWindow(OperatorNode):
    """Gathers raw tensors over windows of steps; subclasses say what of them, and what it comes to.

    A layer on which `gather` raises is left out of that frame and reported.

    Args:
        stream: The stream that is followed.
        operator: The operator's name, for messages.
        window: Steps in a window.
        name: What is appended to the topic.
        unit_dim: The dimension that counts a layer's units, where the user has said it.
    """

    def __init__(self, stream: Stream, operator: str, window: int, name: str, unit_dim: int | None) -> None:
        super().__init__(stream.runtime)
        self._operator = operator
        self._windows = StepWindows(window, window)
        self._name = name
        self._unit_dims = UnitDimensions.of_stream(stream, unit_dim)
        self._of_a_run = stream.lens is not None
        self._since = stream.runtime.step if self._of_a_run else 0
        self._open: dict[TopicKey, _Open] = {}
        self._told: set[str] = set()

    def gather(self, held: Gathered | None, value: Tensor, unit_dim: int | None) -> Gathered:
        """What is kept of a layer once another of its tensors has come.

        Args:
            held: What was kept before; None at a window's first.
            value: The tensor, valid now only.
            unit_dim: The dimension that counts its units; None where only its shape can tell.
        """
        raise NotImplementedError

    def finish(self, layers: Sequence[Gathered]) -> Tensor:
        """The values of layers at the end of a window, [layers, ...].

        Args:
            layers: What was kept of each.
        """
        raise NotImplementedError

    def on_frame(self, frame: Frame) -> Emitted:
        """Take in raw tensors; a frame of a later window ends the open one."""
        check_whole(frame, self._operator)
        key, index = (frame.source, frame.topic), self._windows.index(frame)
        window = self._open.get(key)
        out: list[Frame] = []
        if window is not None and index > window.index:
            out = self._close(key)
            window = None
        elif window is not None and index < window.index:
            self.count("late")
            return out
        if not frame.layers:
            return out
        at = relabelled(frame, frame.topic, torch.empty(0), layers=())
        if window is None:
            late_start = frame.step > self._since > 0
            window = self._open[key] = _Open(index, self._since + 1 if late_start else self._since, at)
        window.at = at
        for layer, value in frame.items():
            self._gather(window.layers, layer, value, self._unit_dims.of(layer, value, frame.topic))
        return out

    def _gather(self, layers: dict[str, Gathered], layer: str, value: Tensor, unit_dim: int | None) -> None:
        try:
            layers[layer] = self.gather(layers.get(layer), value, unit_dim)
        except Exception as error:
            layers.pop(layer, None)
            message = f"{layer}: {error}"
            if message not in self._told:
                # Once: it will not be otherwise with the next batch.
                self._told.add(message)
                self._runtime.report(error, f"{self._operator}() of layer {layer!r}")

    def _close(self, key: TopicKey) -> list[Frame]:
        window = self._open.pop(key)
        if not window.layers or self._windows.start(window.index) < window.covered:
            return []
        values = self.finish(list(window.layers.values()))
        frame = relabelled(window.at, f"{key[1]}.{self._name}", values, layers=tuple(window.layers))
        return [frame.replace(step=self._windows.end(window.index), kind=Kind.STEP)]

    def on_mark(self, mark: Mark) -> Emitted:
        """The windows that end with a step are over at its update."""
        if mark.kind is MarkKind.EPOCH:
            return None
        due = [key for key, window in self._open.items() if self._windows.end(window.index) <= mark.step]
        return [frame for key in due for frame in self._close(key)]

    def on_completed(self) -> Emitted:
        """The windows whose last step has come; on a lens its update has closed them already."""
        keys = list(self._open)
        if self._of_a_run:
            return None
        full = [k for k in keys if self._open[k].at.step == self._windows.end(self._open[k].index)]
        return [frame for key in full for frame in self._close(key)]

    def state_dict(self) -> dict[str, Any]:
        """What is kept of each topic's open window."""
        return {
            "topics": [
                {
                    "source": source,
                    "topic": topic,
                    "index": window.index,
                    "covered": window.covered,
                    "at": frame_state(window.at),
                    "layers": {
                        name: {k: t.clone() for k, t in held.items()} for name, held in window.layers.items()
                    },
                }
                for (source, topic), window in self._open.items()
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._open = {}
        for saved in state["topics"]:
            layers = {name: {k: t.clone() for k, t in held.items()} for name, held in saved["layers"].items()}
            at = frame_from_state(saved["at"])
            self._open[saved["source"], saved["topic"]] = _Open(saved["index"], saved["covered"], at, layers)

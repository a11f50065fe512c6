"""State that takes in the gradients of every step, and gives its results at a cadence."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from reactivex import Observable
from torch import Tensor

from streamlens.frame import Frame
from streamlens.nodes import Emitted, stateful
from streamlens.operators._base import OperatorNode
from streamlens.operators._merge import merged
from streamlens.operators._tensors import Due, at_every_step, check_whole, copies, dense, tensors_of
from streamlens.runtime import Runtime
from streamlens.stream import Stream

__all__ = ["GradientState", "following"]


class GradientState(OperatorNode):
    """Tensors a layer that every gradient changes.

    A gradient with an element that is not finite changes nothing, and is counted: as a whole, since an
    optimizer takes it or leaves it as a whole.

    Args:
        runtime: The stream's runtime.
        due: Which steps are given.
        operator: Who asks, for messages.
        names: What the tensors are, each as large as the gradient.
    """

    def __init__(self, runtime: Runtime, due: Due, operator: str, names: Sequence[str]) -> None:
        super().__init__(runtime)
        self._due = due
        self._operator = operator
        self.tensors: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        self.taken: dict[str, Tensor] = {}
        """How many gradients of each layer were taken, on the device they are on."""

    @abstractmethod
    def take(self, layers: Sequence[str], gradients: list[Tensor]) -> None:
        """Let finite gradients change the tensors in place; `taken` counts them already."""

    @abstractmethod
    def results(self, frame: Frame) -> Emitted:
        """What is given for a frame's layers."""

    def on_frame(self, frame: Frame) -> Emitted:
        """Take in the gradients; give results if they are due."""
        check_whole(frame, self._operator)
        if not frame.layers:
            return None
        now = {name: dense(gradient) for name, gradient in frame.items()}
        self.fit(now)
        whole = {name: _is_finite(gradient) for name, gradient in now.items()}
        self.count_finite(
            torch.stack([finite.to(whole[frame.layers[0]].device) for finite in whole.values()])
        )
        if all(finite.device.type == "cpu" for finite in whole.values()):
            good = [name for name, finite in whole.items() if finite]
            for name in good:
                self.taken[name] += 1
            if good:
                self.take(good, [now[name] for name in good])
        else:
            self.take_where(now, whole)
        return self.results(frame) if self._due(frame.step) else None

    def take_where(self, now: Mapping[str, Tensor], finite: Mapping[str, Tensor]) -> None:
        """Without asking the device which gradients are finite: what others changed is put back."""
        names = tuple(now)
        before = {key: {n: held[n].clone() for n in names} for key, held in self.tensors.items()}
        for name in names:
            self.taken[name] = self.taken[name] + finite[name]
        self.take(names, [torch.where(finite[n], now[n], torch.zeros_like(now[n])) for n in names])
        for key, held in self.tensors.items():
            for name in names:
                held[name].copy_(torch.where(finite[name], held[name], before[key][name]))

    def fit(self, gradients: Mapping[str, Tensor]) -> None:
        """Have tensors that these gradients fit: new ones for a layer that is new, or has another shape."""
        for name, gradient in gradients.items():
            held = next(iter(self.tensors.values())).get(name)
            if held is None or held.shape != gradient.shape or held.dtype is not gradient.dtype:
                for tensors in self.tensors.values():
                    tensors[name] = torch.zeros_like(gradient, memory_format=torch.preserve_format)
                self.taken[name] = torch.zeros((), dtype=torch.float32, device=gradient.device)
            elif held.device != gradient.device:
                for tensors in (*self.tensors.values(), self.taken):
                    tensors[name] = tensors[name].to(gradient.device)

    def state_dict(self) -> dict[str, Any]:
        """The tensors, and how many gradients they have seen."""
        return {"taken": copies(self.taken), **{key: copies(held) for key, held in self.tensors.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.taken = copies(state["taken"])
        self.tensors = {key: copies(state[key]) for key in self.tensors}


def _is_finite(gradient: Tensor) -> Tensor:
    if not gradient.numel():
        return torch.ones((), dtype=torch.bool, device=gradient.device)
    # One pass, a twentieth of isfinite(): the extremes are NaN where an element is.
    low, high = torch.aminmax(gradient)
    return low.isfinite() & high.isfinite()


def following(
    source: Observable[Frame],
    topic: str,
    operator: str,
    plan: str,
    make: Callable[[Runtime, Due], GradientState],
) -> Stream:
    """A stream's gradients through a state: at every step on a lens, whatever its cadence."""
    stream, due, front = at_every_step(tensors_of(source, topic, operator))
    return stateful(merged(stream, [stream], front), lambda: make(stream.runtime, due), plan)

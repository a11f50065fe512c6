"""`per_epoch`: what happens over an epoch, as one frame."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from reactivex import Observable
from torch import Tensor

from streamlens.chain import Mark, MarkKind
from streamlens.frame import Frame
from streamlens.nodes import Emitted, stateful
from streamlens.operators._base import (
    OperatorNode,
    TopicKey,
    checked_source,
    frame_from_state,
    frame_state,
    per_topic_state,
    relabelled,
)
from streamlens.operators._named import Reduce, check_reduce, over_known, reduce_name
from streamlens.operators._recurrence import LayerStates
from streamlens.operators._rows import Rows, reduce_rows
from streamlens.operators._windowed import Epochs, Windowed
from streamlens.runtime import Runtime
from streamlens.stream import Operator

__all__ = ["per_epoch"]

_FOLDED: Final = frozenset({"mean", "sum", "std", "max", "min", "first", "last"})
"""What is computed as the frames come, without keeping them."""


@dataclass(frozen=True)
class _Fold:
    """A named reduction, one value at a time; values that are not finite are left out."""

    reduce: str
    warm_up: int = 0

    def start(self, values: Tensor) -> tuple[Tensor, ...]:
        if self.reduce in {"mean", "sum", "std"}:
            zeros = torch.zeros_like(values, memory_format=torch.contiguous_format)
            return torch.zeros_like(zeros, dtype=torch.int32), zeros, zeros
        return (torch.full_like(values, math.nan, memory_format=torch.contiguous_format),)

    def step(self, state: tuple[Tensor, ...], values: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        finite = values.isfinite()
        if self.reduce in {"mean", "sum", "std"}:
            count, mean, squares = state
            count = count + finite
            # Welford's recurrence: sums over a long epoch would lose digits.
            deviation = torch.where(finite, values - mean, 0)
            mean = mean + deviation / count.clamp(min=1)
            squares = squares + deviation * torch.where(finite, values - mean, 0)
            return (count, mean, squares), values, finite
        (kept,) = state
        if self.reduce == "last":
            kept = torch.where(finite, values, kept)
        elif self.reduce == "first":
            kept = torch.where(finite & kept.isnan(), values, kept)
        else:
            extreme = torch.fmax if self.reduce == "max" else torch.fmin
            kept = torch.where(finite, extreme(kept, values), kept)
        return (kept,), values, finite

    def finish(self, state: tuple[Tensor, ...]) -> Tensor:
        if len(state) == 1:
            return state[0]
        count, mean, squares = state
        if self.reduce == "std":
            return (squares / (count - 1).clamp(min=0)).sqrt()
        return torch.where(count > 0, mean * count if self.reduce == "sum" else mean, math.nan)


class _Epoch:
    """One topic's epoch so far: folded, or kept where the reduction needs all values at once."""

    def __init__(self, last: Frame, fold: _Fold | None) -> None:
        self.last = last
        """The latest frame, without its values: where the epoch's frame will stand."""
        self.fold = fold
        self.states = None if fold is None else LayerStates(fold)
        self.rows = Rows()

    def finish(self, reduce: Reduce) -> tuple[tuple[str, ...], Tensor | tuple[Tensor, ...]]:
        if self.states is None or self.fold is None:
            return reduce_rows(self.rows.frames, lambda v: over_known(v, v.isfinite(), reduce))
        state = self.states.state
        if isinstance(state, dict):
            return tuple(state), tuple(self.fold.finish(tensors)[0] for tensors in state.values())
        return self.states.layers, self.fold.finish(state)

    def state_dict(self) -> dict[str, Any]:
        folded = None if self.states is None else self.states.state_dict()
        return {"last": frame_state(self.last), "folded": folded, "rows": self.rows.state_dict()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], fold: _Fold | None) -> _Epoch:
        epoch = cls(frame_from_state(state["last"]), fold)
        if epoch.states is not None:
            epoch.states.load_state_dict(state["folded"])
        epoch.rows.load_state_dict(state["rows"])
        return epoch


class _PerEpoch(OperatorNode):
    """Gathers each topic's frames of the epoch; gives one when the epoch is over."""

    def __init__(self, runtime: Runtime, reduce: Reduce) -> None:
        super().__init__(runtime)
        self._reduce = reduce
        self._fold = _Fold(reduce) if isinstance(reduce, str) and reduce in _FOLDED else None
        self._suffix = f"epoch_{reduce_name(reduce)}"
        self._topics: dict[TopicKey, _Epoch] = {}

    def on_frame(self, frame: Frame) -> Emitted:
        if not frame.layers:
            return None
        key = (frame.source, frame.topic)
        epoch = self._topics.get(key)
        out: list[Frame] = []
        bare = frame.replace(layers=(), values=())
        if epoch is not None and frame.epoch < epoch.last.epoch:
            self.count("late")
            return None
        if epoch is not None and frame.epoch > epoch.last.epoch:
            out += self._emit(key)
            epoch = None
        if epoch is None:
            epoch = self._topics[key] = _Epoch(bare, self._fold)
        epoch.last = bare
        if epoch.states is not None:
            epoch.states.apply(frame, self.count_finite)
        else:
            self.count("duplicate", len(epoch.rows.insert(frame)))
            values = frame.values
            for value in (values,) if isinstance(values, Tensor) else values:
                self.count_finite(value.isfinite())
        return out

    def _emit(self, key: TopicKey) -> list[Frame]:
        epoch = self._topics.pop(key)
        layers, values = epoch.finish(self._reduce)
        last = epoch.last
        names = last.components
        same_width = isinstance(values, Tensor) and values.shape[1:2] == (len(names),)
        topic = f"{last.topic}.{self._suffix}"
        return [relabelled(last, topic, values, layers=layers, components=names if same_width else ())]

    def on_mark(self, mark: Mark) -> Emitted:
        if mark.kind is not MarkKind.EPOCH:
            return None
        over = [key for key, epoch in self._topics.items() if epoch.last.epoch <= mark.epoch]
        return [frame for key in over for frame in self._emit(key)]

    def on_completed(self) -> Emitted:
        return [frame for key in tuple(self._topics) for frame in self._emit(key)]

    def state_dict(self) -> dict[str, Any]:
        return {"topics": per_topic_state(self._topics)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._topics = {}
        for saved in state["topics"]:
            self._topics[saved["source"], saved["topic"]] = _Epoch.from_state(saved, self._fold)


def per_epoch(reduce: Reduce = "mean") -> Operator:
    """One frame an epoch: the layers' values, reduced over its steps.

    It is given when the epoch is over (on a Lens: `lens.epochs()`, `lens.batches()` or
    `lens.epoch_finished()` say so), when a frame of a later epoch comes, or when the stream ends,
    and is labelled by the epoch's last step that had a frame. After it, `every(n)` counts epochs.

    By name (`"mean"`, `"sum"`, `"max"`, `"min"`, `"std"`, `"median"`, `"last"`, `"first"`), values that
    are missing, NaN or infinite are left out (the latter counted); a layer without any value gives
    NaN. A function is given the values stacked, [time, layers, ...], NaN where a layer is missing,
    and returns [layers, ...]. The result is topic `<topic>.epoch_<reduce>`, such as
    `loss.epoch_mean`.

    On a Lens, micro-step frames are averaged over their step first. Names other than `"median"` are
    computed as frames come, in a few tensor operations each; `"median"` and functions keep every
    frame of the epoch (raw ones as copies).

    Args:
        reduce: The name of a reduction, or a function.

    Returns:
        The operator.

    Raises:
        ValueError: An unknown name.
        TypeError: `reduce` is neither a name nor a function.
    """
    check_reduce("per_epoch", reduce)
    plan = f"per_epoch({reduce_name(reduce)})"

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        stream = checked_source(source)
        node = stateful(stream, lambda: _PerEpoch(stream.runtime, reduce), plan, per_step=True, marks=True)
        return Windowed.of(node, Epochs())

    return apply

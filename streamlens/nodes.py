"""Nodes: the primitives that every operator is built on.

`frame_operator` makes an operator out of a function of one frame, `stateful` out of a `Node` with
state; both keep failures to the frame that caused them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from reactivex import Observable, abc
from reactivex.disposable import CompositeDisposable, Disposable
from torch import Tensor

from streamlens.chain import Mark, MarkKind, current_chain
from streamlens.errors import StreamlensError
from streamlens.frame import Frame, Kind
from streamlens.stream import Stream, as_stream

__all__ = ["Emitted", "Node", "average_micro_steps", "forward", "frame_operator", "stateful"]

Emitted: TypeAlias = Frame | Iterable[Frame] | None
"""What a node gives for one input: a frame, several, or none."""


class Node:
    """One operator's work and state within one subscription.

    Subclasses write `on_frame`, and whichever of the others they need. What is in `state_dict()`
    is saved by `lens.state_dict()`.
    """

    plan: str = ""
    skipped: int = 0
    running: bool = False
    held: Sized | None = None
    """What marks are for, if they are for what is held alone: while it is empty none are given."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What people should know of it, for `explain()`."""
        return ()

    def on_frame(self, frame: Frame) -> Emitted:
        """What one frame gives."""
        raise NotImplementedError

    def on_mark(self, mark: Mark) -> Emitted:
        """What a mark of the clock gives."""
        return None

    def on_completed(self) -> Emitted:
        """What is left when the source ends."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """The node's state as plain containers and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""


def forward(observer: abc.ObserverBase[Frame], emitted: Emitted) -> None:
    """Hand on what a node gave."""
    if emitted is None:
        return
    if isinstance(emitted, Frame | Mapping):
        # A join's result, a mapping from topic to frame, is one item as a frame is.
        observer.on_next(cast("Frame", emitted))
        return
    for frame in emitted:
        observer.on_next(frame)


def stateful(
    source: Observable[Frame],
    make: Callable[[], Node],
    plan: str,
    *,
    per_step: bool = False,
    marks: bool = False,
    kind: Kind | None = None,
    raw: bool = False,
) -> Stream:
    """The primitive that every operator with state is built on.

    The state lives in a `Node` made anew for each subscription and registered with the chain, so
    that it is saved and restored. A frame on which the node raises is skipped and reported; the
    chain goes on.

    Args:
        source: The stream to follow.
        make: Makes the node of a new subscription.
        plan: The operator as it shows in the plan.
        per_step: Average micro-step frames over their step first.
        marks: Whether the node wants the clock's marks.
        kind: How often the result's frames come, if that changes.
        raw: Whether the result still holds the model's own tensors.
    """
    stream = as_stream(source)
    stream.check_subscribable()
    if per_step:
        stream = average_micro_steps(stream)
    runtime = stream.runtime

    def subscribe(
        observer: abc.ObserverBase[Frame], scheduler: abc.SchedulerBase | None = None
    ) -> abc.DisposableBase:
        node = make()
        node.plan = plan
        node.running = True
        chain = current_chain.get()
        if chain is not None:
            chain.cells.append(node)

        def run(handler: Callable[..., Emitted], *args: Any) -> None:
            try:
                emitted = handler(*args)
            except Exception as error:
                if chain is not None:
                    chain.counts["errors"] += 1
                runtime.report(error, f"{plan} in {chain.key if chain else 'a stream'!r}")
                return
            if emitted is not None:
                forward(observer, emitted)

        on_next = partial(run, node.on_frame)

        def on_completed() -> None:
            run(node.on_completed)
            observer.on_completed()

        group = CompositeDisposable(
            stream.subscribe(on_next, observer.on_error, on_completed, scheduler=scheduler)
        )
        if marks and stream.lens is not None:
            # After subscribing upstream: marks reach upstream operators first.
            group.add(runtime.on_mark(partial(run, node.on_mark), node.held))
        group.add(Disposable(lambda: setattr(node, "running", False)))
        return group

    return stream.then(subscribe, plan, kind=kind, raw=raw)


def frame_operator(
    source: Observable[Frame], fn: Callable[[Frame], Emitted], plan: str, *, raw: bool | None = None
) -> Stream:
    """An operator without state: a function of one frame.

    Args:
        source: The stream to follow.
        fn: Gives a frame, several or none for each frame.
        plan: The operator as it shows in the plan.
        raw: Whether the result still holds the model's own tensors; as the source unless given.
    """
    stream = as_stream(source)
    stream.check_subscribable()

    def subscribe(
        observer: abc.ObserverBase[Frame], scheduler: abc.SchedulerBase | None = None
    ) -> abc.DisposableBase:
        chain = current_chain.get()

        def on_next(frame: Frame) -> None:
            try:
                emitted = fn(frame)
            except Exception as error:
                if chain is not None:
                    chain.counts["errors"] += 1
                stream.runtime.report(error, f"{plan} in {chain.key if chain else 'a stream'!r}")
                return
            forward(observer, emitted)

        return stream.subscribe(on_next, observer.on_error, observer.on_completed, scheduler=scheduler)

    return stream.then(subscribe, plan, raw=stream.raw if raw is None else raw)


def average_micro_steps(stream: Stream) -> Stream:
    """Frames of one micro-step each, averaged over their step; other frames pass.

    Only a stream that comes from a lens is averaged: on a plain one nothing says which
    micro-step is the last.
    """
    if stream.lens is None or stream.kind in (Kind.STEP, Kind.EVENT):
        return stream
    if stream.raw:
        raise StreamlensError(
            f"{stream.plan_text}: raw micro-step frames cannot be averaged over a step or joined to a "
            "parameter topic; reduce them first, for example with norm()"
        )
    return stateful(stream, _StepMean, "per_step()", marks=True, kind=Kind.STEP)


class _StepMean(Node):
    """Sums the micro-step frames of the open step; gives their mean at its update."""

    _pending: dict[tuple[str, str], _Sums]

    def __init__(self) -> None:
        self.held = self._pending = {}

    def on_frame(self, frame: Frame) -> Emitted:
        if frame.kind is not Kind.MICRO_STEP:
            return frame
        if frame.borrowed:
            raise StreamlensError(
                f"raw micro-step frames of {frame.topic!r} cannot be averaged over a step; reduce them first"
            )
        key = (frame.source, frame.topic)
        held = self._pending.get(key)
        if held is None or held.last.step != frame.step or held.last.components != frame.components:
            self._pending[key] = _Sums(frame)
        else:
            held.add(frame)
        return None

    def on_mark(self, mark: Mark) -> Emitted:
        if not self._pending or mark.kind is MarkKind.EPOCH:
            return None
        due = [key for key, sums in self._pending.items() if sums.last.step <= mark.step]
        return [self._pending.pop(key).mean() for key in due]

    def on_completed(self) -> Emitted:
        # The open step never got its update: what it gathered belongs to no step.
        self._pending.clear()
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"pending": [sums.state_dict() for sums in self._pending.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pending = [_Sums.from_state(saved) for saved in state.get("pending", ())]
        self._pending.clear()
        self._pending.update({(sums.last.source, sums.last.topic): sums for sums in pending})


class _Sums:
    """Per-layer sums of a topic over the micro-steps of one step."""

    def __init__(self, frame: Frame) -> None:
        self.last = frame
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self._gather(frame)

    def add(self, frame: Frame) -> None:
        self.last = frame
        self._gather(frame)

    def _gather(self, frame: Frame) -> None:
        for layer, value in frame.items():
            total = self.totals.get(layer)
            self.totals[layer] = value if total is None else total + value
            self.counts[layer] = self.counts.get(layer, 0) + 1

    def mean(self) -> Frame:
        if all(count == 1 for count in self.counts.values()) and len(self.last) == len(self.totals):
            return self.last.replace(kind=Kind.STEP)
        layers = tuple(self.totals)
        values = torch.stack([self.totals[name] / self.counts[name] for name in layers])
        return self.last.replace(layers=layers, values=values, kind=Kind.STEP)

    def state_dict(self) -> dict[str, Any]:
        last = self.last
        return {
            "topic": last.topic,
            "step": last.step,
            "epoch": last.epoch,
            "micro_step": last.micro_step,
            "components": list(last.components),
            "source": last.source,
            "totals": dict(self.totals),
            "counts": dict(self.counts),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> _Sums:
        layers = tuple(state["totals"])
        sums = cls(
            Frame(
                state["topic"],
                state["step"],
                layers,
                torch.stack([state["totals"][name] for name in layers]),
                epoch=state["epoch"],
                micro_step=state["micro_step"],
                components=state["components"],
                kind=Kind.MICRO_STEP,
                source=state["source"],
            )
        )
        sums.counts = dict(state["counts"])
        return sums

"""`window`: what happens over some steps, as one frame."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reactivex import Observable
from torch import Tensor

from streamlens.chain import Mark, MarkKind
from streamlens.frame import Frame
from streamlens.nodes import Emitted, stateful
from streamlens.operators._base import (
    OperatorNode,
    TopicKey,
    checked_source,
    is_whole,
    layers_of,
    per_topic_state,
    relabelled,
)
from streamlens.operators._named import Reduce, check_reduce, over_known, reduce_name
from streamlens.operators._rows import Rows, reduce_rows
from streamlens.operators._windowed import StepWindows, Windowed
from streamlens.stream import Operator, Stream

__all__ = ["window"]


class _Topic:
    """One topic's open windows: its kept frames, and how far it has come."""

    def __init__(self) -> None:
        self.rows = Rows()
        self.next = 0
        """The oldest window that is not over."""
        self.emitted: tuple[str, ...] = ()
        """The layers of that window that were given already, its last step having come."""
        self.covered = 0
        """The first step from which every frame was seen."""
        self.clock = -1
        """The last step that is known of."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows.state_dict(),
            "next": self.next,
            "emitted": list(self.emitted),
            "covered": self.covered,
            "clock": self.clock,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rows.load_state_dict(state["rows"])
        self.next = state["next"]
        self.emitted = tuple(state["emitted"])
        self.covered = state["covered"]
        self.clock = state["clock"]


class _Window(OperatorNode):
    """Keeps the frames of the windows that are open; gives each window when it is over."""

    def __init__(
        self, stream: Stream, windows: StepWindows, reduce: Reduce, suffix: str, *, partial: bool
    ) -> None:
        super().__init__(stream.runtime)
        self._windows = windows
        self._reduce = reduce
        self._suffix = suffix
        self._partial = partial
        self._marked = stream.lens is not None
        self._since = stream.runtime.step if self._marked else 0
        self._topics: dict[TopicKey, _Topic] = {}

    def on_frame(self, frame: Frame) -> Emitted:
        topic = self._topics.get((frame.source, frame.topic))
        if topic is None:
            topic = self._topics[frame.source, frame.topic] = self._begin(frame)
        out = self._advance(topic, frame.step)
        windows = self._windows
        if topic.next and frame.step <= windows.end(topic.next - 1):
            self.count("late")
            return out
        if frame.step < windows.start(topic.next) or not frame.layers:
            return out
        repeated = topic.rows.insert(frame)
        self.count("duplicate", len(repeated))
        if len(repeated) == len(frame):
            return out
        self._count_unknown(frame)
        if frame.step == windows.end(topic.next):
            # Of a lens, the layers that this frame lacks may still come: another optimizer's.
            out += self._emit(topic, frame.layers if self._marked else None)
        return out

    def _begin(self, frame: Frame) -> _Topic:
        topic = _Topic()
        topic.next = self._windows.first_ending_at_or_after(frame.step)
        # Frames of the step that was open at the subscription may have come before it.
        topic.covered = self._since + 1 if frame.step > self._since > 0 else self._since
        return topic

    def _count_unknown(self, frame: Frame) -> None:
        values = frame.values
        for value in (values,) if isinstance(values, Tensor) else values:
            self.count_finite(value.isfinite())

    def _advance(self, topic: _Topic, step: int) -> list[Frame]:
        """Close the windows that end before a step."""
        topic.clock = max(topic.clock, step)
        windows = self._windows
        out: list[Frame] = []
        while windows.end(topic.next) < step:
            if not topic.rows:
                topic.next = windows.first_ending_at_or_after(step)
                topic.emitted = ()
                break
            out += self._emit(topic)
            topic.next += 1
            topic.emitted = ()
            topic.rows.drop_before(windows.start(topic.next))
        return out

    def _emit(
        self, topic: _Topic, layers: tuple[str, ...] | None = None, label: int | None = None
    ) -> list[Frame]:
        """The oldest open window, with the layers wanted that it was not given with before."""
        start = self._windows.start(topic.next)
        rows = topic.rows.up_to(self._windows.end(topic.next))
        if not rows or (start < topic.covered and not self._partial):
            return []
        if topic.emitted:
            names = layers if layers is not None else layers_of(rows)
            if names == topic.emitted:
                return []
            known = frozenset(topic.emitted)
            layers = tuple(name for name in names if name not in known)
            if not layers:
                return []
        reduce = self._reduce
        wanted, values = reduce_rows(rows, lambda v: over_known(v, v.isfinite(), reduce), layers=layers)
        topic.emitted += wanted
        last = rows[-1]
        frame = relabelled(last, f"{last.topic}.{self._suffix}", values, layers=wanted)
        same_width = isinstance(values, Tensor) and values.shape[1:2] == (len(last.components),)
        return [
            frame.replace(
                step=self._windows.end(topic.next) if label is None else label,
                components=last.components if same_width else (),
            )
        ]

    def on_mark(self, mark: Mark) -> Emitted:
        if mark.kind is not MarkKind.CLOSED:
            return None
        return [frame for topic in self._topics.values() for frame in self._advance(topic, mark.step + 1)]

    def on_completed(self) -> Emitted:
        out: list[Frame] = []
        for topic in self._topics.values():
            end, before = self._windows.end(topic.next), self._windows.end(topic.next - 1)
            if end <= topic.clock:
                out += self._emit(topic)
            elif self._partial and topic.rows:
                # Where windows slide, what the last full one did not see yet.
                label = topic.rows.frames[-1].step
                if not topic.next or label > before:
                    out += self._emit(topic, label=label)
        self._topics.clear()
        return out

    def state_dict(self) -> dict[str, Any]:
        return {"topics": per_topic_state(self._topics)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._topics = {}
        for saved in state["topics"]:
            topic = self._topics[saved["source"], saved["topic"]] = _Topic()
            topic.load_state_dict(saved)


def window(size: int, hop: int | None = None, reduce: Reduce = "mean", *, partial: bool = False) -> Operator:
    """One frame for every `size` steps: the layers' values, reduced over the window.

    ::

        --0--1--2--3--4--5--6--7->
              window(4, reduce="sum")
        -----------6-----------22>

    Windows are aligned to step 0: [0, size), [hop, hop + size), and so on; tumbling unless a smaller
    `hop` makes them slide. Each is labelled by its last step, and given when that step's frame has
    come (or the step has closed without one). On a Lens, layers that are updated later in that
    step follow in a frame of their own. After a window, `every(n)` counts windows.

    By name (`"mean"`, `"sum"`, `"max"`, `"min"`, `"std"`, `"median"`, `"last"`, `"first"`), values that
    are missing, NaN or infinite are left out (the latter counted); a layer without any value gives
    NaN. `"std"` divides by n - 1. A function is given the values stacked, [time, layers, ...] with one
    entry of time for each step that had a frame, NaN where a layer is missing, and returns
    [layers, ...]. The result is topic `<topic>.<reduce><size>`, such as `loss.mean100`.

    Frames of a window that is over are dropped and counted as late. On a Lens, micro-step frames
    are averaged over their step first. The cost is `size` kept frames (raw ones are copied), one
    stack of them and a few tensor operations a window; nothing waits for a GPU.

    Args:
        size: Steps in a window.
        hop: Steps from one window to the next; `size` unless given.
        reduce: The name of a reduction, or a function.
        partial: Also give windows whose beginning was not observed, and at the end of the stream
            the one that is open, labelled by its last frame.

    Returns:
        The operator.

    Raises:
        ValueError: A size or hop that is not a positive integer, or an unknown name.
        TypeError: `reduce` is neither a name nor a function.
    """
    hop = size if hop is None else hop
    for name, value in (("size", size), ("hop", hop)):
        if not is_whole(value) or value < 1:
            raise ValueError(f"window({name}={value!r}): the {name} is a positive number of steps")
    check_reduce("window", reduce)
    windows = StepWindows(size, hop)
    what = reduce_name(reduce)
    plan = f"window({size}{f', hop={hop}' if hop != size else ''}, {what}{', partial' if partial else ''})"

    def apply(source: Observable[Frame]) -> Observable[Frame]:
        stream = checked_source(source)

        def make() -> _Window:
            return _Window(stream, windows, reduce, f"{what}{size}", partial=partial)

        return Windowed.of(stateful(stream, make, plan, per_step=True, marks=True), windows)

    return apply

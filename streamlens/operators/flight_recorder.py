"""`flight_recorder`: the last frames before something happened."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from reactivex import Observable, abc
from reactivex.disposable import CompositeDisposable

from streamlens.capture.source import Source
from streamlens.failure import on_failure
from streamlens.frame import Frame, Kind
from streamlens.nodes import Emitted, forward, stateful
from streamlens.operators._base import (
    OperatorNode,
    checked_source,
    frame_from_state,
    frame_state,
    is_whole,
    own,
)
from streamlens.operators._listening import check_control, listen
from streamlens.runtime import Runtime
from streamlens.stream import Stream

__all__ = ["FlightRecorder", "flight_recorder"]


class _Recorder(OperatorNode):
    """The ring, and how many frames still follow the last release."""

    def __init__(self, runtime: Runtime, last: int, after: int) -> None:
        super().__init__(runtime)
        self._after = after
        self._ring: deque[Frame] = deque(maxlen=last)
        self._following = 0
        self._cause = ""

    def on_frame(self, frame: Frame) -> Emitted:
        batch = self._runtime.batch if isinstance(self._runtime, Source) else None
        kept = own(frame)
        if batch is not None:
            kept = kept.replace(meta={**kept.meta, "batch": batch})
        if self._following:
            self._following -= 1
            return self._recorded(kept, self._cause)
        self._ring.append(kept)
        return None

    def release(self, cause: str) -> list[Frame]:
        """What the ring holds, oldest first; it is empty then."""
        frames = [self._recorded(frame, cause) for frame in self._ring]
        self._ring.clear()
        self._following, self._cause = self._after, cause
        return frames

    @staticmethod
    def _recorded(frame: Frame, cause: str) -> Frame:
        # An event: whatever averages or waits for steps has gone past its step long ago.
        meta = {**frame.meta, "cause": cause}
        return frame.replace(topic=f"{frame.topic}.recorded", kind=Kind.EVENT, meta=meta)

    def state_dict(self) -> dict[str, Any]:
        ring = [frame_state(frame) for frame in self._ring]
        return {"ring": ring, "following": self._following, "cause": self._cause}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ring.clear()
        self._ring.extend(frame_from_state(saved) for saved in state["ring"])
        self._following, self._cause = state["following"], state["cause"]


class FlightRecorder:
    """What `flight_recorder` makes: an operator that can be told to let go of what it holds."""

    def __init__(self, last: int, on: Stream | None, after: int) -> None:
        self._last = last
        self._on = on
        self._after = after
        # What it holds belongs to subscriptions: this only knows them.
        self._releases: weakref.WeakSet[_Release] = weakref.WeakSet()

    def dump(self) -> None:
        """Let everything through that is held, now, in every chain that the recorder is part of."""
        for release in tuple(self._releases):
            release("dump")

    @property
    def plan(self) -> str:
        """How it shows in a plan."""
        on = f", on={self._on.plan_text}" if self._on is not None else ""
        after = f", after={self._after}" if self._after else ""
        return f"flight_recorder(last={self._last}{on}{after})"

    def __call__(self, source: Observable[Frame]) -> Stream:
        """Apply it to a stream.

        Raises:
            StreamlensError: A Lens with no topic selected.
            TypeError: No Observable.
        """
        front = checked_source(source)
        runtime = front.runtime

        def subscribe(
            observer: abc.ObserverBase[Frame], scheduler: abc.SchedulerBase | None = None
        ) -> abc.DisposableBase:
            node = _Recorder(runtime, self._last, self._after)
            release = _Release(runtime, node, lambda frames: forward(observer, frames))
            self._releases.add(release)
            recording = stateful(front, lambda: node, self.plan, kind=Kind.EVENT)
            group = CompositeDisposable(recording.subscribe(observer, scheduler=scheduler))
            # After the frames themselves: those of an alert's own step are in the ring by then.
            if self._on is not None:
                group.add(listen(self._on, release.on_alert, self.plan))
            group.add(on_failure(runtime, release.on_failure))
            group.add(release)
            return group

        return front.then(subscribe, self.plan, kind=Kind.EVENT)


class _Release(abc.DisposableBase):
    """Lets a recorder's frames go, in order with all others."""

    def __init__(self, runtime: Runtime, node: _Recorder, give: Callable[[list[Frame]], None]) -> None:
        self._runtime = runtime
        self._node = node
        self._give: Callable[[list[Frame]], None] | None = give

    def __call__(self, cause: str) -> None:
        self._runtime.post(lambda: self._release(cause))

    def _release(self, cause: str) -> None:
        if self._give is not None and self._node.running:
            self._give(self._node.release(cause))

    def on_alert(self, alert: Frame) -> None:
        """Something has come on the stream that says when; the end of an alert is no reason."""
        if alert.meta.get("state") != "end":
            self._release(alert.topic)

    def on_failure(self, error: BaseException) -> None:
        """Training has raised."""
        self(f"{type(error).__name__}: {error}")

    def dispose(self) -> None:
        """Let nothing go any more."""
        self._give = None


def flight_recorder(
    last: int = 200, *, on: Observable[Frame] | None = None, after: int = 0
) -> FlightRecorder:
    """Hold the last frames back, and let them through when something has happened.

    ::

        norms     --0--1--2--3--4--5--6--7--8-->
        alerts    ----------------s------------>
             flight_recorder(last=3, on=alerts, after=1)
        recorded  ----------------(345)-6------>

    So what led to the trouble is there, step by step, though only every hundredth step is stored. The
    frames held, `last` of them in all, come through in order, as topic `<topic>.recorded`:

    - when a frame comes on `on` (of alerts only those that start);
    - when training raises: out of `with observe(model) as lens:`, or out of the program. (A notebook
      shows exceptions itself: use `with` there, or `dump()`.);
    - on `dump()`: `recorder = flight_recorder()`, `lens.pipe(norm("weights"), recorder)`,
      `recorder.dump()`.

    Each comes through once, and then `after` frames follow directly. Frames keep their own steps and
    are events, which nothing averages or waits for. `meta["cause"]` says what let them go (the alert's topic,
    the exception, or `"dump"`), `meta["batch"]` the index of the batch within its epoch: in a step of
    several micro-steps, that of the last one.

    Held are the frames themselves: `last` small ones of reduced topics, and copies of all tensors of raw
    ones. They are part of the chain's saved state. `on` is subscribed beside the chain, with a key of its
    own. What is held when the stream ends without any of these is dropped.

    Args:
        last: How many frames are held.
        on: A stream whose frames let them go, such as alerts.
        after: How many further frames follow.

    Returns:
        The operator, with a method `dump()`.

    Raises:
        ValueError: `last` is below 1 or `after` below 0.
        TypeError: `on` is no Observable.
        StreamlensError: `on` is a Lens with no topic selected.
    """
    for name, number, least in (("last", last, 1), ("after", after, 0)):
        if not is_whole(number) or number < least:
            raise ValueError(f"flight_recorder({name}={number!r}): a whole number from {least} on")
    control = None if on is None else check_control("flight_recorder", "on", on)
    return FlightRecorder(last, control, after)

"""`when`: a chain that is on while an alert is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from reactivex import Observable, abc
from reactivex.disposable import CompositeDisposable, Disposable, SerialDisposable

from streamlens.chain import Chain, current_chain
from streamlens.errors import StreamlensError
from streamlens.frame import Frame
from streamlens.lens import Lens
from streamlens.nodes import Emitted, Node, stateful
from streamlens.operators._base import checked_source
from streamlens.operators._listening import check_control, listen
from streamlens.stream import Operator, Stream

__all__ = ["when"]


class _Alerts(Node):
    """Which alerts are open, and since when some are."""

    def __init__(self) -> None:
        self._open: set[tuple[str, str, str, str]] = set()
        self.since = -1
        self.until = -1

    @property
    def on(self) -> bool:
        """Whether an alert is open."""
        return bool(self._open)

    def take(self, alert: Frame) -> None:
        """An alert starts or ends.

        Raises:
            StreamlensError: The frame is no alert.
        """
        state = alert.meta.get("state")
        if state not in ("start", "end"):
            raise StreamlensError(
                f"{self.plan}: the frame of {alert.topic!r} at step {alert.step} is no alert: its meta has "
                "no state 'start' or 'end'"
            )
        about = {(alert.source, alert.topic, str(alert.meta.get("of", "")), layer) for layer in alert.layers}
        was_on = self.on
        self._open = self._open | about if state == "start" else self._open - about
        if self.on and not was_on:
            self.since = alert.step
        elif was_on and not self.on:
            self.until = alert.step

    def on_frame(self, frame: Frame) -> Emitted:
        """The frame, if it lies in a step after the start and not after the end."""
        within = frame.step > self.since >= 0 and (self.on or frame.step <= self.until)
        return frame if within else None

    @property
    def notes(self) -> tuple[str, ...]:
        """Whether it is on."""
        return (f"on since step {self.since}",) if self.on else ("off: it waits for an alert",)

    def state_dict(self) -> dict[str, Any]:
        """The open alerts."""
        return {"open": [list(key) for key in sorted(self._open)], "since": self.since, "until": self.until}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._open = {(key[0], key[1], key[2], key[3]) for key in state["open"]}
        self.since, self.until = state["since"], state["until"]


class _Switch(_Alerts):
    """Subscribes a lens while an alert is open."""

    def __init__(
        self,
        connect: Callable[[int], abc.DisposableBase],
        next_step: Callable[[], int],
        chain: Chain | None,
    ) -> None:
        super().__init__()
        self._connect = connect
        self._next_step = next_step
        self._chain = chain
        self._connected = False
        self._first = 0
        self.connection = SerialDisposable()

    def take(self, alert: Frame) -> None:
        super().take(alert)
        if self.on and not self._connected:
            # Of the step that is open a part has gone by already.
            self._first = self._next_step()
        self._follow()

    def _follow(self) -> None:
        if self.on == self._connected:
            return
        self._connected = self.on
        if not self.on:
            self.connection.disposable = Disposable()
            return
        # What is captured from now on is this chain's, whoever sent the alert.
        token = current_chain.set(self._chain)
        try:
            self.connection.disposable = self._connect(self._first)
        finally:
            current_chain.reset(token)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "first": self._first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._first = state["first"]
        self._follow()


@dataclass(frozen=True, eq=False)
class _Gate:
    """What a view carries: see `streamlens.capture.view.Gate`."""

    alerts: Stream

    @property
    def plan(self) -> str:
        return f"when({self.alerts.plan_text})"

    def connect(
        self, connect: Callable[[int], abc.DisposableBase], next_step: Callable[[], int]
    ) -> abc.DisposableBase:
        chain = current_chain.get()
        switch = _Switch(connect, next_step, chain)
        switch.plan = self.plan
        switch.running = True
        if chain is not None:
            chain.cells.append(switch)
        listening = listen(self.alerts, switch.take, self.plan)
        stopped = Disposable(lambda: setattr(switch, "running", False))
        return CompositeDisposable(listening, switch.connection, stopped)


def when(alerts: Observable[Frame]) -> Operator:
    """A chain that is on while an alert is: from the step after the one that it started at until it ends.

    ::

        alerts          -------start---------------end------>
        weights         --0--1--2---3---4---5---6---7---8--->
             when(alerts)
        weights         -----------3---4---5---6---7-------->

    On a Lens this is pushed down: before an alert nothing is asked of the run, so that whatever follows
    (a histogram of every gradient, say) costs nothing until it is wanted, and nothing again once the alert
    has ended. `lens.explain()` says whether it is on. On any other stream its frames are passed or
    dropped. Alerts of several rules and layers overlap: it is on while any of them is open. With
    `poor_initialisation`, whose alert never ends, that is for good.

    Alerts are subscribed beside the chain, with a key of their own; derive them,
    `alerts = lens.derive("alerts", lens.pipe(health()))`, so that they are computed once for all. Which
    alerts are open is saved with the chain's state. A frame that is no alert is reported and ignored.

    Args:
        alerts: A stream of alerts.

    Returns:
        The operator.

    Raises:
        TypeError: `alerts` is no Observable.
        StreamlensError: It is a Lens with no topic selected.

    Example:
        `lens.pipe(when(alerts), norm("weight_gradients"))`
    """
    stream = check_control("when", "alerts", alerts)
    gate = _Gate(stream)

    def apply(source: Observable[Frame]) -> Stream:
        if isinstance(source, Lens):
            return source.narrow(gate=gate)
        front = checked_source(source)

        def subscribe(
            observer: abc.ObserverBase[Frame], scheduler: abc.SchedulerBase | None = None
        ) -> abc.DisposableBase:
            node = _Alerts()
            passing = stateful(front, lambda: node, gate.plan, raw=front.raw)
            # First, so that where both come of one source an alert is known before the next frame.
            group = CompositeDisposable(listen(stream, node.take, gate.plan))
            group.add(passing.subscribe(observer, scheduler=scheduler))
            return group

        return front.then(subscribe, gate.plan, raw=front.raw)

    return apply

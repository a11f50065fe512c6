"""`Source`: a runtime with a clock, which answers views with frames."""

from __future__ import annotations

import contextlib
import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from reactivex.abc import DisposableBase
from reactivex.disposable import Disposable
from torch import Tensor

from streamlens.capture.due import Schedule
from streamlens.capture.emitted import emitted
from streamlens.capture.exchange import Alone, Exchange
from streamlens.capture.provider import Provider
from streamlens.capture.view import Demand, View
from streamlens.chain import Mark, MarkKind, current_chain
from streamlens.frame import Frame, Kind, Lease
from streamlens.topics import TOPICS, TopicSpec, check_own_topic, topic_spec, unknown_topic

__all__ = ["Source"]

_MODEL = ("",)

_STATS = ("emitted", "late", "incomplete", "duplicate", "dropped", "written", "skipped_nan", "errors")
"""What `stats()` always has."""

_VERSION = 1
_SNAPSHOT = frozenset({"version", "run_id", "clock", "chains"})
"""What every snapshot has."""


class Source(Provider):
    """Keeps the demands of subscribers and delivers frames of the open step to them.

    Attributes:
        clock: Where the run is.
        exchange: What is asked of other processes that train the same model.
        demands: What is subscribed.
        topics: The topics that somebody has selected.
        idle: Whether nobody has selected any.
        user_topics: Topics that come from `emit`.
        sessions: Whose lenses are of this source; it ends with the last.
        in_epochs: How many loops over `lens.epochs()` run.
        paused: How many `lens.paused()` silence it.
        inert: Whether nothing is ever taken.
        should_stop: Whether the loops that train are asked to end.
        inherited: Whether this process was forked from the one that it belongs to.
    """

    _snapshot = _SNAPSHOT

    recorded = False
    """Whether what it gives is over, so that nothing can act on it."""

    def __init__(self, name: str = "", on_error: str = "report") -> None:
        super().__init__(name, on_error)
        self.exchange: Exchange = Alone()
        self.demands: list[Demand] = []
        self.topics: frozenset[str] = frozenset()
        self.idle = True
        self.user_topics: dict[str, None] = {}
        self.sessions: set[Any] = set()
        self.in_epochs = 0
        self.paused = 0
        self.inert = False
        self.should_stop = False
        self.inherited = False
        self._due: tuple[Demand, ...] = ()
        self._due_step = -1
        self._schedule = Schedule()

    @contextlib.contextmanager
    def silenced(self) -> Iterator[None]:
        """A region in which nothing is taken."""
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    @property
    def writes(self) -> bool:  # type: ignore[override]
        """Whether sinks write in this process."""
        return self.exchange.writes

    @property
    def place(self) -> str:  # type: ignore[override]
        """What this process is called in reports."""
        return self.exchange.place

    def origins(self, topic: str, layers: Sequence[str], step: int) -> tuple[int, ...]:
        """The processes from which values that are not finite come."""
        return self.exchange.origins(topic, layers, step)

    @property
    def step(self) -> int:
        """The optimizer update that is open."""
        return self.clock.step

    @property
    def next_step(self) -> int:
        """The first step of which nothing has been taken yet."""
        clock = self.clock
        return clock.step + int(clock.updated or clock.counted)

    @property
    def batch(self) -> int | None:
        """The index within its epoch of the batch under way, or of the last; None before the first."""
        clock = self.clock
        return clock.batch if clock.in_pass else clock.batch - 1 if clock.batch else None

    @property
    @abstractmethod
    def silent(self) -> bool:
        """Whether nothing is to be emitted now."""

    # -- demands -----------------------------------------------------------------------------

    @property
    def known_topics(self) -> tuple[str, ...]:
        """Every topic that can be selected."""
        return (*TOPICS, *self.user_topics, *self.derived_topics)

    def check_topic(self, topic: str) -> TopicSpec | None:
        """What is known of a topic; None for one of the user's own.

        Raises:
            UnknownTopicError: Nothing provides it.
        """
        spec = topic_spec(topic) if isinstance(topic, str) else None
        if spec is None and topic not in self.user_topics and topic not in self.derived_topics:
            raise unknown_topic(topic, self.known_topics)
        return spec

    def subscribe_view(self, view: View, deliver: Callable[[Frame], None]) -> DisposableBase:
        """Deliver what a view asks for, from the next frame on, or while its gates say so."""
        if view.gates:
            gate, *others = view.gates
            inner = replace(view, gates=tuple(others))
            return gate.connect(
                lambda first: self.subscribe_view(replace(inner, start=max(inner.start, first)), deliver),
                lambda: self.next_step,
            )
        demand = Demand(view, deliver, current_chain.get(), self.resolve(view))
        derived = [
            self.subscribe_derived(t, self._of_view(demand)) for t in view.topics if t in self._derived
        ]
        self.demands.append(demand)
        self.demands_changed()

        def remove() -> None:
            demand.active = False
            for connection in derived:
                connection.dispose()
            if demand in self.demands:
                self.demands.remove(demand)
                self.demands_changed()

        return Disposable(remove)

    def _of_view(self, demand: Demand) -> Callable[[Frame], None]:
        def deliver(frame: Frame) -> None:
            if demand.view.due(frame.step):
                self._hand(demand, frame)

        return deliver

    @property
    def due_now(self) -> tuple[Demand, ...]:
        """The demands that want frames of the open step."""
        step = self.clock.step
        if step != self._due_step:
            self._due_step = step
            exchange, schedule = self.exchange, self._schedule
            self._due = schedule.admitted(step, exchange.admits) if exchange.active else schedule.at(step)
        return self._due

    @property
    def live(self) -> list[Demand]:
        """The demands that still want something, at this step or later."""
        return [demand for demand in self.demands if not demand.view.over(self.clock.step)]

    def demands_changed(self) -> None:
        """A subscription has come or gone."""
        live = self.live
        self.idle = not live
        self.topics = frozenset(t for d in live for t in d.view.topics)
        self._schedule = Schedule(self.demands)
        self._due, self._due_step = (), -1

    # -- emitting ----------------------------------------------------------------------------

    def frame(
        self,
        topic: str,
        layers: Sequence[str],
        values: Tensor | tuple[Tensor, ...],
        *,
        kind: Kind = Kind.STEP,
        components: tuple[str, ...] = (),
        meta: Mapping[str, Any] | None = None,
        lease: Lease | None = None,
        micro_step: int | None = None,
    ) -> Frame:
        """A frame of the open step, of the open micro-step unless told otherwise."""
        clock = self.clock
        return Frame(
            topic,
            clock.step,
            layers,
            values,
            epoch=clock.epoch,
            micro_step=clock.micro_step if micro_step is None else micro_step,
            components=components,
            meta=meta,
            kind=kind,
            source=self.name,
            lease=lease,
        )

    def post_frames(
        self,
        frames: Sequence[tuple[Sequence[Demand], Frame]],
        lease: Lease | None = None,
        mark: Mark | None = None,
    ) -> None:
        """Deliver a burst of frames; raw ones are valid until it is over.

        Args:
            frames: Each with the demands that it answers.
            lease: Under which the raw ones are lent.
            mark: What is announced before them.
        """
        if not frames:
            if lease is not None:
                lease.end()
            if mark is not None:
                self.post_mark(mark)
            return

        def burst() -> None:
            if mark is not None:
                self.mark(mark)
            if lease is not None:
                self.lend(lease)
            self.counts["emitted"] += len(frames)
            for demands, frame in frames:
                for demand in demands:
                    self._hand(demand, frame)

        self.post(burst)

    def _hand(self, demand: Demand, frame: Frame) -> None:
        if not demand.active:
            return
        start = time.perf_counter()
        try:
            demand.deliver(frame)
        except Exception as error:
            self.report(error, f"delivery of {frame.topic!r}")
        finally:
            if demand.chain is not None:
                demand.chain.seconds += time.perf_counter() - start

    def wanted(self, topics: Iterable[str]) -> bool:
        """Whether anybody has selected one of these topics."""
        return not self.topics.isdisjoint(topics)

    def emit(self, topic: str, layers: tuple[str, ...], values: Tensor, kind: Kind) -> None:
        """Deliver a frame of a topic that needs no capture to whoever selected it."""
        demands = [d for d in self.due_now if topic in d.view.topics]
        if demands and not self.silent:
            self.post_frames([(demands, self.frame(topic, layers, values, kind=kind))])

    def emit_frame(self, frame: Frame) -> None:
        """Deliver a frame that was made already to whoever selected its topic at its step."""
        demands = [d for d in self.demands if frame.topic in d.view.topics and d.view.due(frame.step)]
        if demands and not self.silent:
            self.post_frames([(demands, frame)])

    def check_own_topic(self, topic: str) -> None:
        """Make sure that a topic may be the user's own, and that it can be selected from now on.

        Raises:
            TypeError: It is no name.
            StreamlensError: The run provides it itself.
        """
        check_own_topic(topic, self.derived_topics)
        self.user_topics[topic] = None

    def emit_own(self, topic: str, value: float | Tensor | Mapping[str, Any]) -> None:
        """Deliver a number of the user's own, or one a layer.

        Raises:
            TypeError: The value is no number, tensor or mapping of layers to these.
            ValueError: The layers' values differ in shape.
        """
        values = emitted(topic, value)
        if values:
            self.emit(topic, tuple(values), torch.stack(tuple(values.values())), Kind.EVENT)

    def emit_index(self, topic: str, index: int) -> None:
        """Deliver an event that carries an index."""
        if topic in self.topics and self.due_now:
            self.emit(topic, _MODEL, torch.tensor([float(index)]), Kind.EVENT)

    def announce_epoch(self) -> None:
        """The epoch is over, and its last step is closed: an event, and a mark."""
        step = max(self.clock.step - 1, 0)
        ended = self.clock.end_epoch()
        demands = [d for d in self.demands if "epoch_finished" in d.view.topics and d.view.due(step)]
        frame = self.frame("epoch_finished", _MODEL, torch.tensor([float(ended)]), kind=Kind.EVENT).replace(
            step=step, epoch=ended
        )
        if not self.silent:
            self.post_frames([(demands, frame)] if demands else [])
        self.post_mark(Mark(MarkKind.EPOCH, step, ended))

    # -- state and the end -------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """Counts of what was emitted and lost."""
        total = self.counts.copy()
        for chain in self.chains:
            total["skipped_nan"] += sum(cell.skipped for cell in chain.cells)
        for sink in self.sink_stats().values():
            total["dropped"] += sink.dropped
            total["written"] += sink.written
        return {**{name: total[name] for name in _STATS}, **total}

    def state_dict(self) -> dict[str, Any]:
        """The clock and the state of every operator, as plain containers and tensors."""
        return {
            "version": _VERSION,
            "run_id": self.run_id,
            "clock": self.clock.state_dict(),
            "should_stop": self.should_stop,
            "chains": self.chain_states(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a snapshot was taken.

        Raises:
            ValueError: It is none.
        """
        if not isinstance(state, Mapping) or not state.keys() >= self._snapshot:
            keys = f"the keys {', '.join(map(repr, state))}" if isinstance(state, Mapping) else repr(state)
            raise ValueError(f"load_state_dict() takes what lens.state_dict() gave, got {keys}")
        if state["version"] != _VERSION:
            raise ValueError(
                f"load_state_dict(): the snapshot has version {state['version']!r}, and this streamlens "
                f"reads what its own lens.state_dict() gives, version {_VERSION}: use the one that wrote it"
            )
        self.run_id = str(state["run_id"])
        self.clock.load_state_dict(state["clock"])
        self.should_stop = bool(state.get("should_stop", False))
        self.resumed_at = self.clock.step if self.clock.updated else self.clock.step - 1
        self.resumption = uuid.uuid4().hex
        if self._delivery is not None:
            self._delivery.renew()
        self.demands_changed()
        self.load_chain_states(state["chains"])

    def shut_down(self, timeout: float | None = None) -> bool:
        """Complete every stream, flush and close every sink."""
        if self.closed:
            return True
        if self.inherited:
            # Its streams complete in the process that they belong to.
            self.closed = True
            self._tidy()
            return True
        self.complete_chains()
        self.closed = True
        done = self.close_delivery(timeout)
        self._tidy()
        self.errors.on_completed()
        return done

    def _tidy(self) -> None:
        """Let go of what a closed source does not need."""
        self.demands.clear()
        self._due = ()
        self._derived.clear()

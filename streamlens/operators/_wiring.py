"""How a join is wired: its inputs made ready, the stream in front subscribed once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, Final, TypeAlias

from reactivex import Observable, abc
from reactivex.disposable import CompositeDisposable, Disposable
from reactivex.subject import Subject

from streamlens.chain import MarkKind, current_chain
from streamlens.errors import StreamlensError
from streamlens.frame import Frame, Kind
from streamlens.lens import Lens
from streamlens.nodes import average_micro_steps
from streamlens.operators._base import checked_source
from streamlens.operators._join import Join, JoinInput
from streamlens.operators._tensors import whole
from streamlens.operators._windowed import Epochs, Windowed
from streamlens.operators.selection import topic
from streamlens.runtime import Runtime
from streamlens.stream import Stream, as_stream

__all__ = ["JoinSource", "Wiring", "joined", "subscribe_inputs"]

JoinSource: TypeAlias = str | Observable[Frame] | Callable[[Any], Observable[Frame]]
"""An input of a join: a topic or an operator of the stream it is applied to, or another stream."""

hub_under_way: Final[ContextVar[Subject[Frame] | None]] = ContextVar("streamlenshub_under_way", default=None)
"""While a join subscribes: where the frames of the stream in front come from."""


def stand_in(source: Stream) -> Stream:
    """The stream in front, for the inputs of a join: subscribed once for all of them."""

    def subscribe(
        observer: abc.ObserverBase[Frame], scheduler: abc.SchedulerBase | None = None
    ) -> abc.DisposableBase:
        hub = hub_under_way.get()
        return (source if hub is None else hub).subscribe(observer, scheduler=scheduler)

    stream = source.then(subscribe, "", raw=source.raw)
    stream.plan = ()
    return stream


class Wiring:
    """The inputs of a join, made ready for it.

    Args:
        source: The stream in front.
        sources: The inputs.
        average: Average micro-steps over their step, unless all inputs come by micro-step.
    """

    def __init__(
        self, source: Observable[Frame], sources: Sequence[JoinSource], *, average: bool = True
    ) -> None:
        self.own_streams = own_streams = all(isinstance(s, Observable) for s in sources)
        self.front = source if isinstance(source, Lens) or own_streams else checked_source(source)
        self.shared = None if isinstance(self.front, Lens) or own_streams else as_stream(self.front)
        base = self.front if self.shared is None else stand_in(self.shared)
        inputs = [self._input(base, entry) for entry in sources]
        kinds = {stream.kind for stream in inputs}
        plain = all(stream.lens is None for stream in inputs)
        self.by_micro_step = kinds == {Kind.MICRO_STEP} or (plain and Kind.STEP not in kinds)
        if average and not self.by_micro_step:
            inputs = [average_micro_steps(stream) for stream in inputs]
        self.inputs = inputs
        self.one_burst = all(s.raw and s.kind is Kind.STEP for s in inputs) and (
            len({id(s.runtime) for s in inputs}) == 1 and not plain
        )

    @staticmethod
    def _input(base: Observable[Frame], entry: JoinSource) -> Stream:
        if isinstance(entry, str):
            return checked_source(topic(entry)(base))
        return checked_source(entry if isinstance(entry, Observable) else entry(base))

    def need_whole(self, operator: str) -> None:
        """Have tensors from lenses only while they are whole.

        Raises:
            UnmergeableError: Several ranks hold parts of them now.
        """
        self.inputs = [
            whole(s, operator) if isinstance(s, Lens) and s.raw and not s.view.whole else s
            for s in self.inputs
        ]

    def check_distinct(self, operator: str, sources: Sequence[JoinSource]) -> None:
        """Raise where two inputs are the same, so that their frames have one topic.

        Raises:
            StreamlensError: They are.
        """
        known: dict[object, int] = {}
        for place, (entry, stream) in enumerate(zip(sources, self.inputs, strict=True)):
            # The plan of a plain stream, or one with operators of other libraries, does not tell it.
            vague = stream.foreign or (isinstance(entry, Observable) and stream.lens is None)
            what = id(entry) if vague else (id(stream.runtime), stream.plan)
            first = known.setdefault(what, place)
            if first != place:
                raise StreamlensError(
                    f"{operator}(): inputs {first} and {place} are the same, {stream.plan_text}, and both "
                    "would be read by one topic: leave one out, or give it a name of its own, "
                    "lambda stream: stream.pipe(norm('weights'), rename('another'))"
                )

    def join(self, runtime: Runtime, lateness: int) -> Join:
        """The state of a new subscription."""
        inputs = [
            JoinInput(
                stream.runtime if stream.lens is not None else None,
                # What is given at an epoch's end comes after its last step has closed.
                MarkKind.EPOCH
                if isinstance(stream, Windowed) and stream.windows == Epochs()
                else MarkKind.CLOSED,
            )
            for stream in self.inputs
        ]
        return Join(
            runtime,
            inputs,
            by_micro_step=self.by_micro_step,
            lateness=lateness,
            one_burst=self.one_burst,
        )

    def result(self, subscribe: abc.Subscription[Frame], plan: str) -> Stream:
        """The join's stream: of the lens that its inputs come from, and of their windows."""
        first = next((s for s in self.inputs if s.lens is not None), self.inputs[0])
        plan_in_front: tuple[str, ...] = ()
        if not self.own_streams:
            front = as_stream(self.front)
            plan_in_front = front.plan
            first = front if front.lens is not None else first
        kinds = {stream.kind for stream in self.inputs}
        kind = Kind.STEP if Kind.STEP in kinds else self.inputs[0].kind
        stream = Stream(
            subscribe,
            plan=(*plan_in_front, plan),
            runtime=first.runtime,
            lens=first.lens,
            kind=kind,
            foreign=any(s.foreign for s in self.inputs),
            # A join has the layers that all inputs have.
            selectors=tuple(dict.fromkeys(selector for s in self.inputs for selector in s.selectors)),
        )
        windows = [s.windows if isinstance(s, Windowed) else None for s in self.inputs]
        if windows[0] is not None and all(w == windows[0] for w in windows):
            return Windowed.of(stream, windows[0])
        return stream


def joined(
    source: Observable[Frame],
    sources: Sequence[JoinSource],
    emit: Callable[[tuple[Frame, ...]], Any],
    operator: str,
    lateness: int,
    *,
    keyed: bool = False,
    whole: bool = False,
) -> Stream:
    """The stream of what `emit` makes of the frames that belong together.

    Args:
        source: The stream in front.
        sources: The inputs.
        emit: Makes a result of one frame an input.
        operator: The operator's name, for its plan and for messages.
        lateness: How many steps an input may reorder.
        keyed: Whether inputs are told by their topics, so that two must not be the same.
        whole: Whether tensors must be whole ones.

    Raises:
        StreamlensError: An input cannot be joined, or is there twice, or is of parts.
    """
    wiring = Wiring(source, sources)
    if whole:
        wiring.need_whole(operator)
    if keyed:
        wiring.check_distinct(operator, sources)
    late = f", allowed_lateness={lateness}" if lateness else ""
    plan = f"{operator}({', '.join(stream.plan_text for stream in wiring.inputs)}{late})"
    holder: list[Stream] = []

    def subscribe(
        observer: abc.ObserverBase[Frame], scheduler: abc.SchedulerBase | None = None
    ) -> abc.DisposableBase:
        return _subscribe(wiring, holder[0].runtime, observer, scheduler, emit, plan, lateness)

    holder.append(wiring.result(subscribe, plan))
    return holder[0]


def _subscribe(
    wiring: Wiring,
    runtime: Runtime,
    observer: abc.ObserverBase[Frame],
    scheduler: abc.SchedulerBase | None,
    emit: Callable[[tuple[Frame, ...]], Any],
    plan: str,
    lateness: int,
) -> abc.DisposableBase:
    join = wiring.join(runtime, lateness)
    join.plan = plan
    join.running = True
    chain = current_chain.get()
    if chain is not None:
        chain.cells.append(join)
    group = CompositeDisposable()

    def receive(i: int) -> Callable[[Frame], None]:
        def on_next(frame: Frame) -> None:
            try:
                frames = join.on_input(i, frame)
                result = None if frames is None else emit(frames)
            except Exception as error:
                if chain is not None:
                    chain.counts["errors"] += 1
                runtime.report(error, f"{plan} in {chain.key if chain else 'a stream'!r}")
                return
            if result is not None:
                observer.on_next(result)
            if join.ended:
                observer.on_completed()

        return on_next

    def complete(i: int) -> Callable[[], None]:
        def on_completed() -> None:
            join.on_input_completed(i)
            if join.ended:
                observer.on_completed()

        return on_completed

    start = subscribe_inputs(wiring, group, receive, complete, observer.on_error, scheduler)
    # Last, so that every operator in front has acted on a mark before the join does.
    for marked in {id(s.runtime): s.runtime for s in wiring.inputs if s.lens is not None}.values():
        group.add(marked.on_mark(partial(join.on_mark_of, marked)))
    start()
    group.add(Disposable(lambda: setattr(join, "running", False)))
    return group


def subscribe_inputs(
    wiring: Wiring,
    group: CompositeDisposable,
    receive: Callable[[int], Callable[[Frame], None]],
    complete: Callable[[int], Callable[[], None]],
    on_error: Callable[[Exception], None],
    scheduler: abc.SchedulerBase | None,
) -> Callable[[], None]:
    """Subscribe every input, and the stream in front once for all of them.

    Args:
        wiring: The inputs.
        group: Takes what ends the subscriptions.
        receive: Gives what receives the frames of an input, by its place.
        complete: Gives what is called when an input ends.
        on_error: Called when one fails.
        scheduler: As for any subscription.

    Returns:
        What lets go of the frames that the stream in front gave meanwhile; to be called last.
    """
    hub: Subject[Frame] = Subject()
    start = connect(wiring.shared, hub, group, scheduler)
    # Inputs with streams of their own may be of one that stands in for what another join has in front.
    token = hub_under_way.set(hub_under_way.get() if wiring.shared is None else hub)
    try:
        for i, stream in enumerate(wiring.inputs):
            group.add(stream.subscribe(receive(i), on_error, complete(i), scheduler=scheduler))
    finally:
        hub_under_way.reset(token)
    return start


def connect(
    shared: Stream | None,
    hub: Subject[Frame],
    group: CompositeDisposable,
    scheduler: abc.SchedulerBase | None,
) -> Callable[[], None]:
    """Subscribe the stream in front; what it gives at once waits until the inputs are there."""
    if shared is None:
        return lambda: None
    waiting: list[Callable[[], None]] | None = []

    def on_next(frame: Frame) -> None:
        if waiting is None:
            hub.on_next(frame)
        else:
            waiting.append(lambda: hub.on_next(frame))

    def on_error(error: Exception) -> None:
        if waiting is None:
            hub.on_error(error)
        else:
            waiting.append(lambda: hub.on_error(error))

    def on_completed() -> None:
        if waiting is None:
            hub.on_completed()
        else:
            waiting.append(hub.on_completed)

    def start() -> None:
        nonlocal waiting
        first, waiting = waiting or [], None
        for event in first:
            event()

    group.add(shared.subscribe(on_next, on_error, on_completed, scheduler=scheduler))
    return start

"""The frames of several inputs as one stream, in the order in which they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reactivex import Observable, abc
from reactivex.disposable import CompositeDisposable

from streamlens.frame import Frame
from streamlens.operators._wiring import JoinSource, Wiring, subscribe_inputs
from streamlens.stream import Stream, as_stream

__all__ = ["merged"]


def merged(
    source: Observable[Frame], sources: Sequence[JoinSource], plan: tuple[str, ...] | None = None
) -> Stream:
    """The frames of every input, each as it comes; nothing is held back.

    It ends when every input has ended. Where the inputs are operators, the stream in front is
    subscribed once for all of them, unless it is a lens.

    Args:
        source: The stream in front, whose lens the result is of.
        sources: Operators to apply to it, or streams of their own; at least one.
        plan: How the result shows in the plan; as the stream in front unless given.

    Returns:
        The stream.
    """
    wiring = Wiring(source, sources, average=False)
    kinds = {stream.kind for stream in wiring.inputs}

    def subscribe(
        observer: abc.ObserverBase[Frame], scheduler: abc.SchedulerBase | None = None
    ) -> abc.DisposableBase:
        group = CompositeDisposable()
        running = set(range(len(wiring.inputs)))

        def receive(_: int) -> Callable[[Frame], None]:
            return observer.on_next

        def complete(i: int) -> Callable[[], None]:
            def on_completed() -> None:
                running.discard(i)
                if not running:
                    observer.on_completed()

            return on_completed

        subscribe_inputs(wiring, group, receive, complete, observer.on_error, scheduler)()
        return group

    front = as_stream(source)
    return Stream(
        subscribe,
        plan=front.plan if plan is None else plan,
        runtime=front.runtime,
        lens=front.lens,
        kind=kinds.pop() if len(kinds) == 1 else None,
        foreign=any(stream.foreign for stream in wiring.inputs),
        raw=all(stream.raw for stream in wiring.inputs),
        selectors=front.selectors,
    )

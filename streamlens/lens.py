"""`Lens`: a view of what a run can emit, narrowed before anything is computed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, ParamSpec, Self, TypeVar

from reactivex import Observable, abc
from reactivex.subject import Subject
from torch import Tensor, nn

from streamlens.capture.engine import Engine
from streamlens.capture.source import Source
from streamlens.capture.view import Gate, View
from streamlens.chain import ErrorReport, current_chain
from streamlens.errors import ClosedLensError, StreamlensError, UnknownTopicError
from streamlens.failure import failed
from streamlens.frame import Frame
from streamlens.layers import LayerSelector
from streamlens.reductions import Reduction
from streamlens.session import Batches, Session, epochs
from streamlens.stream import Stream
from streamlens.topics import topic_spec

__all__ = ["Lens"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_EVERYTHING: Final = View()
"""The view that nothing has narrowed yet."""


def _under(name: str, frame: Frame) -> Frame:
    """A frame under a derived topic's name, which several topics of one chain keep apart."""
    return frame if frame.topic == name or frame.topic.startswith(f"{name}.") else frame.replace(topic=name)


class Lens(Stream):
    """A view of what a run can emit: topics, layers, cadence and reduction.

    `observe(model)` returns one with nothing selected. The operators `topic`, `layers`, `every`,
    `between` and the reductions (`norm`, `mean`, ...) applied to a Lens give a narrower Lens;
    nothing is captured, copied or computed that no subscriber asked for. What follows the first
    other operator is an ordinary Observable.
    """

    def __init__(self, source: Source, session: Session, view: View = _EVERYTHING) -> None:
        super().__init__(
            None,
            plan=(source.title, *view.describe()),
            runtime=source,
            kind=source.kind_of(view),
            selectors=view.selectors,
        )
        self.source = source
        self.session = session
        self.view = view
        self.lens = self
        self.raw = view.reduction is None and source.gives_raw(view.topics)

    @property
    def engine(self) -> Engine:
        """What observes the model.

        Raises:
            StreamlensError: The lens is of no PyTorch model.
        """
        if not isinstance(self.source, Engine):
            raise StreamlensError(f"{self.plan_text} observes no PyTorch model")
        return self.source

    # -- narrowing ---------------------------------------------------------------------------

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics selected; none yet if empty."""
        return self.view.topics

    @property
    def reducible(self) -> bool:
        """Whether a reduction can be pushed down: raw topics are selected and none is applied yet."""
        return self.view.reduction is None and bool(self.topics) and self.source.can_reduce(self.topics)

    def narrow(
        self,
        *,
        topics: Sequence[str] | None = None,
        layers: LayerSelector | None = None,
        every: int | None = None,
        between: tuple[int, int | None] | None = None,
        reduction: Reduction | None = None,
        expected: bool | None = None,
        gate: Gate | None = None,
    ) -> Lens:
        """A lens that asks for less.

        Args:
            topics: Select these topics; if some were selected already, they must be among them.
            layers: Keep only these layers.
            every: Keep only steps with `step % every == 0`.
            between: Keep only steps in `[start, stop)`.
            reduction: What becomes of each tensor where it is taken.
            expected: Whether it is worth a report if nothing of a topic comes.
            gate: Says when it is asked for at all.

        Raises:
            UnknownTopicError: A topic that nothing provides.
            LayerNotFoundError: No layer is selected.
            StreamlensError: The reduction cannot be pushed down.
            UnmergeableError: Several ranks hold parts, and it does not merge.
        """
        self._check_open()
        view = self.view
        if topics is not None:
            view = replace(view, topics=self._select(topics))
        if layers is not None:
            view = replace(view, selectors=(*view.selectors, layers))
            self._check_layers(view)
        if every is not None:
            view = replace(view, every=math.lcm(view.every, every))
        if between is not None:
            start, stop = between
            stops = [s for s in (view.stop, stop) if s is not None]
            view = replace(view, start=max(view.start, start), stop=min(stops) if stops else None)
        if expected is not None:
            view = replace(view, expected=expected)
        if gate is not None:
            view = replace(view, gates=(*view.gates, gate))
        if reduction is not None:
            target = Lens(self.source, self.session, view)
            target._check_selected()
            if not target.reducible:
                raise StreamlensError(
                    f"{self.plan_text}: {reduction.name} cannot be applied to what is reduced already"
                )
            view = self.source.reduced(view, reduction)
        if topics is not None and view.selectors:
            self._check_layers(view)
        return Lens(self.source, self.session, view)

    def _select(self, topics: Sequence[str]) -> tuple[str, ...]:
        wanted = tuple(dict.fromkeys(topics))
        for topic in wanted:
            self.source.check_topic(topic)
            if self.topics and topic not in self.topics:
                raise UnknownTopicError(
                    f"topic {topic!r} was not selected before: this lens has {', '.join(self.topics)}; "
                    f"start from the lens that observe() returned"
                )
        return wanted

    def _check_layers(self, view: View) -> None:
        self.source.refresh()
        if view.topics:
            self.source.resolve(view)
        else:
            self.source.check_selector(view.selectors[-1])

    def module_classes(self) -> Mapping[str, nn.Module]:
        """The model's modules by layer name, held weakly."""
        return self.source.modules

    def check_subscribable(self) -> None:
        """Raise if no topic is selected.

        Raises:
            StreamlensError: None is, or one is known only reduced, and no reduction was applied.
        """
        self._check_selected()
        self.source.check_view(self.view)

    def _check_selected(self) -> None:
        self._check_open()
        if not self.topics:
            raise StreamlensError(
                "this lens has no topic selected: apply topic('weights') or a metric such as uw_ratio() or "
                f"norm('weight_gradients') first. Topics: {', '.join(self.source.known_topics)}"
            )

    def _check_open(self) -> None:
        if self.session.closed:
            raise ClosedLensError(self.source.closed_message)
        self.source.check_open()

    def _subscribe_core(
        self, observer: abc.ObserverBase[Frame], scheduler: abc.SchedulerBase | None = None
    ) -> abc.DisposableBase:
        self.check_subscribable()
        chain = current_chain.get()
        if chain is not None:
            chain.sources.append(observer.on_completed)
        return self.source.subscribe_view(self.view, observer.on_next)

    # -- the user's part ---------------------------------------------------------------------

    @property
    def current_step(self) -> int:
        """The optimizer update that is open, or was last, counted from 0."""
        return self.source.clock.step

    @property
    def epoch(self) -> int:
        """The epoch, counted from 0; it advances only when told."""
        return self.source.clock.epoch

    @property
    def should_stop(self) -> bool:
        """Whether training is asked to end, by a controller such as `sl.control.Stop` or by you.

        `lens.epochs()` and `lens.batches()` then give no more, and Trainers that have our callback end
        after the batch; any other loop asks: `if lens.should_stop: break`. Everything goes on working, and
        a snapshot keeps it: set it to False to go on all the same.
        """
        return self.source.should_stop

    @should_stop.setter
    def should_stop(self, stop: bool) -> None:
        self.source.should_stop = bool(stop)

    def step(self) -> None:
        """Say that the parameters were updated, in a loop without a `torch.optim` optimizer."""
        self._check_open()
        self.source.end_update()

    def epochs(self, n: int) -> Iterator[int]:
        """Run epochs up to number `n`: `for epoch in lens.epochs(10)`.

        After a resume it goes on to `n` from where the run was. Emits `epoch_started` and
        `epoch_finished`. Once `should_stop` is true it gives no more; the epoch under way ends as ever.

        Args:
            n: How many epochs the whole run has.

        Raises:
            ValueError: `n` is no whole number.
        """
        self._check_open()
        return epochs(self.source, n)

    def batches(self, loader: Iterable[T]) -> Iterable[T]:
        """Iterate over a loader once, and end the epoch: `for x, y in lens.batches(loader)`.

        Within `lens.epochs()` the epoch ends with that loop and not here. Once `should_stop` is true no
        batch follows, and the epoch is over, `epoch_finished` and all.

        Args:
            loader: Anything that yields batches; its length is kept.
        """
        self._check_open()
        return Batches(self.source, loader)

    def epoch_finished(self) -> None:
        """Say that an epoch is over; closes the open step first if it had its update."""
        self._check_open()
        self.source.end_epoch()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Silence a region: forwards and updates in it emit nothing and do not count as passes.

        The model has none of our hooks in it, so that `torch.jit.script(model)` works.
        """
        with self.source.silenced():
            yield

    def watch_loss(self, loss: Callable[P, R]) -> Callable[P, R]:
        """Watch a loss: an `nn.Module`, or any callable `(prediction, labels) -> loss`.

        Returns:
            The module itself, or a function to call in place of the one given.

        Example:
            `criterion = lens.watch_loss(F.cross_entropy)`
        """
        self._check_open()
        if not callable(loss):
            raise TypeError(f"watch_loss() needs a module or a function, got {type(loss).__name__}")
        return self.source.watch_loss(loss)

    def emit(self, topic: str, value: float | Tensor | Mapping[str, Any]) -> None:
        """Emit a number of your own, at the step that is open.

        Args:
            topic: Its name, such as `"validation_loss"`.
            value: A number, a tensor, or `{layer: number or tensor}`.

        Raises:
            StreamlensError: The topic is one that the run emits by itself.
            TypeError: The topic is no name, or the value is not one of these.
            ValueError: The layers' values differ in shape.
        """
        self._check_open()
        self.source.check_own_topic(topic)
        self.source.emit_own(topic, value)

    def derive(self, name: str, chain: Observable[Frame]) -> Stream:
        """Make a chain's result a topic of its own, computed once for all who select it.

        Its frames are delivered after the whole burst of frames that made them.

        Args:
            name: The topic. A chain that yields several topics keeps them under that name.
            chain: What `lens.pipe(...)` returned.

        Returns:
            The stream of the derived topic.

        Raises:
            TypeError: The name is no string, or empty.
            StreamlensError: The name is taken, or the chain is not of this lens.
        """
        self._check_open()
        source = self.source
        if not isinstance(name, str) or not name:
            raise TypeError(f"derive() needs a topic's name such as 'smoothed', got {name!r}")
        if name in source.known_topics or topic_spec(name) is not None:
            raise StreamlensError(f"cannot derive {name!r}: there is a topic of that name already")
        if not isinstance(chain, Stream) or chain.runtime is not source:
            raise StreamlensError(f"derive({name!r}): the chain must come from this lens: lens.pipe(...)")
        chain.check_subscribable()

        def connect(push: Callable[[Frame], None]) -> abc.DisposableBase:
            return chain.subscribe(lambda frame: push(_under(name, frame)), name=f"derive({name})")

        source.add_derived(name, connect)
        return Lens(source, self.session, View(topics=(name,)))

    # -- state, errors, the end --------------------------------------------------------------

    @property
    def errors(self) -> Subject[ErrorReport]:
        """Failures that were kept away from training, as an Observable."""
        return self.source.errors

    def state_dict(self) -> dict[str, Any]:
        """The clock and the state of every operator, as plain containers and tensors."""
        return self.source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a snapshot was taken; works before and after subscribing.

        Args:
            state: What `state_dict()` gave, also after `torch.save` and `torch.load`.

        Raises:
            ValueError: It is not that.
        """
        self._check_open()
        self.source.load_state_dict(state)

    def explain(self, style: str = "text") -> str:
        """What runs, as a database explains a query.

        Args:
            style: `"text"`, or `"mermaid"` for a graph.
        """
        from streamlens.explain import explain

        return explain(self.source, style)

    def stats(self) -> dict[str, int]:
        """Frames emitted, late, dropped; NaN skipped; errors."""
        return self.source.stats()

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until every sink has written what it was given; False if that took too long."""
        return self.source.flush(timeout)

    def close(self, timeout: float | None = None) -> bool:
        """Complete every stream, remove every hook, flush and close every sink.

        Args:
            timeout: Seconds to wait for sinks; no limit if None.

        Returns:
            Whether every sink had written everything it was given, in time and without a failed write.
        """
        return self.session.close(timeout)

    @property
    def closed(self) -> bool:
        """Whether the lens is closed."""
        return self.session.closed or self.source.closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            failed(self.source, error)
        self.close(timeout=30.0)

    def __repr__(self) -> str:
        return f"<Lens {self.plan_text}{' (closed)' if self.closed else ''}>"

"""`Stream`: an Observable of frames that remembers where it comes from.

What the operators of streamlens return is a `Stream`. It knows its runtime (the error boundary and
the clock's marks), its plan (for `explain()` and for the keys of saved state) and how often its
frames come; operators of reactivex may stand anywhere in between and give a `Stream` again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from inspect import getclosurevars
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from reactivex import ConnectableObservable, Observable, abc
from reactivex.disposable import Disposable

from streamlens.chain import Attachment, Chain, Ending, current_chain
from streamlens.errors import StreamlensError
from streamlens.frame import Frame, Kind
from streamlens.layers import LayerSelector
from streamlens.runtime import Runtime, default_runtime
from streamlens.sink import Sink, check_tensors

if TYPE_CHECKING:
    from streamlens.lens import Lens

__all__ = ["Operator", "Stream", "as_stream"]

Operator: TypeAlias = Callable[[Observable[Frame]], Observable[Frame]]
"""A function from a stream of frames to a stream of frames; what every operator call returns."""


class Stream(Observable[Frame]):
    """An Observable of frames that remembers its source.

    Args:
        subscribe: The subscription function, as for any Observable.
        plan: The operators applied so far, as text.
        runtime: The source's runtime; the shared default one for plain Observables.
        lens: The Lens the stream came from, if any.
        kind: How often its frames come, where that is known.
        foreign: Whether an operator that is not ours is part of it.
        raw: Whether its frames still hold the model's own tensors.
        selectors: Which layers were selected on the way, as far as operators of ours did.
    """

    def __init__(
        self,
        subscribe: abc.Subscription[Frame] | None,
        *,
        plan: tuple[str, ...],
        runtime: Runtime,
        lens: Lens | None = None,
        kind: Kind | None = None,
        foreign: bool = False,
        raw: bool = False,
        selectors: tuple[LayerSelector, ...] = (),
    ) -> None:
        super().__init__(subscribe)
        self.plan = plan
        self.runtime = runtime
        self.lens = lens
        self.kind = kind
        self.foreign = foreign
        self.raw = raw
        self.selectors = selectors

    def pipe(self, *operators: Callable[[Any], Any]) -> Any:
        """Apply operators from left to right; what they return is a Stream where it can be one.

        Raises:
            TypeError: Something that is no operator, such as a sink.
        """
        result: Any = self
        for operator in cast("tuple[Any, ...]", operators):
            before = result
            if not callable(operator):
                end = f"; end the chain in it: .subscribe({type(operator).__name__}(...))"
                raise TypeError(
                    f"pipe() takes operators such as ema(0.9), got {operator!r}"
                    + (end if isinstance(operator, Sink) else "")
                )
            result = operator(result)
            if (
                isinstance(before, Stream)
                and isinstance(result, Observable)
                and not isinstance(result, Stream | ConnectableObservable)
            ):
                result = before._wrap(result, _name_of(operator))
        return result

    def _wrap(self, foreign: Observable[Any], name: str) -> Stream:
        return Stream(
            _subscribing(foreign),
            plan=(*self.plan, f"<{name}>"),
            runtime=self.runtime,
            lens=self.lens,
            kind=self.kind,
            foreign=True,
            selectors=self.selectors,
        )

    def then(
        self, subscribe: abc.Subscription[Frame], step: str, *, kind: Kind | None = None, raw: bool = False
    ) -> Stream:
        """A stream that follows this one by an operator of ours.

        Args:
            subscribe: The new stream's subscription function.
            step: The operator as it shows in the plan.
            kind: How often its frames come, if that changes.
            raw: Whether its frames still hold the model's own tensors.
        """
        return Stream(
            subscribe,
            plan=(*self.plan, step),
            runtime=self.runtime,
            lens=self.lens,
            kind=kind or self.kind,
            foreign=self.foreign,
            raw=raw,
            selectors=self.selectors,
        )

    @property
    def plan_text(self) -> str:
        """The plan in one line."""
        return " | ".join(self.plan)

    def subscribe(
        self,
        on_next: abc.ObserverBase[Frame] | abc.OnNext[Frame] | None = None,
        on_error: abc.OnError | None = None,
        on_completed: abc.OnCompleted | None = None,
        *,
        scheduler: abc.SchedulerBase | None = None,
        name: str | None = None,
    ) -> abc.DisposableBase:
        """Receive the stream's frames.

        Args:
            on_next: A sink, an Rx observer, or a callable that takes a frame. Callables run on the
                training thread; sinks on threads of their own.
            on_error: Called if the stream ends with an error.
            on_completed: Called when the stream ends.
            scheduler: The default scheduler of this subscription.
            name: The key of the chain's state in `state_dict()`; its plan unless given.

        Returns:
            A Disposable that ends the subscription.

        Raises:
            ClosedLensError: The lens is closed.
            StreamlensError: The chain cannot work, for the reason named, `name` is taken, or this is
                another thread than the one that observes and trains.
        """
        if current_chain.get() is not None:
            # An operator subscribes upstream: the chain under way collects what it needs.
            return super().subscribe(cast("Any", on_next), on_error, on_completed, scheduler=scheduler)
        self.runtime.check_subscribing()
        self.check_subscribable()
        if self.raw and isinstance(on_next, Sink):
            check_tensors(on_next, self.plan_text)
        self._check_name(name)
        chain = Chain(self.plan_text, name or self.runtime.chain_key(self.plan_text), self.foreign)
        chain.selectors = self.selectors
        chain.session = self.lens.session if self.lens is not None else None
        chain.inner = str(getattr(on_next, "__module__", "")).startswith("reactivex.")
        self._warn_of_ambiguity(chain, name)
        terminal = _Terminal(self.runtime, chain, on_next, on_error, on_completed)
        token = current_chain.set(chain)
        try:
            chain.disposable = super().subscribe(
                terminal.on_next, terminal.on_error, terminal.on_completed, scheduler=scheduler
            )
        except BaseException:
            terminal.dispose()
            raise
        finally:
            current_chain.reset(token)
        if terminal.failure is not None:
            terminal.dispose()
            raise terminal.failure
        if terminal.ended:
            return Disposable()
        self.runtime.add_chain(chain)
        if isinstance(on_next, Sink):
            on_next.subscribed(terminal.dispose)
        return Disposable(terminal.dispose)

    def check_subscribable(self) -> None:
        """Raise where subscribing could not work; a Lens checks that something is selected."""

    def _check_name(self, name: str | None) -> None:
        if name is not None and self.lens is not None and any(c.key == name for c in self.runtime.chains):
            raise StreamlensError(
                f"subscribe(name={name!r}): another chain has that name, and one of them would lose its "
                "saved state: choose another name, or dispose the earlier subscription first"
            )

    def _warn_of_ambiguity(self, chain: Chain, name: str | None) -> None:
        if (
            name is None
            and self.foreign
            and any(c.plan == chain.plan and c.foreign for c in self.runtime.chains)
        ):
            warnings.warn(
                f"two chains have the plan {chain.plan!r}, which contains operators of other libraries: "
                "saved state could be mixed up; pass subscribe(..., name=...) to tell them apart",
                stacklevel=3,
            )


class _Terminal:
    """The end of a chain: what the subscriber raises does not go back into the run."""

    __slots__ = (
        "_on_completed",
        "_on_error",
        "_on_next",
        "_proxy",
        "chain",
        "ended",
        "failure",
        "runtime",
    )

    def __init__(
        self, runtime: Runtime, chain: Chain, on_next: Any, on_error: Any, on_completed: Any
    ) -> None:
        self.runtime = runtime
        self.chain = chain
        self.failure: Exception | None = None
        self.ended = False
        self._proxy: abc.ObserverBase[Frame] | Attachment | None = None
        chain.complete = self.on_completed
        if isinstance(on_next, type) and issubclass(on_next, abc.ObserverBase):
            name = on_next.__name__
            raise TypeError(f"subscribe() was given the class {name}: make one, {name}(...), and pass that")
        # Only sinks are kept silent on the ranks that do not write: controllers decide on all of them.
        writes = isinstance(on_next, Sink)
        if isinstance(on_next, Sink):
            chain.ends_in = type(on_next).__name__
            self._proxy = runtime.delivery.connect(on_next, chain.key)
            on_next = self._proxy
        elif isinstance(on_next, Ending):
            chain.ends_in = type(on_next).__name__
            on_next = self._proxy = on_next.attach(runtime, chain)
        if hasattr(on_next, "on_next"):
            if self._proxy is None:
                chain.ends_in = type(on_next).__name__
            self._on_next: Callable[[Frame], None] | None = self._write if writes else on_next.on_next
            self._on_error: Callable[[Exception], None] | None = on_next.on_error
            self._on_completed: Callable[[], None] | None = on_next.on_completed
        else:
            if on_next is not None and not callable(on_next):
                raise TypeError(
                    f"subscribe() needs a sink, an observer or a callable that takes a frame, got {on_next!r}"
                )
            if on_next is not None:
                chain.ends_in = getattr(on_next, "__name__", type(on_next).__name__)
            self._on_next, self._on_error, self._on_completed = on_next, on_error, on_completed

    def on_next(self, frame: Frame) -> None:
        self.chain.counts["frames"] += 1
        if self._on_next is None:
            return
        if self.chain.subscribing:
            # What the callback subscribes is no part of this chain.
            token = current_chain.set(None)
            try:
                self._call(self._on_next, frame)
            finally:
                current_chain.reset(token)
        else:
            self._call(self._on_next, frame)

    def _write(self, frame: Frame) -> None:
        """Hand a frame to the sink; of several processes that train together, one writes."""
        if self._proxy is not None and self.runtime.writes:
            self._proxy.on_next(frame)

    def _call(self, fn: Callable[..., None], *args: Any) -> None:
        try:
            fn(*args)
        except Exception as error:
            self.chain.counts["errors"] += 1
            self.runtime.report(error, f"{self.chain.ends_in} at the end of {self.chain.key!r}")

    def on_error(self, error: Exception) -> None:
        if self.chain.subscribing and self.chain.counts["frames"] == 0:
            self.failure = error
            return
        self.ended = True
        self.chain.counts["errors"] += 1
        self.runtime.remove_chain(self.chain)
        if self._on_error is not None:
            self._call(self._on_error, error)
        self.runtime.report(error, f"chain {self.chain.key!r} (it has ended)")

    def on_completed(self) -> None:
        if self.ended:
            return
        self.ended = True
        self.runtime.remove_chain(self.chain)
        if self._on_completed is not None:
            self._call(self._on_completed)
        if self.chain.disposable is not None:
            self.chain.disposable.dispose()

    def dispose(self) -> None:
        if not self.ended:
            self.ended = True
            self.runtime.remove_chain(self.chain)
            if self._proxy is not None:
                cast("Any", self._proxy).dispose()
        if self.chain.disposable is not None:
            self.chain.disposable.dispose()


def _name_of(operator: Callable[..., Any]) -> str:
    """What an operator of another library is called."""
    name = getattr(operator, "__name__", type(operator).__name__)
    if name == "_wrap_curried":
        # reactivex returns a closure over the operator's own function, such as `map_`.
        curried = getclosurevars(operator).nonlocals.get("fun")
        name = getattr(curried, "__name__", name).strip("_")
    return str(name)


def _subscribing(source: Observable[Any]) -> abc.Subscription[Frame]:
    """A subscription function that subscribes to another Observable."""

    def subscribe(
        observer: abc.ObserverBase[Frame], scheduler: abc.SchedulerBase | None = None
    ) -> abc.DisposableBase:
        return source.subscribe(observer, scheduler=scheduler)

    return subscribe


def as_stream(source: Observable[Frame]) -> Stream:
    """The source itself if it is a Stream, else a Stream around it."""
    if isinstance(source, Stream):
        return source
    if not isinstance(source, Observable):
        raise TypeError(
            f"an operator takes an Observable of frames, got {type(source).__name__}; "
            "write source.pipe(operator(...))"
        )
    return Stream(
        _subscribing(source),
        plan=(type(source).__name__,),
        runtime=default_runtime(),
    )

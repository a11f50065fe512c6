"""`Runtime`: what every source of frames shares, whatever it takes them from.

A runtime delivers bursts of frames in order, keeps failures away from the producer, knows the chains that
end in subscribers and carries their state. The PyTorch engine is one, a source that is pushed to or
replayed another; plain Observables share a default one.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

from reactivex.abc import DisposableBase
from reactivex.disposable import Disposable
from reactivex.subject import Subject

from streamlens.chain import Cell, Chain, Derived, ErrorReport, Mark, current_chain
from streamlens.errors import ClosedLensError, StreamlensError
from streamlens.frame import Frame, Lease

if TYPE_CHECKING:
    from streamlens.delivery import Delivery
    from streamlens.sink import RunInfo

__all__ = ["Runtime", "default_runtime"]

P = ParamSpec("P")
R = TypeVar("R")

log: Final = logging.getLogger("streamlens")

_REPEAT_AFTER: Final = 60.0
"""Seconds after which the same cause is logged again."""


class Runtime:
    """Ordered delivery, the error boundary, chains and their state.

    Args:
        name: The label of this source in sinks, or `""`.
        on_error: `"report"` contains failures; `"raise"` lets them through, for tests.
    """

    def __init__(self, name: str = "", on_error: str = "report") -> None:
        self.name, self.on_error = name, on_error
        self.closed = False
        self.errors: Subject[ErrorReport] = Subject()
        self.counts: Counter[str] = Counter()
        self.chains: list[Chain] = []
        self.run_id = uuid.uuid4().hex
        self.resumed_at: int | None = None
        self.resumption = ""
        self._marks: list[tuple[Callable[[Mark], None], Sized | None]] = []
        self._queue: deque[Callable[[], object]] = deque()
        self._draining = False
        self._leases: list[Lease] = []
        self._derived: dict[str, Derived] = {}
        self._derived_burst: list[tuple[Derived, Frame]] = []
        self._logged: dict[tuple[str, str], float] = {}
        self._pending_state: dict[str, list[dict[str, Any]]] = {}
        self._left_behind: weakref.WeakSet[Cell] = weakref.WeakSet()
        self._delivery: Delivery | None = None

    # -- facts -------------------------------------------------------------------------------

    writes = True
    """Whether sinks write in this process."""
    place = ""
    """What this process is called in reports; empty where there are no others."""

    def origins(self, topic: str, layers: Sequence[str], step: int) -> tuple[int, ...]:
        """The processes from which values that are not finite come; none where there are no others."""
        return ()

    @property
    def step(self) -> int:
        """The step that is open, or was last."""
        return 0

    def run_info(self) -> RunInfo:
        """What sinks are told about this run."""
        from streamlens.sink import RunInfo

        return RunInfo(self.run_id, self.name, self.resumed_at, self.metadata(), self.resumption)

    def metadata(self) -> dict[str, Any]:
        """What is known about the run, for sinks that store it."""
        return {}

    # -- delivery ----------------------------------------------------------------------------

    def post(self, item: Callable[[], object]) -> None:
        """Run `item` after everything posted before it, also when posted from within a delivery."""
        self._queue.append(item)
        self.drain()

    @property
    def delivering(self) -> bool:
        """Whether a delivery is under way, so that what is posted now waits for its end."""
        return self._draining

    def drain(self) -> None:
        """Deliver what is queued; does nothing when called from within a delivery."""
        if self._draining:
            return
        self._draining = True
        try:
            while self._queue:
                self._queue.popleft()()
                if self._derived_burst:
                    self._deliver_derived()
        except BaseException:
            # Interrupted: what waits would come with values of a later moment.
            self.counts["interrupted"] += len(self._queue)
            self._queue.clear()
            raise
        finally:
            self._draining = False
            while self._leases:
                self._leases.pop().end()
            if self._delivery is not None:
                self._delivery.end_burst()

    def _deliver_derived(self) -> None:
        while self._derived_burst:
            burst, self._derived_burst = self._derived_burst, []
            for derived, frame in burst:
                for observer in tuple(derived.observers):
                    self.guarded(observer, frame)

    def lend(self, lease: Lease) -> None:
        """End `lease` when the delivery under way (or the next) is over."""
        self._leases.append(lease)

    def guarded(self, observer: Callable[[Frame], None], frame: Frame) -> None:
        """Hand a frame to one observer; what it raises stays here."""
        try:
            observer(frame)
        except Exception as error:
            self.report(error, f"delivery of {frame.topic!r}")

    def attempt(self, where: str, fn: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        """Call a function that may be the user's; None and a report if it raises."""
        try:
            return fn(*args, **kwargs)
        except Exception as error:
            self.report(error, where)
            return None

    # -- marks -------------------------------------------------------------------------------

    def on_mark(self, fn: Callable[[Mark], None], held: Sized | None = None) -> DisposableBase:
        """Call `fn` with every mark, in order with the frames; with `held`, while it is not empty."""
        entry = (fn, held)
        self._marks.append(entry)

        def remove() -> None:
            with contextlib.suppress(ValueError):
                self._marks.remove(entry)

        return Disposable(remove)

    def post_mark(self, mark: Mark) -> None:
        """Announce a mark, in order with the frames; costs nothing where nobody wants marks."""
        if self._marks:
            self.post(lambda: self.mark(mark))

    def mark(self, mark: Mark) -> None:
        """Announce a mark to the operators that asked for marks."""
        for fn, held in tuple(self._marks):
            if held is None or held:
                self.attempt(f"the mark {mark.kind.value!r}", fn, mark)

    # -- errors ------------------------------------------------------------------------------

    def report(self, error: Exception, where: str) -> None:
        """Log a failure once a cause, count it, and publish it on `errors`.

        Raises:
            Exception: The failure itself, with `on_error="raise"`.
        """
        self.counts["errors"] += 1
        if self.on_error == "raise":
            raise error
        where = f"{where} ({self.place})" if self.place else where
        cause = (where, type(error).__name__)
        now = time.monotonic()
        if now - self._logged.get(cause, -_REPEAT_AFTER) >= _REPEAT_AFTER:
            self._logged[cause] = now
            expected = isinstance(error, StreamlensError | OSError)
            log.error(
                "%s failed at step %d: %s: %s (training goes on)",
                where,
                self.step,
                type(error).__name__,
                error,
                exc_info=None if expected else error,
            )
        try:
            self.errors.on_next(ErrorReport(error, where, self.step))
        except Exception:
            log.exception("a subscriber of the errors stream failed")

    def check_open(self) -> None:
        """Raise if the runtime is closed.

        Raises:
            ClosedLensError: It is.
        """
        if self.closed:
            raise ClosedLensError("this lens is closed: call streamlens.observe(model) again for a new one")

    def check_subscribing(self) -> None:
        """Raise where nothing can be subscribed now.

        Raises:
            ClosedLensError: The runtime is closed.
        """
        self.check_open()

    # -- chains and their state --------------------------------------------------------------

    def chain_key(self, plan: str) -> str:
        """A key for a new chain: its plan, with an ordinal where equal plans are subscribed."""
        taken = {chain.key for chain in self.chains}
        key, ordinal = plan, 1
        while key in taken:
            ordinal += 1
            key = f"{plan} #{ordinal}"
        return key

    def add_chain(self, chain: Chain) -> None:
        """Register a chain that has subscribed, and give it the state that was loaded for it."""
        chain.subscribing = False
        self.chains.append(chain)
        state = self._pending_state.pop(chain.key, None)
        if state is not None:
            self._load_chain(chain, state)

    def remove_chain(self, chain: Chain) -> None:
        """Forget a chain that has ended."""
        chain.alive = False
        with contextlib.suppress(ValueError):
            self.chains.remove(chain)
        for cell in chain.cells:
            self.counts["skipped_nan"] += cell.skipped
            if cell.running:
                self._left_behind.add(cell)

    def chain_states(self) -> dict[str, list[dict[str, Any]]]:
        """The state of every chain that has some, by key."""
        self._report_unreachable()
        states = {chain.key: chain.state_dict() for chain in self.chains if chain.cells and not chain.inner}
        return {**self._pending_state, **states}

    def _report_unreachable(self) -> None:
        """Say so where a snapshot cannot hold the state of an operator that runs."""
        cells = [cell for cell in self._left_behind if cell.running]
        cells += [cell for chain in self.chains if chain.inner for cell in chain.cells]
        lost = sorted({cell.plan for cell in cells if cell.state_dict()})
        if lost:
            self.report(
                StreamlensError(
                    f"the state of {', '.join(lost)} is not in the snapshot: an operator of another library "
                    "(such as share, whose first subscriber has gone, or flat_map) subscribed it on its own; "
                    "put operators with state after that one, or share with lens.derive(name, chain)"
                ),
                "state_dict",
            )

    def load_chain_states(self, states: Mapping[str, list[dict[str, Any]]]) -> None:
        """Give chains their state back, now or when they subscribe."""
        self._pending_state = dict(states)
        for chain in self.chains:
            state = self._pending_state.pop(chain.key, None)
            if state is not None:
                self._load_chain(chain, state)

    def _load_chain(self, chain: Chain, states: list[dict[str, Any]]) -> None:
        if [s["plan"] for s in states] != [c.plan for c in chain.cells]:
            self.report(
                StreamlensError(
                    f"the saved state of chain {chain.key!r} does not fit its operators; it starts afresh"
                ),
                "load_state_dict",
            )
            return
        for cell, state in zip(chain.cells, states, strict=True):
            cell.load_state_dict(state["state"])

    # -- derived topics ----------------------------------------------------------------------

    def add_derived(self, name: str, connect: Callable[[Callable[[Frame], None]], DisposableBase]) -> None:
        """Make a chain's result selectable as a topic."""
        self._derived[name] = Derived(connect)

    @property
    def derived_topics(self) -> tuple[str, ...]:
        """The names given to `derive`."""
        return tuple(self._derived)

    def subscribe_derived(self, name: str, observer: Callable[[Frame], None]) -> DisposableBase:
        """Receive a derived topic's frames; its chain runs while somebody does."""
        derived = self._derived[name]
        derived.observers.append(observer)
        if derived.connection is None:
            # Its chain is a subscription with a key of its own, not part of the one under way.
            token = current_chain.set(None)
            try:
                derived.connection = derived.connect(
                    lambda frame: self._derived_burst.append((derived, frame))
                )
            finally:
                current_chain.reset(token)

        def remove() -> None:
            with contextlib.suppress(ValueError):
                derived.observers.remove(observer)
            if not derived.observers and derived.connection is not None:
                connection, derived.connection = derived.connection, None
                connection.dispose()

        return Disposable(remove)

    # -- sinks -------------------------------------------------------------------------------

    @property
    def delivery(self) -> Delivery:
        """What stands between this runtime's chains and their sinks."""
        if self._delivery is None:
            from streamlens.delivery import Delivery

            self._delivery = Delivery(*_held_weakly(self))
        return self._delivery

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until every sink has written what it was given; False if that took too long."""
        return True if self._delivery is None else self._delivery.flush(timeout)

    def sink_stats(self) -> dict[str, Any]:
        """What each sink was given, wrote and lost."""
        return {} if self._delivery is None else self._delivery.stats()

    def complete_chains(self) -> None:
        """Complete every stream, so that operators let go of what they hold."""
        # The chains of derived topics come before those that select them.
        for chain in tuple(self.chains):
            self.finish(chain)

    def finish(self, chain: Chain) -> None:
        """Complete one stream."""
        try:
            chain.finish()
        except Exception as error:
            self.report(error, f"completion of {chain.key}")
        self._deliver_derived()

    def close_delivery(self, timeout: float | None) -> bool:
        """Flush and close every sink."""
        return True if self._delivery is None else self._delivery.close(timeout)


def _held_weakly(
    runtime: Runtime,
) -> tuple[Callable[[], RunInfo], Callable[[Exception, str], None]]:
    """What sinks ask and tell a runtime, for their workers: these must not keep a run that is let go."""
    reference = weakref.ref(runtime)
    last = runtime.run_info()

    def run_info() -> RunInfo:
        found = reference()
        return last if found is None else found.run_info()

    def report(error: Exception, where: str) -> None:
        found = reference()
        if found is None:
            log.error("%s failed after its run was gone: %s: %s", where, type(error).__name__, error)
        else:
            found.report(error, where)

    return run_info, report


_default: Runtime | None = None


def default_runtime() -> Runtime:
    """The runtime of streams that come from no lens."""
    global _default
    if _default is None:
        _default = Runtime()
    return _default

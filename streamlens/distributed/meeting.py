"""`Meeting`: how processes find out, without a collective, that all of them observe the model."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from streamlens.errors import StreamlensError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["EVERY", "Meeting", "named"]

EVERY: Final = 16
"""Steps between those at which all processes meet, whatever is due."""

_AWAKE: Final = 64
"""Updates at which a process that needs no others looks for them; then only every `EVERY` steps."""


_open: Final[Counter[str]] = Counter()
"""Meetings of one name that this process comes to."""


def named(ranks: list[int]) -> str:
    """Some ranks, for people."""
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


class Meeting:
    """Processes meet at a step through the run's store, until all of them ask for it.

    Each comes once a step, and says whether it asks for the others. One that does not waits for nobody.
    One that does waits until all have come to the step; from that step on they go together if all of
    them ask, which each does as soon as it sees that one does.

    The meeting's name is the model's shape and a number, which is the next one as soon as processes have
    met under it or one of them has left: models of one shape may be observed one after the other, by
    different processes even. Several that one process observes at a time are told apart by their order.

    Args:
        store: The run's store.
        model: What tells the model from others, equal on all processes.
        rank: This process.
        ranks: How many there are.
        timeout: Seconds to wait for others.

    Attributes:
        store: What belongs to this meeting alone.
    """

    def __init__(self, store: Store, model: str, rank: int, ranks: int, timeout: float) -> None:
        from torch.distributed.distributed_c10d import PrefixStore

        self._prefix = PrefixStore
        self._model = model
        self._numbers = PrefixStore(f"streamlens/{model}", store)
        self._rank = rank
        self._ranks = ranks
        self._timeout = timeout
        self._last = -1
        self._begin()

    def _begin(self) -> None:
        """Come under the number that is the next one now."""
        self._number = self._numbers.add("number", 0)
        self._shared = f"{self._model}/{self._number}"
        order = _open[self._shared]
        _open[self._shared] += 1
        self.store = self._prefix(f"{self._number}/{order}", self._numbers)
        self._store = self._prefix("meeting", self.store)
        self._left = False
        self._came = False
        self._called = False
        self._asleep = False
        self._alone = 0

    def come(self, step: int, *, asks: bool) -> bool:
        """Come to a step; whether all go together from it on.

        Raises:
            StreamlensError: Others did not come in time.
        """
        if step == self._last:
            return False
        self._last = step
        if self._asleep and not asks and step % EVERY:
            return False
        if self._passed:
            self._move_on()
        while (met := self._come(step, asks=asks)) is None:
            self._move_on()
        return met

    @property
    def _passed(self) -> bool:
        """Whether this number was left, before all have met, by a process that comes no more."""
        return bool(self._numbers.add("number", 0) != self._number)

    def _move_on(self) -> None:
        _open[self._shared] -= 1
        self._begin()

    def _come(self, step: int, *, asks: bool) -> bool | None:
        """The same; None if a process has left."""
        store = self._store
        if not self._came:
            self._came = True
            store.set(f"here/{self._rank}", "1")
        if asks and not self._called:
            self._called = True
            store.set("call", "1")
        meets = step % EVERY == 0
        if not asks:
            self._alone += 1
            if self._alone > _AWAKE and not self._asleep:
                self._asleep = True
                store.set("asleep", "1")
            asks = store.check(["call"])
        elif not meets and store.check(["asleep"]):
            return False
        if not asks:
            store.add(f"{step}/alone", 1)
        if store.add(f"{step}/here", 1) == self._ranks:
            store.set(f"{step}/outcome", "no" if store.add(f"{step}/alone", 0) else "yes")
        return self._wait(step, meets=meets) if asks else False

    def _wait(self, step: int, *, meets: bool) -> bool | None:
        """Wait for the others at a step; None if one of them has left."""
        store, deadline, pause = self._store, time.monotonic() + self._timeout, 0.0005
        while True:
            passed = self._passed
            # They leave also when all have met, but not before the outcome is there.
            if store.check([f"{step}/outcome"]):
                return bool(store.get(f"{step}/outcome") == b"yes")
            if passed:
                return None
            if not meets and store.check(["asleep"]):
                return False
            if time.monotonic() > deadline:
                raise self._late(step)
            # Looking again and again leaves the store to others, which a wait within it would block.
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)

    def leave(self) -> None:
        """Come no more: all have met, or this process gives up."""
        if self._left:
            return
        self._left = True
        _open[self._shared] -= 1
        if self._numbers.add(f"{self._number}/left", 1) == 1:
            self._numbers.add("number", 1)

    def missing(self) -> list[int]:
        """The processes that do not observe the model, or have made no update yet."""
        return [rank for rank in range(self._ranks) if not self._store.check([f"here/{rank}"])]

    def _late(self, step: int) -> StreamlensError:
        missing = self.missing()
        waited = f"{named([self._rank])} waited {self._timeout:g} s for {named(missing)}"
        if missing:
            return StreamlensError(
                f"{waited}, which observed no such model: call streamlens.observe(model) on every rank, "
                "before its first update (sinks write on rank 0 alone by themselves). What takes all ranks "
                "is left out from now on, and training goes on; observe(model, distributed=False) looks at "
                "this rank alone"
            )
        return StreamlensError(
            f"{named([self._rank])} waited {self._timeout:g} s at step {step} for ranks that observe the "
            "model but did not come to that step: resume all ranks from one step. What takes all ranks is "
            "left out from now on, and training goes on"
        )

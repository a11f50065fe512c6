"""`Threads`: a run belongs to one thread at a time, and what comes from another is refused."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from streamlens.capture.optimizers import steps_under_way
from streamlens.errors import StreamlensError

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine

__all__ = ["Threads"]


class Threads:
    """Knows which thread trains, and notices when several do at once.

    One thread after another may train a model. Several at a time (Hogwild) change its parameters while
    they are being read, and no number taken then would be true.

    Attributes:
        contended: Whether several have trained at once: nothing is taken any more.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._owner = threading.current_thread()
        self._trainers: set[int] = set()
        self._updating = 0
        self.contended = False

    def observed(self) -> None:
        """`observe` was called, on the thread that is expected to subscribe and to train."""
        if not self._trainers:
            self._owner = threading.current_thread()

    def update_begins(self) -> None:
        """An optimizer that owns parameters begins to step.

        Raises:
            StreamlensError: Another thread trains the same model at the same time.
        """
        here = threading.get_ident()
        busy, self._updating = self._updating, here
        if here != self._owner.ident:
            self._owner = threading.current_thread()
        if not self.contended and not self._engine.idle:
            passes = self._engine.passes.thread if self._engine.clock.counted else here
            between = passes != here and passes in self._trainers
            if between or (busy not in (0, here) and steps_under_way(busy)):
                self.contended = True
                raise StreamlensError(
                    "several threads train this model at once (Hogwild): it changes while it is read, so "
                    "nothing more is taken from it. Train a copy in each thread, with a lens each; or train "
                    "in one thread, close this lens and observe(model) again"
                )
        self._trainers.add(here)

    def update_ends(self) -> None:
        """It has stepped."""
        self._updating = 0

    def check_subscribing(self) -> None:
        """Raise if this is not the thread on which frames are delivered.

        Raises:
            StreamlensError: It is another one.
        """
        here, owner = threading.current_thread(), self._owner
        passes = self._engine.passes.thread
        if passes and passes != owner.ident:
            trainer = next((t for t in threading.enumerate() if t.ident == passes), None)
            owner = trainer or owner
        if owner is not here and owner.is_alive():
            raise StreamlensError(
                f"subscribe() was called on thread {here.name!r}, but the frames of this lens come on "
                f"{owner.name!r}, which observes or trains: subscribe there, before the training or within a "
                "callback (or call observe() on the thread that is to train). To follow a run from another "
                "thread, subscribe a sink, or what hands frames over: lambda frame: queue.put(frame.clone())"
            )

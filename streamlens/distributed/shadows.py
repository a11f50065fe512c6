"""`Shadows`: what this process takes because others have asked for it."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from reactivex.abc import DisposableBase

from streamlens.capture.view import View
from streamlens.errors import StreamlensError

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine
    from streamlens.frame import Frame

__all__ = ["Shadows", "shared"]


def shared(view: View) -> View:
    """What of a view others need to know."""
    return replace(view, expected=False)


class _Shadow:
    """Receives what others have asked for; does this process's part of what they make of it, if any."""

    def __init__(self, engine: Engine, view: View) -> None:
        self._follow = None if view.follower is None else view.follower(engine)

    def __call__(self, frame: Frame) -> None:
        if self._follow is not None:
            self._follow(frame)


class Shadows:
    """Subscriptions to what others have asked for and nobody here has.

    Args:
        engine: The engine.

    Attributes:
        changing: Whether they are being made or ended.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._held: dict[View, DisposableBase] = {}
        self.changing = False

    def asked_here(self, takes_all: Callable[[View], bool]) -> tuple[View, ...]:
        """What is subscribed here and takes all processes, as others need to know it."""
        own = [d.view for d in self._engine.demands if not isinstance(d.deliver, _Shadow)]
        return tuple(dict.fromkeys(shared(view) for view in own if takes_all(view)))

    def follow(self, agreed: Iterable[View], asks: Collection[View]) -> None:
        """Take what was agreed on, whether or not anybody here has asked for it."""
        wanted = [view for view in agreed if view not in asks]
        self.changing = True
        try:
            for view in [view for view in self._held if view not in wanted]:
                self._held.pop(view).dispose()
            for view in wanted:
                if view not in self._held:
                    self._held[view] = self._engine.subscribe_view(view, _Shadow(self._engine, view))
        except StreamlensError as error:
            self._engine.report(error, "what another rank asks for")
        finally:
            self.changing = False

    def packed(self, view: View) -> bytes:
        """A view as it is told to others; nothing, and a report, if it cannot be."""
        try:
            return pickle.dumps(view)
        except Exception as error:
            self._engine.report(
                StreamlensError(
                    f"{' | '.join(view.describe())} cannot be told to the other ranks ({error}), and "
                    "what takes all of them is left out: use functions at the top level of a module"
                ),
                "the agreement of ranks",
            )
            return b""

    def drop(self) -> None:
        """End all of them."""
        held, self._held = self._held, {}
        for shadow in held.values():
            shadow.dispose()

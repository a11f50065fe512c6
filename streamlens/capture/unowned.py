"""`Unowned`: parameters that belong to no optimizer, whose weights still make part of the frames."""

from __future__ import annotations

from collections.abc import Iterable

from streamlens.capture.model import ParameterEntry

__all__ = ["Unowned"]


class Unowned:
    """Tells parameters that are nobody's from those of an optimizer that has not stepped yet.

    Optimizers become known by stepping. In the first step of one, a parameter with a gradient may still
    be another's: what it holds then is not its value after that step's update. It waits for the step's
    end, and is known to be nobody's from then on.
    """

    def __init__(self) -> None:
        self._settled: set[int] = set()
        self._waiting: frozenset[int] = frozenset()

    @property
    def waiting(self) -> bool:
        """Whether some parameter waits for the end of the step."""
        return bool(self._waiting)

    def with_first(self, entries: Iterable[ParameterEntry], owned: set[int]) -> frozenset[int]:
        """The parameters that come with the first optimizer of a step.

        Args:
            entries: The model's parameters.
            owned: The places of those that some optimizer is known to own.
        """
        free = [entry for entry in entries if entry.order not in owned]
        self._waiting = frozenset(
            e.order for e in free if e.gradient is not None and e.order not in self._settled
        )
        return frozenset(e.order for e in free) - self._waiting

    def at_end(self, owned: set[int]) -> frozenset[int]:
        """The parameters that have waited, and belong to nobody now that the step is over."""
        waited, self._waiting = self._waiting - owned, frozenset()
        self._settled |= waited
        return waited

    def forget(self) -> None:
        """The model's parameters have changed."""
        self._settled.clear()
        self._waiting = frozenset()

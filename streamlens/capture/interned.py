"""`Interned` and `InModelOrder`: one object for equal tuples of layer names, as they are or sorted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

__all__ = ["MOST_SETS", "InModelOrder", "Interned"]

MOST_SETS: Final = 256
"""Sets of layers that are remembered: where layers are skipped at random, every step has another one."""


class Interned:
    """Gives the same layers as the same tuple, which is what operators compare first."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], tuple[str, ...]] = {}

    def __call__(self, layers: Iterable[str]) -> tuple[str, ...]:
        """The one tuple of these layers."""
        found = tuple(layers)
        if len(self._known) >= MOST_SETS and found not in self._known:
            self._known.clear()
        return self._known.setdefault(found, found)


class InModelOrder:
    """Sorts calls of modules, `act` and `act@1`, by their place in the model."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], tuple[str, ...]] = {}

    def __call__(self, keys: Iterable[str], order: Mapping[str, int]) -> tuple[str, ...]:
        """The same calls in order; those of no module come last.

        Args:
            keys: The calls.
            order: The place of each module; another one needs a `clear` before.
        """
        called = tuple(keys)
        found = self._known.get(called)
        if found is None:
            if len(self._known) >= MOST_SETS:
                self._known.clear()
            found = self._known[called] = tuple(sorted(called, key=lambda key: _place(key, order)))
        return found

    def clear(self) -> None:
        """Forget every order, because the model changed."""
        self._known.clear()


def _place(key: str, order: Mapping[str, int]) -> tuple[int, int]:
    name, _, call = key.partition("@")
    return order.get(name, len(order)), int(call or 0)

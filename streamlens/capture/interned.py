"""`Interned`: one object for equal tuples of layer names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

__all__ = ["MOST_SETS", "Interned"]

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

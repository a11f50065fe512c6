"""Finding things by name, as typed by people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from streamlens.errors import did_you_mean

__all__ = ["lookup"]

T = TypeVar("T")


def lookup(kind: str, name: str, known: Mapping[str, T]) -> tuple[str, T]:
    """The entry of that name, whatever the case it is written in, with the name as registered.

    Raises:
        ValueError: There is no such entry; the message names the nearest and all there are.
    """
    for registered, entry in known.items():
        if registered.lower() == name.lower():
            return registered, entry
    hint = did_you_mean(name, known)
    raise ValueError(
        f"unknown {kind} {name!r}" + (f": {hint}" if hint else ".") + f" There are: {', '.join(known)}"
    )

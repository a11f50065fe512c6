"""Which layers and steps of a topic a reader wants."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from streamlens.errors import LayerNotFoundError, did_you_mean

__all__ = ["Steps", "select_layers", "step_bounds", "step_condition"]

Steps: TypeAlias = int | slice | range | tuple[int | None, int | None] | list[int]
"""Which steps: one, those of a slice, range or list, or from the first to the last of a pair."""


def select_layers(topic: str, known: Sequence[str], layers: str | Sequence[str] | None) -> list[str]:
    """The layers of a topic that names or globs choose, in the order in which they are known.

    Raises:
        LayerNotFoundError: A name or glob chooses none.
    """
    if layers is None:
        return list(known)
    chosen: set[str] = set()
    for pattern in [layers] if isinstance(layers, str) else layers:
        # A name is also taken as it is: one with brackets, as a glob, would not match itself.
        found = {name for name in known if name == pattern or fnmatchcase(name, pattern)}
        if not found:
            hint = did_you_mean(pattern, known)
            raise LayerNotFoundError(
                f"no layer of {topic!r} matches {pattern!r}: {hint}{' ' if hint else ''}"
                f"Layers: {', '.join(map(repr, known[:12]))}{', ...' if len(known) > 12 else ''}"
            )
        chosen |= found
    return [name for name in known if name in chosen]


def step_condition(steps: Steps | None) -> tuple[str, list[int]]:
    """An SQL condition on the step, to be added to others, and its parameters.

    Raises:
        ValueError: A slice with a negative bound.
        TypeError: `steps` is none of what `Steps` allows.
    """
    if isinstance(steps, int):
        return " AND step = ?", [steps]
    if isinstance(steps, list):
        return f" AND step IN ({', '.join('?' * len(steps))})", list(steps)
    first, last, stride = _interval(steps)
    condition, bounds = "", []
    if first is not None:
        condition, bounds = " AND step >= ?", [first]
    if last is not None:
        condition, bounds = f"{condition} AND step <= ?", [*bounds, last]
    if first is not None and stride > 1:
        condition, bounds = f"{condition} AND (step - ?) % ? = 0", [*bounds, first, stride]
    return condition, bounds


def step_bounds(steps: Steps | None) -> tuple[int | None, int | None]:
    """The first and the last of steps that lie side by side; None for open.

    Raises:
        ValueError: A slice with a negative bound, or a stride; a list.
        TypeError: `steps` is none of what `Steps` allows.
    """
    if isinstance(steps, list):
        raise ValueError(
            f"steps={steps!r}: only steps side by side can be chosen here, which a list may not be"
        )
    first, last, stride = _interval(steps)
    if stride > 1:
        raise ValueError(f"steps={steps!r}: only steps side by side can be chosen here, without a stride")
    return first, last


def _interval(
    steps: int | slice | range | tuple[int | None, int | None] | None,
) -> tuple[int | None, int | None, int]:
    """The first step, the last and the stride."""
    match steps:
        case None:
            return None, None, 1
        case int():
            return steps, steps, 1
        case (first, last):
            return first, last, 1
        case range():
            ordered = steps if steps.step > 0 else steps[::-1]
            return ordered.start, ordered.stop - 1, ordered.step
        case slice(start=start, stop=stop, step=step):
            first, last, stride = start or 0, None if stop is None else stop - 1, step or 1
            if first < 0 or stride < 1 or (stop is not None and stop < 0):
                raise ValueError(
                    f"steps={steps!r}: a slice of steps counts from step 0; its bounds cannot be negative"
                )
            return first, last, stride
    raise TypeError(f"steps={steps!r}: pass a step, a slice, a range, a list or a pair (first, last)")

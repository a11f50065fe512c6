"""`Unowned`: parameters that belong to no optimizer, whose weights still make part of the frames."""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from streamlens.capture.model import ParameterEntry

__all__ = ["Unowned"]

_LOOKS: Final = 16
"""How often all objects may be gone through."""


class Unowned:
    """Tells parameters that are nobody's from those of an optimizer that has not stepped yet.

    Optimizers become known by stepping, some of them late: after a warm-up, or every tenth step. What such
    a one's parameter holds when the first optimizer has stepped need not be its value after that step's
    updates, so it waits for the step's end; what nobody holds comes with the first optimizer. At the first
    step of all, every parameter with a gradient, or about to get one, that no known optimizer owns waits.

    Attributes:
        given: The parameters that came with the first optimizer of the open step: they do not come again.
    """

    def __init__(self) -> None:
        self._settled: set[int] = set()
        self._waiting: frozenset[int] = frozenset()
        self._holders = _Holders()
        self.given: frozenset[int] = frozenset()

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
        # Within a backward, where optimizers step parameter by parameter, most gradients are still to come.
        coming = torch._C._current_graph_task_id() != -1
        learning = [e for e in free if e.gradient is not None or (coming and e.parameter.requires_grad)]
        held = self._holders.of(learning) if learning else frozenset()
        self._waiting = frozenset(
            e.order for e in learning if e.order not in self._settled or e.order in held
        )
        self.given = frozenset(e.order for e in free) - self._waiting
        return self.given

    def at_end(self, owned: set[int]) -> frozenset[int]:
        """The parameters that have waited, and were nobody's now that the step is over."""
        waited, self._waiting = self._waiting - owned, frozenset()
        self.given = frozenset()
        self._settled |= waited
        return waited

    def forget(self) -> None:
        """The model's parameters have changed."""
        self._settled.clear()
        self._waiting = self.given = frozenset()
        self._holders.forget()


class _Holders:
    """The optimizers that hold parameters which no optimizer has updated yet.

    PyTorch tells nobody that an optimizer is made. Whoever holds a parameter refers to it, though: when it
    has more references than ever before, the optimizers are looked for among all objects, some 20 ms.
    Where every parameter with a gradient belongs to an optimizer that steps, this is never asked.
    """

    def __init__(self) -> None:
        self._most: dict[int, int] = {}
        self._looks = 0
        self._found: weakref.WeakSet[Optimizer] = weakref.WeakSet()

    def of(self, entries: Sequence[ParameterEntry]) -> frozenset[int]:
        """Those of some parameters, by their places, that an optimizer holds."""
        grown = False
        for entry in entries:
            references = sys.getrefcount(_held(entry))
            if references > self._most.get(entry.order, 0):
                self._most[entry.order] = references
                grown = True
        if grown and self._looks < _LOOKS:
            self._looks += 1
            # Not isinstance: that would ask a proxy for what it stands for.
            self._found.update(o for o in gc.get_objects() if issubclass(type(o), Optimizer))
        held: set[int] = set()
        for optimizer in self._found:
            # One may be under construction on another thread.
            with contextlib.suppress(Exception):
                held.update(id(t) for group in optimizer.param_groups for t in group["params"])
        return frozenset(entry.order for entry in entries if id(_held(entry)) in held)

    def forget(self) -> None:
        """The model's parameters have changed."""
        self._most.clear()


def _held(entry: ParameterEntry) -> Tensor:
    """What an optimizer holds of a parameter."""
    return entry.parameter if entry.copy is None else entry.copy.base

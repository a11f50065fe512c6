"""What controllers do to gradients before an update, and which gradients no update gets to see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine
    from streamlens.capture.model import ParameterEntry

__all__ = ["Intervention", "Interventions"]

Intervention: TypeAlias = "Callable[[Optimizer, Sequence[ParameterEntry]], None]"
"""Given the optimizer and what it owns, changes gradients in place."""


class Interventions:
    """Acts on the gradients of an update: called when they are final and before they are taken.

    An optimizer leaves a parameter without a gradient alone, its state included. That is how a frozen
    parameter is kept from an update whatever computed a gradient for it: what is withheld is taken away
    for the length of the update, also while the lens is silent, and put back after it.

    Args:
        engine: The engine whose updates these are.

    Attributes:
        acting: What acts on gradients, in this order.
        withheld: The full names of the parameters whose gradients no update gets to see.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.acting: list[Intervention] = []
        self.withheld: set[str] = set()
        self._away: list[tuple[nn.Parameter, Tensor]] = []

    def __bool__(self) -> bool:
        return bool(self.acting or self.withheld)

    def withholds(self, layer: str) -> bool:
        """Whether a layer, or a parameter by its full name, is kept from updates."""
        return any(layer in (name, name.rpartition(".")[0]) for name in self.withheld)

    def before(self, optimizer: Optimizer, entries: Sequence[ParameterEntry]) -> None:
        """The gradients are those of this update."""
        # Of an update that raised: by now these gradients are of an earlier step.
        self._away = []
        if self.withheld:
            for entry in entries:
                gradient = entry.parameter.grad
                if gradient is not None and entry.name in self.withheld:
                    self._away.append((entry.parameter, gradient))
                    entry.parameter.grad = None
        if not self._engine.silent:
            for intervene in tuple(self.acting):
                self._engine.guard(intervene, optimizer, entries)

    def after(self) -> None:
        """The update has been made."""
        away, self._away = self._away, []
        for parameter, gradient in away:
            if parameter.grad is None:
                parameter.grad = gradient

    def drop(self) -> None:
        """Let go of everything."""
        self.after()
        self.acting = []
        self.withheld = set()

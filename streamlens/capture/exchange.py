"""`Exchange`: how statistics of parts become those of the whole where several processes train one model.

What is computed of parts are `Partial`s: tables with some rows that are of a part. They are settled once
an update call, all together, and what was reduced in forward and backward waits for that (`Settling`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from streamlens.capture.sharded import Part
from streamlens.capture.table import Table
from streamlens.capture.view import View
from streamlens.reductions import Reduction

if TYPE_CHECKING:
    from streamlens.capture.engine import Engine

__all__ = ["Alone", "Exchange", "Partial", "Settling"]


@dataclass(eq=False)
class Partial:
    """A table of which some rows are of parts.

    Attributes:
        label: What it is of: equal on all processes.
        table: The table.
        parts: The rows to merge, each with the part that this process holds; None for one that failed.
        names: What a row's key is called on all processes, where that is not the key itself.
        weight: How many examples this process has, where values are those of a mean over its own.
        open: Whether a part may be missing, as where a module is called by some processes only.
    """

    label: str
    table: Table
    parts: Mapping[Hashable, Part | None]
    names: Mapping[Hashable, str] | None = None
    weight: Tensor | float | None = None
    open: bool = False


class Exchange(Protocol):
    """What an engine asks of the processes that train together."""

    @property
    def timeout(self) -> float | None:
        """Seconds for which other processes are waited for."""
        ...

    @property
    def active(self) -> bool:
        """Whether several processes train together."""
        ...

    @property
    def writes(self) -> bool:
        """Whether sinks write in this process."""
        ...

    @property
    def place(self) -> str:
        """What this process is called in reports; empty if it is alone."""
        ...

    @property
    def batch(self) -> Part:
        """The part of the global batch that this process computes."""
        ...

    @property
    def split(self) -> bool:
        """Whether an output that is no DTensor may be a part of the layer's."""
        ...

    def check(self, topics: Iterable[str], what: str, reduction: Reduction | None) -> None:
        """Raise where something cannot be had of a whole.

        Args:
            topics: What it is of.
            what: What it is, for people.
            reduction: The reduction; None for what takes whole tensors.

        Raises:
            UnmergeableError: It takes whole tensors, or a reduction that does not merge.
        """
        ...

    def admits(self, view: View) -> bool:
        """Whether a view is taken now: what takes all processes is, once all know of it."""
        ...

    def demands_changed(self) -> None:
        """A subscription has come or gone."""
        ...

    def model_changed(self) -> None:
        """Parameters were replaced."""
        ...

    def settle(self, partials: Sequence[Partial]) -> None:
        """Turn the rows of parts into rows of the whole; those that cannot be are taken out."""
        ...

    def origins(self, topic: str, layers: Sequence[str], step: int) -> tuple[int, ...]:
        """The processes from which values that are not finite come, where it is not all of them.

        Args:
            topic: What the values are, such as `activations.norm2`.
            layers: Whose they are.
            step: When they came up.
        """
        ...

    def close(self) -> None:
        """Nothing more will be asked."""
        ...


@dataclass
class Alone:
    """An exchange with nobody."""

    timeout: float | None = None
    active: bool = False
    writes: bool = True
    place: str = ""
    batch: Part = field(default_factory=Part)
    split: bool = False

    def check(self, topics: Iterable[str], what: str, reduction: Reduction | None) -> None:
        """Everything is whole."""

    def admits(self, view: View) -> bool:
        """Everything is."""
        return True

    def demands_changed(self) -> None:
        """Nobody needs to know."""

    def model_changed(self) -> None:
        """Nobody needs to know."""

    def settle(self, partials: Sequence[Partial]) -> None:
        """Everything is whole."""

    def origins(self, topic: str, layers: Sequence[str], step: int) -> tuple[int, ...]:
        """There are no others."""
        return ()

    def close(self) -> None:
        """There is nothing to close."""


class Settling:
    """What waits in an engine to be merged with other processes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._later: list[tuple[Partial, Callable[[], None]]] = []

    def later(self, partial: Partial, emit: Callable[[], None]) -> None:
        """Merge what was computed of parts at the update, and call `emit` then, which makes frames of it.

        Where nobody else trains there is nothing to wait for.
        """
        if self._engine.exchange.active:
            self._later.append((partial, emit))
        else:
            emit()

    def now(self, partials: Sequence[Partial] = ()) -> None:
        """Merge with other processes, at an update: what is given, and what has waited for it."""
        if not self._engine.exchange.active:
            return
        later, self._later = self._later, []
        self._engine.exchange.settle([*(partial for partial, _ in later), *partials])
        for _, emit in later:
            self._engine.guard(emit)

    def drop(self) -> None:
        """Let go of what waits."""
        self._later.clear()

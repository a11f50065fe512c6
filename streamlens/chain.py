"""`Chain`: one subscription, with its state; and what runs along it beside frames.

Marks tell operators with state where the run is; reports tell whoever listens what failed.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from reactivex.abc import DisposableBase

from streamlens.frame import Frame
from streamlens.layers import LayerSelector

if TYPE_CHECKING:
    from streamlens.runtime import Runtime

__all__ = [
    "Attachment",
    "Cell",
    "Chain",
    "Derived",
    "Ending",
    "ErrorReport",
    "Mark",
    "MarkKind",
    "current_chain",
]


class MarkKind(enum.Enum):
    """What a mark announces."""

    UPDATE = "update"
    """An optimizer stepped: the frames of its step's parameters follow."""
    CLOSED = "closed"
    """A step is over: nothing more of it, nor of an earlier one, will come."""
    EPOCH = "epoch"
    """An epoch is over."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A point in the run that operators with state may act on, in order with the frames."""

    kind: MarkKind
    step: int
    epoch: int
    micro_step: int = 0


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """One failure that was kept away from training.

    Attributes:
        error: The exception.
        where: The chain, sink, layer or hook it came from.
        step: The step that was open.
    """

    error: Exception
    where: str
    step: int

    def __str__(self) -> str:
        return f"{self.where} at step {self.step}: {type(self.error).__name__}: {self.error}"


class Cell(Protocol):
    """The state of one operator within one subscription."""

    @property
    def plan(self) -> str:
        """The operator as it shows in the plan."""
        ...

    @property
    def running(self) -> bool:
        """Whether its subscription has not been disposed."""
        ...

    @property
    def skipped(self) -> int:
        """Values that were skipped because they were NaN or infinite."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What people should know of it, for `explain()`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        ...


@dataclass(eq=False)
class Chain:
    """One subscription: what was asked for, its state and what it has cost.

    Attributes:
        plan: The operators, as text.
        key: Under which its state is saved.
        foreign: Whether operators that are not ours are part of it.
        ends_in: Where its frames go, for people.
        cells: The states of its operators, upstream last.
        counts: Frames, errors and what was lost.
        seconds: Time spent in it.
        subscribing: Whether it is only being put together.
        alive: Whether it has not ended.
        disposable: Ends it.
        sources: Complete its inputs, so that operators give what they hold back.
        complete: Completes its end.
        session: The call of `observe` that it came through.
        inner: Whether an operator of reactivex subscribed it while running, as `flat_map` does.
        selectors: Which layers its operators have selected.
    """

    plan: str
    key: str
    foreign: bool = False
    ends_in: str = "callable"
    cells: list[Cell] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    subscribing: bool = True
    alive: bool = True
    disposable: DisposableBase | None = None
    sources: list[Callable[[], None]] = field(default_factory=list)
    complete: Callable[[], None] | None = None
    session: object | None = None
    inner: bool = False
    selectors: tuple[LayerSelector, ...] = ()

    def finish(self) -> None:
        """Complete it: from its inputs on, and then what has not ended by that."""
        for complete in self.sources:
            complete()
        if self.complete is not None:
            self.complete()

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of every operator of the chain, upstream last."""
        return [{"plan": cell.plan, "state": cell.state_dict()} for cell in self.cells]


class Attachment(Protocol):
    """What receives the frames of one chain on behalf of an `Ending`; an Rx observer."""

    def on_next(self, frame: Frame) -> None:
        """Receive a frame, on the training thread."""
        ...

    def on_error(self, error: Exception) -> None:
        """The chain has ended with an error."""
        ...

    def on_completed(self) -> None:
        """The chain has ended."""
        ...

    def dispose(self) -> None:
        """The subscription was disposed."""
        ...


class Ending(ABC):
    """The end of a chain that has to know which run and chain it ends, as a controller has."""

    @abstractmethod
    def attach(self, runtime: Runtime, chain: Chain) -> Attachment:
        """Called when a chain subscribes, before anything upstream is.

        What has state appends a `Cell` to `chain.cells`. What is raised here, `subscribe` raises.

        Args:
            runtime: The run.
            chain: The subscription that is being made.

        Returns:
            What is to receive its frames.
        """


@dataclass(slots=True)
class Derived:
    """A chain's result as a topic of its own, computed once for all who select it."""

    connect: Callable[[Callable[[Frame], None]], DisposableBase]
    observers: list[Callable[[Frame], None]] = field(default_factory=list)
    connection: DisposableBase | None = None


current_chain: ContextVar[Chain | None] = ContextVar("streamlens_chain", default=None)
"""The chain that is being subscribed: operators register their state cells and demands with it."""

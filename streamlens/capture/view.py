"""`View`: what a Lens asks of a run, and `Demand`: one subscription to a view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from reactivex.abc import DisposableBase

from streamlens.chain import Chain
from streamlens.frame import Frame
from streamlens.layers import LayerSelector
from streamlens.reductions import Reduction
from streamlens.topics import Facet, Phase, topic_spec

if TYPE_CHECKING:
    from streamlens.capture.source import Source

__all__ = ["Demand", "Follower", "Gate", "View"]


class Follower(Protocol):
    """What a process does with a view that others have asked for and it has not.

    It is a value that pickles, as it goes from one process to the others.
    """

    def __call__(self, source: Source) -> Callable[[Frame], None]:
        """What receives the frames of the view."""
        ...


class Gate(Protocol):
    """What says when a view is asked for at all."""

    @property
    def plan(self) -> str:
        """How it shows in a plan."""
        ...

    def connect(
        self, connect: Callable[[int], DisposableBase], next_step: Callable[[], int]
    ) -> DisposableBase:
        """Call `connect` whenever the view is to be asked for, and dispose of what it gives when not.

        Args:
            connect: Asks for the view, from a step on.
            next_step: The first step of which nothing has been taken yet.

        Returns:
            What ends all of it.
        """
        ...


@dataclass(frozen=True)
class View:
    """Topics, layers, cadence and reduction: everything that is decided before computing.

    Attributes:
        topics: The topics selected; none yet if empty.
        selectors: Layer selectors, all of which must agree; all layers if empty.
        every: Due when `step % every == 0`.
        start: The first step.
        stop: The step before which it ends, if any.
        reduction: What becomes of each tensor where it is taken.
        expected: Whether it is worth a report if nothing of a topic comes.
        gates: What says when it is asked for; always if empty.
        whole: The operator that needs whole tensors, for people; empty if parts of them do too.
        follower: Where what is made of raw tensors is merged over processes: the part of those that have
            not asked for it.
    """

    topics: tuple[str, ...] = ()
    selectors: tuple[LayerSelector, ...] = ()
    every: int = 1
    start: int = 0
    stop: int | None = None
    reduction: Reduction | None = None
    expected: bool = True
    gates: tuple[Gate, ...] = ()
    whole: str = ""
    follower: Follower | None = None

    def due(self, step: int) -> bool:
        """Whether a frame of this step is wanted."""
        return step % self.every == 0 and step >= self.start and (self.stop is None or step < self.stop)

    def over(self, step: int) -> bool:
        """Whether nothing at or after this step is wanted."""
        return self.stop is not None and step >= self.stop

    def describe(self) -> tuple[str, ...]:
        """The view as a plan: one entry an argument that is not the default."""
        parts: list[str] = [gate.plan for gate in self.gates]
        if self.topics:
            parts.append(f"topic({', '.join(map(repr, self.topics))})")
        parts += [f"layers({selector.describe()})" for selector in self.selectors]
        if self.every != 1:
            parts.append(f"every({self.every})")
        if self.start or self.stop is not None:
            parts.append(f"between({self.start}, {self.stop})")
        if self.reduction is not None:
            parts.append(self.reduction.describe())
        return tuple(parts)


@dataclass(eq=False)
class Demand:
    """One subscription to a view.

    Attributes:
        view: What is wanted.
        wants_updates: Whether a copy of parameters is needed for it.
        at_update: Whether anything of it is taken around an update.
        deliver: Receives the frames.
        chain: The chain it belongs to, which its time is charged to.
        layers: For each topic, the names wanted; None for all of them.
    """

    view: View
    deliver: Callable[[Frame], None]
    chain: Chain | None
    layers: dict[str, frozenset[str] | None] = field(default_factory=dict)
    active: bool = True
    wants_updates: bool = field(init=False)
    at_update: bool = field(init=False)

    def __post_init__(self) -> None:
        specs = [spec for topic in self.view.topics if (spec := topic_spec(topic)) is not None]
        self.wants_updates = any(spec.facet is Facet.UPDATE for spec in specs)
        self.at_update = any(spec.phase in (Phase.PARAMETER, Phase.CLOCK) for spec in specs)
